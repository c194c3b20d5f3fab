//! Block devices of VMs: their records, discs in drives, and the calls for plugging.

use super::{Call, vbd_plug};
use crate::model::{Database, NULL, Value, read_record};
use crate::rpc::{Failure, Outcome};

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    let vbd = call.text(0);
    let void = |()| Value::void();
    Some(match simple {
        "create" => create(call),
        "destroy" => destroy(call),
        "plug" => vbd_plug::plug(core, &call.task, vbd).await.map(void),
        "unplug" | "unplug_force" => vbd_plug::unplug(core, &call.task, vbd).await.map(void),
        "insert" => {
            let mut db = core.db();
            vbd_plug::check(&db, vbd, "insert", true).and_then(|()| db.check("VDI", call.text(1))).map(|()| {
                db.set("VBD", vbd, "VDI", call.text(1));
                db.set("VBD", vbd, "empty", false);
                Value::void()
            })
        }
        "eject" => {
            let mut db = core.db();
            vbd_plug::check(&db, vbd, "eject", true).map(|()| {
                eject(&mut db, vbd);
                Value::void()
            })
        }
        "set_mode" => set_mode(call),
        "assert_attachable" => vbd_plug::check(&core.db(), vbd, "attach", true).map(void),
        _ => return None,
    })
}

/// Takes the disc out.
pub(super) fn eject(db: &mut Database, vbd: &str) {
    db.set("VBD", vbd, "VDI", NULL);
    db.set("VBD", vbd, "empty", true);
}

fn create(call: &Call) -> Outcome {
    let fields = read_record("VBD", &call.value(0))?;
    create_in(&mut call.core.db(), fields).map(Value::Text)
}

/// The number of a device name: `3`, `xvdd`, `hdd`, `sdd`.
fn number_of(device: &str) -> Option<u32> {
    if let Ok(number) = device.parse() {
        return Some(number);
    }
    let letter = ["xvd", "hd", "sd"].iter().find_map(|prefix| device.strip_prefix(prefix))?;
    let mut letters = letter.chars();
    let first = letters.next().filter(char::is_ascii_lowercase)?;
    letters.next().is_none().then(|| u32::from(first) - u32::from('a'))
}

fn used_numbers(db: &Database, vm: &str) -> Vec<u32> {
    db.set_of("VM", vm, "VBDs").iter().filter_map(|vbd| number_of(&db.text("VBD", vbd, "userdevice"))).collect()
}

/// Numbers that a VM's new device could take.
pub(super) fn free_numbers(db: &Database, vm: &str) -> Vec<u32> {
    let used = used_numbers(db, vm);
    let control = db.flag("VM", vm, "is_control_domain");
    // Number 3 is the CD drive's by custom; a control domain has a larger but finite list.
    let last = if control { 255 } else { 16 };
    (0..last).filter(|number| !used.contains(number)).collect()
}

