//! What may be done to a VM, and when: xapi's rules in xapi's order.

use crate::model::Database;
use crate::rpc::{Failure, Outcome};

/// Operations that `VM.allowed_operations` considers.
const LISTED: &[&str] = &[
    "snapshot",
    "clone",
    "copy",
    "revert",
    "checkpoint",
    "provision",
    "start",
    "start_on",
    "pause",
    "unpause",
    "clean_shutdown",
    "clean_reboot",
    "hard_shutdown",
    "hard_reboot",
    "suspend",
    "resume",
    "resume_on",
    "pool_migrate",
    "migrate_send",
    "changing_dynamic_range",
    "changing_static_range",
    "changing_shadow_memory",
    "changing_NVRAM",
    "changing_VCPUs_live",
    "make_into_template",
    "export",
    "metadata_export",
    "destroy",
    "create_vtpm",
    "sysprep",
];

/// What the record lists. Guests here have the drivers that suspend, shutdown and migration ask for.
pub(super) fn allowed(db: &Database, vm: &str) -> Vec<&'static str> {
    let possible = |operation: &&str| check(db, vm, operation).is_ok() && mobile(db, vm, operation);
    LISTED.iter().copied().filter(possible).collect()
}

/// Whether the platform of a VM lets it move or sleep. The record says so; a call is tried all the same.
fn mobile(db: &Database, vm: &str, operation: &str) -> bool {
    let set = |key: &str| db.map_value("VM", vm, "platform", key).is_some_and(|value| value == "1" || value == "true");
    !matches!(operation, "suspend" | "checkpoint" | "pool_migrate" | "migrate_send")
        || !(set("nomigrate") || set("nested-virt"))
}

/// Power states in which an operation is possible, in the order in which an error names them.
fn states(db: &Database, vm: &str, operation: &str) -> Vec<&'static str> {
    match operation {
        "changing_VCPUs" | "changing_static_range" | "changing_memory_limits" => {
            if db.flag("VM", vm, "is_control_domain") { vec!["halted", "running"] } else { vec!["halted"] }
        }
        "changing_shadow_memory"
        | "changing_NVRAM"
        | "make_into_template"
        | "provision"
        | "start"
        | "start_on"
        | "create_vtpm" => vec!["halted"],
        "unpause" => vec!["paused"],
        "csvm" | "resume" | "resume_on" => vec!["suspended"],
        "clean_reboot"
        | "clean_shutdown"
        | "changing_VCPUs_live"
        | "pause"
        | "pool_migrate"
        | "awaiting_memory_live"
        | "call_plugin"
        | "changing_memory_live"
        | "changing_shadow_memory_live"
        | "data_source_op"
        | "send_sysrq"
        | "send_trigger"
        | "sysprep"
        | "suspend"
        | "snapshot_with_quiesce" => vec!["running"],
        "changing_dynamic_range" => vec!["halted", "running"],
        "clone" | "copy" => {
            let allowed = |pool: &String| {
                let key = db.map_value("pool", pool, "other_config", "allow_clone_suspended_vm");
                key.is_some_and(|value| value == "true" || value == "1")
            };
            if db.flag("VM", vm, "is_a_snapshot") || db.refs("pool").iter().any(allowed) {
                vec!["halted", "suspended"]
            } else {
                vec!["halted"]
            }
        }
        "create_template" | "destroy" | "export" => vec!["halted", "suspended"],
        "hard_reboot" => vec!["paused", "running"],
        "checkpoint" | "get_boot_record" | "shutdown" | "hard_shutdown" => vec!["paused", "suspended", "running"],
        "migrate_send" => vec!["halted", "suspended", "running"],
        _ => vec!["halted", "paused", "suspended", "running"],
    }
}

/// Operations that may run beside each other.
fn concurrent(operation: &str, current: &[String]) -> bool {
    let together =
        |group: &[&str]| group.contains(&operation) && current.iter().all(|running| group.contains(&running.as_str()));
    together(&["clone", "copy", "export"])
        || together(&["snapshot", "checkpoint"])
        || (current == ["migrate_send"] && matches!(operation, "metadata_export" | "clean_shutdown" | "clean_reboot"))
        || (operation == "hard_shutdown" && !current.iter().any(|running| running == "hard_shutdown"))
        || (operation == "hard_reboot"
            && !current.iter().any(|running| matches!(running.as_str(), "hard_shutdown" | "hard_reboot")))
}

