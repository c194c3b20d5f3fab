//! `GET /export_raw_vdi`: a disk as a raw image or as a VHD, `200` first and the truth afterwards.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use xenvault_block::{ByteRange, ReadAt};

use super::connection::{Link, send};
use super::request::Request;
use super::response;
use super::transfer::{Plugged, TransferTask, disk_of, io_failure, redirection};
use crate::FaultEffect;
use crate::core::Core;
use crate::rpc::Failure;
use crate::storage::Disk;
use crate::vhd_export::{VhdBase, VhdExport};

/// Largest disk that a VHD can hold: 2040 GiB.
const LARGEST_VHD: i64 = 2040 << 30;

/// Bytes of a raw image that are read at once.
const PIECE: u64 = 1 << 20;

/// How a transfer ended.
enum End {
    Done,
    /// The client is gone: there is nobody to tell.
    ClientGone,
    Failed(Failure),
}

pub(super) async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
) {
    core.counters.call("http/export_raw_vdi");
    let fault = core.faults.strike("http/export_raw_vdi");
    match &fault {
        Some(FaultEffect::Drop) => return,
        Some(FaultEffect::Hang) => return core.end.cancelled().await,
        Some(FaultEffect::Delay(time)) => tokio::time::sleep(*time).await,
        _ => {}
    }
    let _access = match super::auth::check(core, host, request, "get_export_raw_vdi") {
        Ok(access) => access,
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let vdi = match disk_of(core, request, "vdi") {
        Ok(Some(vdi)) => vdi,
        Ok(None) => {
            let text = response::escape("Failure(\"Missing vdi query parameter\")");
            send(link, &response::internal_error(&text)).await;
            return;
        }
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let sr = core.db().text("VDI", &vdi, "SR");
    if let Some(redirection) = redirection(core, host, request, std::slice::from_ref(&sr)) {
        let page = redirection.unwrap_or_else(|failure| response::internal_error(&failure.text()));
        send(link, &page).await;
        return;
    }
    let mut task = TransferTask::new(core, host, request, "Exporting raw VDI");
    let format = request.param("format").unwrap_or("raw").to_lowercase();
    let Some(content_type) = content_type(&format) else {
        task.fail(&Failure::new("INTERNAL_ERROR", [format!("Unknown format {format}")]));
        send(link, &response::transfer("HTTP/1.0 404 Not Found", &[])).await;
        return;
    };
    let uuid = core.db().text("VDI", &vdi, "uuid");
    let headers = [
        format!("task-id:{}", task.reference),
        format!("content-type:{content_type}"),
        format!("content-disposition: attachment; filename=\"{uuid}.{format}\""),
    ];
    if !send(link, &response::transfer("HTTP/1.1 200 OK", &headers)).await {
        task.fail(&io_failure());
        return;
    }
    let end = match &fault {
        Some(FaultEffect::Error { code, params }) => {
            End::Failed(Failure { code: code.clone(), params: params.clone() })
        }
        _ => transfer(core, host, request, link, &vdi, &format, &mut task, &fault).await,
    };
    match (end, fault) {
        (End::Done, Some(FaultEffect::ErrorAfter { code, params })) => {
            late(link, &task, &Failure { code, params }).await
        }
        (End::Done, _) => task.succeed(None),
        (End::ClientGone, _) => task.fail(&io_failure()),
        (End::Failed(failure), _) => late(link, &task, &failure).await,
    }
}

fn content_type(format: &str) -> Option<&'static str> {
    match format {
        "raw" => Some("application/octet-stream"),
        "vhd" => Some("application/vhd"),
        _ => None,
    }
}

/// A second response in the middle of the body, as a late failure looks.
async fn late<S: AsyncRead + AsyncWrite + Unpin>(link: &mut Link<S>, task: &TransferTask, failure: &Failure) {
    task.fail(failure);
    let text = if failure.code == "INTERNAL_ERROR" {
        response::escape(failure.params.first().map_or("", String::as_str))
    } else {
        failure.text()
    };
    send(link, &response::internal_error(&text)).await;
}

#[expect(clippy::too_many_arguments, reason = "the parts of one request")]
async fn transfer<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
    vdi: &str,
    format: &str,
    task: &mut TransferTask,
    fault: &Option<FaultEffect>,
) -> End {
    if format == "vhd" && core.db().int("VDI", vdi, "virtual_size") > LARGEST_VHD {
        return End::Failed(Failure::new("VDI_TOO_LARGE", [vdi.to_owned(), LARGEST_VHD.to_string()]));
    }
    let plugged = match Plugged::new(core, host, vdi, false).await {
        Ok(plugged) => plugged,
        Err(failure) => return End::Failed(failure),
    };
    let most = match fault {
        Some(FaultEffect::Truncate(most)) => Some(*most),
        _ => None,
    };
    let base = match disk_of(core, request, "base") {
        Ok(base) => base.filter(|_| format == "vhd"),
        Err(_) => return End::Failed(Failure::internal("Db_exn.Read_missing_uuid")),
    };
    // The base is attached too.
    let base_plugged = match &base {
        Some(base) => match Plugged::new(core, host, base, false).await {
            Ok(plugged) => Some(plugged),
            Err(failure) => {
                plugged.end().await;
                return End::Failed(failure);
            }
        },
        None => None,
    };
    let end = match open(core, vdi, base.as_deref(), format) {
        Ok(source) => copy(core, link, source, vdi, task, most).await,
        Err(failure) => End::Failed(failure),
    };
    if let Some(base) = base_plugged {
        base.end().await;
    }
    plugged.end().await;
    end
}

