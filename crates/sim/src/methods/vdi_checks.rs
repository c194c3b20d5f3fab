//! What may be done to a disk, and when: xapi's rules in xapi's order.

use super::sr;
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};

/// Operations that `VDI.allowed_operations` lists.
const LISTED: &[&str] =
    &["copy", "generate_config", "clone", "forget", "resize", "resize_online", "snapshot", "destroy", "update"];

/// How an error names the type.
const METADATA: &str = "CBT metadata";

pub(super) fn allowed(db: &Database, vdi: &str) -> Vec<&'static str> {
    LISTED.iter().copied().filter(|operation| check(db, vdi, operation).is_ok()).collect()
}

fn feature_of(operation: &str) -> Option<&'static str> {
    Some(match operation {
        "snapshot" => "VDI_SNAPSHOT",
        "destroy" => "VDI_DELETE",
        "resize" => "VDI_RESIZE",
        "update" => "VDI_UPDATE",
        "resize_online" => "VDI_RESIZE_ONLINE",
        "generate_config" => "VDI_GENERATE_CONFIG",
        "clone" => "VDI_CLONE",
        "mirror" => "VDI_MIRROR",
        "enable_cbt" | "disable_cbt" | "data_destroy" | "list_changed_blocks" => "VDI_CONFIG_CBT",
        "set_on_boot" => "VDI_RESET_ON_BOOT",
        _ => return None,
    })
}

/// The first reason why an operation is not possible now.
pub(crate) fn check(db: &Database, vdi: &str, operation: &str) -> Outcome<()> {
    db.check("VDI", vdi)?;
    let sr = db.text("VDI", vdi, "SR");
    let current: Vec<(String, String)> = db
        .get("VDI", vdi, "current_operations")?
        .as_map()
        .iter()
        .map(|(task, name)| (task.clone(), name.as_str().to_owned()))
        .collect();
    let in_progress = |name: &str, task: &str| Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VDI", vdi, name, task]);
    // A migration destroys the disk that it has mirrored.
    let mirrored = operation == "destroy" && current.iter().any(|(_, name)| name == "mirror");
    if let Some((task, name)) = current.iter().find(|(_, name)| name != "copy").filter(|_| !mirrored) {
        return Err(in_progress(name, task));
    }
    if operation == "resize" && sr::hosts(db, &sr).is_empty() {
        return Err(Failure::new("SR_HAS_NO_PBDS", [sr]));
    }
    attachments(db, vdi, operation)?;
    if let Some(feature) = feature_of(operation)
        && !sr::has_feature(db, &sr, feature)
    {
        return Err(Failure::new("SR_OPERATION_NOT_SUPPORTED", [sr]));
    }
    let kind = db.text("VDI", vdi, "type");
    let refused_for_metadata = matches!(
        operation,
        "clone"
            | "copy"
            | "disable_cbt"
            | "enable_cbt"
            | "mirror"
            | "resize"
            | "resize_online"
            | "snapshot"
            | "set_on_boot"
    );
    if kind == "cbt_metadata" && refused_for_metadata {
        return Err(Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi, METADATA]));
    }
    if db.flag("VDI", vdi, "cbt_enabled") && matches!(operation, "mirror" | "set_on_boot") {
        return Err(Failure::new("VDI_CBT_ENABLED", [vdi]));
    }
    last_rules(db, vdi, operation, &kind, current.iter().any(|(_, name)| name == "copy"))
}

/// Devices that use the disk now.
fn attachments(db: &Database, vdi: &str, operation: &str) -> Outcome<()> {
    let vbds = db.set_of("VDI", vdi, "VBDs");
    let active: Vec<&String> = vbds.iter().filter(|vbd| db.flag("VBD", vbd, "currently_attached")).collect();
    let live = matches!(
        operation,
        "snapshot" | "resize_online" | "blocked" | "clone" | "mirror" | "enable_cbt" | "disable_cbt" | "data_destroy"
    );
    let blocked = match operation {
        _ if live => false,
        "copy" => active.iter().any(|vbd| db.text("VBD", vbd, "mode") == "RW"),
        // A checkpoint's devices stay attached.
        "list_changed_blocks" => active.iter().any(|vbd| !db.flag("VM", &db.text("VBD", vbd, "VM"), "is_a_snapshot")),
        _ => !active.is_empty(),
    };
    if blocked {
        return Err(Failure::new("VDI_IN_USE", [vdi, operation]));
    }
    if operation == "data_destroy" {
        return Ok(());
    }
    for vbd in &vbds {
        if let Some((task, name)) = db.get("VBD", vbd, "current_operations").ok().and_then(|map| map.as_map().first()) {
            return Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VDI", vdi, name.as_str(), task]));
        }
    }
    Ok(())
}

