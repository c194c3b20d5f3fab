//! Which base a disk's changes are counted from, decided from evidence, and the changes themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use xenvault_cbt::{
    BaseDecision, BaseEvidence, BaseRecord, BaseState, ChangedBlocks, DiskNow, FullReason, Level as ReadLevel, Power,
    Tracking, VmRun, decide,
};
use xenvault_store::{Point, PointDisk, PointFilter, Repository};
use xenvault_xenapi::{DateTime, Session, XenApiError, host, message, pool, vdi, vm, vm_metrics};

use super::evidence::{Concerned, Notice, Seen, WINDOW_SECONDS, alarming, run_end};
use super::request::{BackupRequest, LevelRequest};
use super::snapshot::Shot;
use crate::EngineError;
use crate::pool::{
    Doing as _, DoingInRepository as _, await_task_on, code, is_gone, is_unsupported, only_hosts, server_time,
    until_answered, while_busy,
};
use crate::run::Run;

/// Names of the facts that a point keeps with each disk for the next choice of a base.
pub(crate) mod fact {
    pub(crate) const SR: &str = "sr-uuid";
    pub(crate) const SR_TYPE: &str = "sr-type";
    pub(crate) const POWER: &str = "vm-power-state";
    pub(crate) const HOST: &str = "resident-host";
    pub(crate) const HOST_BOOT: &str = "resident-host-boot-time";
    pub(crate) const VM_START: &str = "vm-start-time";
    pub(crate) const SNAPSHOT_TIME: &str = "snapshot-time";
    pub(crate) const UNVERIFIED: &str = "runs-since-verification";
    pub(crate) const MESSAGES: &str = "messages-seen";
    pub(crate) const DATA: &str = "data-offsets";
    pub(crate) const BASE: &str = "base-snapshot";
    pub(crate) const UNRELATED: &str = "unrelated-to-base";
}

/// Facts about the VM just before or just after a snapshot.
///
/// A point keeps those from before its snapshot: whatever happens after that, a crash between the snapshot and the
/// reading of facts too, has to count as having happened since. The decision takes those from after the new snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Situation {
    pub(crate) run: VmRun,
    /// `None` if the pool's messages can not be read.
    pub(crate) notices: Option<Vec<Notice>>,
    /// Boot time of each host, by its UUID.
    boot_times: BTreeMap<String, u64>,
    /// Server time when it was read, seconds since 1970.
    at: u64,
    pub(crate) pool: String,
    pub(crate) vm: String,
}

/// What is going to be done with a disk.
#[derive(Clone, Debug)]
pub(crate) struct DiskPlan {
    /// `None`: read as a whole, for the reason.
    pub(crate) changes: Option<Changes>,
    /// The changes are not believed this time, but checked against the whole disk.
    pub(crate) verify: bool,
    pub(crate) reason: String,
    /// The bitmap of this step, also where it is not used for reading.
    pub(crate) bitmap: Option<ChangedBlocks>,
    /// The disk in the parent point, if it has it.
    pub(crate) previous: Option<PointDisk>,
    pub(crate) kinship: Kinship,
}

/// What the pool says of base and new snapshot, which should be of one chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kinship {
    /// Nothing against it.
    Fine,
    /// They have no common history, though nothing else spoke against the base.
    Unrelated,
    /// The same as at the backup before.
    UnrelatedAgain,
}

/// Changes since a disk of the parent point.
#[derive(Clone, Debug)]
pub(crate) struct Changes {
    pub(crate) blocks: ChangedBlocks,
    pub(crate) since: PointDisk,
}

/// The newest point of the VM that can be read. Points that can not be read are reported and never count as absent
/// silently: without them the backup is a full one.
pub(crate) async fn parent(
    repository: &Repository,
    run: &Run,
    pool: &str,
    vm: &str,
) -> Result<Option<Point>, EngineError> {
    let filter =
        PointFilter { pool_uuid: Some(pool.to_owned()), vm_uuid: Some(vm.to_owned()), ..PointFilter::default() };
    let listing = repository.points(&filter).await.doing("list the points")?;
    for damaged in &listing.damaged {
        run.meter.warn("damaged-point", format!("point {} can not be read: {}", damaged.object, damaged.error));
    }
    match listing.points.last() {
        Some(newest) => Ok(Some(repository.point(&newest.id).await.doing("read the newest point")?)),
        None => Ok(None),
    }
}

