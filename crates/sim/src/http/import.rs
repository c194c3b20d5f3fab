//! `PUT /import_raw_vdi`: a raw image, xapi's chunk protocol, or a VHD, onto a disk. `200` comes before the body is
//! read and says nothing.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf};
use xenvault_block::{ReadAt, WriteAt};

use super::connection::{Link, send};
use super::request::{Input, Request};
use super::transfer::{Plugged, TransferTask, disk_of, io_failure, redirection};
use super::{import_vhd, response};
use crate::FaultEffect;
use crate::core::Core;
use crate::model::Value;
use crate::rpc::Failure;
use crate::storage::{Disk, SrKind};

/// Largest chunk of the chunk protocol that is taken at once; larger ones are written in parts.
const PART: usize = 1 << 20;

pub(super) async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
) {
    core.counters.call("http/import_raw_vdi");
    let fault = core.faults.strike("http/import_raw_vdi");
    match &fault {
        Some(FaultEffect::Drop) => return,
        Some(FaultEffect::Hang) => return core.end.cancelled().await,
        Some(FaultEffect::Delay(time)) => tokio::time::sleep(*time).await,
        _ => {}
    }
    let _access = match super::auth::check(core, host, request, "put_import_raw_vdi") {
        Ok(access) => access,
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let vdi = match disk_of(core, request, "vdi") {
        Ok(vdi) => vdi,
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let sr = match &vdi {
        Some(vdi) => Some(core.db().text("VDI", vdi, "SR")),
        None => sr_of(core, request),
    };
    let mut task = TransferTask::new(core, host, request, "Importing raw VDI");
    let Some(sr) = sr else {
        refuse(link, &task, &Failure::bare("VDI_MISSING"), "HTTP/1.1 400 Bad Request").await;
        return;
    };
    if let Some(redirection) = redirection(core, host, request, std::slice::from_ref(&sr)) {
        let page = redirection.unwrap_or_else(|failure| response::internal_error(&failure.text()));
        send(link, &page).await;
        return;
    }
    let chunked = request.param("chunked").is_some();
    let format = request.param("format").unwrap_or("raw").to_lowercase();
    let internal = |text: &str| Failure::new("INTERNAL_ERROR", [text]);
    let missing = "HTTP/1.0 404 Not Found";
    if !matches!(format.as_str(), "raw" | "vhd") {
        return refuse(link, &task, &internal(&format!("Unknown format {format}")), missing).await;
    }
    if format != "raw" && chunked {
        return refuse(link, &task, &internal("Cannot handle chunked VHD"), missing).await;
    }
    if let Some(encoding) = &request.transfer_encoding {
        return refuse(link, &task, &internal(&format!("Cannot handle encoding: {encoding}")), missing).await;
    }
    let vdi = match (vdi, request.content_length) {
        (Some(vdi), _) => vdi,
        (None, Some(length)) if format == "raw" => {
            let fields = vec![("name_label".to_owned(), Value::text("Imported VDI"))];
            match crate::methods::create_disk(core, &sr, length, fields) {
                Ok(vdi) => vdi,
                Err(failure) => return late(link, &task, &failure).await,
            }
        }
        (None, _) => {
            let text = if format == "vhd" {
                "Importing a VHD directly into an SR not yet supported"
            } else {
                "Not enough info supplied to import"
            };
            return refuse(link, &task, &internal(text), "HTTP/1.0 400 Bad Request").await;
        }
    };
    let headers = [format!("task-id:{}", task.reference), "content-type: application/octet-stream".to_owned()];
    send(link, &response::transfer("HTTP/1.1 200 OK", &headers)).await;
    let outcome = match &fault {
        Some(FaultEffect::Error { code, params }) => Err(Failure { code: code.clone(), params: params.clone() }),
        _ => receive(core, host, request, link, &vdi, &format, chunked, &mut task, &fault).await,
    };
    match (outcome, fault) {
        (Ok(()), Some(FaultEffect::ErrorAfter { code, params })) => late(link, &task, &Failure { code, params }).await,
        (Ok(()), _) => task.succeed(Some(&vdi.into())),
        (Err(failure), Some(FaultEffect::Truncate(_))) => task.fail(&failure),
        (Err(failure), _) => late(link, &task, &failure).await,
    }
}

fn sr_of(core: &Core, request: &Request) -> Option<String> {
    let db = core.db();
    match (request.param("sr_id"), request.param("sr_uuid")) {
        (Some(sr), _) if db.exists("SR", sr) => Some(sr.to_owned()),
        (_, Some(uuid)) => db.by_uuid("SR", uuid).ok(),
        _ => None,
    }
}

/// A refusal before the 200.
async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    task: &TransferTask,
    failure: &Failure,
    status: &str,
) {
    task.fail(failure);
    send(link, &response::transfer(status, &[])).await;
}

/// A failure after the 200: two more responses follow it.
async fn late<S: AsyncRead + AsyncWrite + Unpin>(link: &mut Link<S>, task: &TransferTask, failure: &Failure) {
    task.fail(failure);
    send(link, &response::transfer("HTTP/1.1 400 Bad Request", &[])).await;
    send(link, &response::internal_error(&failure.text())).await;
}

#[expect(clippy::too_many_arguments, reason = "the parts of one request")]
async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
    vdi: &str,
    format: &str,
    chunked: bool,
    task: &mut TransferTask,
    fault: &Option<FaultEffect>,
) -> Result<(), Failure> {
    let plugged = Plugged::new(core, host, vdi, true).await?;
    let most = match fault {
        Some(FaultEffect::Truncate(most)) => *most,
        _ => u64::MAX,
    };
    let id = core.disk_id(vdi)?;
    let prezeroed = core.storage.vdi(id)?.kind != SrKind::LvmRaw;
    let mut target = Target {
        disk: core.storage.disk(id)?,
        uuid: id.to_string(),
        core,
        task,
        all: request.content_length.unwrap_or(0),
        received: 0,
        most,
    };
    let outcome = match (format, chunked) {
        ("vhd", _) if !prezeroed => Err(io::ErrorKind::Unsupported.into()),
        ("vhd", _) => import_vhd::receive(&mut link.input, &mut target, request.content_length).await,
        (_, true) => chunks(&mut link.input, &mut target).await,
        (_, false) => {
            let length = request.content_length.unwrap_or_else(|| target.disk.size());
            raw(&mut link.input, &mut target, length).await
        }
    };
    plugged.end().await;
    outcome.map_err(|_| io_failure())
}

