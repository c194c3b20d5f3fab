//! `GET /export` and `GET /export_metadata`: VMs as archives, with and without the content of their disks.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use xenvault_block::{ByteRange, ReadAt};

use super::connection::{Link, send};
use super::request::Request;
use super::response;
use super::transfer::{Plugged, TransferTask, io_failure, redirection};
use crate::FaultEffect;
use crate::core::Core;
use crate::methods::{Operation, check_vm};
use crate::rpc::{Failure, Outcome};
use crate::storage::Disk;
use crate::xva::{self, CHUNK, Compressor};

pub(super) async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
    metadata: bool,
) {
    let name = if metadata { "export_metadata" } else { "export" };
    core.counters.call(&format!("http/{name}"));
    let fault = core.faults.strike(&format!("http/{name}"));
    match &fault {
        Some(FaultEffect::Drop) => return,
        Some(FaultEffect::Hang) => return core.end.cancelled().await,
        Some(FaultEffect::Delay(time)) => tokio::time::sleep(*time).await,
        _ => {}
    }
    let _access = match super::auth::check(core, host, request, &format!("get_{name}")) {
        Ok(access) => access,
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let task = TransferTask::new(core, host, request, if metadata { "VM.export_metadata" } else { "VM.export" });
    let prepared = prepare(core, request, metadata, &task).await;
    let (vms, operations) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => {
            // A failure before the 200 stands in the task as a refusal.
            let params = [format!("http/get_{name}"), failure.text()];
            task.fail(&Failure::new("RBAC_PERMISSION_DENIED", params));
            send(link, &response::internal_error(&failure.text())).await;
            return;
        }
    };
    let disks = if metadata { Vec::new() } else { disks(core, &vms) };
    let srs: Vec<String> = {
        let db = core.db();
        disks.iter().map(|vdi| db.text("VDI", vdi, "SR")).collect()
    };
    if let Some(redirection) = redirection(core, host, request, &srs) {
        // Where it leads to a host that sees everything, the task is that one's affair.
        let page = redirection.unwrap_or_else(|failure| {
            task.fail(&failure);
            response::internal_error(&failure.text())
        });
        send(link, &page).await;
        return;
    }
    let snapshots = metadata && request.param("export_snapshots") != Some("false");
    let (selection, records) = {
        let db = core.db();
        let selection = xva::select(&db, &vms, snapshots);
        let records = xva::write(&db, &selection, snapshots, &|vtpm| core.vtpm(vtpm));
        (selection, records)
    };
    let failed = match &fault {
        Some(FaultEffect::Error { code, params }) => Some(Failure { code: code.clone(), params: params.clone() }),
        _ => None,
    };
    let mut out = Out { sent: 0, most: truncated(&fault), compressor: Compressor::Plain };
    let outcome = match (records, failed) {
        (Err(failure), _) => Err(End::Failed(failure)),
        (Ok(records), failed) => {
            let head = xva::file("ova.xml", records.as_bytes());
            let length = metadata.then(|| head.len() + xva::end().len());
            send(link, &heading(&task, length)).await;
            match failed {
                Some(failure) => Err(End::Failed(failure)),
                None => out.archive(core, host, request, link, head, &disks, &selection).await,
            }
        }
    };
    drop(operations);
    match (outcome, fault) {
        (Ok(()), Some(FaultEffect::ErrorAfter { code, params })) => task.fail(&Failure { code, params }),
        (Ok(()), _) => task.succeed(None),
        (Err(End::ClientGone), _) => task.fail(&Failure::new("CLIENT_ERROR", ["Unix.Unix_error(EPIPE, write)"])),
        (Err(End::Failed(failure)), _) => {
            task.fail(&failure);
            send(link, &response::internal_error(&failure.text())).await;
        }
    }
}

fn truncated(fault: &Option<FaultEffect>) -> u64 {
    match fault {
        Some(FaultEffect::Truncate(most)) => *most,
        _ => u64::MAX,
    }
}

fn heading(task: &TransferTask, length: Option<usize>) -> Vec<u8> {
    let mut headers = vec![
        format!("task-id: {}", task.reference),
        "Server: xapi/0.0".to_owned(),
        "content-type: application/octet-stream".to_owned(),
    ];
    headers.extend(length.map(|length| format!("Content-Length: {length}")));
    headers.push("Content-Disposition: attachment; filename=\"export.xva\"".to_owned());
    response::transfer("HTTP/1.0 200 OK", &headers)
}

