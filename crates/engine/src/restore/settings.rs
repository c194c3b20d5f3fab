//! Which settings of a VM come back, how, and in what order. One table; a test holds it against every field of a VM.

use std::collections::{BTreeMap, BTreeSet};

use xenvault_xenapi::value::{FromValue as _, ToValue as _};
use xenvault_xenapi::{Value, vdi, vm};

use super::request::NotRestored;
use crate::EngineError;
use crate::marks;

/// How a field of the original reaches the new VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Given when the VM is created.
    AtCreation,
    /// Set in a step of its own, because creation can not, or must not yet.
    Afterwards,
    /// Made by the pool for the new VM, or only true at a moment: nothing to bring back.
    OfTheMoment,
    /// Can not or must not be brought back; reported if the original had something there.
    Left(&'static str),
}

use Way::{Afterwards, AtCreation, Left, OfTheMoment};

/// Every field of a VM.
pub(super) const FIELDS: &[(&str, Way)] = &[
    ("name_description", AtCreation),
    ("user_version", AtCreation),
    ("domain_type", AtCreation),
    ("HVM_boot_policy", AtCreation),
    ("HVM_boot_params", AtCreation),
    ("HVM_shadow_multiplier", AtCreation),
    ("NVRAM", AtCreation),
    ("PV_args", AtCreation),
    ("PV_bootloader", AtCreation),
    ("PV_bootloader_args", AtCreation),
    ("PV_kernel", AtCreation),
    ("PV_legacy_args", AtCreation),
    ("PV_ramdisk", AtCreation),
    ("PCI_bus", AtCreation),
    ("VCPUs_max", AtCreation),
    ("VCPUs_at_startup", AtCreation),
    ("VCPUs_params", AtCreation),
    ("memory_static_max", AtCreation),
    ("memory_dynamic_max", AtCreation),
    ("memory_dynamic_min", AtCreation),
    ("memory_static_min", AtCreation),
    ("actions_after_crash", AtCreation),
    ("actions_after_reboot", AtCreation),
    ("actions_after_shutdown", AtCreation),
    ("actions_after_softreboot", AtCreation),
    ("platform", AtCreation),
    ("recommendations", AtCreation),
    ("xenstore_data", AtCreation),
    ("tags", AtCreation),
    ("order", AtCreation),
    ("start_delay", AtCreation),
    ("shutdown_delay", AtCreation),
    ("version", AtCreation),
    ("hardware_platform_version", AtCreation),
    ("has_vendor_device", AtCreation),
    ("reference_label", AtCreation),
    // Our marks are taken out, and the seed of MAC addresses, which is one VM's own.
    ("other_config", Afterwards),
    ("name_label", Afterwards),
    ("bios_strings", Afterwards),
    ("VBDs", Afterwards),
    ("VIFs", Afterwards),
    ("VTPMs", Afterwards),
    ("blocked_operations", Afterwards),
    ("ha_restart_priority", Afterwards),
    // A VM whose past comes back must look new to its guest: domain controllers rely on it.
    ("generation_id", OfTheMoment),
    ("affinity", Left("the host that the VM preferred may be another one now")),
    ("appliance", Left("the VM is not put into an appliance")),
    ("groups", Left("the VM is not put into groups")),
    ("protection_policy", Left("protection policies are not supported by current servers")),
    ("snapshot_schedule", Left("the VM is not put under a snapshot schedule")),
    ("suspend_SR", Left("the SR for suspended VMs is that of the pool")),
    ("suspend_VDI", Left("the memory of a suspended VM is not part of a backup: the VM starts anew")),
    ("VGPUs", Left("virtual graphics cards belong to hardware of one host: add them again")),
    ("VUSBs", Left("USB devices that are passed through belong to one host: add them again")),
    ("attached_PCIs", Left("PCI devices that are passed through belong to one host: add them again")),
    ("crash_dumps", Left("crash dumps are not part of a backup")),
    ("blobs", OfTheMoment),
    ("ha_always_run", OfTheMoment),
    ("uuid", OfTheMoment),
    ("allowed_operations", OfTheMoment),
    ("children", OfTheMoment),
    ("consoles", OfTheMoment),
    ("current_operations", OfTheMoment),
    ("domarch", OfTheMoment),
    ("domid", OfTheMoment),
    ("guest_metrics", OfTheMoment),
    ("is_a_snapshot", OfTheMoment),
    ("is_a_template", OfTheMoment),
    ("is_control_domain", OfTheMoment),
    ("is_default_template", OfTheMoment),
    ("is_snapshot_from_vmpp", OfTheMoment),
    ("is_vmss_snapshot", OfTheMoment),
    ("last_boot_CPU_flags", OfTheMoment),
    ("last_booted_record", OfTheMoment),
    ("memory_overhead", OfTheMoment),
    ("memory_target", OfTheMoment),
    ("metrics", OfTheMoment),
    ("parent", OfTheMoment),
    ("pending_guidances", OfTheMoment),
    ("pending_guidances_full", OfTheMoment),
    ("pending_guidances_recommended", OfTheMoment),
    ("power_state", OfTheMoment),
    ("requires_reboot", OfTheMoment),
    ("resident_on", OfTheMoment),
    ("scheduled_to_be_resident_on", OfTheMoment),
    ("secureboot_certificates_state", OfTheMoment),
    ("snapshot_info", OfTheMoment),
    ("snapshot_metadata", OfTheMoment),
    ("snapshot_of", OfTheMoment),
    ("snapshot_time", OfTheMoment),
    ("snapshots", OfTheMoment),
    ("transportable_snapshot_id", OfTheMoment),
];

