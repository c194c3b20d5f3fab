//! `VM.revert`: fields from the snapshot's memory of them, disks as clones of the snapshot's, with new uuids.

use super::vm_clone::{Way, copy_disk, copy_single};
use super::{Call, Operation, vbd, vif, vm_checks, vm_power};
use crate::core::{Core, post_message};
use crate::model::{Database, NULL, Type, Value, schema};
use crate::rpc::{Failure, Outcome};

/// Fields that a revert leaves as they are.
const KEPT: &[&str] = &[
    "uuid",
    "_ref",
    "suspend_VDI",
    "power_state",
    "parent",
    "current_operations",
    "allowed_operations",
    "metrics",
    "guest_metrics",
    "resident_on",
    "domid",
    "protection_policy",
    "snapshot_schedule",
    "scheduled_to_be_resident_on",
    "snapshots",
    "tags",
    "affinity",
    "groups",
    "consoles",
    "VBDs",
    "VIFs",
    "VGPUs",
    "VUSBs",
    "VTPMs",
    "attached_PCIs",
    "is_snapshot_from_vmpp",
    "children",
    "crash_dumps",
];

pub(super) async fn revert(call: &Call) -> Outcome {
    let core = &call.core;
    let snapshot = call.text(0);
    let vm = {
        let db = core.db();
        db.check("VM", snapshot)?;
        db.text("VM", snapshot, "snapshot_of")
    };
    vm_checks::check(&core.db(), snapshot, "revert")?;
    if !core.db().exists("VM", &vm) {
        return Err(Failure::new("VM_REVERT_FAILED", [snapshot, &vm]));
    }
    let objects = [("VM", snapshot, "revert"), ("VM", vm.as_str(), "reverting")];
    let operation = Operation::begin(call, &objects, |db: &Database| {
        vm_checks::check(db, snapshot, "revert")?;
        vm_checks::check(db, &vm, "reverting")
    })
    .await?;
    if core.db().text("VM", &vm, "power_state") != "Halted" {
        vm_power::hard_shutdown(core, &vm);
    }
    restore_fields(&mut core.db(), snapshot, &vm);
    let outcome = restore_devices(core, snapshot, &vm).await;
    drop(operation);
    outcome.map_err(|failure| match failure.code.as_str() {
        "SR_BACKEND_FAILURE_44" | "SR_BACKEND_FAILURE_109" | "VDI_INCOMPATIBLE_TYPE" => failure,
        _ => Failure::new("VM_REVERT_FAILED", [snapshot, &vm]),
    })?;
    let mut db = core.db();
    db.set("VM", &vm, "parent", snapshot);
    let (name, uuid) = (db.text("VM", &vm, "name_label"), db.text("VM", &vm, "uuid"));
    let body = format!(
        "VM '{name}' (uuid: {uuid}) reverted to snapshot: {} (uuid {})",
        db.text("VM", snapshot, "name_label"),
        db.text("VM", snapshot, "uuid")
    );
    post_message(&mut db, "VM_SNAPSHOT_REVERTED", 5, "VM", &uuid, &body);
    Ok(Value::void())
}

/// Replaces devices and disks. The old disks that the snapshot has a version of are destroyed.
async fn restore_devices(core: &std::sync::Arc<Core>, snapshot: &str, vm: &str) -> Outcome<()> {
    let (snapshot_vbds, old_vbds, originals) = {
        let db = core.db();
        let snapshot_vbds = db.set_of("VM", snapshot, "VBDs");
        let originals: Vec<String> = snapshot_vbds
            .iter()
            .filter(|vbd| db.text("VBD", vbd, "type") == "Disk")
            .map(|vbd| db.text("VDI", &db.text("VBD", vbd, "VDI"), "snapshot_of"))
            .collect();
        (snapshot_vbds, db.set_of("VM", vm, "VBDs"), originals)
    };
    for old in old_vbds {
        let (vdi, kind) = {
            let mut db = core.db();
            let found = (db.text("VBD", &old, "VDI"), db.text("VBD", &old, "type"));
            vbd::remove(&mut db, &old);
            found
        };
        // A disk that the snapshot does not know stays, attached to nothing.
        if kind != "Disk" || !originals.contains(&vdi) {
            continue;
        }
        core.storage.destroy(core.disk_id(&vdi)?)?;
        core.db().destroy("VDI", &vdi);
    }
    for vbd in snapshot_vbds {
        let (disk, ours) = copy_disk(core, &vbd, &Way::Clone).await?;
        let mut db = core.db();
        if ours {
            let original = db.text("VDI", &db.text("VBD", &vbd, "VDI"), "snapshot_of");
            if original != NULL {
                for sibling in db.refs_where("VDI", "snapshot_of", &original) {
                    db.set("VDI", &sibling, "snapshot_of", disk.as_str());
                }
            }
        }
        let new = vbd::copy(&mut db, &vbd, vm, &disk)?;
        let attached = db.flag("VBD", &vbd, "currently_attached");
        db.set("VBD", &new, "currently_attached", attached);
    }
    restore_memory(core, snapshot, vm).await?;
    let mut db = core.db();
    for vif in db.set_of("VM", vm, "VIFs") {
        db.destroy("VIF", &vif);
    }
    for vif in db.set_of("VM", snapshot, "VIFs").into_iter().rev() {
        vif::copy(&mut db, &vif, vm, true)?;
    }
    Ok(())
}

