//! Everything that can be checked before the pool is touched, and what a backup will work on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use xenvault_xenapi::{ErrorCode, Session, network, pbd, pif, pool, sm, sr, vbd, vdi, vm};

use super::endpoints::{Access, access};
use super::finding::{Finding, FindingKind};
use super::request::SkippedDevice;
use crate::marks::{self, Candidate};
use crate::meter::Meter;
use crate::pool::Doing as _;
use crate::{Engine, EngineError};

/// Snapshots of one disk that make its chain long, see U04: a chain holds 30 links.
const LONG_CHAIN: usize = 20;
/// How often to look whether an operation on the VM has ended.
const OPERATION_POLL: Duration = Duration::from_millis(500);
/// What a snapshot takes on an SR that provisions thinly, in bytes: some megabytes of tables.
const THIN_SNAPSHOT_BYTES: u64 = 16 * 1024 * 1024;

/// Whether changes of a disk can be recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trackable {
    Yes,
    No,
}

/// One disk that is going to be backed up.
#[derive(Clone, Debug)]
pub(crate) struct LiveDisk {
    pub(crate) device: String,
    pub(crate) reference: vdi::Ref,
    pub(crate) record: vdi::Record,
    pub(crate) sr: sr::Record,
    pub(crate) trackable: Trackable,
    pub(crate) can_be_snapshotted: bool,
}

/// What a backup works on.
#[derive(Clone, Debug)]
pub(crate) struct Ground {
    pub(crate) pool: pool::Record,
    pub(crate) access: Access,
    pub(crate) disks: Vec<LiveDisk>,
    pub(crate) skipped: Vec<SkippedDevice>,
    /// All devices of the VM, for its configuration.
    pub(crate) vbds: Vec<vbd::Record>,
}

/// Reads what the VM consists of and checks it. Touches nothing.
pub(crate) async fn check(engine: &Engine, meter: &Meter, vm: (&vm::Ref, &vm::Record)) -> Result<Ground, EngineError> {
    let session = engine.session();
    let pool = crate::pool::the_pool(session).await?;
    let vbds = devices(session, vm.1).await?;
    let (disks, skipped) = disks(session, &pool, &vbds).await?;
    if disks.is_empty() {
        return Err(EngineError::NoDisks {
            name: vm.1.name_label.clone(),
            uuid: vm.1.uuid.clone(),
            skipped: describe(&skipped),
        });
    }
    let networks = network::get_all_records(session).await.doing("list the networks")?;
    let missing = |finding| EngineError::Prerequisite { finding };
    let access = match access(networks.values(), engine.options().clear_text) {
        Err(finding) if finding.kind == FindingKind::NbdNotEnabled && !knows_nbd(session, meter, &disks).await? => {
            Access::Http
        }
        other => other.map_err(missing)?,
    };
    if let Some(disk) = disks.iter().find(|disk| !disk.can_be_snapshotted) {
        return Err(missing(unsupported(disk)));
    }
    snapshot_allowed(session, vm, engine.options().operation_wait).await?;
    for (sr, record) in srs_of(&disks) {
        plugged(session, &sr, &record).await?;
    }
    space(session, &disks).await?;
    if access != Access::Http {
        reachable(session, &disks, &networks).await?;
    }
    advise(engine, meter, &pool, &disks).await?;
    Ok(Ground { pool, access, disks, skipped, vbds })
}

/// Whether the server has NBD at all; one that has it and does not serve it is a finding with a remedy.
async fn knows_nbd(session: &Session, meter: &Meter, disks: &[LiveDisk]) -> Result<bool, EngineError> {
    let Some(disk) = disks.first() else { return Ok(true) };
    let Some(why) = without_nbd(session, disk).await? else { return Ok(true) };
    let text =
        format!("{why}; every backup reads whole disks over HTTP, and reads only a part of each again to check it");
    meter.warn(FindingKind::NbdUnsupported.code(), text);
    Ok(false)
}

