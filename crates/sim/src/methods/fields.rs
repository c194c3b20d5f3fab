//! Records as a client sees them: what is stored, and the fields that follow from other objects.

use super::{vbd_plug, vdi_checks, vm_checks};
use crate::core::Core;
use crate::model::{Database, Value};
use crate::rpc::Outcome;

/// The full record of an object.
pub(crate) fn record(core: &Core, db: &Database, class: &str, reference: &str) -> Outcome {
    let mut fields = db.fields(class, reference)?;
    for (name, value) in &mut fields {
        if let Some(computed) = computed(core, db, class, reference, name) {
            *value = computed;
        }
    }
    if core.options.older_server {
        fields.retain(|(name, _)| !matches!((class, name.as_str()), ("VDI", "cbt_enabled") | ("network", "purpose")));
    }
    Ok(Value::Map(fields))
}

/// One field of an object.
pub(crate) fn field(core: &Core, db: &Database, class: &str, reference: &str, name: &str) -> Outcome {
    let stored = db.get(class, reference, name)?;
    Ok(computed(core, db, class, reference, name).unwrap_or_else(|| stored.clone()))
}

/// A field that follows from other objects or from the storage.
fn computed(core: &Core, db: &Database, class: &str, reference: &str, name: &str) -> Option<Value> {
    match (class, name) {
        ("VM", "allowed_operations") => Some(Value::texts(vm_checks::allowed(db, reference))),
        ("VDI", "allowed_operations") => Some(Value::texts(vdi_checks::allowed(db, reference))),
        ("VBD", "allowed_operations") => Some(Value::texts(vbd_plug::allowed(db, reference))),
        ("VIF", "allowed_operations") => {
            let running = db.text("VM", &db.text("VIF", reference, "VM"), "power_state") == "Running";
            let plugged = db.flag("VIF", reference, "currently_attached");
            Some(Value::texts(match (running, plugged) {
                (true, true) => vec!["attach", "unplug"],
                (true, false) => vec!["attach", "plug"],
                _ => vec!["attach"],
            }))
        }
        ("SR", "allowed_operations") => Some(Value::texts(super::sr_checks::allowed(db, reference))),
        ("host", "allowed_operations") => {
            Some(Value::texts(["vm_migrate", "provision", "vm_resume", "enable", "evacuate", "vm_start"]))
        }
        ("task", "allowed_operations") => {
            let cancellable = core.cancels.lock().is_ok_and(|cancels| cancels.contains_key(reference));
            let pending = db.text("task", reference, "status") == "pending";
            Some(if cancellable && pending { Value::texts(["cancel"]) } else { Value::List(Vec::new()) })
        }
        ("VDI", "physical_utilisation") => {
            let info = core.storage.vdi(db.text("VDI", reference, "uuid").parse().ok()?).ok()?;
            Some(info.physical_utilisation.into())
        }
        ("SR", "physical_utilisation" | "physical_size" | "virtual_allocation") => {
            let usage = core.storage.sr_usage(db.text("SR", reference, "uuid").parse().ok()?).ok()?;
            Some(match name {
                "physical_utilisation" => usage.physical_utilisation.into(),
                "physical_size" => usage.physical_size.into(),
                _ => usage.virtual_allocation.into(),
            })
        }
        _ => None,
    }
}
