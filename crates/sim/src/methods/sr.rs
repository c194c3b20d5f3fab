//! Storage repositories and their connections to hosts.

use super::Call;
use crate::core::parse_uuid;
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};
use crate::storage::SrKind;

/// What an SR's driver can do, as its SM record lists it.
pub(crate) fn features(kind: SrKind) -> Vec<&'static str> {
    let mut features = vec![
        "SR_PROBE",
        "SR_UPDATE",
        "VDI_ACTIVATE",
        "VDI_ATTACH",
        "VDI_CLONE",
        "VDI_CREATE",
        "VDI_DEACTIVATE",
        "VDI_DELETE",
        "VDI_DETACH",
        "VDI_GENERATE_CONFIG",
        "VDI_MIRROR",
        "VDI_RESET_ON_BOOT",
        "VDI_RESIZE",
        "VDI_SNAPSHOT",
        "VDI_CONFIG_CBT",
    ];
    if matches!(kind, SrKind::Ext | SrKind::Large) {
        features.push("THIN_PROVISIONING");
    }
    features.sort_unstable();
    features
}

/// Whether the driver of a disk's SR has a feature.
pub(super) fn has_feature(db: &Database, sr: &str, feature: &str) -> bool {
    let kind = db.text("SR", sr, "type");
    db.refs_where("SM", "type", &kind)
        .iter()
        .any(|sm| db.get("SM", sm, "features").is_ok_and(|features| features.member(feature).is_some()))
}

/// Hosts with an attached PBD of an SR.
pub(crate) fn hosts(db: &Database, sr: &str) -> Vec<String> {
    let pbds = db.set_of("SR", sr, "PBDs");
    let attached = pbds.iter().filter(|pbd| db.flag("PBD", pbd, "currently_attached"));
    attached.map(|pbd| db.text("PBD", pbd, "host")).collect()
}

/// `SR_HAS_NO_PBDS` unless some host has it attached.
pub(super) fn check_attached(db: &Database, sr: &str) -> Outcome<()> {
    db.check("SR", sr)?;
    if hosts(db, sr).is_empty() {
        return Err(Failure::new("SR_HAS_NO_PBDS", [sr]));
    }
    Ok(())
}

pub(super) fn allowed(db: &Database, sr: &str) -> Vec<&'static str> {
    let mut operations = vec!["unplug", "plug", "pbd_create", "update", "pbd_destroy", "scan"];
    let of_feature = [
        ("VDI_CONFIG_CBT", "vdi_enable_cbt"),
        ("VDI_CONFIG_CBT", "vdi_list_changed_blocks"),
        ("VDI_CONFIG_CBT", "vdi_disable_cbt"),
        ("VDI_CONFIG_CBT", "vdi_data_destroy"),
        ("VDI_RESIZE", "vdi_resize"),
        ("VDI_CLONE", "vdi_clone"),
        ("VDI_SNAPSHOT", "vdi_snapshot"),
        ("VDI_MIRROR", "vdi_mirror"),
        ("VDI_CREATE", "vdi_create"),
        ("VDI_DELETE", "vdi_destroy"),
    ];
    operations.extend(of_feature.iter().filter(|(feature, _)| has_feature(db, sr, feature)).map(|(_, name)| *name));
    operations
}

pub(super) async fn call(call: &Call, class: &str, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    let reference = call.text(0);
    Some(match (class, simple) {
        ("SR", "scan") => scan(call),
        ("SR", "update") => check_attached(&core.db(), reference).map(|()| Value::void()),
        ("SR", "set_name_label" | "set_name_description" | "set_shared") => {
            let mut db = core.db();
            let field = simple.trim_start_matches("set_");
            db.check("SR", reference).map(|()| {
                db.set("SR", reference, field, call.value(1));
                Value::void()
            })
        }
        ("SR", "get_supported_types") => {
            let db = core.db();
            Ok(Value::texts(db.refs("SM").iter().map(|sm| db.text("SM", sm, "type"))))
        }
        ("PBD", "plug") => {
            let mut db = core.db();
            db.check("PBD", reference).map(|()| {
                db.set("PBD", reference, "currently_attached", true);
                Value::void()
            })
        }
        ("PBD", "unplug") => unplug(call),
        _ => return None,
    })
}

fn unplug(call: &Call) -> Outcome {
    let mut db = call.core.db();
    let pbd = call.text(0);
    db.check("PBD", pbd)?;
    let (sr, host) = (db.text("PBD", pbd, "SR"), db.text("PBD", pbd, "host"));
    let in_use = db.set_of("SR", &sr, "VDIs").into_iter().find(|vdi| {
        db.set_of("VDI", vdi, "VBDs").iter().any(|vbd| {
            db.flag("VBD", vbd, "currently_attached")
                && db.text("VM", &db.text("VBD", vbd, "VM"), "resident_on") == host
        })
    });
    if let Some(vdi) = in_use {
        return Err(Failure::new("VDI_IN_USE", [vdi]));
    }
    db.set("PBD", pbd, "currently_attached", false);
    Ok(Value::void())
}

/// The storage is asked; disks that the database does not know are introduced, and ones that are gone leave it.
fn scan(call: &Call) -> Outcome {
    let core = &call.core;
    let sr = call.text(0);
    let uuid = {
        let db = core.db();
        check_attached(&db, sr)?;
        parse_uuid(&db.text("SR", sr, "uuid"))?
    };
    let found = core.storage.vdis(uuid)?;
    let mut db = core.db();
    for vdi in db.set_of("SR", sr, "VDIs") {
        let known = db.text("VDI", &vdi, "uuid");
        let managed = db.flag("VDI", &vdi, "managed") && !db.flag("VDI", &vdi, "read_only");
        if managed && !found.iter().any(|info| info.vdi.to_string() == known) {
            db.destroy("VDI", &vdi);
        }
    }
    for info in found {
        let uuid = info.vdi.to_string();
        if db.by_uuid("VDI", &uuid).is_err() {
            super::vdi::introduce(&mut db, sr, &info);
        }
    }
    Ok(Value::void())
}
