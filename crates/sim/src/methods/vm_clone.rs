//! Copies of VMs: snapshots, clones and full copies share one way, as in xapi.

use std::sync::Arc;

use super::{Call, vbd, vdi, vdi_checks, vdi_copy, vif};
use crate::core::Core;
use crate::model::{Database, NEVER, NULL, Value, new_uuid, now};
use crate::rpc::Outcome;

/// How the disks are copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Snapshot,
    /// A snapshot with the memory; tells whether the VM was running when it began.
    Checkpoint {
        running: bool,
    },
    Clone,
    /// A full copy, to another SR if one is named.
    Copy(Option<String>),
}

/// Makes the copy. On a failure the disks made so far go again.
pub(super) async fn copy_vm(call: &Call, vm: &str, name: &str, way: &Way, ignore: &[String]) -> Outcome<String> {
    let core = &call.core;
    let snapshot = matches!(way, Way::Snapshot | Way::Checkpoint { .. });
    let vbds: Vec<String> = {
        let db = core.db();
        let vbds = db.set_of("VM", vm, "VBDs");
        vbds.into_iter().filter(|vbd| !snapshot || !ignore.contains(&db.text("VBD", vbd, "VDI"))).collect()
    };
    let mut made: Vec<(String, String, bool)> = Vec::new();
    for vbd in vbds {
        match copy_disk(core, &vbd, way).await {
            Ok((disk, ours)) => made.push((vbd, disk, ours)),
            Err(failure) => {
                undo(core, &made);
                return Err(failure);
            }
        }
    }
    let image = core.db().text("VM", vm, "suspend_VDI");
    let image = if *way == Way::Snapshot || image == NULL {
        None
    } else {
        match copy_single(core, &image, way).await {
            Ok(copy) => Some(copy),
            Err(failure) => {
                undo(core, &made);
                return Err(failure);
            }
        }
    };
    let outcome = finish(core, vm, name, way, &made);
    match &outcome {
        Ok(copy) => {
            super::vtpm::copy_all(core, vm, copy);
            if let Some(image) = image {
                core.db().set("VM", copy, "suspend_VDI", image);
            }
        }
        Err(_) => {
            if let Some(image) = image {
                made.push((String::new(), image, true));
            }
            undo(core, &made);
        }
    }
    outcome
}

fn undo(core: &Core, made: &[(String, String, bool)]) {
    for (_, disk, _) in made.iter().filter(|(_, _, ours)| *ours) {
        if let Ok(id) = core.disk_id(disk) {
            // The failure that led here is the one to tell.
            let _ = core.storage.destroy(id);
        }
        core.db().destroy("VDI", disk);
    }
}

/// The copy of a device's disk, and whether it was made here. Discs in CD drives stay the same.
pub(super) async fn copy_disk(core: &Arc<Core>, vbd: &str, way: &Way) -> Outcome<(String, bool)> {
    let (source, kind, empty) = {
        let db = core.db();
        (db.text("VBD", vbd, "VDI"), db.text("VBD", vbd, "type"), db.flag("VBD", vbd, "empty"))
    };
    if empty {
        return Ok((NULL.to_owned(), false));
    }
    if kind == "CD" {
        return Ok((source, false));
    }
    copy_single(core, &source, way).await.map(|disk| (disk, true))
}

/// The copy of one disk.
pub(super) async fn copy_single(core: &Arc<Core>, source: &str, way: &Way) -> Outcome<String> {
    let operation = match way {
        Way::Snapshot | Way::Checkpoint { .. } => "snapshot",
        Way::Clone => "clone",
        Way::Copy(_) => "copy",
    };
    // Another operation on the disk is waited for.
    let patience = std::time::Duration::from_secs(7200);
    core.retry(patience, |db: &mut Database| vdi_checks::check(db, source, operation)).await?;
    match way {
        Way::Snapshot | Way::Checkpoint { .. } => vdi::take_copy(core, source, true),
        Way::Clone => vdi::take_copy(core, source, false),
        Way::Copy(sr) => {
            let sr = match sr {
                Some(sr) => sr.clone(),
                None => core.db().text("VDI", source, "SR"),
            };
            vdi_copy::copy_to(core, source, &sr).await
        }
    }
}

