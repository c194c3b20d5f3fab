//! What the pool's records and storage hear of the life of a host: crash, stop, boot, a toolstack that restarts, and
//! a coordinator that moves.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::vbd_plug;
use super::vm_power::{End, halt};
use crate::core::{Core, post_message};
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};

/// How many of the last changes a coordinator that took over after a failure had not been told of.
const CHANGES_LOST: u64 = 200;

/// Operations that run on the VM's own host.
const ON_OWN_HOST: &[&str] = &[
    "clean_shutdown",
    "hard_shutdown",
    "shutdown",
    "clean_reboot",
    "hard_reboot",
    "snapshot",
    "checkpoint",
    "pool_migrate",
    "migrate_send",
    "pause",
    "unpause",
    "suspend",
];

/// `HOST_OFFLINE` for work that has to be done on a host that is not live.
pub(super) fn check_live(core: &Core, class: &str, simple: &str, reference: &str) -> Outcome<()> {
    let vm = match class {
        "VM" if ON_OWN_HOST.contains(&simple) => reference.to_owned(),
        "VBD" if matches!(simple, "plug" | "unplug" | "unplug_force") => core.db().text("VBD", reference, "VM"),
        _ => return Ok(()),
    };
    let host = core.db().text("VM", &vm, "resident_on");
    check_host_live(core, &host)
}

/// `HOST_OFFLINE` for a host that is not live; the null reference passes.
pub(super) fn check_host_live(core: &Core, host: &str) -> Outcome<()> {
    let db = core.db();
    if db.exists("host", host) && !db.flag("host_metrics", &db.text("host", host, "metrics"), "live") {
        return Err(Failure::new("HOST_OFFLINE", [host]));
    }
    Ok(())
}

/// Whether the host that a VM runs on by its record has stopped.
pub(super) fn is_on_dead_host(core: &Core, vm: &str) -> bool {
    let host = core.db().text("VM", vm, "resident_on");
    core.host_of(&host).is_ok_and(|node| !node.is_powered())
}

fn residents(core: &Core, host: &str) -> Vec<String> {
    let db = core.db();
    let all = db.set_of("host", host, "resident_VMs");
    all.into_iter().filter(|vm| !db.flag("VM", vm, "is_control_domain")).collect()
}

/// A host dies and is back at once: its VMs are off, its transfers break, its boot time is new.
pub(crate) fn crash_host(core: &Core, index: usize) -> Outcome<()> {
    let node = core.host_at(index)?;
    node.end_life();
    node.failure_told.store(false, Ordering::SeqCst);
    let vbds = core.db().set_of("VM", &node.control_domain, "VBDs");
    for vbd in vbds {
        // A disk that is gone has nothing to be detached.
        drop(vbd_plug::detach_now(core, &vbd));
        core.db().destroy("VBD", &vbd);
    }
    for vm in residents(core, &node.reference) {
        halt(core, &vm, End::Crash);
        core.crashed.lock().unwrap_or_else(PoisonError::into_inner).insert(vm, index);
    }
    later_boot(&mut core.db(), &node.reference);
    Ok(())
}

/// Sets a boot time that is later than the one before, even when the clock has not moved on by a second.
fn later_boot(db: &mut Database, host: &str) {
    let boot = later(db, host, "boot_time");
    db.put("host", host, "other_config", "boot_time", boot.as_str());
    db.put("host", host, "other_config", "agent_start_time", boot.as_str());
}

fn later(db: &Database, host: &str, key: &str) -> String {
    let before = db.map_value("host", host, "other_config", key);
    let before = before.and_then(|text| text.trim_end_matches('.').parse::<i64>().ok()).unwrap_or_default();
    format!("{}.", before.max(jiff::Timestamp::now().as_second()) + 1)
}