/// BIOS strings that a client may set.
const BIOS_KEYS: [&str; 14] = [
    "bios-vendor",
    "bios-version",
    "system-manufacturer",
    "system-product-name",
    "system-version",
    "system-serial-number",
    "baseboard-manufacturer",
    "baseboard-product-name",
    "baseboard-version",
    "baseboard-serial-number",
    "baseboard-asset-tag",
    "baseboard-location-in-chassis",
    "enclosure-asset-tag",
    "bios-release-date",
];

/// Operations that nobody may do with a VM that is half restored.
pub(super) const BLOCKED: [vm::Operations; 4] =
    [vm::Operations::Start, vm::Operations::StartOn, vm::Operations::Clone, vm::Operations::Copy];

/// The record that the new VM is created from: everything that the table allows, under a name that says it is not done.
pub(super) fn creation_record(original: &vm::Record, name: &str) -> Result<vm::Record, EngineError> {
    let Value::Map(all) = original.to_value() else {
        return Err(EngineError::Internal { what: "a VM's record is no map".to_owned() });
    };
    let allowed: BTreeSet<&str> =
        FIELDS.iter().filter(|(_, way)| *way == AtCreation).map(|(field, _)| *field).collect();
    let kept: BTreeMap<String, Value> = all.into_iter().filter(|(field, _)| allowed.contains(field.as_str())).collect();
    let mut record = vm::Record::from_value(Value::Map(kept))
        .map_err(|_| EngineError::Internal { what: "the record of the new VM".to_owned() })?;
    record.name_label = name.to_owned();
    record.generation_id = generation_id(&original.generation_id);
    record.blocked_operations =
        BLOCKED.iter().map(|operation| (operation.clone(), "Xenvault is restoring this VM".to_owned())).collect();
    Ok(record)
}

/// A new generation id where the original had one: two 64-bit numbers.
fn generation_id(original: &str) -> String {
    if original.is_empty() {
        return String::new();
    }
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    format!("{}:{}", high.cast_signed(), low.cast_signed())
}

/// `other_config` for the new VM: without our marks, and without what is one VM's own.
pub(super) fn other_config(original: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut kept = marks::without_marks(original);
    for own in [marks::CHAIN, "mac_seed", "import_task"] {
        kept.remove(own);
    }
    kept
}

/// The BIOS strings that can be set, and whether any can not.
pub(super) fn bios_strings(original: &BTreeMap<String, String>) -> (BTreeMap<String, String>, bool) {
    let (settable, rest): (BTreeMap<_, _>, BTreeMap<_, _>) =
        original.clone().into_iter().partition(|(key, _)| BIOS_KEYS.contains(&key.as_str()));
    // A host's own strings carry an OEM mark beside; a VM that has no manufacturer has the generic ones.
    (settable, !rest.is_empty())
}

