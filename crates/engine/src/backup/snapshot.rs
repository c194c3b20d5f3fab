//! Tracking on, snapshot taken, marks on it: the part of a backup that changes the pool.

use std::collections::BTreeMap;
use std::time::Duration;

use xenvault_cbt::{FullReason, Tracking};
use xenvault_xenapi::{Session, XenApiError, vbd, vdi, vm};

use super::finding::{Finding, FindingKind};
use super::prerequisites::{Ground, LiveDisk, SNAPSHOT_REMEDY, Trackable};
use crate::EngineError;
use crate::marks::{self, CHAIN, Candidate, Marks, Role};
use crate::pool::{Doing as _, await_task, code, gone_is_fine, is_full, server_time};
use crate::run::Run;
use crate::state::Made;

/// A disk with its snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Shot {
    pub(crate) live: LiveDisk,
    pub(crate) reference: vdi::Ref,
    pub(crate) record: vdi::Record,
    /// Tracking of the live disk, after it was asked for.
    pub(crate) live_tracking: Tracking,
    /// The nonce of the chain of changes that the snapshot belongs to.
    pub(crate) chain: Option<String>,
}

/// The snapshot of the VM.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    pub(crate) reference: vm::Ref,
    pub(crate) record: vm::Record,
    pub(crate) disks: Vec<Shot>,
}

/// Switches tracking on where it is off. The nonce goes first: a crash in between must not leave an old nonce on a new
/// chain (X11). Returns the state of each disk as read back, by its reference.
pub(crate) async fn enable_tracking(run: &Run, ground: &Ground) -> Result<BTreeMap<vdi::Ref, Tracking>, EngineError> {
    let mut tracking = BTreeMap::new();
    for disk in &ground.disks {
        let session = run.session();
        if disk.trackable == Trackable::No {
            tracking.insert(disk.reference.clone(), Tracking::Unsupported);
            continue;
        }
        if !disk.record.cbt_enabled || !disk.record.other_config.contains_key(CHAIN) {
            let nonce = uuid::Uuid::new_v4().to_string();
            set_chain(session, &disk.reference, &nonce).await.doing("mark the disk with a new chain of changes")?;
        }
        let mut unsupported = false;
        if !disk.record.cbt_enabled {
            remove_broken_bases(run, disk).await;
            let started = vdi::enable_cbt_async(session, &disk.reference).await;
            let options = run.engine.options();
            let enabled = await_task::<()>(session, run.journal()?, options, "VDI.enable_cbt", started).await;
            if let Err(error) = enabled {
                // The server knows better than its features tell (X09).
                let reason = code(&error).map(|code| FullReason::from_failure(code.as_str()));
                unsupported = reason == Some(FullReason::CbtUnsupported);
                run.meter.warn(
                    "cbt-not-enabled",
                    format!("tracking of disk {} could not be switched on ({error}); it is read whole", disk.device),
                );
            }
        }
        let enabled = vdi::get_cbt_enabled(session, &disk.reference).await.doing("read back a disk's tracking")?;
        let state = match (enabled, unsupported) {
            (true, _) => Tracking::Enabled,
            (false, true) => Tracking::Unsupported,
            (false, false) => Tracking::Disabled,
        };
        tracking.insert(disk.reference.clone(), state);
    }
    Ok(tracking)
}

/// Removes our bases of a disk that is not tracked: nothing can be counted from them any more, whosever point they
/// served.
///
/// It has to be now. Where the storage threw the log away by itself (X10), the base before it still names the live disk
/// as its successor; destroyed after tracking is on again, it would be joined with the new log and tear that from its
/// own predecessor.
async fn remove_broken_bases(run: &Run, disk: &LiveDisk) {
    let session = run.session();
    for reference in &disk.record.snapshots {
        let Ok(record) = vdi::get_record(session, reference).await else { continue };
        let candidate = Candidate {
            uuid: &record.uuid,
            name: &record.name_label,
            other_config: &record.other_config,
            is_a_snapshot: record.is_a_snapshot,
            in_journal: false,
            foreign_user: !record.vbds.is_empty(),
        };
        let Ok(owned) = marks::judge(&candidate, run.engine.instance()) else { continue };
        let bitmap_only = record.type_ == vdi::Type::CbtMetadata;
        if owned.role != Some(Role::Base) || !bitmap_only || run.engine.state().is_alive(&owned.run) {
            continue;
        }
        if let Err(error) = gone_is_fine(vdi::destroy(session, reference).await) {
            run.meter.warn(
                "not-cleaned-up",
                format!("disk {}: a base that serves nobody any more could not be removed: {error}", disk.device),
            );
        }
    }
}

async fn set_chain(session: &Session, disk: &vdi::Ref, nonce: &str) -> Result<(), XenApiError> {
    vdi::remove_from_other_config(session, disk, CHAIN).await?;
    vdi::add_to_other_config(session, disk, CHAIN, nonce).await
}

/// Whether the SR says that it makes no snapshots of such a disk (raw volumes, simple SR types).
fn is_refused_by_storage(error: &XenApiError) -> bool {
    error.api().is_some_and(|failure| {
        failure.sr_backend_failure() == Some(38) || failure.code.as_str() == "SR_OPERATION_NOT_SUPPORTED"
    })
}

