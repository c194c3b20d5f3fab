//! Disks: making, snapshots, clones, sizes, names, and their end.

use super::{Call, Operation, sr, sr_checks, vdi_checks};
use crate::core::{Core, parse_uuid};
use crate::model::{Database, NULL, Value, now, read_record};
use crate::rpc::{Failure, Outcome};
use crate::storage::{SrKind, VdiInfo};

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    Some(match simple {
        "create" => create(call).await,
        "destroy" => destroy(call).await,
        "snapshot" => copy_on_write(call, true).await,
        "clone" => copy_on_write(call, false).await,
        "resize" => resize(call, "resize").await,
        "resize_online" => resize(call, "resize_online").await,
        "set_name_label" | "set_name_description" | "set_sharable" | "set_read_only" | "set_allow_caching" => {
            let mut db = call.core.db();
            db.check("VDI", call.text(0)).map(|()| {
                db.set("VDI", call.text(0), simple.trim_start_matches("set_"), call.value(1));
                Value::void()
            })
        }
        "set_on_boot" => set_on_boot(call).await,
        "forget" => {
            let mut db = call.core.db();
            vdi_checks::check(&db, call.text(0), "forget").map(|()| {
                db.destroy("VDI", call.text(0));
                Value::void()
            })
        }
        "update" => {
            let db = call.core.db();
            vdi_checks::check(&db, call.text(0), "update").map(|()| Value::void())
        }
        _ => return None,
    })
}

/// Marks a disk and its SR, which does one thing at a time, and takes the storage manager's time.
pub(super) async fn begin_on_sr(call: &Call, operation: &'static str, of_sr: &'static str) -> Outcome<Operation> {
    let vdi = call.text(0);
    begin_on_sr_of(call, vdi, operation, of_sr).await
}

/// The same for any disk.
pub(super) async fn begin_on_sr_of(
    call: &Call,
    vdi: &str,
    operation: &'static str,
    of_sr: &'static str,
) -> Outcome<Operation> {
    let sr = {
        let db = call.core.db();
        db.check("VDI", vdi)?;
        db.text("VDI", vdi, "SR")
    };
    let check = |db: &Database| {
        sr_checks::check(db, &sr, of_sr)?;
        vdi_checks::check(db, vdi, operation)?;
        sr::check_attached(db, &sr)
    };
    let mark = Operation::begin(call, &[("SR", sr.as_str(), of_sr), ("VDI", vdi, operation)], check).await?;
    sr::take_time(call).await;
    Ok(mark)
}

async fn set_on_boot(call: &Call) -> Outcome {
    let vdi = call.text(0);
    let _operation = begin_on_sr(call, "set_on_boot", "vdi_set_on_boot").await?;
    call.core.db().set("VDI", vdi, "on_boot", call.value(1));
    Ok(Value::void())
}

async fn create(call: &Call) -> Outcome {
    let core = &call.core;
    let fields = read_record("VDI", &call.value(0))?;
    let field = |name: &str| fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    if field("type").is_some_and(|kind| kind.as_str() == "cbt_metadata") {
        return Err(Failure::new("VDI_INCOMPATIBLE_TYPE", ["", "CBT metadata"]));
    }
    let sr = field("SR").map(|sr| sr.as_str().to_owned()).unwrap_or_default();
    let size = field("virtual_size").map_or(0, |size| size.as_int());
    let size = u64::try_from(size).map_err(|_| {
        Failure::new("SR_BACKEND_FAILURE_79", ["", "VDI Invalid size [opterr=VDI size must be positive]", ""])
    })?;
    core.db().check("SR", &sr)?;
    let check = |db: &Database| sr_checks::check(db, &sr, "vdi_create");
    let _operation = Operation::begin(call, &[("SR", sr.as_str(), "vdi_create")], check).await?;
    sr::take_time(call).await;
    let keep = fields.into_iter().filter(|(name, _)| !matches!(name.as_str(), "SR" | "virtual_size" | "uuid"));
    create_disk(core, &sr, size, keep.collect()).map(Value::Text)
}

/// Makes a disk on an SR and its record.
pub(crate) fn create_disk(core: &Core, sr: &str, size: u64, fields: Vec<(String, Value)>) -> Outcome<String> {
    let sr_uuid = {
        let db = core.db();
        sr::check_attached(&db, sr)?;
        if !sr::has_feature(&db, sr, "VDI_CREATE") {
            return Err(Failure::new("SR_OPERATION_NOT_SUPPORTED", [sr]));
        }
        parse_uuid(&db.text("SR", sr, "uuid"))?
    };
    let info = core.storage.create_vdi(sr_uuid, uuid::Uuid::new_v4(), size)?;
    let mut db = core.db();
    let vdi = introduce(&mut db, sr, &info);
    for (name, value) in fields {
        db.set("VDI", &vdi, &name, value);
    }
    if info.kind == SrKind::LvmRaw {
        // The caller's `sm_config` came over it.
        db.put("VDI", &vdi, "sm_config", "type", "raw".to_owned());
    }
    Ok(vdi)
}