/// Where the bytes come from.
enum Source {
    Raw { disk: Disk, at: u64 },
    Vhd(Box<VhdExport>),
}

fn open(core: &Core, vdi: &str, base: Option<&str>, format: &str) -> Result<Source, Failure> {
    let disk = core.storage.disk(core.disk_id(vdi)?)?;
    if format == "raw" {
        return Ok(Source::Raw { disk, at: 0 });
    }
    let base = match base {
        Some(base) => {
            let id = core.disk_id(base)?;
            let sr = core.storage.vdi(id)?.sr;
            let path = format!("/var/run/sr-mount/{sr}/{id}.vhd");
            Some(VhdBase { disk: core.storage.disk(id)?, path, footer_uuid: id })
        }
        None => None,
    };
    let export = VhdExport::new(disk, base.as_ref())
        .map_err(|_| Failure::internal("Cannot compute differences on non-VHD images"))?;
    Ok(Source::Vhd(Box::new(export)))
}

impl Source {
    fn length(&self) -> u64 {
        match self {
            Self::Raw { disk, .. } => disk.size(),
            Self::Vhd(export) => export.length(),
        }
    }

    fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        match self {
            Self::Raw { disk, at } => {
                let length = PIECE.min(disk.size() - *at);
                if length == 0 {
                    return Ok(None);
                }
                let range = ByteRange::with_length(*at, length).map_err(std::io::Error::other)?;
                *at += length;
                disk.read(range).map(Some)
            }
            Self::Vhd(export) => export.next_piece(),
        }
    }
}

async fn copy<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Core,
    link: &mut Link<S>,
    mut source: Source,
    vdi: &str,
    task: &mut TransferTask,
    most: Option<u64>,
) -> End {
    let uuid = core.db().text("VDI", vdi, "uuid");
    let all = source.length();
    let mut sent = 0_u64;
    loop {
        let step = tokio::task::spawn_blocking(move || {
            let piece = source.next();
            (source, piece)
        });
        let Ok((back, piece)) = step.await else { return End::Failed(io_failure()) };
        source = back;
        let piece = match piece {
            Ok(Some(piece)) => piece,
            Ok(None) => return End::Done,
            Err(_) => return End::Failed(io_failure()),
        };
        let room = most.map_or(piece.len(), |most| {
            usize::try_from(most.saturating_sub(sent)).unwrap_or(usize::MAX).min(piece.len())
        });
        let part = piece.slice(..room);
        if !send(link, &part).await {
            return End::ClientGone;
        }
        sent += part.len() as u64;
        core.counters.sent(&uuid, part.len() as u64);
        task.progress(sent, all);
        if room < piece.len() {
            return End::ClientGone;
        }
    }
}
