//! `PUT /import` and `PUT /import_metadata`: archives become VMs. `200` comes before the body is read.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf};
use xenvault_block::{ReadAt, WriteAt};

use super::connection::{Link, send};
use super::request::{Input, Request};
use super::response;
use super::transfer::{Plugged, TransferTask, io_failure, redirection};
use crate::FaultEffect;
use crate::core::Core;
use crate::model::{NULL, Value};
use crate::rpc::{Failure, Outcome};
use crate::xva::{self, BLOCK, CHUNK, Created, Expander, Header, Wishes};

/// Largest `ova.xml` that is taken.
const RECORDS_LIMIT: u64 = 64 << 20;

fn premature() -> Failure {
    Failure::bare("IMPORT_ERROR_PREMATURE_EOF")
}

pub(super) async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
    metadata: bool,
) {
    let name = if metadata { "import_metadata" } else { "import" };
    core.counters.call(&format!("http/{name}"));
    let fault = core.faults.strike(&format!("http/{name}"));
    match &fault {
        Some(FaultEffect::Drop) => return,
        Some(FaultEffect::Hang) => return core.end.cancelled().await,
        Some(FaultEffect::Delay(time)) => tokio::time::sleep(*time).await,
        _ => {}
    }
    let _access = match super::auth::check(core, host, request, &format!("put_{name}")) {
        Ok(access) => access,
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let task = TransferTask::new(core, host, request, if metadata { "VM.metadata_import" } else { "VM.import" });
    let flag = |name: &str| request.param(name) == Some("true");
    let mut wishes =
        Wishes { restore: flag("restore"), force: flag("force"), dry_run: metadata && flag("dry_run"), sr: None };
    if !metadata {
        match sr_of(core, request) {
            Ok(sr) => wishes.sr = Some(sr),
            Err(failure) => {
                task.fail(&failure);
                send(link, &response::internal_error(&failure.text())).await;
                return;
            }
        }
    }
    let sr = wishes.sr.as_ref().map(std::slice::from_ref);
    if let Some(redirection) = sr.and_then(|sr| redirection(core, host, request, sr)) {
        let page = redirection.unwrap_or_else(|failure| {
            task.fail(&failure);
            response::internal_error(&failure.text())
        });
        send(link, &page).await;
        return;
    }
    let headers = [format!("task-id:{}", task.reference), "content-type: application/octet-stream".to_owned()];
    send(link, &response::transfer("HTTP/1.1 200 OK", &headers)).await;
    let mut made = None;
    let outcome = match &fault {
        Some(FaultEffect::Error { code, params }) => Err(Failure { code: code.clone(), params: params.clone() }),
        _ => {
            let mut archive = Archive { input: &mut link.input, expander: None, ready: Vec::new() };
            receive(core, host, &mut archive, &wishes, &task, &mut made).await
        }
    };
    match (outcome, fault) {
        (Ok(_), Some(FaultEffect::ErrorAfter { code, params })) => task.fail(&Failure { code, params }),
        (Ok(vms), _) => task.succeed(Some(&Value::texts(vms))),
        (Err(failure), _) => {
            let begun = made.is_some();
            if let Some(made) = made.filter(|_| !wishes.force) {
                xva::remove(core, &made);
            }
            task.fail(&failure);
            // Once the disks are on their way the connection just ends.
            if !begun {
                send(link, &response::internal_error(&failure.text())).await;
            }
        }
    }
}

/// Where the disks go: the SR of the request, or the pool's default.
fn sr_of(core: &Core, request: &Request) -> Outcome<String> {
    let db = core.db();
    if let Some(sr) = request.param("sr_id") {
        return db.check("SR", sr).map(|()| sr.to_owned());
    }
    if let Some(uuid) = request.param("sr_uuid") {
        return db.by_uuid("SR", uuid);
    }
    let pool = db.refs("pool").first().cloned().unwrap_or_default();
    let sr = db.text("pool", &pool, "default_SR");
    if sr == NULL || !db.exists("SR", &sr) {
        return Err(Failure::new("DEFAULT_SR_NOT_FOUND", [sr]));
    }
    Ok(sr)
}

async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    archive: &mut Archive<'_, S>,
    wishes: &Wishes,
    task: &TransferTask,
    made: &mut Option<Created>,
) -> Outcome<Vec<String>> {
    let first = archive.header().await?.ok_or_else(premature)?;
    if first.name != "ova.xml" {
        return Err(Failure::new("IMPORT_ERROR_UNEXPECTED_FILE", ["ova.xml", first.name.as_str()]));
    }
    if first.size > RECORDS_LIMIT {
        return Err(Failure::new("IMPORT_ERROR_GENERIC", ["Out_of_memory"]));
    }
    let records = archive.content(&first).await?;
    let objects = xva::read(&String::from_utf8_lossy(&records))?;
    let created = xva::create(core, &objects, wishes)?;
    core.db().put("task", &task.reference, "other_config", "object_creation", "complete");
    let created = made.insert(created);
    let mut targets = Vec::new();
    for (name, vdi) in &created.disks {
        let plugged = Plugged::new(core, host, vdi, true).await?;
        let id = core.disk_id(vdi)?;
        let disk = core.storage.disk(id)?;
        let size = disk.size();
        // The archive's chunks end where the exported disk did, which may be before a size that was rounded up.
        let asked = objects.iter().find(|object| object.id == *name);
        let asked = asked.and_then(|object| object.value("virtual_size")).map_or(0, Value::as_int);
        let size = u64::try_from(asked).unwrap_or_default().min(size);
        targets.push(Target { name: name.clone(), uuid: id.to_string(), disk, size, plugged });
    }
    let outcome = disks(core, archive, &targets).await;
    for target in targets {
        target.plugged.end().await;
    }
    outcome.map(|()| created.vms.clone())
}