/// Makes the record of a disk that the storage has.
pub(crate) fn introduce(db: &mut Database, sr: &str, info: &VdiInfo) -> String {
    let uuid = info.vdi.to_string();
    let parent = info.parent.filter(|_| info.kind.is_vhd());
    let parent = parent.map(|parent| ("vhd-parent".to_owned(), parent.to_string()));
    // The storage manager says so of every raw volume.
    let raw = (info.kind == SrKind::LvmRaw).then(|| ("type".to_owned(), "raw".to_owned()));
    db.create(
        "VDI",
        vec![
            ("uuid", uuid.as_str().into()),
            ("SR", sr.into()),
            ("virtual_size", info.virtual_size.into()),
            ("location", uuid.as_str().into()),
            ("type", if info.metadata_only { "cbt_metadata".into() } else { "user".into() }),
            ("is_a_snapshot", info.metadata_only.into()),
            ("cbt_enabled", info.cbt_enabled.into()),
            ("sm_config", Value::map(parent.into_iter().chain(raw))),
        ],
    )
}

async fn destroy(call: &Call) -> Outcome {
    let core = &call.core;
    let vdi = call.text(0);
    let operation = begin_on_sr(call, "destroy", "vdi_destroy").await?;
    core.storage.destroy(core.disk_id(vdi)?)?;
    drop(operation);
    let mut db = core.db();
    let vbds = db.set_of("VDI", vdi, "VBDs");
    for snapshot in db.set_of("VDI", vdi, "snapshots") {
        // The reference dangles in a real pool too: it is not reset.
        db.touch("VDI", &snapshot);
    }
    db.destroy("VDI", vdi);
    for vbd in vbds {
        db.destroy("VBD", &vbd);
    }
    for vm in db.refs_where("VM", "suspend_VDI", vdi) {
        db.set("VM", &vm, "suspend_VDI", NULL);
    }
    Ok(Value::void())
}

async fn copy_on_write(call: &Call, snapshot: bool) -> Outcome {
    let (name, of_sr) = if snapshot { ("snapshot", "vdi_snapshot") } else { ("clone", "vdi_clone") };
    let _operation = begin_on_sr(call, name, of_sr).await?;
    take_copy(&call.core, call.text(0), snapshot).map(Value::Text)
}

/// Makes a snapshot or a clone of a disk. What the client controls is copied, `other_config` among it.
pub(super) fn take_copy(core: &Core, vdi: &str, snapshot: bool) -> Outcome<String> {
    let id = core.disk_id(vdi)?;
    let new_id = uuid::Uuid::new_v4();
    let (info, message) =
        if snapshot { core.storage.snapshot(id, new_id)? } else { (core.storage.clone_vdi(id, new_id)?, None) };
    let copy = {
        let mut db = core.db();
        let sr = db.text("VDI", vdi, "SR");
        let copied = [
            "name_label",
            "name_description",
            "type",
            "sharable",
            "other_config",
            "xenstore_data",
            "on_boot",
            "allow_caching",
            "tags",
        ];
        let values: Vec<_> = copied.iter().map(|name| (*name, db.get("VDI", vdi, name).cloned())).collect();
        let copy = introduce(&mut db, &sr, &info);
        for (name, value) in values {
            db.set("VDI", &copy, name, value?);
        }
        db.set("VDI", &copy, "snapshot_time", Value::Date(now()));
        if snapshot {
            db.set("VDI", &copy, "is_a_snapshot", true);
            db.set("VDI", &copy, "snapshot_of", vdi);
        }
        refresh(core, &mut db, vdi);
        copy
    };
    core.tell(message);
    Ok(copy)
}

/// Takes over what the storage manager changed on the disk itself.
pub(super) fn refresh(core: &Core, db: &mut Database, vdi: &str) {
    let Some(info) = db.text("VDI", vdi, "uuid").parse().ok().and_then(|id| core.storage.vdi(id).ok()) else { return };
    db.set("VDI", vdi, "cbt_enabled", info.cbt_enabled);
    match info.parent.filter(|_| info.kind.is_vhd()) {
        Some(parent) => db.put("VDI", vdi, "sm_config", "vhd-parent", parent.to_string()),
        None => db.take("VDI", vdi, "sm_config", "vhd-parent"),
    }
}

async fn resize(call: &Call, name: &'static str) -> Outcome {
    let core = &call.core;
    let vdi = call.text(0);
    let _operation = begin_on_sr(call, name, "vdi_resize").await?;
    let size = u64::try_from(call.int(1)).unwrap_or_default();
    let (size, message) = core.storage.resize(core.disk_id(vdi)?, size)?;
    core.db().set("VDI", vdi, "virtual_size", size);
    core.tell(message);
    Ok(Value::void())
}