/// The VMs, checked and marked as being exported.
async fn prepare(
    core: &Arc<Core>,
    request: &Request,
    metadata: bool,
    task: &TransferTask,
) -> Outcome<(Vec<String>, Vec<Operation>)> {
    let vms = {
        let db = core.db();
        if metadata && request.param("all") == Some("true") {
            let own = |vm: &String| {
                !db.flag("VM", vm, "is_control_domain")
                    && !db.flag("VM", vm, "is_a_snapshot")
                    && !db.flag("VM", vm, "is_default_template")
            };
            db.refs("VM").into_iter().filter(own).collect()
        } else {
            match (request.param("ref"), request.param("uuid")) {
                (Some(vm), _) => db.check("VM", vm).map(|()| vec![vm.to_owned()])?,
                (None, Some(uuid)) => vec![db.by_uuid("VM", uuid)?],
                (None, None) => return Err(Failure::internal("Missing VM reference (ref or uuid)")),
            }
        }
    };
    let name = if metadata { "metadata_export" } else { "export" };
    let mut operations = Vec::new();
    for vm in &vms {
        let mark = [("VM", vm.as_str(), name)];
        operations.push(Operation::begin_as(core, &task.reference, &mark, |db| check_vm(db, vm, name)).await?);
    }
    Ok((vms, operations))
}

/// The disks whose content goes into an archive; discs do not.
fn disks(core: &Core, vms: &[String]) -> Vec<String> {
    let db = core.db();
    let of = |vm: &String| {
        let vbds = db.set_of("VM", vm, "VBDs").into_iter();
        let disks = vbds.filter(|vbd| db.text("VBD", vbd, "type") != "CD").map(|vbd| db.text("VBD", &vbd, "VDI"));
        let mut disks: Vec<String> = disks.collect();
        disks.push(db.text("VM", vm, "suspend_VDI"));
        disks.retain(|vdi| db.exists("VDI", vdi));
        disks
    };
    vms.iter().flat_map(of).collect()
}

/// Why an archive broke off.
enum End {
    ClientGone,
    Failed(Failure),
}

/// The way out: compressed if wanted, cut where a fault wants it. Holds one chunk at a time.
struct Out {
    sent: u64,
    most: u64,
    compressor: Compressor,
}

impl Out {
    #[expect(clippy::too_many_arguments, reason = "the parts of one request")]
    async fn archive<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        core: &Arc<Core>,
        host: usize,
        request: &Request,
        link: &mut Link<S>,
        head: Vec<u8>,
        disks: &[String],
        selection: &xva::Selection,
    ) -> Result<(), End> {
        let broken = |_| End::Failed(io_failure());
        self.compressor = Compressor::new(request.param("use_compression")).map_err(broken)?;
        self.push(link, head).await?;
        for vdi in disks {
            let plugged = Plugged::new(core, host, vdi, false).await.map_err(End::Failed)?;
            let outcome = self.disk(core, link, vdi, selection.name(vdi).unwrap_or_default()).await;
            plugged.end().await;
            outcome?;
        }
        self.push(link, xva::end()).await?;
        let last = std::mem::replace(&mut self.compressor, Compressor::Plain).finish().map_err(broken)?;
        self.push(link, last).await
    }

    async fn disk<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        core: &Arc<Core>,
        link: &mut Link<S>,
        vdi: &str,
        name: &str,
    ) -> Result<(), End> {
        let id = core.disk_id(vdi).map_err(End::Failed)?;
        let disk = core.storage.disk(id).map_err(|error| End::Failed(error.into()))?;
        let uuid = id.to_string();
        let size = disk.size();
        let mut at = 0;
        while at < size {
            let length = CHUNK.min(size - at);
            let data = read(disk.clone(), at, length).await?;
            // The first and the last are always there, zeros or not.
            if at == 0 || at + length == size || data.iter().any(|byte| *byte != 0) {
                let file = format!("{name}/{:08}", at / CHUNK);
                let sum = format!("{:016X}", xva::xxh64(&data));
                self.push(link, xva::file(&file, &data)).await?;
                self.push(link, xva::file(&format!("{file}.xxhash"), sum.as_bytes())).await?;
                core.counters.sent(&uuid, length);
            }
            at += length;
        }
        Ok(())
    }

    async fn push<S: AsyncRead + AsyncWrite + Unpin>(&mut self, link: &mut Link<S>, bytes: Vec<u8>) -> Result<(), End> {
        let mut bytes = self.compressor.push(bytes).map_err(|_| End::Failed(io_failure()))?;
        let room = usize::try_from(self.most.saturating_sub(self.sent)).unwrap_or(usize::MAX);
        let cut = bytes.len() > room;
        bytes.truncate(room);
        self.sent += bytes.len() as u64;
        if !send(link, &bytes).await || cut { Err(End::ClientGone) } else { Ok(()) }
    }
}

async fn read(disk: Disk, at: u64, length: u64) -> Result<Bytes, End> {
    let range = ByteRange::with_length(at, length).map_err(|_| End::Failed(io_failure()))?;
    let read = tokio::task::spawn_blocking(move || disk.read(range)).await;
    read.ok().and_then(Result::ok).ok_or(End::Failed(io_failure()))
}
