//! What may be done with an SR, and when: xapi's rules in xapi's order.

use super::sr::has_feature;
use crate::model::Database;
use crate::rpc::{Failure, Outcome};

/// Every operation that an SR's `allowed_operations` can list.
const ALL: &[&str] = &[
    "scan",
    "destroy",
    "forget",
    "plug",
    "unplug",
    "vdi_create",
    "vdi_destroy",
    "vdi_resize",
    "vdi_clone",
    "vdi_snapshot",
    "vdi_mirror",
    "vdi_enable_cbt",
    "vdi_disable_cbt",
    "vdi_data_destroy",
    "vdi_list_changed_blocks",
    "vdi_set_on_boot",
    "vdi_introduce",
    "vdi_revert",
    "update",
    "pbd_create",
    "pbd_destroy",
];

/// The driver's feature that an operation needs. A clone needs none: it would be faked.
fn feature_of(operation: &str) -> Option<&'static str> {
    Some(match operation {
        "vdi_create" => "VDI_CREATE",
        "vdi_destroy" => "VDI_DELETE",
        "vdi_resize" => "VDI_RESIZE",
        "vdi_introduce" => "VDI_INTRODUCE",
        "vdi_mirror" => "VDI_MIRROR",
        "vdi_enable_cbt" | "vdi_disable_cbt" | "vdi_data_destroy" | "vdi_list_changed_blocks" => "VDI_CONFIG_CBT",
        "vdi_set_on_boot" => "VDI_RESET_ON_BOOT",
        "update" => "SR_UPDATE",
        "vdi_revert" => "VDI_REVERT",
        "vdi_snapshot" => "VDI_SNAPSHOT",
        _ => return None,
    })
}

pub(super) fn allowed(db: &Database, sr: &str) -> Vec<&'static str> {
    ALL.iter().copied().filter(|operation| check(db, sr, operation).is_ok()).collect()
}

/// The first reason why an operation is not possible now.
pub(super) fn check(db: &Database, sr: &str, operation: &str) -> Outcome<()> {
    db.check("SR", sr)?;
    if feature_of(operation).is_some_and(|feature| !has_feature(db, sr, feature)) {
        return Err(Failure::new("SR_OPERATION_NOT_SUPPORTED", [sr]));
    }
    if matches!(operation, "destroy" | "forget") {
        let pbds = db.set_of("SR", sr, "PBDs");
        if pbds.iter().any(|pbd| db.flag("PBD", pbd, "currently_attached")) {
            return Err(Failure::new("SR_HAS_PBD", [sr]));
        }
        if operation == "destroy" && pbds.is_empty() {
            return Err(Failure::new("SR_HAS_NO_PBDS", [sr]));
        }
        let in_use = |vdi: &String| db.flag("VDI", vdi, "managed") && db.text("VDI", vdi, "type") != "rrd";
        if operation == "destroy" && db.set_of("SR", sr, "VDIs").iter().any(in_use) {
            return Err(Failure::bare("SR_NOT_EMPTY"));
        }
    }
    let current = db.get("SR", sr, "current_operations")?.as_map();
    // Plugs go together with plugs, and nothing else with anything.
    let alone = current.iter().find(|(_, name)| operation != "plug" || name.as_str() != "plug");
    match alone {
        Some((task, name)) => Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["SR", sr, name.as_str(), task])),
        None => Ok(()),
    }
}