fn no_snapshots(vm: &str, error: &XenApiError) -> EngineError {
    let said = error.api().map(ToString::to_string).unwrap_or_default();
    let finding = Finding {
        kind: FindingKind::SnapshotUnsupported,
        text: format!("the storage of VM {vm:?} makes no snapshot of one of its disks ({said})"),
        remedy: SNAPSHOT_REMEDY.to_owned(),
    };
    EngineError::Prerequisite { finding }
}

/// Takes the snapshot and puts our marks on it and on its disks.
pub(crate) async fn take(
    run: &Run,
    ground: &Ground,
    tracking: &BTreeMap<vdi::Ref, Tracking>,
    vm: (&vm::Ref, &vm::Record),
) -> Result<Snapshot, EngineError> {
    let session = run.session();
    let name = marks::operation_name("Xenvault backup", run.engine.instance(), run.id());
    run.intend(Made::Vm, &name)?;
    let started = vm::snapshot_async(session, vm.0, &name, &[]).await;
    let options = run.engine.options();
    let taken = await_task::<vm::Ref>(session, run.journal()?, options, "VM.snapshot", started).await;
    let reference = match taken {
        Ok(reference) => reference,
        // The result is lost, not the snapshot: its name tells (X05).
        Err(XenApiError::TaskVanished { operation }) => {
            by_name(session, &name).await?.ok_or(XenApiError::TaskVanished { operation }).doing("take the snapshot")?
        }
        Err(error) if is_full(&error) => {
            let sr = ground.disks.first().map(|disk| disk.sr.name_label.clone()).unwrap_or_default();
            return Err(EngineError::SrFull { sr, action: "take the snapshot".into(), source: Box::new(error) });
        }
        Err(error) if is_refused_by_storage(&error) => return Err(no_snapshots(&vm.1.name_label, &error)),
        Err(error) => return Err(error).doing("take the snapshot"),
    };
    let record = vm::get_record(session, &reference).await.doing("read the snapshot's record")?;
    run.created(Made::Vm, &record.uuid)?;
    let now = server_time(session, &ground.pool).await?;
    let marks = Marks {
        instance: run.engine.instance().to_owned(),
        run: run.id().to_owned(),
        role: Role::Snapshot,
        vm: vm.1.uuid.clone(),
        repository: run.engine.any_repository().map(|repository| repository.id().to_string()),
        resume_until: Some(now.saturating_add(options.resume_window.as_secs())),
    };
    let other_config = marks.applied(&record.uuid, &record.other_config);
    vm::set_other_config(session, &reference, &other_config).await.doing("mark the snapshot")?;
    let found = snapshot_disks(run, &record, &marks).await?;
    let disks = matched(ground, tracking, found)?;
    Ok(Snapshot { reference, record, disks })
}

async fn by_name(session: &Session, name: &str) -> Result<Option<vm::Ref>, EngineError> {
    // The task may be gone a moment before its result is to be seen.
    for pause in [0, 200, 1000, 3000] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let found = vm::get_by_name_label(session, name).await.doing("look for the snapshot")?;
        if let Some(reference) = found.into_iter().next() {
            return Ok(Some(reference));
        }
    }
    Ok(None)
}

/// The disks of the snapshot, marked, with their records as they are after that.
async fn snapshot_disks(
    run: &Run,
    snapshot: &vm::Record,
    marks: &Marks,
) -> Result<Vec<(vdi::Ref, vdi::Record)>, EngineError> {
    let session = run.session();
    let mut found = Vec::new();
    for reference in &snapshot.vbds {
        let vbd = vbd::get_record(session, reference).await.doing("read the snapshot's devices")?;
        if vbd.type_ != vbd::Type::Disk || vbd.vdi.is_null() {
            continue;
        }
        let mut record = vdi::get_record(session, &vbd.vdi).await.doing("read a snapshot disk's record")?;
        run.created(Made::Vdi, &record.uuid)?;
        record.other_config = marks.applied(&record.uuid, &record.other_config);
        vdi::set_other_config(session, &vbd.vdi, &record.other_config).await.doing("mark a snapshot disk")?;
        found.push((vbd.vdi, record));
    }
    Ok(found)
}

/// Every disk of the VM with its snapshot; a disk too many or too few ends the backup (X30).
fn matched(
    ground: &Ground,
    tracking: &BTreeMap<vdi::Ref, Tracking>,
    mut found: Vec<(vdi::Ref, vdi::Record)>,
) -> Result<Vec<Shot>, EngineError> {
    let differs = EngineError::DiskCount { vm: ground.disks.len(), snapshot: found.len() };
    if ground.disks.len() != found.len() {
        return Err(differs);
    }
    let mut shots = Vec::with_capacity(found.len());
    for live in &ground.disks {
        let Some(at) = found.iter().position(|(_, record)| record.snapshot_of == live.reference) else {
            return Err(differs);
        };
        let (reference, record) = found.swap_remove(at);
        let chain = record.other_config.get(CHAIN).cloned();
        let live_tracking = tracking.get(&live.reference).copied().unwrap_or(Tracking::Disabled);
        shots.push(Shot { live: live.clone(), reference, record, live_tracking, chain });
    }
    Ok(shots)
}