/// Reads the facts that make a base trustworthy or not, with the messages since `from` (seconds since 1970). What can
/// not be read stays unknown.
pub(crate) async fn situation(
    session: &Session,
    pool: &pool::Record,
    vm: &vm::Record,
    from: Option<u64>,
) -> Result<Situation, EngineError> {
    let at = server_time(session, pool).await?;
    let power = match vm.power_state {
        vm::PowerState::Running | vm::PowerState::Paused => Some(Power::Running),
        vm::PowerState::Halted => Some(Power::Halted),
        vm::PowerState::Suspended => Some(Power::Suspended),
        vm::PowerState::Unknown(_) => None,
    };
    let mut run = VmRun { power, host_uuid: None, host_boot_time: None, start_time: None };
    let mut boot_times = BTreeMap::new();
    if let Ok(hosts) = host::get_all_records(session).await {
        for (reference, record) in hosts {
            let boot_time = record.other_config.get("boot_time").and_then(|text| seconds(text));
            if vm.resident_on == reference {
                run.host_boot_time = boot_time;
                run.host_uuid = Some(record.uuid.clone());
            }
            boot_times.extend(boot_time.map(|time| (record.uuid, time)));
        }
    }
    if let Some(metrics) = vm.metrics.non_null() {
        run.start_time = match vm_metrics::get_record(session, metrics).await {
            Ok(record) => u64::try_from(record.start_time.unix_seconds()).ok(),
            Err(_) => None,
        };
    }
    let from = from.unwrap_or(at).min(at.saturating_sub(WINDOW_SECONDS)).saturating_sub(1);
    let since = DateTime::from_unix_seconds(i64::try_from(from).unwrap_or(0));
    let notices = match message::get_since(session, since).await {
        Ok(all) => Some(all.into_values().map(notice).collect()),
        Err(error) => {
            tracing::warn!(%error, "the pool's messages can not be read: bases count as suspect");
            None
        }
    };
    Ok(Situation { run, notices, boot_times, at, pool: pool.uuid.clone(), vm: vm.uuid.clone() })
}

/// From when on messages matter for the bases of a point, seconds since 1970.
pub(crate) fn messages_from(parent: Option<&Point>) -> Option<u64> {
    parent?.disks.iter().filter_map(|disk| seen(disk).map(|seen| seen.from)).min()
}

fn notice(record: message::Record) -> Notice {
    Notice {
        uuid: record.uuid,
        name: record.name,
        object: record.obj_uuid,
        at: u64::try_from(record.timestamp.unix_seconds()).unwrap_or(0),
    }
}

/// `1795368590.` and the like: whole seconds of a number that xapi wrote as a float.
fn seconds(text: &str) -> Option<u64> {
    text.split('.').next()?.parse().ok()
}

/// The facts for the point that is being made.
pub(crate) fn facts(situation: &Situation, shot: &Shot) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::from([
        (fact::SR.to_owned(), shot.live.sr.uuid.clone()),
        (fact::SR_TYPE.to_owned(), shot.live.sr.type_.clone()),
        (fact::SNAPSHOT_TIME.to_owned(), shot.record.snapshot_time.unix_seconds().to_string()),
    ]);
    let power = situation.run.power.map(|power| match power {
        Power::Running => "running",
        Power::Halted => "halted",
        Power::Suspended => "suspended",
    });
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    for (name, value) in [
        (fact::POWER, power.map(str::to_owned)),
        (fact::HOST, situation.run.host_uuid.clone()),
        (fact::HOST_BOOT, number(situation.run.host_boot_time)),
        (fact::VM_START, number(situation.run.start_time)),
    ] {
        if let Some(value) = value {
            facts.insert(name.to_owned(), value);
        }
    }
    if let Some(notices) = &situation.notices {
        facts.insert(fact::MESSAGES.to_owned(), Seen::remember(notices, &situation.vm, situation.at).to_text());
    }
    facts
}

