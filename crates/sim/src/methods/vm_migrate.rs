//! Storage migration within the pool, `VM.migrate_send` and `VDI.pool_migrate`: what is asked first, in xapi's order.
//!
//! A disk that moves gets a new VDI of another uuid on the other SR; its devices are pointed there, and the old VDI
//! goes. What only the old record had (`other_config`, tags, change log) does not come along.

use super::vm_move::{Move, Moving};
use super::{Call, Operation, host_life, sr, vbd, vdi_checks, vm_checks, vm_power};
use crate::core::Core;
use crate::model::{Database, NULL, Value};
use crate::rpc::{Failure, Outcome};

/// Keys of a destination, as `host.migrate_receive` makes them.
const DESTINATION: &[&str] = &["master", "xenops", "session_id", "host", "SM"];

/// Storage migrations that one host does at a time.
const MOST_AT_ONCE: usize = 3;

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    Some(match simple {
        "migrate_send" => migrate_send(call).await.map(Value::Text),
        "assert_can_migrate" => {
            let order = Order::of(call);
            let db = call.core.db();
            order.and_then(|order| can_migrate(&db, call.text(0), &order)).map(|()| Value::void())
        }
        _ => return None,
    })
}

/// `host.migrate_receive`: where a migration may go, with a session for it.
pub(super) fn receive(call: &Call) -> Outcome {
    let core = &call.core;
    let (host, network) = (call.text(0), call.text(1));
    let address = {
        let db = core.db();
        check_licence(&db)?;
        db.check("host", host)?;
        db.check("network", network)?;
        let pifs = db.set_of("network", network, "PIFs");
        let pif = pifs.iter().find(|pif| db.text("PIF", pif, "host") == host);
        let pif = pif.ok_or_else(|| Failure::new("HOST_CANNOT_ATTACH_NETWORK", [host, network]))?;
        match db.text("PIF", pif, "IP") {
            empty if empty.is_empty() => return Err(Failure::new("INTERFACE_HAS_NO_IP", [pif.as_str()])),
            address => address,
        }
    };
    let master = core.host_at(core.coordinator())?.address;
    let session = super::session::open_like(core, host, &call.session);
    let service = |name: &str| format!("http://{address}/services/{name}?session_id={session}");
    Ok(Value::map([
        ("SM", service("SM")),
        ("host", host.to_owned()),
        ("xenops", service("xenops")),
        ("session_id", session.clone()),
        ("master", format!("http://{master}")),
    ]))
}

/// What a migration is asked to do.
#[derive(Debug)]
pub(super) struct Order {
    /// Host that it goes to.
    host: String,
    /// Disk and the SR that it goes to.
    disks: Vec<(String, String)>,
    networks_are_mapped: bool,
    copy: bool,
}

impl Order {
    fn of(call: &Call) -> Outcome<Self> {
        let dest = call.value(1);
        let given = |key: &str| dest.member(key).map(|value| value.as_str().to_owned());
        if DESTINATION.iter().any(|key| given(key).is_none()) {
            return Err(Failure::internal("Not_found"));
        }
        let (host, session) = (given("host").unwrap_or_default(), given("session_id").unwrap_or_default());
        if !call.core.db().exists("host", &host) {
            return Err(Failure::new("NOT_IMPLEMENTED", ["VM.migrate_send to another pool"]));
        }
        super::session::check(&call.core, &session)?;
        let disks = call.value(3);
        let disks = disks.as_map().iter().map(|(vdi, sr)| (vdi.clone(), sr.as_str().to_owned())).collect();
        let copy = call.value(5).member("copy").is_some_and(|value| value.as_str() == "true");
        Ok(Self { host, disks, networks_are_mapped: !call.value(4).as_map().is_empty(), copy })
    }

    fn target(&self, vdi: &str) -> Option<&String> {
        self.disks.iter().find(|(known, _)| known == vdi).map(|(_, sr)| sr)
    }
}

fn check_licence(db: &Database) -> Outcome<()> {
    let restricted = |pool: &String| {
        db.map_value("pool", pool, "restrictions", "restrict_storage_xen_motion").is_some_and(|value| value == "true")
    };
    let found = db.refs("pool").iter().any(restricted);
    if found { Err(Failure::new("LICENSE_RESTRICTION", ["Storage_motion"])) } else { Ok(()) }
}

