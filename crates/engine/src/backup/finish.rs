//! After the point is written: the snapshot's data goes, its change information stays as the next base, and the older
//! base goes (X17, X18). Whatever fails here is a warning on a good point, and the sweep's work.

use std::time::Duration;

use xenvault_xenapi::{ErrorCode, XenApiError, vdi, vm};

use super::base::Kinship;
use super::bases;
use super::snapshot::{Shot, Snapshot};
use crate::marks::{self, Role};
use crate::pool::{await_task_on, code, gone_is_fine, only_hosts, until_answered, wait_detached, while_busy};
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

/// Returns whether everything was cleaned up. `kinship` stands in the order of the snapshot's disks.
pub(crate) async fn clean_up(run: &Run, vm_uuid: &str, snapshot: &Snapshot, kinship: &[Kinship]) -> bool {
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
    if snapshot.asked_again {
        clean &= no_other_came(run, &snapshot.record.name_label).await;
    }
    for (at, shot) in snapshot.disks.iter().enumerate() {
        let twice = kinship.get(at) == Some(&Kinship::UnrelatedAgain);
        match purge(run, journal, shot).await {
            Ok(Outcome::Base) if twice => clean &= give_up_chain(run, journal, shot, vm_uuid).await,
            Ok(Outcome::Base) => clean &= remove_older_bases(run, shot, vm_uuid).await,
            Ok(Outcome::Gone) => drop(run.removed(Made::Vdi, &shot.record.uuid)),
            Err(error) => clean &= attempt(run, shot, "remove the snapshot's data", Err(error)),
        }
    }
    clean
}

/// Whether the first of two attempts at the snapshot made none after all. One that did is the sweep's: it bears our name.
async fn no_other_came(run: &Run, name: &str) -> bool {
    let problem = match vm::get_by_name_label(run.session(), name).await {
        Ok(found) if found.is_empty() => return true,
        Ok(_) => "it appeared later".to_owned(),
        Err(error) => format!("whether it appeared later can not be seen: {error}"),
    };
    run.meter.warn(
        "snapshot-left",
        format!("a first snapshot, whose answer was lost, may be left ({problem}); the next sweep removes it"),
    );
    false
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
    let purge = || async {
        let hosts = only_hosts(session, &shot.live.sr).await;
        let started = vdi::data_destroy_async(session, &shot.reference).await;
        let options = run.engine.options();
        await_task_on::<()>(session, journal, options, "VDI.data_destroy", hosts, started).await
    };
    while_busy(BUSY_LIMIT, || until_answered(purge)).await
}

/// Removes the bases of the same disk that this run replaces: ours, for the same VM (a disk can be shared by several,
/// each with points and bases of its own) and the same repository.
async fn remove_older_bases(run: &Run, shot: &Shot, vm_uuid: &str) -> bool {
    let bases = match bases::ours(run, &shot.live.reference).await {
        Ok(bases) => bases,
        Err(error) => return attempt(run, shot, "list the older bases", Err(error)),
    };
    let repository = run.engine.any_repository().map(|repository| repository.id().to_string());
    let mut clean = true;
    for base in bases.into_iter().filter(|base| base.reference != shot.reference) {
        if base.owned.vm.as_deref() == Some(vm_uuid) && base.owned.repository == repository {
            let removed = gone_is_fine(vdi::destroy(run.session(), &base.reference).await);
            clean &= attempt(run, shot, "remove an older base", removed);
        }
    }
    clean
}

/// Gives up a chain of changes in which the pool twice found no history between two snapshots in a row: tracking goes
/// off and so does the base, and the next backup begins a new chain. It does not mend itself (see
/// [`bases::remove_useless`]), and a snapshot of somebody else that went after a crash is enough to break it.
///
/// Where others track the same disk it stays on (X21): they would lose their own chain.
async fn give_up_chain(run: &Run, journal: &Journal, shot: &Shot, vm_uuid: &str) -> bool {
    let session = run.session();
    let device = &shot.live.device;
    match bases::tracked_by_others(run, &shot.live.reference).await {
        Ok(None) => {}
        Ok(Some(other)) => {
            run.meter.warn(
                "chain-unrelated",
                format!(
                    "disk {device}: the pool finds no history between the snapshots of its last backups, so each reads it \
                     as a whole. Snapshot {other} of somebody else is tracked too: once nobody needs it, remove it and \
                     run `xe vdi-disable-cbt uuid={}`; the next backup switches tracking on anew",
                    shot.live.record.uuid
                ),
            );
            return true;
        }
        Err(error) => return attempt(run, shot, "see who else tracks it", Err(error)),
    }
    let disable = || async {
        let hosts = only_hosts(session, &shot.live.sr).await;
        let started = vdi::disable_cbt_async(session, &shot.live.reference).await;
        let options = run.engine.options();
        await_task_on::<()>(session, journal, options, "VDI.disable_cbt", hosts, started).await
    };
    let disabled = while_busy(BUSY_LIMIT, || until_answered(disable)).await;
    if disabled.is_err() {
        return attempt(run, shot, "give up its broken chain of changes", disabled);
    }
    run.meter.warn(
        "chain-given-up",
        format!(
            "disk {device}: the pool found no history between the snapshots of its last backups; tracking was switched \
             off, and the next backup switches it on anew and reads the disk as a whole once more"
        ),
    );
    let removed = gone_is_fine(vdi::destroy(session, &shot.reference).await);
    attempt(run, shot, "remove a base that is of no use", removed) && remove_older_bases(run, shot, vm_uuid).await
}