/// How many runs have believed the pool's list of changes since the whole disk was read.
pub(crate) fn unverified(disk: &PointDisk) -> u32 {
    disk.attributes.get(fact::UNVERIFIED).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Which messages a point knew of. Points of earlier releases remember the moment only.
fn seen(disk: &PointDisk) -> Option<Seen> {
    let number = |name: &str| disk.attributes.get(name).and_then(|text| text.parse::<u64>().ok());
    match disk.attributes.get(fact::MESSAGES) {
        Some(text) => Seen::parse(text),
        None => number(fact::SNAPSHOT_TIME).map(Seen::before),
    }
}

/// What a point kept about a disk, as evidence.
fn recorded(disk: &PointDisk) -> BaseRecord {
    let text = |name: &str| disk.attributes.get(name).cloned();
    let number = |name: &str| disk.attributes.get(name).and_then(|text| text.parse().ok());
    let power = match disk.attributes.get(fact::POWER).map(String::as_str) {
        Some("running") => Some(Power::Running),
        Some("halted") => Some(Power::Halted),
        Some("suspended") => Some(Power::Suspended),
        _ => None,
    };
    BaseRecord {
        vdi_uuid: disk.vdi_uuid.clone(),
        sr_uuid: text(fact::SR).unwrap_or_default(),
        virtual_size: disk.virtual_size,
        chain_nonce: disk.chain_nonce.clone(),
        run: VmRun {
            power,
            host_uuid: text(fact::HOST),
            host_boot_time: number(fact::HOST_BOOT),
            start_time: number(fact::VM_START),
        },
    }
}

/// The base as it is at this moment: read again for each disk, just before use (U02, X19).
struct Base {
    reference: Option<vdi::Ref>,
    state: BaseState,
    snapshot_of: Option<String>,
}

async fn look_at_base(session: &Session, disk: &PointDisk) -> Result<Base, EngineError> {
    let gone = Base { reference: None, state: BaseState::Gone, snapshot_of: None };
    let reference = match vdi::get_by_uuid(session, &disk.snapshot_vdi_uuid).await {
        Err(error) if is_gone(&error) => return Ok(gone),
        other => other.doing("look for the base")?,
    };
    let record = match vdi::get_record(session, &reference).await {
        Err(error) if is_gone(&error) => return Ok(gone),
        other => other.doing("read the base's record")?,
    };
    let state = match (record.type_ == vdi::Type::CbtMetadata, record.cbt_enabled) {
        (_, false) => BaseState::Gone,
        (true, true) => BaseState::BitmapOnly,
        (false, true) => BaseState::WithData,
    };
    let snapshot_of = match record.snapshot_of.non_null() {
        Some(live) => vdi::get_uuid(session, live).await.ok(),
        None => None,
    };
    Ok(Base { reference: Some(reference), state, snapshot_of })
}

/// Decides how one disk is read and, if its changes can be counted, asks for them. The disk must not be open over NBD.
pub(crate) async fn plan(
    run: &Run,
    request: &BackupRequest,
    situation: &Situation,
    parent: Option<&Point>,
    shot: &Shot,
) -> Result<DiskPlan, EngineError> {
    let previous = parent.and_then(|point| previous_of(point, shot)).cloned();
    let mut evidence = BaseEvidence {
        level: match request.level {
            LevelRequest::Full => ReadLevel::Everything,
            LevelRequest::Incremental => ReadLevel::Changes,
        },
        base: previous.as_ref().map(recorded),
        now: now(situation, shot),
    };
    let mut base = None;
    if let Some(disk) = &previous {
        let found = look_at_base(run.session(), disk).await?;
        evidence.now.base = found.state;
        evidence.now.base_snapshot_of = found.snapshot_of.clone();
        weigh(&mut evidence, situation, disk);
        base = found.reference;
    }
    let decision = decide(&evidence);
    // A full read asks all the same: the bitmap of each step is kept, so that other policies can join them.
    evidence.level = ReadLevel::Changes;
    let changes = match (&base, &previous, decide(&evidence)) {
        (Some(base), Some(disk), BaseDecision::UseBase) => Some(changes(run, base, disk, shot).await?),
        _ => None,
    };
    let kinship = match (&changes, &previous) {
        (Some(Err(FullReason::Unrelated)), Some(disk)) if disk.attributes.contains_key(fact::UNRELATED) => {
            Kinship::UnrelatedAgain
        }
        (Some(Err(FullReason::Unrelated)), _) => Kinship::Unrelated,
        _ => Kinship::Fine,
    };
    let plan = match (decision, changes, previous) {
        (BaseDecision::UseBase, Some(Ok(blocks)), Some(since)) => DiskPlan {
            changes: Some(Changes { blocks: blocks.clone(), since: since.clone() }),
            verify: request.verify_every.is_some_and(|every| unverified(&since).saturating_add(1) >= every.get()),
            reason: "changed-blocks".to_owned(),
            bitmap: Some(blocks),
            previous: Some(since),
            kinship,
        },
        (BaseDecision::UseBase, Some(Err(reason)), previous) => whole(reason, None, previous),
        (BaseDecision::UseBase, _, previous) => whole(FullReason::BaseGone, None, previous),
        (BaseDecision::ReadWhole(reason), changes, previous) => whole(reason, changes.and_then(Result::ok), previous),
    };
    Ok(DiskPlan { kinship, ..plan })
}

fn whole(reason: FullReason, bitmap: Option<ChangedBlocks>, previous: Option<PointDisk>) -> DiskPlan {
    DiskPlan { changes: None, verify: false, reason: reason.to_string(), bitmap, previous, kinship: Kinship::Fine }
}

/// The same disk in the parent; else what stood at its place, which says why it can not be counted from.
fn previous_of<'a>(point: &'a Point, shot: &Shot) -> Option<&'a PointDisk> {
    let same = point.disks.iter().find(|disk| disk.vdi_uuid == shot.live.record.uuid);
    same.or_else(|| point.disks.iter().find(|disk| disk.device == shot.live.device))
}