/// Devices with a disk: not empty, no CD.
fn disk_devices(db: &Database, vm: &str) -> Vec<String> {
    let mut vbds = db.set_of("VM", vm, "VBDs");
    vbds.retain(|vbd| !db.flag("VBD", vbd, "empty") && db.text("VBD", vbd, "type") != "CD");
    vbds
}

fn disks_of(db: &Database, vm: &str) -> Vec<String> {
    disk_devices(db, vm).iter().map(|vbd| db.text("VBD", vbd, "VDI")).collect()
}

/// `VM.assert_can_migrate`.
pub(super) fn can_migrate(db: &Database, vm: &str, order: &Order) -> Outcome<()> {
    db.check("VM", vm)?;
    check_licence(db)?;
    check_all_mapped(db, vm, order)?;
    for (vdi, sr) in &order.disks {
        db.check("VDI", vdi)?;
        db.check("SR", sr)?;
        let source = db.text("VDI", vdi, "SR");
        if source == *sr {
            continue;
        }
        supports(db, &source, &[("VDI_SNAPSHOT", "VDI_SNAPSHOT"), ("VDI_MIRROR", "VDI_MIRROR")])?;
        // Who can mirror can also be mirrored to.
        supports(db, sr, &[("VDI_SNAPSHOT", "VDI_SNAPSHOT"), ("VDI_MIRROR", "VDI_MIRROR_IN")])?;
    }
    if !db.flag("host", &order.host, "enabled") {
        return Err(Failure::new("HOST_DISABLED", [order.host.as_str()]));
    }
    if order.networks_are_mapped {
        let text = "VIF mapping is not allowed for intra-pool migration -all VIFs must be on the same network";
        return Err(Failure::not_allowed(text));
    }
    check_not_tracked(db, &order.disks)
}

fn check_all_mapped(db: &Database, vm: &str, order: &Order) -> Outcome<()> {
    match disks_of(db, vm).iter().find(|vdi| order.target(vdi).is_none()) {
        Some(vdi) => Err(Failure::new("VDI_NOT_IN_MAP", [vdi.as_str()])),
        None => Ok(()),
    }
}

/// Features as the driver lists them, and as an error names them.
fn supports(db: &Database, sr: &str, features: &[(&str, &str)]) -> Outcome<()> {
    let missing: Vec<&str> =
        features.iter().filter(|(feature, _)| !sr::has_feature(db, sr, feature)).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::new("SR_DOES_NOT_SUPPORT_MIGRATION", [sr, &missing.join(";")]))
}

/// Of the disks that change their SR none may be tracked or encrypted.
fn check_not_tracked(db: &Database, disks: &[(String, String)]) -> Outcome<()> {
    for (vdi, sr) in disks {
        if db.text("VDI", vdi, "SR") == *sr {
            continue;
        }
        if db.flag("VDI", vdi, "cbt_enabled") {
            return Err(Failure::new("VDI_CBT_ENABLED", [vdi.as_str()]));
        }
        if db.map_value("VDI", vdi, "sm_config", "key_hash").is_some() {
            return Err(Failure::new("VDI_IS_ENCRYPTED", [vdi.as_str()]));
        }
    }
    Ok(())
}

async fn migrate_send(call: &Call) -> Outcome<String> {
    let core = &call.core;
    let vm = call.text(0);
    let order = Order::of(call)?;
    host_life::check_host_live(core, &order.host)?;
    let _operation =
        Operation::begin(call, &[("VM", vm, "migrate_send")], |db: &Database| vm_checks::check(db, vm, "migrate_send"))
            .await?;
    can_migrate(&core.db(), vm, &order)?;
    let source = core.db().text("VM", vm, "resident_on");
    let live = source != NULL;
    send(core, &call.task, vm, &order).await?;
    if live {
        vm_power::say_migrated(&mut core.db(), vm, &source, &order.host);
    }
    Ok(vm.to_owned())
}