/// What a disk of the original had and the new one does not get.
pub(super) fn disk_left_out(device: &str, original: &vdi::Record) -> Vec<NotRestored> {
    let reset = original.on_boot == vdi::OnBoot::Reset;
    [
        (reset, "on_boot", "the original forgot its changes at every start, the new disk keeps them"),
        (original.allow_caching, "allow_caching", "the new disk is not cached on the hosts"),
        (original.read_only, "read_only", "the new disk can be written to"),
    ]
    .into_iter()
    .filter(|(present, ..)| *present)
    .map(|(_, field, reason)| NotRestored { field: format!("disk {device}: {field}"), reason: reason.to_owned() })
    .collect()
}

/// What the original had and the new VM does not get.
pub(super) fn left_out(original: &vm::Record) -> Vec<NotRestored> {
    let Value::Map(all) = original.to_value() else { return Vec::new() };
    let mut left = Vec::new();
    for (field, way) in FIELDS {
        let present = all.get(*field).is_some_and(|value| !value.is_default());
        if let (Left(reason), true) = (way, present) {
            left.push(NotRestored { field: (*field).to_owned(), reason: (*reason).to_owned() });
        }
    }
    for field in original.extra.iter().filter(|(_, value)| !value.is_default()).map(|(field, _)| field) {
        let reason = "a field of a newer server that this release does not know".to_owned();
        left.push(NotRestored { field: field.clone(), reason });
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_vm_has_its_way() {
        let Value::Map(all) = vm::Record::default().to_value() else { panic!("no map") };
        let known: BTreeSet<&str> = FIELDS.iter().map(|(field, _)| *field).collect();
        let missing: Vec<&String> = all.keys().filter(|field| !known.contains(field.as_str())).collect();
        assert!(missing.is_empty(), "decide about {missing:?}");
        let gone: Vec<&&str> = known.iter().filter(|field| !all.contains_key(**field)).collect();
        assert!(gone.is_empty(), "{gone:?}");
        assert_eq!(known.len(), FIELDS.len(), "a field stands twice");
    }

    #[test]
    fn a_new_vm_gets_the_settings_and_neither_identity_nor_high_availability() {
        let original = vm::Record {
            uuid: "u".into(),
            name_label: "web".into(),
            vcpus_max: 4,
            memory_static_max: 1 << 30,
            ha_restart_priority: "restart".into(),
            affinity: xenvault_xenapi::host::Ref::new("OpaqueRef:h"),
            generation_id: "1:2".into(),
            other_config: BTreeMap::from([("mac_seed".into(), "s".into())]),
            tags: vec!["gold".into()],
            ..Default::default()
        };
        let record = creation_record(&original, "unfinished").unwrap();
        assert_eq!((record.vcpus_max, record.memory_static_max, record.tags), (4, 1 << 30, vec!["gold".to_owned()]));
        assert_eq!((record.name_label.as_str(), record.uuid.as_str()), ("unfinished", ""));
        assert_eq!(record.ha_restart_priority, "");
        assert!(record.affinity.is_null() && record.other_config.is_empty());
        assert!(record.blocked_operations.contains_key(&vm::Operations::Start));
        assert!(record.generation_id != "1:2" && record.generation_id.split(':').all(|n| n.parse::<i64>().is_ok()));
        let left: Vec<String> = left_out(&original).into_iter().map(|left| left.field).collect();
        assert_eq!(left, ["affinity"]);
    }

    #[test]
    fn other_config_comes_back_without_marks_and_seeds() {
        let original = BTreeMap::from([
            ("xenvault:instance".into(), "i".into()),
            ("xenvault:chain".into(), "c".into()),
            ("mac_seed".into(), "s".into()),
            ("folder".into(), "/db".into()),
        ]);
        assert_eq!(other_config(&original), BTreeMap::from([("folder".into(), "/db".into())]));
    }

    #[test]
    fn settings_of_disks_that_do_not_come_back_are_reported() {
        assert_eq!(disk_left_out("0", &vdi::Record::default()), []);
        let original = vdi::Record { on_boot: vdi::OnBoot::Reset, allow_caching: true, ..Default::default() };
        let left: Vec<String> = disk_left_out("2", &original).into_iter().map(|left| left.field).collect();
        assert_eq!(left, ["disk 2: on_boot", "disk 2: allow_caching"]);
    }
}