fn now(situation: &Situation, shot: &Shot) -> DiskNow {
    let snapshot_tracking = match (shot.live_tracking, shot.record.cbt_enabled) {
        (Tracking::Unsupported, _) => Tracking::Unsupported,
        (_, true) => Tracking::Enabled,
        (_, false) => Tracking::Disabled,
    };
    DiskNow {
        vdi_uuid: shot.live.record.uuid.clone(),
        sr_uuid: shot.live.sr.uuid.clone(),
        virtual_size: u64::try_from(shot.record.virtual_size).unwrap_or(0),
        live_tracking: shot.live_tracking,
        snapshot_tracking,
        chain_nonce: shot.chain.clone(),
        base: BaseState::Gone,
        base_snapshot_of: None,
        run: situation.run.clone(),
        base_host_boot_time: None,
        run_end: xenvault_cbt::RunEnd::Unknown,
        messages: None,
    }
}

/// Adds what is known about the time since the base.
fn weigh(evidence: &mut BaseEvidence, situation: &Situation, base: &PointDisk) {
    let Some(record) = &evidence.base else { return };
    let boot_time = record.run.host_uuid.as_ref().and_then(|host| situation.boot_times.get(host));
    evidence.now.base_host_boot_time = boot_time.copied();
    let (Some(notices), Some(seen)) = (&situation.notices, seen(base)) else { return };
    // The clock went back by so much that new messages can be older than what the base had seen: nothing is known.
    let taken = base.attributes.get(fact::SNAPSHOT_TIME).and_then(|text| text.parse::<u64>().ok());
    if taken.is_none_or(|taken| situation.at.saturating_add(WINDOW_SECONDS / 2) < taken) {
        return;
    }
    let new = seen.newer(notices);
    let hosts = [&record.run.host_uuid, &evidence.now.run.host_uuid];
    let concerned = Concerned {
        vm: &situation.vm,
        vdi: &evidence.now.vdi_uuid,
        pool: &situation.pool,
        hosts: hosts.into_iter().flatten().map(String::as_str).collect(),
    };
    let ran = |power: Option<Power>| power == Some(Power::Running);
    let states = (ran(record.run.power), ran(evidence.now.run.power));
    let restarted = record.run.start_time != evidence.now.run.start_time;
    evidence.now.run_end = run_end(&new, &situation.vm, states, restarted);
    evidence.now.messages = Some(alarming(&new, &concerned));
}

/// How long a listing is tried again while the disk is in use.
const LISTING_LIMIT: Duration = Duration::from_secs(30);

/// Older to newer snapshot, as a task (X12, X13). A failure of the listing is a reason to read everything, no failure
/// of the backup; only a pool that does not answer at all is one.
async fn changes(
    run: &Run,
    base: &vdi::Ref,
    previous: &PointDisk,
    shot: &Shot,
) -> Result<Result<ChangedBlocks, FullReason>, EngineError> {
    let session = run.session();
    let (options, journal) = (run.engine.options(), run.journal()?);
    let list = || async {
        let hosts = only_hosts(session, &shot.live.sr).await;
        let started = vdi::list_changed_blocks_async(session, base, &shot.reference).await;
        await_task_on::<String>(session, journal, options, "VDI.list_changed_blocks", hosts, started).await
    };
    let text = match while_busy(LISTING_LIMIT, || until_answered(list)).await {
        Ok(text) => text,
        Err(error) => {
            let Some(code) = code(&error) else {
                return match error {
                    XenApiError::TaskVanished { .. }
                    | XenApiError::TaskStalled { .. }
                    | XenApiError::TaskHostGone { .. }
                    | XenApiError::Response { .. }
                    | XenApiError::ResponseTooLarge { .. } => {
                        let text = format!("disk {} is read whole: {error}", shot.live.device);
                        run.meter.warn("changes-not-listed", text);
                        Ok(Err(FullReason::ListingFailed))
                    }
                    other => Err(other).doing("list the changed blocks"),
                };
            };
            let reason = match is_unsupported(&error) {
                true => FullReason::CbtUnsupported,
                false => FullReason::from_failure(code.as_str()),
            };
            run.meter
                .warn("changes-not-listed", format!("disk {} is read whole ({reason}): {error}", shot.live.device));
            return Ok(Err(reason));
        }
    };
    let size = u64::try_from(shot.record.virtual_size).unwrap_or(0);
    let parsed = ChangedBlocks::parse_base64(&text, size).and_then(|blocks| blocks.grown_from(previous.virtual_size));
    Ok(parsed.map_err(|error| {
        run.meter.warn("bitmap-invalid", format!("disk {} is read whole: {error}", shot.live.device));
        FullReason::BitmapInvalid
    }))
}