fn finish(core: &Core, vm: &str, name: &str, way: &Way, made: &[(String, String, bool)]) -> Outcome<String> {
    let mut db = core.db();
    let snapshot = matches!(way, Way::Snapshot | Way::Checkpoint { .. });
    let state = db.text("VM", vm, "power_state");
    // A checkpoint of a paused VM has no memory: it had not been suspended for it.
    let sleeps = state == "Suspended" && *way != Way::Snapshot;
    let state_told = if matches!(way, Way::Checkpoint { running: true }) { "Running" } else { &state };
    let copy = copy_record(&mut db, vm, name, snapshot, state_told)?;
    if sleeps {
        db.set("VM", &copy, "power_state", "Suspended");
    }
    let parts = |db: &mut Database| -> Outcome<()> {
        for (vbd, disk, _) in made {
            let new = vbd::copy(db, vbd, &copy, disk)?;
            if sleeps {
                // The devices of a VM with memory stay attached by their records.
                let attached = db.flag("VBD", vbd, "currently_attached");
                db.set("VBD", &new, "currently_attached", attached);
            }
            // The copy owns its disks whoever owns the originals.
            let disk_device = db.text("VBD", &new, "type") == "Disk";
            if disk_device && db.map_value("VBD", &new, "other_config", "owner").is_none() {
                db.put("VBD", &new, "other_config", "owner", "");
            }
        }
        for vif in db.set_of("VM", vm, "VIFs").into_iter().rev() {
            vif::copy(db, &vif, &copy, snapshot)?;
        }
        Ok(())
    };
    match parts(&mut db) {
        Ok(()) => Ok(copy),
        Err(failure) => {
            db.destroy("VM", &copy);
            Err(failure)
        }
    }
}

/// Fields of a copy that begin anew.
const FRESH: &[&str] = &[
    "uuid",
    "allowed_operations",
    "current_operations",
    "blocked_operations",
    "name_label",
    "power_state",
    "is_a_template",
    "is_default_template",
    "is_a_snapshot",
    "snapshot_of",
    "snapshots",
    "snapshot_time",
    "snapshot_info",
    "snapshot_metadata",
    "transportable_snapshot_id",
    "parent",
    "children",
    "resident_on",
    "scheduled_to_be_resident_on",
    "suspend_VDI",
    "other_config",
    "domid",
    "domarch",
    "metrics",
    "guest_metrics",
    "blobs",
    "ha_always_run",
    "VBDs",
    "VIFs",
    "VUSBs",
    "VTPMs",
    "VGPUs",
    "consoles",
    "crash_dumps",
    "appliance",
    "start_delay",
    "shutdown_delay",
    "order",
    "suspend_SR",
    "version",
    "generation_id",
    "requires_reboot",
    "groups",
    "attached_PCIs",
    "pending_guidances",
    "pending_guidances_recommended",
    "pending_guidances_full",
    "protection_policy",
    "snapshot_schedule",
    "is_snapshot_from_vmpp",
    "is_vmss_snapshot",
];