/// What a server without NBD answers when it is asked for a disk's addresses; `None` from one that has NBD.
pub(crate) async fn without_nbd(session: &Session, disk: &LiveDisk) -> Result<Option<String>, EngineError> {
    match vdi::get_nbd_info(session, &disk.reference).await {
        Err(error) if crate::pool::is_unsupported(&error) => Ok(Some(error.to_string())),
        Err(error) if crate::pool::is_gone(&error) => Ok(None),
        other => other.map(|_| None).doing("list the NBD addresses of a disk"),
    }
}

async fn devices(session: &Session, vm: &vm::Record) -> Result<Vec<vbd::Record>, EngineError> {
    let mut found = Vec::new();
    for reference in &vm.vbds {
        match vbd::get_record(session, reference).await {
            Ok(record) => found.push(record),
            Err(error) if crate::pool::is_gone(&error) => {}
            Err(error) => return Err(error).doing("read the VM's devices"),
        }
    }
    found.sort_by_key(|record| (record.userdevice.parse::<u32>().unwrap_or(u32::MAX), record.userdevice.clone()));
    Ok(found)
}

async fn disks(
    session: &Session,
    pool: &pool::Record,
    vbds: &[vbd::Record],
) -> Result<(Vec<LiveDisk>, Vec<SkippedDevice>), EngineError> {
    let managers = sm::get_all_records(session).await.doing("list the storage managers")?;
    let mut srs: BTreeMap<sr::Ref, sr::Record> = BTreeMap::new();
    let (mut disks, mut skipped) = (Vec::new(), Vec::new());
    for vbd in vbds {
        if let Some(device) = skipped_device(vbd) {
            skipped.push(device);
            continue;
        }
        let record = vdi::get_record(session, &vbd.vdi).await.doing("read a disk's record")?;
        if !srs.contains_key(&record.sr) {
            let sr = sr::get_record(session, &record.sr).await.doing("read an SR's record")?;
            srs.insert(record.sr.clone(), sr);
        }
        let Some(sr) = srs.get(&record.sr).cloned() else { continue };
        disks.push(live_disk(pool, &managers, vbd, record, sr));
    }
    Ok((disks, skipped))
}

/// What a backup leaves out, and why; `None` for a disk.
pub(crate) fn skipped_device(vbd: &vbd::Record) -> Option<SkippedDevice> {
    let reason = match vbd.type_ {
        vbd::Type::Disk if !vbd.empty && !vbd.vdi.is_null() => return None,
        vbd::Type::Disk => "disk device without a disk".to_owned(),
        vbd::Type::Cd => "CD drive".to_owned(),
        ref other => format!("{other} device"),
    };
    Some(SkippedDevice { device: vbd.userdevice.clone(), reason })
}

/// A disk with what its SR and the licence let be done with it.
pub(crate) fn live_disk(
    pool: &pool::Record,
    managers: &BTreeMap<sm::Ref, sm::Record>,
    vbd: &vbd::Record,
    record: vdi::Record,
    sr: sr::Record,
) -> LiveDisk {
    let trackable = trackable(pool, managers.values(), &sr, &record);
    // A type that is not listed, or a server that does not list features, is given a chance.
    let manager = managers.values().find(|manager| manager.type_ == sr.type_ && !manager.features.is_empty());
    let can_be_snapshotted =
        !is_raw(&record) && manager.is_none_or(|manager| manager.features.contains_key("VDI_SNAPSHOT"));
    let (device, reference) = (vbd.userdevice.clone(), vbd.vdi.clone());
    LiveDisk { device, reference, record, sr, trackable, can_be_snapshotted }
}

