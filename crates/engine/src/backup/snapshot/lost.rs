//! Taking the snapshot when answers get lost and hosts go away: its name tells whether it was made (X05, X06, X07).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use xenvault_xenapi::{ErrorCode, Session, XenApiError, host, tasks, vbd, vdi, vm};

use super::super::prerequisites::Ground;
use crate::EngineError;
use crate::pool::{Doing as _, await_task_on, is_busy, is_gone, is_live};
use crate::run::Run;

/// A snapshot that came to nothing is asked for again for so long: the restart of a toolstack is over by then.
const PATIENCE: Duration = Duration::from_secs(120);

/// After the pool has no snapshot of the VM under way any more, it is looked for so often, with these pauses in
/// milliseconds: the task may be gone a moment before its result is to be seen.
const PAUSES: [u64; 5] = [0, 200, 1000, 3000, 5000];

/// How often to look at a VM that is busy.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

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

/// What a failed attempt means.
enum Verdict {
    /// Whether there is a snapshot is not known, and if there is none the next attempt can succeed.
    Look,
    /// Whether there is a snapshot is not known, and it may still come: it is not asked for twice.
    LookOnly,
    /// Nothing was begun: the VM is busy with something else.
    Wait,
    /// There is none, and there will be none.
    Final,
}

fn verdict(error: &XenApiError) -> Verdict {
    match error {
        XenApiError::TaskStalled { .. } => Verdict::LookOnly,
        error if error.is_lost_answer() => Verdict::Look,
        // The coordinator lost the host that does the work: the VM's own.
        error if matches!(error.code(), Some(ErrorCode::CannotContactHost | ErrorCode::HostOffline)) => Verdict::Look,
        error if is_busy(error) => Verdict::Wait,
        _ => Verdict::Final,
    }
}

/// Takes the snapshot. The second value tells whether another one may appear under its name.
pub(super) async fn make(run: &Run, ground: &Ground, vm: &vm::Ref, name: &str) -> Result<(vm::Ref, bool), Failed> {
    let session = run.session();
    let began = Instant::now();
    let mut again = false;
    loop {
        let host = vm::get_resident_on(session, vm).await.doing("read the VM's host")?;
        let hosts = tasks::host_lives(session, std::slice::from_ref(&host)).await;
        let started = vm::snapshot_async(session, vm, name, &[]).await;
        let (options, journal) = (run.engine.options(), run.journal()?);
        let error = match await_task_on::<vm::Ref>(session, journal, options, "VM.snapshot", hosts, started).await {
            Ok(reference) => return Ok((reference, again)),
            Err(error) => error,
        };
        let verdict = verdict(&error);
        match verdict {
            Verdict::Final => return Err(Failed::Pool(error)),
            Verdict::Wait if began.elapsed() < options.operation_wait => {
                tracing::info!(%error, "the VM is busy, its snapshot waits");
                tokio::time::sleep(BUSY_PAUSE).await;
                continue;
            }
            Verdict::Wait => return Err(Failed::Pool(error)),
            Verdict::Look | Verdict::LookOnly => {}
        }
        tracing::info!(%error, name, "whether the snapshot was taken is not known, it is looked for by its name");
        let found = find(run, ground, vm, name).await?;
        if let Some(reference) = found.complete {
            return Ok((reference, again || found.others));
        }
        warn_of_strays(run, ground).await?;
        if let Some(reference) = found.incomplete {
            // Its disks are counted, which ends the run, and the clean-up removes it.
            return Ok((reference, true));
        }
        if !host.is_null() && !is_live(session, &host).await {
            let host =
                host::get_record(session, &host).await.map_or_else(|_| host.as_str().to_owned(), |it| it.name_label);
            return Err(Failed::Here(EngineError::HostDown { host, source: Box::new(error) }));
        }
        if matches!(verdict, Verdict::LookOnly) || began.elapsed() >= PATIENCE {
            return Err(Failed::Pool(error));
        }
        again = true;
    }
}

/// What bears the name.
#[derive(Default)]
struct Found {
    /// The newest one with all disks.
    complete: Option<vm::Ref>,
    /// One that lacks disks.
    incomplete: Option<vm::Ref>,
    /// There are more.
    others: bool,
}

/// Looks for snapshots of that name, until one is complete or it is clear that there will be none.
async fn find(run: &Run, ground: &Ground, vm: &vm::Ref, name: &str) -> Result<Found, EngineError> {
    let session = run.session();
    let began = Instant::now();
    let mut pauses = PAUSES.iter();
    loop {
        let record = vm::get_record(session, vm).await.doing("see what is done with the VM")?;
        // A coordinator that starts anew forgets what was under way, so that this alone does not say "complete".
        let busy = record.current_operations.values().any(|operation| *operation == vm::Operations::Snapshot);
        let found = by_name(session, ground, vm, name).await?;
        if !busy && found.complete.is_some() {
            return Ok(found);
        }
        let pause = match busy {
            true if began.elapsed() >= run.engine.options().operation_wait => {
                let waited = began.elapsed();
                return Err(EngineError::SnapshotUnderWay { vm: record.name_label, waited });
            }
            true => BUSY_PAUSE,
            false => match pauses.next() {
                Some(pause) => Duration::from_millis(*pause),
                None => return Ok(found),
            },
        };
        tokio::time::sleep(pause).await;
    }
}

async fn by_name(session: &Session, ground: &Ground, vm: &vm::Ref, name: &str) -> Result<Found, EngineError> {
    let mut complete = Vec::new();
    let mut found = Found::default();
    let mut count = 0;
    for reference in vm::get_by_name_label(session, name).await.doing("look for the snapshot")? {
        let record = match vm::get_record(session, &reference).await {
            Err(error) if is_gone(&error) => continue,
            other => other.doing("look for the snapshot")?,
        };
        if !record.is_a_snapshot || record.snapshot_of != *vm {
            continue;
        }
        count += 1;
        if disks(session, &record).await? == ground.disks.len() {
            complete.push((record.snapshot_time.unix_seconds(), reference));
        } else {
            found.incomplete = Some(reference);
        }
    }
    found.others = count > 1;
    found.complete = complete.into_iter().max_by_key(|(taken, _)| *taken).map(|(_, reference)| reference);
    Ok(found)
}

/// How many disks a snapshot has.
async fn disks(session: &Session, snapshot: &vm::Record) -> Result<usize, EngineError> {
    let mut count = 0;
    for reference in &snapshot.vbds {
        match vbd::get_record(session, reference).await {
            Err(error) if is_gone(&error) => {}
            Ok(vbd) => count += usize::from(vbd.type_ == vbd::Type::Disk && !vbd.vdi.is_null()),
            Err(error) => return Err(error).doing("read the snapshot's devices"),
        }
    }
    Ok(count)
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