/// The first reason why an operation is not possible now.
pub(crate) fn check(db: &Database, vm: &str, operation: &str) -> Outcome<()> {
    db.check("VM", vm)?;
    if let Some(reason) = db.map_value("VM", vm, "blocked_operations", operation) {
        return Err(Failure::new("OPERATION_BLOCKED", [vm, &reason]));
    }
    let state = db.text("VM", vm, "power_state").to_lowercase();
    let expected = states(db, vm, operation);
    if !expected.contains(&state.as_str()) {
        return Err(Failure::new("VM_BAD_POWER_STATE", [vm, &expected.join(", "), &state]));
    }
    let running: Vec<(String, String)> = db
        .get("VM", vm, "current_operations")?
        .as_map()
        .iter()
        .map(|(task, name)| (task.clone(), name.as_str().to_owned()))
        .collect();
    let names: Vec<String> = running.iter().map(|(_, name)| name.clone()).collect();
    if !running.is_empty() && !concurrent(operation, &names) {
        let tasks: Vec<&str> = running.iter().map(|(task, _)| task.as_str()).collect();
        let join = |items: Vec<&str>| match items.as_slice() {
            [single] => (*single).to_owned(),
            _ => format!("{{{}}}", items.join(",")),
        };
        let name = join(names.iter().map(String::as_str).collect());
        return Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VM".to_owned(), vm.to_owned(), name, join(tasks)]));
    }
    kinds(db, vm, operation)?;
    if matches!(operation, "snapshot" | "checkpoint" | "suspend") {
        let resets = |vbd: &String| db.text("VDI", &db.text("VBD", vbd, "VDI"), "on_boot") == "reset";
        if db.set_of("VM", vm, "VBDs").iter().any(resets) {
            return Err(Failure::bare("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION"));
        }
    }
    hardware(db, vm, operation, &state)?;
    if operation == "make_into_template" && db.exists("VM_appliance", &db.text("VM", vm, "appliance")) {
        let appliance = db.text("VM", vm, "appliance");
        return Err(Failure::new("VM_IS_PART_OF_AN_APPLIANCE", [vm, &appliance]));
    }
    if operation == "create_vtpm" && !db.set_of("VM", vm, "VTPMs").is_empty() {
        let count = db.set_of("VM", vm, "VTPMs").len().to_string();
        return Err(Failure::new("VTPM_MAX_AMOUNT_REACHED", [count]));
    }
    Ok(())
}

/// Devices of the host that are passed through keep a VM where it is.
fn hardware(db: &Database, vm: &str, operation: &str, state: &str) -> Outcome<()> {
    let moves = matches!(operation, "suspend" | "checkpoint" | "pool_migrate" | "migrate_send");
    let has = |field: &str| !db.set_of("VM", vm, field).is_empty();
    if moves && has("attached_PCIs") {
        return Err(Failure::new("VM_HAS_PCI_ATTACHED", [vm]));
    }
    let at_rest = matches!((operation, state), ("migrate_send", "halted") | ("checkpoint", "suspended"));
    if moves && !at_rest && has("VGPUs") {
        return Err(Failure::new("VM_HAS_VGPU", [vm]));
    }
    if (moves || operation == "snapshot") && has("VUSBs") {
        return Err(Failure::new("VM_HAS_VUSBS", [vm]));
    }
    Ok(())
}

