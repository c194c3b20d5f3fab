//! Taking the snapshot when answers get lost: its name tells whether it was made (X05, X06).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use xenvault_xenapi::{Session, XenApiError, tasks, vdi, vm};

use super::super::prerequisites::Ground;
use crate::EngineError;
use crate::pool::{Doing as _, await_task_on, is_gone};
use crate::run::Run;

/// A second attempt is made only where the first one is known to have come to nothing.
const ATTEMPTS: u32 = 3;

/// After the pool has no snapshot of the VM under way any more, it is looked for so often, with these pauses in
/// milliseconds: the task may be gone a moment before its result is to be seen.
const PAUSES: [u64; 5] = [0, 200, 1000, 3000, 5000];

/// Why there is no snapshot.
pub(super) enum Failed {
    /// The pool said so.
    Pool(XenApiError),
    /// Looking for it failed.
    Here(EngineError),
}

impl From<EngineError> for Failed {
    fn from(error: EngineError) -> Self {
        Self::Here(error)
    }
}

/// Takes the snapshot. The second value tells whether it was asked for more than once.
pub(super) async fn make(run: &Run, ground: &Ground, vm: &vm::Ref, name: &str) -> Result<(vm::Ref, bool), Failed> {
    let session = run.session();
    let mut attempt = 1;
    loop {
        let host = vm::get_resident_on(session, vm).await.doing("read the VM's host")?;
        let hosts = tasks::host_lives(session, &[host]).await;
        let started = vm::snapshot_async(session, vm, name, &[]).await;
        let (options, journal) = (run.engine.options(), run.journal()?);
        let taken = await_task_on::<vm::Ref>(session, journal, options, "VM.snapshot", hosts, started).await;
        let error = match taken {
            Ok(reference) => return Ok((reference, attempt > 1)),
            Err(error) if error.is_lost_answer() || matches!(error, XenApiError::TaskStalled { .. }) => error,
            Err(error) => return Err(Failed::Pool(error)),
        };
        tracing::info!(%error, name, "the answer to the snapshot was lost, it is looked for by its name");
        if let Some(reference) = find(run, vm, name).await? {
            return Ok((reference, attempt > 1));
        }
        warn_of_strays(run, ground).await?;
        // One that stalled was cancelled, and may still come: it is not asked for twice.
        if attempt == ATTEMPTS || matches!(error, XenApiError::TaskStalled { .. }) {
            return Err(Failed::Pool(error));
        }
        attempt += 1;
    }
}

/// The snapshot of that name, once the pool is not at work on one any more.
async fn find(run: &Run, vm: &vm::Ref, name: &str) -> Result<Option<vm::Ref>, EngineError> {
    let session = run.session();
    let deadline = Instant::now() + run.engine.options().operation_wait;
    let mut pauses = PAUSES.iter();
    loop {
        let record = vm::get_record(session, vm).await.doing("see what is done with the VM")?;
        let busy = record.current_operations.values().any(|operation| *operation == vm::Operations::Snapshot);
        let found = by_name(session, vm, name).await?;
        match found.as_slice() {
            [] => {}
            // Complete only when the operation has ended.
            [reference] if !busy => return Ok(Some(reference.clone())),
            [_] => {}
            several => return Err(EngineError::SeveralSnapshots { name: name.to_owned(), count: several.len() }),
        }
        let pause = if busy && Instant::now() < deadline { Some(&1000) } else { pauses.next() };
        let Some(pause) = pause else { return Ok(found.into_iter().next()) };
        tokio::time::sleep(Duration::from_millis(*pause)).await;
    }
}

async fn by_name(session: &Session, vm: &vm::Ref, name: &str) -> Result<Vec<vm::Ref>, EngineError> {
    let mut found = Vec::new();
    for reference in vm::get_by_name_label(session, name).await.doing("look for the snapshot")? {
        match vm::get_snapshot_of(session, &reference).await {
            Ok(of) if of == *vm => found.push(reference),
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error).doing("look for the snapshot"),
        }
    }
    Ok(found)
}

/// A toolstack that dies in the middle of a snapshot leaves those disks that it had taken by then, without a VM and
/// without a name of ours: nothing proves whose they are, so a person has to look.
async fn warn_of_strays(run: &Run, ground: &Ground) -> Result<(), EngineError> {
    let session = run.session();
    for disk in &ground.disks {
        let known: BTreeSet<&vdi::Ref> = disk.record.snapshots.iter().collect();
        let now = vdi::get_record(session, &disk.reference).await.doing("look for the snapshot's disks")?;
        for reference in now.snapshots.iter().filter(|reference| !known.contains(reference)) {
            let record = match vdi::get_record(session, reference).await {
                Err(error) if is_gone(&error) => continue,
                other => other.doing("look for the snapshot's disks")?,
            };
            if record.vbds.is_empty() {
                run.meter.warn(
                    "stray-snapshot-disk",
                    format!(
                        "disk {}: snapshot {} appeared while the pool lost a snapshot of the VM, and no VM uses it. If \
                         nobody else made it, remove it with `xe vdi-destroy uuid={1}`",
                        disk.device, record.uuid
                    ),
                );
            }
        }
    }
    Ok(())
}