/// Capability of the licence, of the SR's type and of the disk itself (X09).
fn trackable<'a>(
    pool: &pool::Record,
    mut managers: impl Iterator<Item = &'a sm::Record>,
    sr: &sr::Record,
    disk: &vdi::Record,
) -> Trackable {
    let licensed = pool.restrictions.get("restrict_cbt").is_none_or(|value| value != "true");
    let manager = managers.find(|manager| manager.type_ == sr.type_);
    let capable = manager.is_some_and(|manager| manager.features.contains_key("VDI_CONFIG_CBT"));
    let kind = matches!(disk.type_, vdi::Type::User | vdi::Type::System);
    let persistent = disk.on_boot != vdi::OnBoot::Reset;
    if licensed && capable && kind && !is_raw(disk) && persistent { Trackable::Yes } else { Trackable::No }
}

/// What to do about a disk that can not be snapshotted.
pub(crate) const SNAPSHOT_REMEDY: &str =
    "move raw disks to an SR with VHD disks (`xe vdi-copy`), or detach them from the VM";

/// A volume without a VHD inside.
pub(crate) fn is_raw(disk: &vdi::Record) -> bool {
    disk.sm_config.get("type").is_some_and(|format| format == "raw")
}

pub(crate) fn unsupported(disk: &LiveDisk) -> Finding {
    Finding {
        kind: FindingKind::SnapshotUnsupported,
        text: format!("SR {:?} makes no snapshot of disk {}", disk.sr.name_label, disk.device),
        remedy: SNAPSHOT_REMEDY.to_owned(),
    }
}

fn describe(skipped: &[SkippedDevice]) -> String {
    if skipped.is_empty() {
        return "it has no block device at all".to_owned();
    }
    let list: Vec<String> =
        skipped.iter().map(|device| format!("device {}: {}", device.device, device.reason)).collect();
    list.join(", ")
}

fn srs_of(disks: &[LiveDisk]) -> BTreeMap<sr::Ref, sr::Record> {
    disks.iter().map(|disk| (disk.record.sr.clone(), disk.sr.clone())).collect()
}

/// The list of allowed operations can be stale, so the server is asked to make it again (X32).
///
/// A migration, or whatever else goes on with the VM, is waited for: it ends by itself.
async fn snapshot_allowed(
    session: &Session,
    (reference, _): (&vm::Ref, &vm::Record),
    wait: Duration,
) -> Result<(), EngineError> {
    let deadline = Instant::now() + wait;
    loop {
        match snapshot_allowed_now(session, reference).await? {
            Answer::Allowed => return Ok(()),
            Answer::Busy(_) if Instant::now() + OPERATION_POLL < deadline => {}
            Answer::Busy(finding) | Answer::Refused(finding) => return Err(EngineError::Prerequisite { finding }),
        }
        tokio::time::sleep(OPERATION_POLL).await;
    }
}

/// What the VM says to a snapshot.
enum Answer {
    Allowed,
    /// Something else goes on with it.
    Busy(Finding),
    Refused(Finding),
}

async fn snapshot_allowed_now(session: &Session, reference: &vm::Ref) -> Result<Answer, EngineError> {
    match vm::update_allowed_operations(session, reference).await {
        // An account may be allowed to take snapshots and not this; the list is as good as it is then.
        Err(error) if matches!(crate::pool::code(&error), Some(ErrorCode::RbacPermissionDenied)) => {}
        other => other.doing("update the VM's allowed operations")?,
    }
    let record = vm::get_record(session, reference).await.doing("read the VM's record")?;
    let busy =
        !record.blocked_operations.contains_key(&vm::Operations::Snapshot) && !record.current_operations.is_empty();
    Ok(match refusal(&record) {
        None => Answer::Allowed,
        Some(finding) if busy => Answer::Busy(finding),
        Some(finding) => Answer::Refused(finding),
    })
}

