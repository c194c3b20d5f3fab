//! After the point is written: the snapshot's data goes, its change information stays as the next base, and the older
//! base goes (X17, X18). Whatever fails here is a warning on a good point, and the sweep's work.

use std::time::Duration;

use xenvault_xenapi::{ErrorCode, XenApiError, vdi, vm};

use super::snapshot::{Shot, Snapshot};
use crate::marks::{self, Candidate, Role};
use crate::pool::{await_task, code, gone_is_fine, is_gone, wait_detached, while_busy};
use crate::run::Run;
use crate::state::{Journal, Made};

/// How long a purge is tried again while the pool says that the disk is in use.
const BUSY_LIMIT: Duration = Duration::from_secs(60);

/// What is left of the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The disk serves as the next base.
    Base,
    /// The disk is gone: the next run reads everything.
    Gone,
}

/// Returns whether everything was cleaned up.
pub(crate) async fn clean_up(run: &Run, vm_uuid: &str, snapshot: &Snapshot) -> bool {
    // Without a journal nothing could be noted; the sweep knows the objects by their marks.
    let Ok(journal) = run.journal() else { return false };
    let mut clean = true;
    for shot in &snapshot.disks {
        clean &= detach(run, shot).await;
    }
    // The marks say "base" before the data goes: whoever finds the disk after a crash knows what to finish.
    for shot in &snapshot.disks {
        if shot.record.cbt_enabled {
            clean &= attempt(run, shot, "mark the base", promote(run, shot).await);
        }
    }
    // The record goes first: its VBDs would point to disks without data.
    match gone_is_fine(vm::destroy(run.session(), &snapshot.reference).await) {
        Ok(()) => drop(run.removed(Made::Vm, &snapshot.record.uuid)),
        Err(error) => {
            run.meter.warn("snapshot-left", format!("the snapshot's record could not be removed: {error}"));
            return false;
        }
    }
    for shot in &snapshot.disks {
        match purge(run, journal, shot).await {
            Ok(Outcome::Base) => clean &= remove_older_bases(run, shot, vm_uuid).await,
            Ok(Outcome::Gone) => drop(run.removed(Made::Vdi, &shot.record.uuid)),
            Err(error) => clean &= attempt(run, shot, "remove the snapshot's data", Err(error)),
        }
    }
    clean
}

/// Warns if a step on a disk failed.
fn attempt(run: &Run, shot: &Shot, what: &str, result: Result<(), XenApiError>) -> bool {
    if let Err(error) = &result {
        let text = format!("disk {}: could not {what} ({error}); the next sweep tries again", shot.live.device);
        run.meter.warn("not-cleaned-up", text);
    }
    result.is_ok()
}

async fn detach(run: &Run, shot: &Shot) -> bool {
    let limit = run.engine.options().detach_timeout;
    match wait_detached(run.session(), &shot.reference, limit).await {
        Ok(true) => true,
        Ok(false) => {
            run.meter.warn(
                "still-attached",
                format!(
                    "the snapshot of disk {} is still attached to a control domain after {} s; restarting the NBD \
                     service of that host (`systemctl restart xapi-nbd`) removes stale ones",
                    shot.live.device,
                    limit.as_secs()
                ),
            );
            false
        }
        Err(error) => attempt(run, shot, "see whether it is still attached", Err(error)),
    }
}

/// Changes the role in the marks, and takes the deadline off: a base has none.
async fn promote(run: &Run, shot: &Shot) -> Result<(), XenApiError> {
    let mut other_config = shot.record.other_config.clone();
    other_config.insert(marks::ROLE.to_owned(), Role::Base.text().to_owned());
    other_config.remove(marks::RESUME_UNTIL);
    vdi::set_other_config(run.session(), &shot.reference, &other_config).await
}

/// Removes the data and keeps the change information; where there is none, removes the disk.
async fn purge(run: &Run, journal: &Journal, shot: &Shot) -> Result<Outcome, XenApiError> {
    if shot.record.cbt_enabled {
        match data_destroy(run, journal, shot).await {
            Ok(()) => return Ok(Outcome::Base),
            // Tracking was lost in between (X18): there is nothing to keep.
            Err(error)
                if matches!(code(&error), Some(ErrorCode::VdiNoCbtMetadata | ErrorCode::OperationNotAllowed)) =>
            {
                run.meter.warn(
                    "base-lost",
                    format!(
                        "disk {} lost its change information while it was backed up ({error}); the next backup reads \
                         it as a whole",
                        shot.live.device
                    ),
                );
            }
            Err(error) => return Err(error),
        }
    }
    while_busy(BUSY_LIMIT, || async { gone_is_fine(vdi::destroy(run.session(), &shot.reference).await) }).await?;
    Ok(Outcome::Gone)
}

async fn data_destroy(run: &Run, journal: &Journal, shot: &Shot) -> Result<(), XenApiError> {
    let session = run.session();
    while_busy(BUSY_LIMIT, || async {
        let started = vdi::data_destroy_async(session, &shot.reference).await;
        await_task::<()>(session, journal, run.engine.options(), "VDI.data_destroy", started).await
    })
    .await
}

/// Removes the bases of the same disk that this run replaces: ours, for the same VM (a disk can be shared by several,
/// each with points and bases of its own) and the same repository.
async fn remove_older_bases(run: &Run, shot: &Shot, vm_uuid: &str) -> bool {
    let session = run.session();
    let present = match vdi::get_record(session, &shot.live.reference).await {
        Ok(record) => record.snapshots,
        Err(error) => return attempt(run, shot, "list the older bases", Err(error)),
    };
    let mut clean = true;
    for reference in present.into_iter().filter(|reference| *reference != shot.reference) {
        let record = match vdi::get_record(session, &reference).await {
            Ok(record) => record,
            Err(error) if is_gone(&error) => continue,
            Err(error) => {
                clean &= attempt(run, shot, "look at an older base", Err(error));
                continue;
            }
        };
        let ours = marks::judge(
            &Candidate {
                uuid: &record.uuid,
                name: &record.name_label,
                other_config: &record.other_config,
                is_a_snapshot: record.is_a_snapshot,
                in_journal: false,
                foreign_user: !record.vbds.is_empty(),
            },
            run.engine.instance(),
        );
        let Ok(owned) = ours else { continue };
        let same_repository =
            owned.repository == run.engine.any_repository().map(|repository| repository.id().to_string());
        let replaced = owned.vm.as_deref() == Some(vm_uuid) && same_repository;
        let base = owned.role == Some(Role::Base) && replaced && !run.engine.state().is_alive(&owned.run);
        if base {
            let removed = gone_is_fine(vdi::destroy(session, &reference).await);
            clean &= attempt(run, shot, "remove an older base", removed);
        }
    }
    clean
}
