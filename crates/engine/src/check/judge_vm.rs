//! What is judged of one VM and its disks. Pure.

use std::collections::{BTreeMap, BTreeSet};

use xenvault_xenapi::{sr, vdi, vm};

use super::facts::{Facts, VmFacts};
use super::finding::{CheckFinding, CheckedObject, Severity};
use crate::backup::FindingKind;
use crate::backup::prerequisites::{
    LiveDisk, Trackable, is_raw, no_address, no_space, refusal, size, snapshot_cost, unsupported,
};
use crate::marks::{self, Candidate};

/// A chain holds so many links (U04).
const CHAIN_LIMIT: usize = 30;
/// From here on a chain is near its limit.
const CHAIN_NEAR: usize = 20;

/// Everything about one VM.
pub(super) fn judge(facts: &Facts, vm: &VmFacts) -> Vec<CheckFinding> {
    let mut findings = Vec::new();
    state(vm, &mut findings);
    for device in &vm.skipped {
        findings.push(CheckFinding::new(
            Severity::Note,
            "device-skipped",
            vm_object(vm),
            format!("device {} of VM {:?} is left out: {}", device.device, vm.record.name_label, device.reason),
            "it is not in the backup",
            "nothing is to be done if that is meant; `xe vbd-list vm-uuid=".to_owned() + &vm.record.uuid + "` shows it",
        ));
    }
    if vm.disks.is_empty() {
        findings.push(CheckFinding::new(
            Severity::Warning,
            "no-disks",
            vm_object(vm),
            format!("VM {:?} has no disk that could be backed up", vm.record.name_label),
            "a backup of it fails: there is nothing to back up",
            format!("leave it out, or give it a disk: `xe vm-disk-list uuid={}`", vm.record.uuid),
        ));
    }
    if let Some(disk) = vm.without_address.and_then(|index| vm.disks.get(index)) {
        let finding = no_address(disk, &facts.networks, &facts.pifs);
        findings.push(CheckFinding::stopping(finding, disk_object(disk)));
    }
    space(vm, &mut findings);
    for disk in &vm.disks {
        tracking(facts, vm, disk, &mut findings);
        foreign(facts, vm, disk, &mut findings);
        chain(facts, disk, &mut findings);
    }
    findings
}

fn vm_object(vm: &VmFacts) -> CheckedObject {
    CheckedObject::new("VM", &vm.record.uuid, &vm.record.name_label)
}

fn disk_object(disk: &LiveDisk) -> CheckedObject {
    CheckedObject::new("VDI", &disk.record.uuid, &disk.record.name_label)
}

/// What the VM's state forbids (X32). The list of allowed operations can be stale and is not asked for again, because
/// that writes it; what forbids a snapshot in any case is looked at itself.
fn state(vm: &VmFacts, findings: &mut Vec<CheckFinding>) {
    let record = &vm.record;
    let nothing = "no backup of the VM can be made";
    let refused = |findings: &mut Vec<CheckFinding>, reason: String, remedy: String| {
        let code = FindingKind::SnapshotNotAllowed.code();
        findings.push(CheckFinding::new(Severity::Error, code, vm_object(vm), reason, nothing, remedy));
    };
    let name = &record.name_label;
    if !record.vusbs.is_empty() {
        refused(
            findings,
            format!("VM {name:?} has {} USB device(s) passed through, which forbid snapshots", record.vusbs.len()),
            format!("`xe vusb-list vm-uuid={0}`, then `xe vusb-unplug` and `xe vusb-destroy` for each", record.uuid),
        );
        return;
    }
    // Refused whatever the list of allowed operations says by now.
    let blocked = record.blocked_operations.contains_key(&vm::Operations::Snapshot);
    let listed = record.allowed_operations.contains(&vm::Operations::Snapshot);
    if blocked || !listed {
        let mut unlisted = record.clone();
        unlisted.allowed_operations.clear();
        if let Some(finding) = refusal(&unlisted) {
            findings.push(CheckFinding::stopping(finding, vm_object(vm)));
        }
    }
}

fn space(vm: &VmFacts, findings: &mut Vec<CheckFinding>) {
    let srs: BTreeMap<sr::Ref, &sr::Record> = vm.disks.iter().map(|disk| (disk.record.sr.clone(), &disk.sr)).collect();
    for (reference, record) in srs {
        let needed: u64 = vm.disks.iter().filter(|disk| disk.record.sr == reference).map(snapshot_cost).sum();
        let (total, used) = (size(record.physical_size), size(record.physical_utilisation));
        if let Some(mut finding) = no_space(record, needed, total, used) {
            finding.text = format!("{} (of VM {:?})", finding.text, vm.record.name_label);
            finding.remedy = format!(
                "{}; `xe vdi-list sr-uuid={} params=uuid,name-label,physical-utilisation,is-a-snapshot` shows what \
                 holds it",
                finding.remedy, record.uuid
            );
            findings.push(CheckFinding::stopping(finding, CheckedObject::new("SR", &record.uuid, &record.name_label)));
        }
    }
}