/// Rules for templates, snapshots and control domains.
fn kinds(db: &Database, vm: &str, operation: &str) -> Outcome<()> {
    let snapshot = db.flag("VM", vm, "is_a_snapshot");
    let template = db.flag("VM", vm, "is_a_template");
    if template && !snapshot {
        let possible = matches!(
            operation,
            "changing_dynamic_range"
                | "changing_static_range"
                | "changing_memory_limits"
                | "changing_shadow_memory"
                | "changing_VCPUs"
                | "changing_NVRAM"
                | "clone"
                | "copy"
                | "export"
                | "metadata_export"
                | "provision"
        );
        let default = db.flag("VM", vm, "is_default_template");
        let ours = matches!(operation, "destroy" | "migrate_send") && !default;
        if !possible && !ours {
            return Err(Failure::new("VM_IS_TEMPLATE", [vm, operation]));
        }
    }
    if snapshot {
        let possible = matches!(
            operation,
            "revert" | "clone" | "copy" | "export" | "destroy" | "hard_shutdown" | "metadata_export"
        );
        if !possible {
            return Err(Failure::new("VM_IS_SNAPSHOT", [vm, operation]));
        }
    }
    if operation == "provision" && !template {
        return Err(Failure::bare("ONLY_ALLOWED_ON_TEMPLATES"));
    }
    if operation == "revert" && !snapshot {
        return Err(Failure::bare("ONLY_REVERT_SNAPSHOT"));
    }
    if db.flag("VM", vm, "is_control_domain") {
        if matches!(operation, "changing_VCPUs" | "destroy") {
            return Err(Failure::not_allowed("This operation is not allowed on dom0"));
        }
        let possible = matches!(
            operation,
            "metadata_export"
                | "changing_dynamic_range"
                | "changing_memory_limits"
                | "changing_static_range"
                | "start"
                | "start_on"
        );
        if !possible {
            return Err(Failure::not_allowed("This operation is not allowed on a control domain"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Value;

    #[test]
    fn a_halted_vm_lists_what_a_real_one_lists() {
        let mut db = Database::default();
        let vm = db.create("VM", Vec::new());
        let mut found = allowed(&db, &vm);
        let mut real = vec![
            "create_vtpm",
            "destroy",
            "metadata_export",
            "export",
            "make_into_template",
            "changing_NVRAM",
            "changing_shadow_memory",
            "changing_static_range",
            "changing_dynamic_range",
            "migrate_send",
            "start_on",
            "start",
            "copy",
            "clone",
            "snapshot",
        ];
        found.sort_unstable();
        real.sort_unstable();
        assert_eq!(found, real);
    }

    fn code(db: &Database, vm: &str, operation: &str) -> String {
        check(db, vm, operation).map_or_else(|failure| failure.code, |()| "possible".to_owned())
    }

    #[test]
    fn devices_of_the_host_keep_a_vm_where_it_is() {
        let mut db = Database::default();
        let with = |db: &mut Database, field: &str, state: &str| {
            let one = Value::texts(["OpaqueRef:one"]);
            db.create("VM", vec![(field, one), ("power_state", state.into())])
        };
        let vm = with(&mut db, "VUSBs", "Running");
        for operation in ["snapshot", "checkpoint", "suspend", "pool_migrate", "migrate_send"] {
            assert_eq!(code(&db, &vm, operation), "VM_HAS_VUSBS", "{operation}");
        }
        let vm = with(&mut db, "attached_PCIs", "Running");
        assert_eq!(code(&db, &vm, "migrate_send"), "VM_HAS_PCI_ATTACHED");
        assert_eq!(code(&db, &vm, "snapshot"), "possible");
        let vm = with(&mut db, "VGPUs", "Halted");
        assert_eq!(code(&db, &vm, "migrate_send"), "possible");
        db.set("VM", &vm, "power_state", "Running");
        assert_eq!(code(&db, &vm, "migrate_send"), "VM_HAS_VGPU");
    }

    #[test]
    fn what_may_go_on_beside_a_storage_migration_and_what_may_not() {
        let mut db = Database::default();
        let vm = db.create("VM", vec![("power_state", "Running".into())]);
        db.put("VM", &vm, "current_operations", "OpaqueRef:task", "migrate_send");
        for operation in ["metadata_export", "clean_shutdown", "clean_reboot", "hard_shutdown", "hard_reboot"] {
            assert_eq!(code(&db, &vm, operation), "possible", "{operation}");
        }
        for operation in ["snapshot", "checkpoint", "suspend", "migrate_send", "pool_migrate", "pause"] {
            assert_eq!(code(&db, &vm, operation), "OTHER_OPERATION_IN_PROGRESS", "{operation}");
        }
        db.set("VM", &vm, "current_operations", Value::map([("OpaqueRef:task", "snapshot")]));
        assert_eq!(code(&db, &vm, "snapshot"), "possible");
        assert_eq!(code(&db, &vm, "metadata_export"), "OTHER_OPERATION_IN_PROGRESS");
    }
}