/// `VDI.pool_migrate`: the storage migration of a VM of which one disk moves.
pub(super) async fn pool_migrate(call: &Call) -> Outcome {
    let core = &call.core;
    let (vdi, sr) = (call.text(0), call.text(1));
    let (vbd, vm) = {
        let db = core.db();
        db.check("VDI", vdi)?;
        db.check("SR", sr)?;
        let vbd = db.set_of("VDI", vdi, "VBDs").into_iter().next();
        let vbd = vbd.ok_or_else(|| Failure::new("VDI_NEEDS_VM_FOR_MIGRATE", [vdi]))?;
        let vm = db.text("VBD", &vbd, "VM");
        (vbd, vm)
    };
    let objects = [("VM", vm.as_str(), "migrate_send"), ("VDI", vdi, "mirror")];
    let _operation = Operation::begin(call, &objects, |db: &Database| {
        vm_checks::check(db, &vm, "migrate_send")?;
        vdi_checks::check(db, vdi, "mirror")
    })
    .await?;
    let order = {
        let db = core.db();
        // The VM's other disks and discs stay where they are.
        let full = db.set_of("VM", &vm, "VBDs").into_iter().filter(|vbd| !db.flag("VBD", vbd, "empty"));
        let others = full.map(|vbd| db.text("VBD", &vbd, "VDI")).filter(|other| other != vdi);
        let mut disks: Vec<(String, String)> = vec![(vdi.to_owned(), sr.to_owned())];
        disks.extend(others.map(|other| (other.clone(), db.text("VDI", &other, "SR"))));
        let required: Vec<&str> = disks.iter().map(|(_, sr)| sr.as_str()).collect();
        let host = choose_host(&db, &vm, &required)?;
        let order = Order { host, disks, networks_are_mapped: false, copy: false };
        can_migrate(&db, &vm, &order)?;
        order
    };
    send(core, &call.task, &vm, &order).await?;
    Ok(core.db().text("VBD", &vbd, "VDI").into())
}

/// Where the VM is if that host sees all of them, else any other that does.
fn choose_host(db: &Database, vm: &str, srs: &[&str]) -> Outcome<String> {
    let resident = db.text("VM", vm, "resident_on");
    let live = |host: &String| db.flag("host_metrics", &db.text("host", host, "metrics"), "live");
    let sees_all = |host: &String| live(host) && srs.iter().all(|sr| sr::hosts(db, sr).contains(host));
    let candidates: Vec<String> = db.refs("host").into_iter().filter(sees_all).collect();
    let chosen = candidates.iter().find(|host| **host == resident).or(candidates.first());
    chosen.cloned().ok_or_else(|| Failure::bare("NO_HOSTS_AVAILABLE"))
}

/// Counts the migrations of a host as long as it lives.
struct Place<'a> {
    core: &'a Core,
    host: String,
}

impl<'a> Place<'a> {
    fn take(core: &'a Core, host: String) -> Outcome<Self> {
        let mut all = core.storage_migrations.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = all.entry(host.clone()).or_default();
        if *count >= MOST_AT_ONCE {
            return Err(Failure::new("TOO_MANY_STORAGE_MIGRATES", [MOST_AT_ONCE.to_string()]));
        }
        *count += 1;
        Ok(Self { core, host })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut all = self.core.storage_migrations.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.host) {
            *count = count.saturating_sub(1);
        }
    }
}

/// The migration itself: disks of the VM, of its snapshots, and suspend images that the other host can not see.
async fn send(core: &std::sync::Arc<Core>, task: &str, vm: &str, order: &Order) -> Outcome<()> {
    let resident = core.db().text("VM", vm, "resident_on");
    let _place = Place::take(core, if resident == NULL { order.host.clone() } else { resident })?;
    let (moves, discs) = {
        let mut db = core.db();
        plug_targets(core, &mut db, order)?;
        (plan(&db, vm, order)?, discs_to_eject(&db, vm, order))
    };
    for vbd in discs {
        let mut db = core.db();
        super::vbd_plug::check(&db, &vbd, "eject", true)?;
        vbd::eject(&mut db, &vbd);
    }
    Moving::begin(core, moves).run(task, vm, &order.host).await
}

