//! Storage repositories and their connections to hosts.

use super::{Call, Operation, host_life, sr_checks};
use crate::core::parse_uuid;
use crate::model::{Database, Value, read_record};
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

/// Live hosts that see all of some SRs: where work on them can be done.
pub(crate) fn live_hosts_of_all(db: &Database, srs: &[String]) -> Vec<String> {
    let live = |host: &String| db.flag("host_metrics", &db.text("host", host, "metrics"), "live");
    let sees = |host: &String| srs.iter().all(|sr| hosts(db, sr).contains(host));
    db.refs("host").into_iter().filter(|host| live(host) && sees(host)).collect()
}

/// The host that does the storage manager's work for an SR: of a shared one always the coordinator.
///
/// `SR_HAS_NO_PBDS` if it does not have the SR attached, `HOST_OFFLINE` if it is down.
pub(super) fn check_attached(db: &Database, sr: &str) -> Outcome<()> {
    db.check("SR", sr)?;
    let attached = hosts(db, sr);
    let coordinator = db.refs("pool").first().map(|pool| db.text("pool", pool, "master")).unwrap_or_default();
    let shared = db.flag("SR", sr, "shared");
    let worker = attached.iter().find(|host| !shared || **host == coordinator);
    let worker = worker.ok_or_else(|| Failure::new("SR_HAS_NO_PBDS", [sr]))?;
    let live = live_hosts_of_all(db, &[sr.to_owned()]);
    if live.contains(worker) { Ok(()) } else { Err(Failure::new("HOST_OFFLINE", [worker.as_str()])) }
}

pub(super) async fn call(call: &Call, class: &str, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    let reference = call.text(0);
    Some(match (class, simple) {
        ("SR", "scan") => scan(call).await,
        ("SR", "update") => check_attached(&core.db(), reference).map(|()| Value::void()),
        ("SR", "forget") => forget(call).await,
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
        ("PBD", "create") => create_pbd(call).await,
        ("PBD", "destroy") => destroy_pbd(call).await,
        ("PBD", "plug") => plug(call).await,
        ("PBD", "unplug") => unplug(call).await,
        _ => return None,
    })
}

/// Marks an SR as busy with an operation, and takes the time of the storage manager.
async fn mark(call: &Call, sr: &str, operation: &'static str) -> Outcome<Operation> {
    let objects = [("SR", sr, operation)];
    let mark = Operation::begin(call, &objects, |db| sr_checks::check(db, sr, operation)).await?;
    take_time(call).await;
    Ok(mark)
}

/// The time that an operation of the storage manager takes.
pub(super) async fn take_time(call: &Call) {
    let delay = call.core.options.sr_delay;
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
}

async fn create_pbd(call: &Call) -> Outcome {
    let core = &call.core;
    let fields = read_record("PBD", &call.value(0))?;
    let named = |name: &str| {
        let found = fields.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str().to_owned()).unwrap_or_default()
    };
    let (sr, host) = (named("SR"), named("host"));
    {
        let db = core.db();
        db.check("SR", &sr)?;
        db.check("host", &host)?;
    }
    let _mark = mark(call, &sr, "pbd_create").await?;
    let mut db = core.db();
    if let Some(pbd) = db.set_of("SR", &sr, "PBDs").into_iter().find(|pbd| db.text("PBD", pbd, "host") == host) {
        return Ok(pbd.into());
    }
    let taken = fields.iter().filter(|(name, _)| name != "uuid" && name != "currently_attached");
    let pbd = db.create("PBD", taken.map(|(name, value)| (name.as_str(), value.clone())).collect());
    Ok(pbd.into())
}

async fn destroy_pbd(call: &Call) -> Outcome {
    let core = &call.core;
    let pbd = call.text(0);
    core.db().check("PBD", pbd)?;
    let sr = core.db().text("PBD", pbd, "SR");
    let _mark = mark(call, &sr, "pbd_destroy").await?;
    let mut db = core.db();
    if db.flag("PBD", pbd, "currently_attached") {
        return Err(Failure::not_allowed("PBD is currently attached"));
    }
    db.destroy("PBD", pbd);
    Ok(Value::void())
}