/// A disk that is filled.
struct Target {
    name: String,
    uuid: String,
    disk: crate::storage::Disk,
    size: u64,
    plugged: Plugged,
}

/// Fills the disks: until every one has had its last chunk, whatever length the request gave.
async fn disks<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Core,
    archive: &mut Archive<'_, S>,
    targets: &[Target],
) -> Outcome<()> {
    let mut open: HashSet<&str> =
        targets.iter().filter(|target| target.size > 0).map(|target| target.name.as_str()).collect();
    let mut wrong = false;
    while !open.is_empty() {
        let header = archive.header().await?.ok_or_else(premature)?;
        let expected = targets.iter().find(|target| open.contains(target.name.as_str()));
        let unexpected = || {
            let wanted = expected.map(|target| target.name.clone()).unwrap_or_default();
            Failure::new("IMPORT_ERROR_UNEXPECTED_FILE", [wanted, header.name.clone()])
        };
        let (prefix, number) = header.name.rsplit_once('/').ok_or_else(unexpected)?;
        let target = targets.iter().find(|target| target.name == prefix).ok_or_else(unexpected)?;
        let number: u64 = number.parse().map_err(|_| unexpected())?;
        let at = number.checked_mul(CHUNK).filter(|at| *at < target.size).ok_or_else(unexpected)?;
        // An empty file is a sign of life and means nothing.
        if header.size > CHUNK {
            return Err(Failure::bare("IMPORT_ERROR_CANNOT_HANDLE_CHUNKED"));
        }
        let data = archive.content(&header).await?;
        let sum = archive.header().await?.ok_or_else(premature)?;
        if sum.size > BLOCK as u64 {
            return Err(Failure::new("IMPORT_ERROR_UNEXPECTED_FILE", [header.name.as_str(), sum.name.as_str()]));
        }
        let given = archive.content(&sum).await?;
        wrong |= !matches(&header.name, &sum.name, &data, &given);
        let end = at + data.len() as u64;
        if end > target.size {
            return Err(io_failure());
        }
        core.counters.received(&target.uuid, data.len() as u64);
        if end == target.size && !data.is_empty() {
            open.remove(target.name.as_str());
        }
        let disk = target.disk.clone();
        let written = tokio::task::spawn_blocking(move || disk.write_all_at(&data, at)).await;
        written.ok().and_then(Result::ok).ok_or_else(io_failure)?;
    }
    archive.rest().await;
    // As in xapi the sums are judged at the end.
    if wrong { Err(Failure::bare("IMPORT_ERROR_SOME_CHECKSUMS_FAILED")) } else { Ok(()) }
}

/// Whether a check sum's file belongs to a chunk and is right: XXH64, or SHA-1 as older servers write it.
fn matches(name: &str, sum: &str, data: &[u8], given: &[u8]) -> bool {
    let given = String::from_utf8_lossy(given).trim().to_lowercase();
    match sum.strip_prefix(name) {
        Some(".xxhash") => given == format!("{:016x}", xva::xxh64(data)),
        Some(".checksum") => {
            let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, data);
            given == digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        }
        _ => false,
    }
}

/// The archive as it comes in; holds one chunk and what one piece expands to.
struct Archive<'a, S> {
    input: &'a mut Input<ReadHalf<S>>,
    expander: Option<Expander>,
    ready: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Archive<'_, S> {
    /// More expanded bytes; `false` at the end of the connection.
    async fn more(&mut self) -> Outcome<bool> {
        const PIECE: usize = 16 << 10;
        let piece = match &self.expander {
            Some(_) => self.input.some(PIECE).await.map_err(|_| premature())?,
            None => self.input.exactly(4).await.map_err(|_| premature())?,
        };
        if piece.is_empty() {
            return Ok(false);
        }
        if self.expander.is_none() {
            self.expander = Some(Expander::new(&piece).map_err(|_| premature())?);
        }
        if let Some(expander) = &mut self.expander {
            self.ready.extend(expander.push(piece).map_err(|_| premature())?);
        }
        Ok(true)
    }

    async fn exactly(&mut self, length: usize) -> Outcome<Vec<u8>> {
        while self.ready.len() < length {
            if !self.more().await? {
                return Err(premature());
            }
        }
        let rest = self.ready.split_off(length);
        Ok(std::mem::replace(&mut self.ready, rest))
    }

    async fn header(&mut self) -> Outcome<Option<Header>> {
        let block = self.exactly(BLOCK).await?;
        xva::read_header(&block).map_err(|()| premature())
    }

    async fn content(&mut self, header: &Header) -> Outcome<Vec<u8>> {
        let length = usize::try_from(header.size).map_err(|_| premature())?;
        let data = self.exactly(length).await?;
        self.exactly(xva::padding(header.size)).await?;
        Ok(data)
    }

    /// The two empty blocks at the end, so that closing does not reset the connection. A missing end is no failure:
    /// nothing that counts comes after the last chunk.
    async fn rest(&mut self) {
        let _ = self.exactly(2 * BLOCK).await;
    }
}