/// The disk that is written, and who is told about it.
pub(super) struct Target<'a> {
    disk: Disk,
    uuid: String,
    core: &'a Core,
    task: &'a mut TransferTask,
    all: u64,
    received: u64,
    most: u64,
}

impl Target<'_> {
    /// Size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.disk.size()
    }

    /// Counts bytes of the body, and breaks off where a fault wants it.
    pub(super) fn count(&mut self, bytes: u64) -> io::Result<()> {
        self.received += bytes;
        self.core.counters.received(&self.uuid, bytes);
        self.task.progress(self.received, self.all);
        if self.received > self.most { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    pub(super) async fn write(&mut self, offset: u64, data: Vec<u8>) -> io::Result<()> {
        let disk = self.disk.clone();
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        if end > disk.size() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        tokio::task::spawn_blocking(move || disk.write_all_at(&data, offset)).await.map_err(io::Error::other)?
    }
}

async fn raw<S: AsyncRead + AsyncWrite + Unpin>(
    input: &mut Input<ReadHalf<S>>,
    target: &mut Target<'_>,
    length: u64,
) -> io::Result<()> {
    copy(input, target, 0, length).await
}

/// Writes the next bytes of the body to a place of the disk.
async fn copy<S: AsyncRead + AsyncWrite + Unpin>(
    input: &mut Input<ReadHalf<S>>,
    target: &mut Target<'_>,
    offset: u64,
    length: u64,
) -> io::Result<()> {
    let mut done = 0;
    while done < length {
        let part = usize::try_from(length - done).unwrap_or(PART).min(PART);
        let data = input.exactly(part).await?;
        target.count(data.len() as u64)?;
        target.write(offset.checked_add(done).ok_or(io::ErrorKind::InvalidData)?, data).await?;
        done += part as u64;
    }
    Ok(())
}

/// xapi's chunk protocol: offset and length, little endian, then the data; offset 0 with length 0 ends it.
async fn chunks<S: AsyncRead + AsyncWrite + Unpin>(
    input: &mut Input<ReadHalf<S>>,
    target: &mut Target<'_>,
) -> io::Result<()> {
    loop {
        let header = input.exactly(12).await?;
        target.count(12)?;
        let (offset, length) = header.split_at(8);
        let offset = u64::from_le_bytes(offset.try_into().map_err(io::Error::other)?);
        let length = u32::from_le_bytes(length.try_into().map_err(io::Error::other)?);
        if offset == 0 && length == 0 {
            return Ok(());
        }
        copy(input, target, offset, u64::from(length)).await?;
    }
}