/// A host dies and stays down. As in a pool without high availability its VMs go on "running" by their records, and
/// the devices of its control domain stay plugged, until it boots again or somebody declares it dead.
pub(crate) fn stop_host(core: &Core, index: usize) -> Outcome<()> {
    let node = core.host_at(index)?;
    if !node.is_powered() {
        return Ok(());
    }
    core.set_running(node, false, false);
    node.failure_told.store(false, Ordering::SeqCst);
    let plugged = |vm: &str| -> Vec<_> {
        let db = core.db();
        let vbds = db.set_of("VM", vm, "VBDs");
        let plugged = vbds.iter().filter(|vbd| db.flag("VBD", vbd, "currently_attached"));
        plugged.filter_map(|vbd| vbd_plug::storage_side(&db, vbd)).collect()
    };
    for (disk, mode) in plugged(&node.control_domain) {
        // A disk that is gone has nothing to be detached.
        drop(core.storage.detach(disk, mode));
    }
    for vm in residents(core, &node.reference) {
        for (disk, _) in plugged(&vm) {
            drop(core.storage.crash(disk, crate::storage::LostBits::SinceAttach));
        }
    }
    if core.coordinator() == index {
        end_sessions(core);
    }
    let mut db = core.db();
    let metrics = db.text("host", &node.reference, "metrics");
    db.set("host_metrics", &metrics, "live", false);
    Ok(())
}

/// A host that had stopped boots: what it had been doing is brought into line.
pub(crate) fn boot_host(core: &Core, index: usize) -> Outcome<()> {
    let node = core.host_at(index)?;
    for vm in residents(core, &node.reference) {
        halt(core, &vm, End::Gone);
        core.crashed.lock().unwrap_or_else(PoisonError::into_inner).insert(vm, index);
    }
    {
        let mut db = core.db();
        for vbd in db.set_of("VM", &node.control_domain, "VBDs") {
            db.destroy("VBD", &vbd);
        }
        later_boot(&mut db, &node.reference);
        let metrics = db.text("host", &node.reference, "metrics");
        db.set("host_metrics", &metrics, "live", true);
    }
    end_toolstack_work(core, index);
    core.set_booting(node, false);
    core.set_running(node, true, true);
    Ok(())
}