fn copy_record(db: &mut Database, vm: &str, name: &str, snapshot: bool, state: &str) -> Outcome<String> {
    let fields = db.fields("VM", vm)?;
    let get = |name: &str| fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let mut record: Vec<(&str, Value)> = fields
        .iter()
        .filter(|(name, _)| !FRESH.contains(&name.as_str()))
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    let template = get("is_a_template").is_some_and(|value| value.as_bool());
    let other_config = get("other_config").unwrap_or(Value::Map(Vec::new()));
    let original_name = get("name_label").map(|value| value.as_str().to_owned()).unwrap_or_default();
    record.extend([
        ("name_label", name.into()),
        ("is_a_template", (snapshot || template).into()),
        ("is_a_snapshot", snapshot.into()),
        ("snapshot_of", if snapshot { vm.into() } else { NULL.into() }),
        ("snapshot_time", Value::Date(if snapshot { now() } else { NEVER.to_owned() })),
        ("snapshot_info", snapshot_info(state, snapshot)),
        ("snapshot_metadata", if snapshot { metadata(&fields, vm).into() } else { "".into() }),
        ("parent", if snapshot { get("parent").unwrap_or_else(Value::null) } else { Value::null() }),
        ("other_config", copied_config(&other_config, template, &original_name, snapshot)),
        ("generation_id", generation_id(&get("generation_id"))),
    ]);
    for (class, field) in [("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")] {
        let source = get(field).map(|value| value.as_str().to_owned()).unwrap_or_default();
        if let Ok(fields) = db.fields(class, &source) {
            let values = fields.iter().filter(|(name, _)| name != "uuid");
            let copy = db.create(class, values.map(|(name, value)| (name.as_str(), value.clone())).collect());
            record.push((field, copy.into()));
        }
    }
    let copy = db.create("VM", record);
    if snapshot {
        db.set("VM", vm, "parent", copy.as_str());
    }
    Ok(copy)
}

fn snapshot_info(power_state: &str, snapshot: bool) -> Value {
    if !snapshot {
        return Value::Map(Vec::new());
    }
    Value::map([("disk-snapshot-type", "crash_consistent"), ("power-state-at-snapshot", power_state)])
}

/// `other_config` is copied whole, but a clone gets a seed for addresses of its own.
fn copied_config(config: &Value, template: bool, name: &str, snapshot: bool) -> Value {
    let mut items: Vec<(String, Value)> = config
        .as_map()
        .iter()
        .filter(|(key, _)| key != "default_template" && key != "xensource_internal")
        .cloned()
        .collect();
    if !snapshot {
        items.retain(|(key, _)| key != "mac_seed");
        items.insert(0, ("mac_seed".into(), new_uuid().into()));
    }
    if template && !items.iter().any(|(key, _)| key == "base_template_name") {
        items.insert(0, ("base_template_name".into(), name.into()));
    }
    Value::Map(items)
}

fn generation_id(present: &Option<Value>) -> Value {
    match present.as_ref().map(Value::as_str) {
        None | Some("" | "0:0") => present.clone().unwrap_or_else(|| "0:0".into()),
        Some(_) => {
            let random = uuid::Uuid::new_v4().as_u64_pair();
            format!("{}:{}", random.0, random.1).into()
        }
    }
}

/// The VM's record in the notation in which a snapshot keeps it, so that a revert can bring the fields back.
fn metadata(fields: &[(String, Value)], vm: &str) -> String {
    let quote = |text: &str| text.replace('\\', "\\\\").replace('\'', "\\'");
    let inner = |value: &Value| match value {
        Value::List(items) => {
            format!(
                "({})",
                items.iter().map(|item| format!("'{}'", quote(item.as_str()))).collect::<Vec<_>>().join(" ")
            )
        }
        Value::Map(items) => {
            let pairs = items.iter().map(|(key, value)| format!("('{}' '{}')", quote(key), quote(value.as_str())));
            format!("({})", pairs.collect::<Vec<_>>().join(" "))
        }
        Value::Int(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        other => other.as_str().to_owned(),
    };
    let column = |name: &str| {
        for prefix in ["name_", "memory_", "VCPUs_", "PV_", "HVM_", "actions_"] {
            if let Some(rest) = name.strip_prefix(prefix) {
                return format!("{prefix}_{rest}");
            }
        }
        name.to_owned()
    };
    let mut parts: Vec<String> =
        fields.iter().rev().map(|(name, value)| format!("('{}' '{}')", column(name), quote(&inner(value)))).collect();
    parts.push(format!("('_ref' '{vm}')"));
    format!("({})", parts.join(" "))
}
