//! VMs that run: start, end, migration.

use super::{Call, Operation, sr, vbd_plug, vm_checks};
use crate::core::{Core, post_message};
use crate::model::{Database, NULL, Value, now};
use crate::rpc::{Failure, Outcome};
use crate::storage::LostBits;

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let vm = call.text(0);
    Some(match simple {
        "start" => start(call, simple, None, call.flag(1)).await,
        "start_on" => start(call, simple, Some(call.text(1)), call.flag(2)).await,
        "clean_shutdown" | "hard_shutdown" | "shutdown" => {
            let running = call.core.db().text("VM", vm, "power_state") == "Running";
            let operation = match simple {
                "shutdown" if running => "clean_shutdown",
                "shutdown" => "hard_shutdown",
                other => other,
            };
            shutdown(call, operation).await
        }
        "clean_reboot" | "hard_reboot" => reboot(call, simple).await,
        "pool_migrate" => migrate(call).await,
        "pause" | "unpause" => {
            let mut db = call.core.db();
            vm_checks::check(&db, vm, simple).map(|()| {
                db.set("VM", vm, "power_state", if simple == "pause" { "Paused" } else { "Running" });
                Value::void()
            })
        }
        "power_state_reset" => {
            let known = call.core.db().check("VM", vm);
            known.map(|()| {
                let dead = super::host_life::is_on_dead_host(&call.core, vm);
                halt(&call.core, vm, if dead { End::Gone } else { End::Clean });
                Value::void()
            })
        }
        _ => return None,
    })
}

/// SRs of a VM's disks and of its memory.
fn srs_of(db: &Database, vm: &str) -> Vec<String> {
    let vbds = db.set_of("VM", vm, "VBDs");
    let full = vbds.iter().filter(|vbd| !db.flag("VBD", vbd, "empty"));
    let image = Some(db.text("VM", vm, "suspend_VDI")).filter(|image| db.exists("VDI", image));
    full.map(|vbd| db.text("VBD", vbd, "VDI")).chain(image).map(|vdi| db.text("VDI", &vdi, "SR")).collect()
}

/// Whether a host has the hardware that a VM needs.
fn has_hardware(db: &Database, vm: &str, host: &str) -> bool {
    let needed = matches!(db.text("VM", vm, "domain_type").as_str(), "hvm" | "pvh" | "pv_in_pvh");
    !needed || db.set_of("host", host, "capabilities").iter().any(|known| known.starts_with("hvm"))
}

/// The host that was asked for, or one that can have the VM.
pub(super) fn choose_host(db: &Database, vm: &str, wanted: Option<&str>) -> Outcome<String> {
    let possible = possible_hosts(db, vm);
    match wanted {
        Some(host) if possible.iter().any(|known| known == host) => Ok(host.to_owned()),
        Some(host) => {
            let sr = unseen_sr(db, vm, host);
            if sr.is_empty() {
                return Err(Failure::new("VM_HVM_REQUIRED", [vm]));
            }
            Err(Failure::new("VM_REQUIRES_SR", [vm.to_owned(), sr, host.to_owned()]))
        }
        None => {
            let affinity = db.text("VM", vm, "affinity");
            let chosen = possible.iter().find(|host| **host == affinity).or(possible.first());
            chosen.cloned().ok_or_else(|| Failure::bare("NO_HOSTS_AVAILABLE"))
        }
    }
}

/// Hosts that see all SRs of a VM's disks.
pub(super) fn possible_hosts(db: &Database, vm: &str) -> Vec<String> {
    let srs = srs_of(db, vm);
    let live = |host: &String| db.flag("host_metrics", &db.text("host", host, "metrics"), "live");
    let sees_all = |host: &String| {
        live(host) && has_hardware(db, vm, host) && srs.iter().all(|sr| sr::hosts(db, sr).contains(host))
    };
    db.refs("host").into_iter().filter(sees_all).collect()
}

/// The first SR that a host would need for a VM and does not see.
fn unseen_sr(db: &Database, vm: &str, host: &str) -> String {
    let unseen = |sr: &String| !sr::hosts(db, sr).iter().any(|known| known == host);
    srs_of(db, vm).into_iter().find(unseen).unwrap_or_default()
}

async fn start(call: &Call, operation: &str, host: Option<&str>, paused: bool) -> Outcome {
    let core = &call.core;
    let vm = call.text(0);
    if let Some(host) = host {
        core.db().check("host", host)?;
        super::host_life::check_host_live(core, host)?;
    }
    let _operation =
        Operation::begin(call, &[("VM", vm, operation)], |db: &Database| vm_checks::check(db, vm, operation)).await?;
    let host = choose_host(&core.db(), vm, host)?;
    boot(core, vm, &host, if paused { "Paused" } else { "Running" })?;
    say_on_host(&mut core.db(), vm, "VM_STARTED", "started", &host);
    Ok(Value::void())
}

/// The message of something that was done on a host.
pub(super) fn say_on_host(db: &mut Database, vm: &str, message: &str, done: &str, host: &str) {
    let (name, uuid) = (db.text("host", host, "name_label"), db.text("host", host, "uuid"));
    say(db, vm, message, &format!("{done} on host: {name} (uuid: {uuid})"));
}