/// Checks and makes a device.
pub(super) fn create_in(db: &mut Database, fields: Vec<(String, Value)>) -> Outcome<String> {
    let value = |name: &str| fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let text = |name: &str| value(name).map(|value| value.as_str().to_owned()).unwrap_or_default();
    let (vm, vdi, device, kind, mode) = (text("VM"), text("VDI"), text("userdevice"), text("type"), text("mode"));
    let empty = value("empty").is_some_and(|value| value.as_bool());
    db.check("VM", &vm)?;
    if !empty {
        db.check("VDI", &vdi)?;
        let vdi_type = db.text("VDI", &vdi, "type");
        if !matches!(
            vdi_type.as_str(),
            "system" | "user" | "ephemeral" | "suspend" | "crashdump" | "metadata" | "rrd" | "pvs_cache"
        ) {
            let name = if vdi_type == "cbt_metadata" { "CBT metadata" } else { &vdi_type };
            return Err(Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi.as_str(), name]));
        }
    }
    if kind == "CD" && mode != "RO" {
        return Err(Failure::bare("VBD_CDS_MUST_BE_READONLY"));
    }
    if kind != "CD" && empty {
        return Err(Failure::new("VBD_NOT_REMOVABLE_MEDIA", ["in constructor"]));
    }
    if mode == "RW" && db.flag("VDI", &vdi, "read_only") {
        return Err(Failure::new("VDI_READONLY", [vdi]));
    }
    let migrating = db
        .get("VM", &vm, "current_operations")?
        .as_map()
        .iter()
        .find(|(_, name)| matches!(name.as_str(), "migrate_send" | "pool_migrate"));
    if let Some((task, name)) = migrating {
        return Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VM", &vm, name.as_str(), task]));
    }
    let invalid = || Failure::new("INVALID_DEVICE", [device.as_str()]);
    let device = if device == "autodetect" {
        free_numbers(db, &vm).first().ok_or_else(invalid)?.to_string()
    } else {
        let number = number_of(&device).ok_or_else(invalid)?;
        if used_numbers(db, &vm).contains(&number) {
            return Err(Failure::new("DEVICE_ALREADY_EXISTS", [device]));
        }
        device
    };
    let metrics = db.create("VBD_metrics", Vec::new());
    let mut record: Vec<(&str, Value)> = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    record.retain(|(name, _)| !matches!(*name, "userdevice" | "device" | "currently_attached" | "uuid" | "metrics"));
    record.push(("userdevice", device.into()));
    record.push(("metrics", metrics.into()));
    if empty {
        record.retain(|(name, _)| *name != "VDI");
    }
    Ok(db.create("VBD", record))
}

fn destroy(call: &Call) -> Outcome {
    let mut db = call.core.db();
    let vbd = call.text(0);
    db.check("VBD", vbd)?;
    if db.flag("VBD", vbd, "currently_attached") {
        let vm = db.text("VM", &db.text("VBD", vbd, "VM"), "uuid");
        let text = format!("VBD '{}' still attached to '{vm}'", db.text("VBD", vbd, "uuid"));
        return Err(Failure::not_allowed(text));
    }
    remove(&mut db, vbd);
    Ok(Value::void())
}

/// Removes a device and its metrics.
pub(super) fn remove(db: &mut Database, vbd: &str) {
    let metrics = db.text("VBD", vbd, "metrics");
    db.destroy("VBD_metrics", &metrics);
    db.destroy("VBD", vbd);
}

fn set_mode(call: &Call) -> Outcome {
    let mut db = call.core.db();
    let vbd = call.text(0);
    db.check("VBD", vbd)?;
    let vm = db.text("VBD", vbd, "VM");
    let state = db.text("VM", &vm, "power_state").to_lowercase();
    if state != "halted" {
        return Err(Failure::new("VM_BAD_POWER_STATE", [vm.as_str(), "halted", &state]));
    }
    if call.text(1) == "RW" && db.flag("VDI", &db.text("VBD", vbd, "VDI"), "read_only") {
        return Err(Failure::new("VDI_READONLY", [db.text("VBD", vbd, "VDI")]));
    }
    db.set("VBD", vbd, "mode", call.text(1));
    Ok(Value::void())
}

/// Copies a device to another VM with another disk.
pub(super) fn copy(db: &mut Database, vbd: &str, vm: &str, vdi: &str) -> Outcome<String> {
    let fields = db.fields("VBD", vbd)?;
    let metrics = db.create("VBD_metrics", Vec::new());
    let empty = vdi == NULL || db.flag("VBD", vbd, "empty");
    let mut record: Vec<(&str, Value)> = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    record.retain(|(name, _)| {
        !matches!(*name, "uuid" | "VM" | "VDI" | "metrics" | "empty" | "currently_attached" | "current_operations")
    });
    record.extend([("VM", vm.into()), ("VDI", vdi.into()), ("empty", empty.into()), ("metrics", metrics.into())]);
    Ok(db.create("VBD", record))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_numbers_under_all_their_names() {
        assert_eq!(number_of("3"), Some(3));
        assert_eq!(number_of("xvdd"), Some(3));
        assert_eq!(number_of("hda"), Some(0));
        assert_eq!(number_of("nonsense"), None);
    }
}