fn last_rules(db: &Database, vdi: &str, operation: &str, kind: &str, copying: bool) -> Outcome<()> {
    let snapshot = db.flag("VDI", vdi, "is_a_snapshot");
    let reset = db.text("VDI", vdi, "on_boot") == "reset";
    match operation {
        "forget" if kind == "rrd" => Err(Failure::new("VDI_HAS_RRDS", [vdi])),
        "destroy" | "data_destroy" => {
            if operation == "data_destroy" {
                if !snapshot {
                    return Err(Failure::not_allowed(format!("VDI is not a snapshot: {vdi}")));
                }
                if !db.flag("VDI", vdi, "cbt_enabled") {
                    return Err(Failure::new("VDI_NO_CBT_METADATA", [vdi]));
                }
            }
            let sr = db.text("VDI", vdi, "SR");
            if db.text("SR", &sr, "type") == "udev" {
                Err(Failure::new("VDI_IS_A_PHYSICAL_DEVICE", [vdi]))
            } else if db.flag("SR", &sr, "is_tools_sr") {
                Err(Failure::new("SR_OPERATION_NOT_SUPPORTED", [sr]))
            } else if kind == "rrd" {
                Err(Failure::new("VDI_HAS_RRDS", [vdi]))
            } else {
                Ok(())
            }
        }
        "snapshot" if db.flag("VDI", vdi, "sharable") => Err(Failure::new("VDI_IS_SHARABLE", [vdi])),
        "snapshot" | "copy" if reset => Err(Failure::bare("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")),
        "copy" if matches!(kind, "ha_statefile" | "redo_log") => {
            let text = "VDI containing HA statefile or redo log cannot be copied (check the VDI's allowed operations).";
            Err(Failure::not_allowed(text))
        }
        "snapshot" if copying => Err(Failure::not_allowed("Snapshot operation not allowed during copy.")),
        "enable_cbt" | "disable_cbt" => {
            if snapshot {
                Err(Failure::not_allowed(format!("VDI is a snapshot: {vdi}")))
            } else if !matches!(kind, "user" | "system") {
                Err(Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi, kind]))
            } else if reset {
                Err(Failure::bare("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION"))
            } else {
                Ok(())
            }
        }
        _ => Ok(()),
    }
}

/// `VDI_INCOMPATIBLE_TYPE` for a disk without data.
pub(super) fn check_has_data(db: &Database, vdi: &str) -> Outcome<()> {
    if db.get("VDI", vdi, "type").map(Value::as_str)? == "cbt_metadata" {
        return Err(Failure::new("VDI_INCOMPATIBLE_TYPE", [vdi, METADATA]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(fields: Vec<(&str, Value)>) -> (Database, String) {
        let mut db = Database::default();
        let features = ["VDI_DELETE", "VDI_MIRROR", "VDI_SNAPSHOT", "VDI_CONFIG_CBT"];
        let features = Value::Map(features.iter().map(|name| ((*name).to_owned(), Value::Int(1))).collect());
        db.create("SM", vec![("type", "ext".into()), ("features", features)]);
        let sr = db.create("SR", vec![("type", "ext".into())]);
        let mut all = vec![("SR", sr.into())];
        all.extend(fields);
        let vdi = db.create("VDI", all);
        (db, vdi)
    }

    fn code(db: &Database, vdi: &str, operation: &str) -> String {
        check(db, vdi, operation).map_or_else(|failure| failure.code, |()| "possible".to_owned())
    }

    #[test]
    fn a_mirrored_disk_can_be_destroyed_by_its_migration_and_nothing_else_be_done_to_it() {
        let (mut db, vdi) = disk(Vec::new());
        db.put("VDI", &vdi, "current_operations", "OpaqueRef:task", "mirror");
        assert_eq!(code(&db, &vdi, "destroy"), "possible");
        for operation in ["snapshot", "copy", "enable_cbt", "mirror", "data_destroy"] {
            assert_eq!(code(&db, &vdi, operation), "OTHER_OPERATION_IN_PROGRESS", "{operation}");
        }
        db.set("VDI", &vdi, "current_operations", Value::map([("OpaqueRef:task", "copy")]));
        assert_eq!(code(&db, &vdi, "snapshot"), "OPERATION_NOT_ALLOWED");
        assert_eq!(code(&db, &vdi, "enable_cbt"), "possible");
    }

    #[test]
    fn disks_of_the_pool_itself_are_not_for_clients() {
        let (db, vdi) = disk(vec![("type", "rrd".into())]);
        assert_eq!(code(&db, &vdi, "destroy"), "VDI_HAS_RRDS");
        assert_eq!(code(&db, &vdi, "forget"), "VDI_HAS_RRDS");
        assert_eq!(code(&db, &vdi, "enable_cbt"), "VDI_INCOMPATIBLE_TYPE");
        let (db, vdi) = disk(vec![("type", "redo_log".into())]);
        assert_eq!(code(&db, &vdi, "copy"), "OPERATION_NOT_ALLOWED");
        let (mut db, vdi) = disk(Vec::new());
        let sr = db.text("VDI", &vdi, "SR");
        db.set("SR", &sr, "is_tools_sr", true);
        assert_eq!(code(&db, &vdi, "destroy"), "SR_OPERATION_NOT_SUPPORTED");
    }
}