/// Attaches all devices and runs the VM. What was attached is detached again on a failure.
fn boot(core: &Core, vm: &str, host: &str, state: &str) -> Outcome<()> {
    let vbds = core.db().set_of("VM", vm, "VBDs");
    for (index, vbd) in vbds.iter().enumerate() {
        let allowed = vbd_plug::check(&core.db(), vbd, "attach", true);
        if let Err(failure) = allowed.and_then(|()| vbd_plug::attach_now(core, vbd)) {
            for done in vbds.iter().take(index) {
                // The failure that led here is the one to tell.
                let _ = vbd_plug::detach_now(core, done);
            }
            return Err(failure);
        }
    }
    let mut db = core.db();
    for vif in db.set_of("VM", vm, "VIFs") {
        db.set("VIF", &vif, "currently_attached", true);
    }
    let metrics = db.text("VM", vm, "metrics");
    db.set("VM_metrics", &metrics, "start_time", Value::Date(now()));
    db.set("VM_metrics", &metrics, "last_updated", Value::Date(now()));
    db.set("VM", vm, "resident_on", host);
    let domain = i64::try_from(db.generation() % 30_000).unwrap_or(1);
    db.set("VM", vm, "domid", domain);
    db.set("VM", vm, "power_state", state);
    Ok(())
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Disks are deactivated in good order.
    Clean,
    /// The host died.
    Crash,
    /// The host died before, and the storage has seen it: only the records are brought into line.
    Gone,
}

pub(super) fn halt(core: &Core, vm: &str, end: End) {
    // The storage has let go of a suspended VM's disks already.
    let end = if core.db().text("VM", vm, "power_state") == "Suspended" {
        super::vm_suspend::drop_image(core, vm);
        End::Gone
    } else {
        end
    };
    let vbds = core.db().set_of("VM", vm, "VBDs");
    for vbd in vbds {
        if !core.db().flag("VBD", &vbd, "currently_attached") {
            continue;
        }
        match end {
            // A disk that is gone has nothing to be detached.
            End::Clean => drop(vbd_plug::detach_now(core, &vbd)),
            End::Gone => {}
            End::Crash => {
                let vdi = core.db().text("VBD", &vbd, "VDI");
                if let Ok(id) = core.disk_id(&vdi) {
                    drop(core.storage.crash(id, LostBits::SinceAttach));
                }
            }
        }
        core.db().set("VBD", &vbd, "currently_attached", false);
    }
    let mut db = core.db();
    for vif in db.set_of("VM", vm, "VIFs") {
        db.set("VIF", &vif, "currently_attached", false);
    }
    db.set("VM", vm, "resident_on", NULL);
    db.set("VM", vm, "domid", Value::Int(-1));
    db.set("VM", vm, "power_state", "Halted");
}

async fn shutdown(call: &Call, operation: &str) -> Outcome {
    let vm = call.text(0);
    let _operation =
        Operation::begin(call, &[("VM", vm, operation)], |db: &Database| vm_checks::check(db, vm, operation)).await?;
    halt(&call.core, vm, End::Clean);
    say(&mut call.core.db(), vm, "VM_SHUTDOWN", "shutdown");
    Ok(Value::void())
}

/// The pool message of a VM's life, as xapi words it.
pub(super) fn say(db: &mut Database, vm: &str, message: &str, what: &str) {
    let (name, uuid) = (db.text("VM", vm, "name_label"), db.text("VM", vm, "uuid"));
    post_message(db, message, 5, "VM", &uuid, &format!("VM '{name}' (uuid: {uuid}) {what}"));
}

/// Ends a run at once, for a revert.
pub(super) fn hard_shutdown(core: &Core, vm: &str) {
    halt(core, vm, End::Clean);
}

async fn reboot(call: &Call, operation: &str) -> Outcome {
    let vm = call.text(0);
    let _operation =
        Operation::begin(call, &[("VM", vm, operation)], |db: &Database| vm_checks::check(db, vm, operation)).await?;
    let host = call.core.db().text("VM", vm, "resident_on");
    halt(&call.core, vm, End::Clean);
    boot(&call.core, vm, &host, "Running")?;
    say(&mut call.core.db(), vm, "VM_REBOOTED", "rebooted");
    Ok(Value::void())
}

/// Live migration within the pool: the disks are deactivated on one host and activated on the other.
async fn migrate(call: &Call) -> Outcome {
    let core = &call.core;
    let (vm, host) = (call.text(0), call.text(1));
    core.db().check("host", host)?;
    super::host_life::check_host_live(core, host)?;
    let _operation =
        Operation::begin(call, &[("VM", vm, "pool_migrate")], |db: &Database| vm_checks::check(db, vm, "pool_migrate"))
            .await?;
    if !possible_hosts(&core.db(), vm).iter().any(|known| known == host) {
        let sr = unseen_sr(&core.db(), vm, host);
        return Err(Failure::new("VM_REQUIRES_SR", [vm, &sr, host]));
    }
    let vbds = core.db().set_of("VM", vm, "VBDs");
    for vbd in vbds {
        if core.db().flag("VBD", &vbd, "currently_attached") {
            vbd_plug::detach_now(core, &vbd)?;
            vbd_plug::attach_now(core, &vbd)?;
        }
    }
    let mut db = core.db();
    let source = db.text("VM", vm, "resident_on");
    db.set("VM", vm, "resident_on", host);
    say_migrated(&mut db, vm, &source, host);
    Ok(Value::void())
}

pub(super) fn say_migrated(db: &mut Database, vm: &str, source: &str, host: &str) {
    let of = |host: &str| (db.text("host", host, "name_label"), db.text("host", host, "uuid"));
    let ((from, from_uuid), (to, to_uuid)) = (of(source), of(host));
    let what = format!("migrated from host '{from}' (uuid: {from_uuid}) to host '{to}' (uuid: {to_uuid})");
    say(db, vm, "VM_MIGRATED", &what);
}