/// Why the VM allows no snapshot, by its record (X32).
pub(crate) fn refusal(record: &vm::Record) -> Option<Finding> {
    if record.allowed_operations.contains(&vm::Operations::Snapshot) {
        return None;
    }
    let blocked = record.blocked_operations.get(&vm::Operations::Snapshot);
    let running: Vec<&str> = record.current_operations.values().map(vm::Operations::as_str).collect();
    let (text, remedy) = match (blocked, running.as_slice()) {
        (Some(reason), _) => (
            format!("snapshots of VM {:?} are blocked ({reason})", record.name_label),
            format!(
                "lift it with `xe vm-param-remove param-name=blocked-operations param-key=snapshot uuid={}`",
                record.uuid
            ),
        ),
        (None, []) if !record.vusbs.is_empty() => (
            format!("VM {:?} has a USB device that is passed through, which forbids snapshots", record.name_label),
            format!("take it away for the backup: `xe vusb-list vm-uuid={}`, then `xe vusb-destroy`", record.uuid),
        ),
        (None, []) => (
            format!("VM {:?} allows no snapshot in state {}", record.name_label, record.power_state),
            "look at its devices (USB and PCI devices that are passed through forbid snapshots) and at the hosts' state"
                .to_owned(),
        ),
        (None, list) => (
            format!("VM {:?} allows no snapshot while it does {}", record.name_label, list.join(", ")),
            "wait for the end of that and try again".to_owned(),
        ),
    };
    Some(Finding { kind: FindingKind::SnapshotNotAllowed, text, remedy })
}

async fn plugged(session: &Session, reference: &sr::Ref, record: &sr::Record) -> Result<(), EngineError> {
    let pbds = pbd::get_all_records(session).await.doing("list the PBDs")?;
    if pbds.values().any(|pbd| pbd.sr == *reference && pbd.currently_attached) {
        return Ok(());
    }
    Err(EngineError::Prerequisite { finding: unplugged(record) })
}

pub(crate) fn unplugged(record: &sr::Record) -> Finding {
    Finding {
        kind: FindingKind::SrUnplugged,
        text: format!("SR {:?} is not plugged on any host", record.name_label),
        remedy: format!("repair it with `xe pbd-plug`; `xe pbd-list sr-uuid={}` shows its PBDs", record.uuid),
    }
}

/// What the snapshot of one disk takes on its SR, in bytes: all of it where volumes are inflated (U05).
pub(crate) fn snapshot_cost(disk: &LiveDisk) -> u64 {
    let thick_type = matches!(disk.sr.type_.as_str(), "lvm" | "lvmoiscsi" | "lvmohba" | "lvmofcoe");
    let thin = disk.sr.sm_config.get("allocation").is_some_and(|value| value.contains("thin"));
    if thick_type && !thin { size(disk.record.virtual_size) } else { THIN_SNAPSHOT_BYTES }
}

/// Sizes are never negative; a record that says otherwise is not believed.
pub(crate) fn size(bytes: i64) -> u64 {
    u64::try_from(bytes).unwrap_or(0)
}

async fn space(session: &Session, disks: &[LiveDisk]) -> Result<(), EngineError> {
    for (reference, record) in srs_of(disks) {
        let needed: u64 = disks.iter().filter(|disk| disk.record.sr == reference).map(snapshot_cost).sum();
        let total = size(sr::get_physical_size(session, &reference).await.doing("read an SR's size")?);
        let used = size(sr::get_physical_utilisation(session, &reference).await.doing("read an SR's use")?);
        if let Some(finding) = no_space(&record, needed, total, used) {
            return Err(EngineError::Prerequisite { finding });
        }
    }
    Ok(())
}

/// Whether an SR has too little space for a snapshot; one that does not know its size says 0 or -1 and is believed.
pub(crate) fn no_space(record: &sr::Record, needed: u64, total: u64, used: u64) -> Option<Finding> {
    let free = total.saturating_sub(used);
    (total > 0 && free < needed).then(|| Finding {
        kind: FindingKind::SrSpace,
        text: format!("SR {:?} has {free} bytes free and the snapshot can take {needed}", record.name_label),
        remedy: "free space on it (remove snapshots and let it coalesce, or move disks), or enlarge it".to_owned(),
    })
}