/// The suspended state of a checkpoint, and the TPM.
async fn restore_memory(core: &std::sync::Arc<Core>, snapshot: &str, vm: &str) -> Outcome<()> {
    let (image, state) = {
        let db = core.db();
        (db.text("VM", snapshot, "suspend_VDI"), db.text("VM", snapshot, "power_state"))
    };
    if core.db().exists("VDI", &image) {
        let copy = copy_single(core, &image, &Way::Clone).await?;
        core.db().set("VM", vm, "suspend_VDI", copy);
    }
    core.db().set("VM", vm, "power_state", state);
    let old = core.db().set_of("VM", vm, "VTPMs");
    for vtpm in old {
        super::vtpm::destroy(core, &vtpm);
    }
    super::vtpm::copy_all(core, snapshot, vm);
    Ok(())
}

fn restore_fields(db: &mut Database, snapshot: &str, vm: &str) {
    let text = db.text("VM", snapshot, "snapshot_metadata");
    let Some(class) = schema().get("VM") else { return };
    for (name, text) in read_pairs(&text) {
        let name = name.replace("__", "_");
        let Some(field) = class.field(&name).filter(|_| !KEPT.contains(&name.as_str())) else { continue };
        let value = if name == "ha_always_run" { Value::Bool(false) } else { read_field(&field.kind, &text) };
        db.set("VM", vm, &name, value);
    }
}

fn read_field(kind: &Type, text: &str) -> Value {
    match kind {
        Type::Int => Value::Int(text.parse().unwrap_or_default()),
        Type::Float => Value::Float(text.parse().unwrap_or_default()),
        Type::Bool => Value::Bool(text == "true"),
        Type::Date => Value::Date(text.to_owned()),
        Type::Set(_) => Value::texts(read_strings(text)),
        Type::Map(..) => Value::map(read_pairs(text)),
        _ => Value::text(text),
    }
}

/// The quoted strings of `('a' 'b')`, also of nested lists, in order.
fn read_strings(text: &str) -> Vec<String> {
    let mut strings = Vec::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\'' {
            continue;
        }
        let mut string = String::new();
        loop {
            match characters.next() {
                None | Some('\'') => break,
                Some('\\') => string.extend(characters.next()),
                Some(other) => string.push(other),
            }
        }
        strings.push(string);
    }
    strings
}

/// The pairs of `(('key' 'value') ...)`.
fn read_pairs(text: &str) -> Vec<(String, String)> {
    let strings = read_strings(text);
    strings.chunks_exact(2).filter_map(|pair| Some((pair.first()?.clone(), pair.last()?.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_a_snapshot_is_read_back() {
        let text = r"(('platform' '((\'acpi\' \'1\'))') ('tags' '(\'a b\' \'c\')') ('domid' '-1'))";
        let pairs = read_pairs(text);
        assert_eq!(pairs[0], ("platform".into(), "(('acpi' '1'))".into()));
        assert_eq!(read_pairs(&pairs[0].1), [("acpi".into(), "1".into())]);
        assert_eq!(read_strings(&pairs[1].1), ["a b", "c"]);
    }
}
