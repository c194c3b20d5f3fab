//! Tracking on, snapshot taken, marks on it: the part of a backup that changes the pool.

mod lost;

use std::collections::BTreeMap;
use std::time::Duration;

use xenvault_cbt::Tracking;
use xenvault_xenapi::{Session, XenApiError, vbd, vdi, vm};

use super::bases;
use super::finding::{Finding, FindingKind};
use super::prerequisites::{Ground, LiveDisk, SNAPSHOT_REMEDY, Trackable};
use crate::EngineError;
use crate::marks::{self, CHAIN, Marks, Role};
use crate::pool::{
    Doing as _, await_task_on, is_full, is_unsupported, only_hosts, server_time, until_answered, while_busy,
};
use crate::run::Run;
use crate::state::Made;
use lost::Failed;

/// How long switching tracking on is tried again while the disk is in use.
const ENABLE_LIMIT: Duration = Duration::from_secs(30);

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
    /// The answer to a first attempt was lost and no snapshot of it was to be seen.
    pub(crate) asked_again: bool,
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
            let marked = until_answered(|| set_chain(session, &disk.reference, &nonce)).await;
            marked.doing("mark the disk with a new chain of changes")?;
        }
        let mut unsupported = false;
        if !disk.record.cbt_enabled {
            bases::remove_useless(run, &disk.device, &disk.reference).await;
            let (options, journal) = (run.engine.options(), run.journal()?);
            let enable = || async {
                let hosts = only_hosts(session, &disk.sr).await;
                let started = vdi::enable_cbt_async(session, &disk.reference).await;
                await_task_on::<()>(session, journal, options, "VDI.enable_cbt", hosts, started).await
            };
            let enabled = while_busy(ENABLE_LIMIT, || until_answered(enable)).await;
            if let Err(error) = enabled {
                // The server knows better than its features tell (X09).
                unsupported = is_unsupported(&error);
                run.meter.warn(
                    "cbt-not-enabled",
                    format!("tracking of disk {} could not be switched on ({error}); it is read whole", disk.device),
                );
            }
        }
        let enabled = match vdi::get_cbt_enabled(session, &disk.reference).await {
            // A server from before tracking does not know the field either.
            Err(error) if is_unsupported(&error) => false,
            other => other.doing("read back a disk's tracking")?,
        };
        let state = match (enabled, unsupported) {
            (true, _) => Tracking::Enabled,
            (false, true) => Tracking::Unsupported,
            (false, false) => Tracking::Disabled,
        };
        tracking.insert(disk.reference.clone(), state);
    }
    Ok(tracking)
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
    let (reference, asked_again) = match lost::make(run, ground, vm.0, &name).await {
        Ok(made) => made,
        Err(Failed::Pool(error)) if is_full(&error) => {
            let sr = ground.disks.first().map(|disk| disk.sr.name_label.clone()).unwrap_or_default();
            return Err(EngineError::SrFull { sr, action: "take the snapshot".into(), source: Box::new(error) });
        }
        Err(Failed::Pool(error)) if is_refused_by_storage(&error) => {
            return Err(no_snapshots(&vm.1.name_label, &error));
        }
        Err(Failed::Pool(error)) => return Err(error).doing("take the snapshot"),
        Err(Failed::Here(error)) => return Err(error),
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
        resume_until: Some(now.saturating_add(run.engine.options().resume_window.as_secs())),
    };
    let other_config = marks.applied(&record.uuid, &record.other_config);
    vm::set_other_config(session, &reference, &other_config).await.doing("mark the snapshot")?;
    let found = snapshot_disks(run, &record, &marks).await?;
    let disks = matched(ground, tracking, found)?;
    Ok(Snapshot { reference, record, disks, asked_again })
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