/// A purpose alone serves nobody: some host of each SR needs an address on such a network (X22).
async fn reachable(
    session: &Session,
    disks: &[LiveDisk],
    networks: &BTreeMap<network::Ref, network::Record>,
) -> Result<(), EngineError> {
    let mut asked = std::collections::BTreeSet::new();
    for disk in disks {
        if !asked.insert(disk.record.sr.clone()) {
            continue;
        }
        let infos = vdi::get_nbd_info(session, &disk.reference).await.doing("list the NBD addresses of a disk")?;
        if !infos.is_empty() {
            continue;
        }
        let pifs = pif::get_all_records(session).await.doing("list the PIFs")?;
        return Err(EngineError::Prerequisite { finding: no_address(disk, networks, &pifs) });
    }
    Ok(())
}

/// Why a disk has no address although a network has the purpose.
pub(crate) fn no_address(
    disk: &LiveDisk,
    networks: &BTreeMap<network::Ref, network::Record>,
    pifs: &BTreeMap<pif::Ref, pif::Record>,
) -> Finding {
    let served: Vec<_> = networks
        .iter()
        .filter(|(_, record)| {
            record.purpose.contains(&network::Purpose::Nbd) || record.purpose.contains(&network::Purpose::InsecureNbd)
        })
        .collect();
    let names: Vec<&str> = served.iter().map(|(_, record)| record.name_label.as_str()).collect();
    let on_them = |record: &&pif::Record| served.iter().any(|(reference, _)| record.network == **reference);
    let why = match pifs.values().filter(on_them).collect::<Vec<_>>().as_slice() {
        [] => "no host has an interface on it",
        list if list.iter().all(|record| !record.currently_attached) => "its interfaces are unplugged",
        list if list.iter().all(|record| record.ip.is_empty() && record.ipv6.is_empty()) => {
            "its interfaces have no IP address"
        }
        _ => "the hosts with an address on it do not have the SR plugged",
    };
    Finding {
        kind: FindingKind::NbdNoAddress,
        text: format!(
            "network {} has an NBD purpose, but {why}, so disk {} on SR {:?} is not served",
            names.join(", "),
            disk.device,
            disk.sr.name_label
        ),
        remedy: "give the hosts of that SR an IP address on the network (`xe pif-reconfigure-ip`), or set the \
                     purpose on a network where they have one"
            .to_owned(),
    }
}

/// Findings that do not stop a backup.
async fn advise(engine: &Engine, meter: &Meter, pool: &pool::Record, disks: &[LiveDisk]) -> Result<(), EngineError> {
    if pool.restrictions.get("restrict_cbt").is_some_and(|value| value == "true") {
        meter.warn(
            FindingKind::CbtRestricted.code(),
            "the licence of this pool does not include changed block tracking: every backup reads whole disks",
        );
    }
    for disk in disks {
        let mut foreign = 0_usize;
        for snapshot in &disk.record.snapshots {
            let record = match vdi::get_record(engine.session(), snapshot).await {
                Err(error) if crate::pool::is_gone(&error) => continue,
                other => other.doing("read a snapshot's record")?,
            };
            let candidate = Candidate {
                uuid: &record.uuid,
                name: &record.name_label,
                other_config: &record.other_config,
                is_a_snapshot: record.is_a_snapshot,
                in_journal: false,
                foreign_user: false,
            };
            if record.type_ == vdi::Type::CbtMetadata && marks::judge(&candidate, engine.instance()).is_err() {
                foreign += 1;
            }
        }
        if foreign > 0 {
            meter.warn(
                FindingKind::ForeignCbt.code(),
                format!(
                    "disk {} has {foreign} snapshot(s) with change information of another product or installation; two \
                     of them on one VM can spoil each other's incrementals",
                    disk.device
                ),
            );
        }
        if disk.record.snapshots.len() >= LONG_CHAIN {
            meter.warn(
                FindingKind::ChainDepth.code(),
                format!(
                    "disk {} has {} snapshots; a chain holds at most 30 links, remove old ones",
                    disk.device,
                    disk.record.snapshots.len()
                ),
            );
        }
    }
    Ok(())
}