/// An SR and all its records leave the database; its disks stay where they are.
async fn forget(call: &Call) -> Outcome {
    let sr = call.text(0);
    let mark = mark(call, sr, "forget").await?;
    {
        let mut db = call.core.db();
        for (class, field) in [("VDI", "VDIs"), ("PBD", "PBDs")] {
            for part in db.set_of("SR", sr, field) {
                db.destroy(class, &part);
            }
        }
    }
    drop(mark);
    call.core.db().destroy("SR", sr);
    Ok(Value::void())
}

/// The SR is attached to the PBD's host. Without effect if it is.
async fn plug(call: &Call) -> Outcome {
    let core = &call.core;
    let pbd = call.text(0);
    let (sr, host) = {
        let db = core.db();
        db.check("PBD", pbd)?;
        (db.text("PBD", pbd, "SR"), db.text("PBD", pbd, "host"))
    };
    host_life::check_host_live(core, &host)?;
    let _mark = mark(call, &sr, "plug").await?;
    let mut db = core.db();
    if db.flag("PBD", pbd, "currently_attached") {
        return Ok(Value::void());
    }
    let other = hosts(&db, &sr).into_iter().next();
    if let Some(other) = other.filter(|_| !db.flag("SR", &sr, "shared")) {
        return Err(Failure::new("SR_NOT_SHARABLE", [sr, other]));
    }
    db.set("PBD", pbd, "currently_attached", true);
    if let Ok(uuid) = parse_uuid(&db.text("SR", &sr, "uuid")) {
        core.collectors.kick(uuid);
    }
    Ok(Value::void())
}

/// The SR is detached from the PBD's host. Without effect if it is.
async fn unplug(call: &Call) -> Outcome {
    let core = &call.core;
    let pbd = call.text(0);
    let (sr, host) = {
        let db = core.db();
        db.check("PBD", pbd)?;
        (db.text("PBD", pbd, "SR"), db.text("PBD", pbd, "host"))
    };
    host_life::check_host_live(core, &host)?;
    let check = |db: &Database| {
        // Snapshots and the like are done by one host, which can not go while one is in progress.
        let coordinator = db.refs("pool").first().map(|pool| db.text("pool", pool, "master")).unwrap_or_default();
        if !db.flag("SR", &sr, "shared") || host == coordinator {
            for vdi in db.set_of("SR", &sr, "VDIs") {
                if let Some((task, name)) = db.get("VDI", &vdi, "current_operations")?.as_map().first() {
                    return Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VDI", &vdi, name.as_str(), task]));
                }
            }
        }
        sr_checks::check(db, &sr, "unplug")
    };
    let _mark = Operation::begin(call, &[("SR", sr.as_str(), "unplug")], check).await?;
    take_time(call).await;
    let mut db = core.db();
    let active = |vbd: &String| {
        db.flag("VBD", vbd, "currently_attached") && db.text("VM", &db.text("VBD", vbd, "VM"), "resident_on") == host
    };
    let vdis = db.set_of("SR", &sr, "VDIs").into_iter();
    let in_use: Vec<String> = vdis.filter(|vdi| db.set_of("VDI", vdi, "VBDs").iter().any(active)).collect();
    if !in_use.is_empty() {
        return Err(Failure::new("VDI_IN_USE", in_use));
    }
    db.set("PBD", pbd, "currently_attached", false);
    Ok(Value::void())
}

/// The storage is asked; disks that the database does not know are introduced, and ones that are gone leave it.
/// The garbage collector is told to look.
async fn scan(call: &Call) -> Outcome {
    let core = &call.core;
    let sr = call.text(0);
    let _mark = mark(call, sr, "scan").await?;
    let uuid = {
        let db = core.db();
        check_attached(&db, sr)?;
        parse_uuid(&db.text("SR", sr, "uuid"))?
    };
    core.collectors.kick(uuid);
    let found = core.storage.vdis(uuid)?;
    let mut db = core.db();
    for vdi in db.set_of("SR", sr, "VDIs") {
        let known = db.text("VDI", &vdi, "uuid");
        // Base copies come and go with their chains, discs are no disks of ours.
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