/// SRs that are the target of a disk are plugged where they are needed, if they are not.
fn plug_targets(core: &Core, db: &mut Database, order: &Order) -> Outcome<()> {
    let coordinator = core.host_at(core.coordinator())?.reference.clone();
    for (vdi, sr) in &order.disks {
        if db.text("VDI", vdi, "SR") == *sr {
            continue;
        }
        for pbd in db.set_of("SR", sr, "PBDs") {
            let host = db.text("PBD", &pbd, "host");
            if host == coordinator || host == order.host {
                db.set("PBD", &pbd, "currently_attached", true);
            }
        }
        if !sr::hosts(db, sr).contains(&order.host) {
            return Err(Failure::new("SR_HAS_NO_PBDS", [sr.as_str()]));
        }
    }
    Ok(())
}

fn discs_to_eject(db: &Database, vm: &str, order: &Order) -> Vec<String> {
    if db.text("VM", vm, "power_state") == "Suspended" {
        return Vec::new();
    }
    let mut vbds = db.set_of("VM", vm, "VBDs");
    vbds.retain(|vbd| {
        let vdi = db.text("VBD", vbd, "VDI");
        let stays = order.target(&vdi).is_some_and(|sr| *sr == db.text("VDI", &vdi, "SR"));
        db.text("VBD", vbd, "type") == "CD" && !db.flag("VBD", vbd, "empty") && !stays
    });
    vbds
}

/// Every disk that changes its SR, small and old ones first.
fn plan(db: &Database, vm: &str, order: &Order) -> Outcome<Vec<Move>> {
    if order.copy {
        let text = "Copy mode is disallowed on intra pool storage migration, try efficient alternatives, \
                    for example, VM.copy/clone.";
        return Err(Failure::not_allowed(text));
    }
    check_all_mapped(db, vm, order)?;
    let own = disks_of(db, vm);
    if let Some(vdi) = own.iter().find(|vdi| db.text("VDI", vdi, "on_boot") == "reset") {
        return Err(Failure::new("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", [vdi.as_str()]));
    }
    let default = db.refs("pool").iter().map(|pool| db.text("pool", pool, "default_SR")).next().unwrap_or_default();
    let suspend = suspend_sr(db, &order.host);
    let usable = |sr: &String| db.exists("SR", sr);
    let snapshots = db.set_of("VM", vm, "snapshots");
    let mut extra = Vec::new();
    for one in std::iter::once(vm).chain(snapshots.iter().map(String::as_str)) {
        let image = db.text("VM", one, "suspend_VDI");
        if db.text("VM", one, "power_state") != "Suspended" || !db.exists("VDI", &image) {
            continue;
        }
        if !sr::hosts(db, &db.text("VDI", &image, "SR")).contains(&order.host) {
            extra.push((image, true));
        }
    }
    extra.extend(snapshots.iter().flat_map(|snapshot| disks_of(db, snapshot)).map(|vdi| (vdi, false)));
    let mut all = order.disks.clone();
    for (vdi, image) in &extra {
        let original = db.text("VDI", vdi, "snapshot_of");
        let named = order.target(vdi).or_else(|| order.target(&original)).cloned();
        let fallback = Some(suspend.clone()).filter(|sr| *image && usable(sr)).or(Some(default.clone()).filter(usable));
        let sr = named.or(fallback).ok_or_else(|| Failure::new("VDI_NOT_IN_MAP", [vdi.as_str()]))?;
        if !all.iter().any(|(known, _)| known == vdi) {
            all.push((vdi.clone(), sr));
        }
    }
    check_not_tracked(db, &all)?;
    let moved = |vdi: &String| own.contains(vdi) || extra.iter().any(|(known, _)| known == vdi);
    let mut moves: Vec<Move> = all
        .into_iter()
        .filter(|(vdi, sr)| moved(vdi) && db.text("VDI", vdi, "SR") != *sr)
        .map(|(vdi, sr)| Move { vdi, sr })
        .collect();
    moves.sort_by_key(|step| (db.int("VDI", &step.vdi, "virtual_size"), db.text("VDI", &step.vdi, "snapshot_time")));
    Ok(moves)
}

/// Where suspend images go on a host that a VM comes to.
fn suspend_sr(db: &Database, host: &str) -> String {
    let of_pool = db.refs("pool").iter().map(|pool| db.text("pool", pool, "suspend_image_SR")).next();
    match of_pool {
        Some(sr) if db.exists("SR", &sr) => sr,
        _ => db.text("host", host, "suspend_image_sr"),
    }
}