/// Ends all sessions.
pub(crate) fn end_sessions(core: &Core) {
    let mut db = core.db();
    for session in db.refs("session") {
        db.destroy("session", &session);
    }
    drop(db);
    core.registrations.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// What a toolstack that starts finds and clears. The coordinator's database does not keep tasks, sessions and the list
/// of deletions over a restart: every task is gone, ended or not, with its marks on objects. A member's toolstack clears
/// its own tasks that had not ended.
pub(crate) fn end_toolstack_work(core: &Core, index: usize) {
    let coordinator = core.coordinator() == index;
    if coordinator {
        end_sessions(core);
    }
    let host = core.host_at(index).map(|node| node.reference.clone()).unwrap_or_default();
    let mut db = core.db();
    for task in db.refs("task") {
        let pending = matches!(db.text("task", &task, "status").as_str(), "pending" | "cancelling");
        if !(coordinator || pending && db.text("task", &task, "resident_on") == host) {
            continue;
        }
        for class in ["VM", "VBD", "VIF", "VDI", "SR", "host"] {
            for object in db.refs(class) {
                db.take(class, &object, "current_operations", &task);
            }
        }
        db.destroy("task", &task);
    }
    if coordinator {
        db.forget_deletions();
    }
}

/// A toolstack is up again.
pub(crate) fn toolstack_started(core: &Core, index: usize) -> Outcome<()> {
    let node = core.host_at(index)?;
    let mut db = core.db();
    let start = later(&db, &node.reference, "agent_start_time");
    db.put("host", &node.reference, "other_config", "agent_start_time", start.as_str());
    drop(db);
    core.set_running(node, node.is_powered(), true);
    Ok(())
}

/// Another host becomes the coordinator: every toolstack restarts. When the old one is down the new one counts from
/// its own copy of the database, which is some changes behind.
pub(crate) fn move_coordinator(core: &Core, index: usize) -> Outcome<()> {
    if is_to_take_over(core, index)? {
        hand_over(core, index, !core.has_coordinator())?;
    }
    Ok(())
}

/// The same, but the new coordinator and the members do not serve yet. Gives those hosts, for [`end_fail_over`].
pub(crate) fn begin_fail_over(core: &Core, index: usize) -> Outcome<Vec<usize>> {
    if !is_to_take_over(core, index)? {
        return Ok(Vec::new());
    }
    let (old, failed) = (core.coordinator(), !core.has_coordinator());
    let running = core.hosts.iter().enumerate().filter(|(host, node)| *host != old && node.is_up());
    let starting: Vec<usize> = running.map(|(host, _)| host).collect();
    for host in &starting {
        core.set_booting(core.host_at(*host)?, true);
    }
    hand_over(core, index, failed)?;
    Ok(starting)
}

/// The hosts of a fail-over serve, the coordinator first; each with a new start time.
pub(crate) fn end_fail_over(core: &Core, starting: &[usize]) -> Outcome<()> {
    let coordinator = core.coordinator();
    let members = starting.iter().copied().filter(|host| *host != coordinator);
    for host in starting.contains(&coordinator).then_some(coordinator).into_iter().chain(members) {
        let node = core.host_at(host)?;
        let mut db = core.db();
        let start = later(&db, &node.reference, "agent_start_time");
        db.put("host", &node.reference, "other_config", "agent_start_time", start.as_str());
        drop(db);
        core.set_booting(node, false);
    }
    Ok(())
}

/// Whether a host can become the coordinator and is not.
fn is_to_take_over(core: &Core, index: usize) -> Outcome<bool> {
    let node = core.host_at(index)?;
    if !node.is_up() {
        return Err(Failure::new("HOST_OFFLINE", [node.reference.as_str()]));
    }
    if core.hosts.iter().any(crate::core::HostNode::is_booting) {
        return Err(Failure::bare("HOST_STILL_BOOTING"));
    }
    Ok(core.coordinator() != index)
}

fn hand_over(core: &Core, index: usize, failed: bool) -> Outcome<()> {
    let master = &core.host_at(index)?.reference;
    for node in &core.hosts {
        node.end_life();
    }
    end_toolstack_work(core, core.coordinator());
    {
        let mut db = core.db();
        if failed {
            db.fall_behind(CHANGES_LOST);
        }
        for pool in db.refs("pool") {
            db.set("pool", &pool, "master", Value::Text(master.clone()));
        }
    }
    core.set_coordinator(index);
    Ok(())
}

/// High availability finds the host of a VM dead: it says so once, and halts what ran there.
pub(crate) fn host_failed(core: &Core, vm: &str) -> Outcome<()> {
    let resident = core.db().text("VM", vm, "resident_on");
    let mut crashed = core.crashed.lock().unwrap_or_else(PoisonError::into_inner);
    let index = match core.hosts.iter().position(|node| node.reference == resident) {
        Some(index) => index,
        // Halted by a crash, or halted in peace: then there is no failure to tell of.
        None => match crashed.get(vm) {
            Some(index) => *index,
            None => return Ok(()),
        },
    };
    let node = core.host_at(index)?;
    if resident == node.reference && node.is_powered() {
        return Err(Failure::new("VM_BAD_POWER_STATE", [vm, "halted", "running"]));
    }
    crashed.retain(|_, host| *host != index);
    drop(crashed);
    if !node.failure_told.swap(true, Ordering::SeqCst) {
        let mut db = core.db();
        let name = db.text("host", &node.reference, "name_label");
        let body = format!("Server '{name}' has failed");
        post_message(&mut db, "HA_HOST_FAILED", 3, "Host", &node.uuid.to_string(), &body);
    }
    if !node.is_powered() {
        for vm in residents(core, &node.reference) {
            halt(core, &vm, End::Gone);
        }
    }
    Ok(())
}