fn tracking(facts: &Facts, vm: &VmFacts, disk: &LiveDisk, findings: &mut Vec<CheckFinding>) {
    if !disk.can_be_snapshotted {
        findings.push(CheckFinding::stopping(unsupported(disk), disk_object(disk)));
        return;
    }
    // The licence is a finding of the pool, once.
    let restricted = facts.pool.restrictions.get("restrict_cbt").is_some_and(|value| value == "true");
    if disk.trackable == Trackable::Yes || restricted {
        return;
    }
    let sr = &disk.sr;
    let uuid = &disk.record.uuid;
    let (why, remedy) = if is_raw(&disk.record) {
        (
            "it is a raw volume".to_owned(),
            format!("copy it to an SR with VHD disks: `xe vdi-copy uuid={uuid} sr-uuid=SR`"),
        )
    } else if disk.record.on_boot == vdi::OnBoot::Reset {
        (
            "it is reset at every start of the VM".to_owned(),
            format!("if its content shall last: `xe vdi-param-set uuid={uuid} on-boot=persist`"),
        )
    } else if !matches!(disk.record.type_, vdi::Type::User | vdi::Type::System) {
        (format!("it is of type {}", disk.record.type_), "nothing is to be done if that is meant".to_owned())
    } else {
        (
            format!("SRs of type {:?} do not track changes", sr.type_),
            format!("move it to an SR that does: `xe vdi-pool-migrate uuid={uuid} sr-uuid=SR`"),
        )
    };
    findings.push(CheckFinding::new(
        Severity::Warning,
        FindingKind::CbtUnsupported.code(),
        disk_object(disk),
        format!("changes of disk {} of VM {:?} can not be tracked: {why}", disk.device, vm.record.name_label),
        "every backup reads the disk as a whole",
        remedy,
    ));
}

/// Change information of others on the same disk (X21).
fn foreign(facts: &Facts, vm: &VmFacts, disk: &LiveDisk, findings: &mut Vec<CheckFinding>) {
    let is_foreign = |record: &&vdi::Record| {
        let candidate = Candidate {
            uuid: &record.uuid,
            name: &record.name_label,
            other_config: &record.other_config,
            is_a_snapshot: record.is_a_snapshot,
            in_journal: false,
            foreign_user: false,
        };
        record.type_ == vdi::Type::CbtMetadata && marks::judge(&candidate, &facts.instance).is_err()
    };
    let others: Vec<&vdi::Record> =
        facts.vdis.values().filter(|record| record.snapshot_of == disk.reference).filter(is_foreign).collect();
    if others.is_empty() {
        return;
    }
    let commands: Vec<String> = others.iter().map(|record| format!("`xe vdi-destroy uuid={}`", record.uuid)).collect();
    findings.push(CheckFinding::new(
        Severity::Warning,
        FindingKind::ForeignCbt.code(),
        disk_object(disk),
        format!(
            "disk {} of VM {:?} has {} snapshot(s) with change information of another product or installation",
            disk.device,
            vm.record.name_label,
            others.len()
        ),
        "two of them on one VM can spoil each other's incrementals",
        format!("let only one product back the VM up; if the other one is not used any more: {}", commands.join(", ")),
    ));
}

/// How many links a disk's chain has by the SR's own notes, and which nodes wait for their merge.
fn chain(facts: &Facts, disk: &LiveDisk, findings: &mut Vec<CheckFinding>) {
    let parent = |record: &vdi::Record| record.sm_config.get("vhd-parent").cloned();
    let on_sr = || facts.vdis.values().filter(|record| record.sr == disk.record.sr);
    let by_uuid: BTreeMap<&str, &vdi::Record> = on_sr().map(|record| (record.uuid.as_str(), record)).collect();
    let mut children: BTreeMap<String, usize> = BTreeMap::new();
    for above in on_sr().filter_map(parent) {
        *children.entry(above).or_default() += 1;
    }
    let mut depth = 1;
    let mut seen = BTreeSet::new();
    let mut waiting = Vec::new();
    let mut next = parent(&disk.record);
    while let Some(uuid) = next {
        if !seen.insert(uuid.clone()) {
            break;
        }
        depth += 1;
        let Some(record) = by_uuid.get(uuid.as_str()) else { break };
        let children = children.get(&uuid).copied().unwrap_or(0);
        // A hidden node with one child is of no use to anybody and merges with it some time.
        if !record.managed && children == 1 {
            waiting.push(uuid.clone());
        }
        next = parent(record);
    }
    // A server that notes no parents still tells how many snapshots there are.
    let with_data = disk.record.snapshots.iter().filter_map(|snapshot| facts.vdis.get(snapshot));
    let snapshots = with_data.filter(|record| record.type_ != vdi::Type::CbtMetadata).count();
    let depth = depth.max(snapshots);
    let sr = &disk.sr.uuid;
    if depth >= CHAIN_NEAR {
        let severity = if depth >= CHAIN_LIMIT { Severity::Error } else { Severity::Warning };
        findings.push(CheckFinding::new(
            severity,
            FindingKind::ChainDepth.code(),
            disk_object(disk),
            format!("the chain of disk {} has {depth} links of {CHAIN_LIMIT} and {snapshots} snapshots", disk.device),
            "at the limit no snapshot, and so no backup, can be made",
            format!(
                "remove snapshots that are not needed (`xe snapshot-list`, `xe snapshot-destroy uuid=SNAPSHOT`), then let \
                 the SR merge: `xe sr-scan uuid={sr}`"
            ),
        ));
    }
    if !waiting.is_empty() {
        findings.push(CheckFinding::new(
            Severity::Note,
            "coalesce-pending",
            disk_object(disk),
            format!("{} node(s) below disk {} wait to be merged", waiting.len(), disk.device),
            "they hold space and make the chain longer until the SR has merged them",
            format!("let it: `xe sr-scan uuid={sr}`; if it does not end, look into /var/log/SMlog on the SR's host"),
        ));
    }
}
