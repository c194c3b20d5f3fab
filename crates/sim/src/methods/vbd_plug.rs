//! Plugging disks into VMs and control domains: the rules, the time it takes, and what the storage hears of it.

use std::sync::Arc;

use super::{Operation, sr};
use crate::core::Core;
use crate::model::{Database, NULL, Value, new_ref};
use crate::rpc::{Failure, Outcome};
use crate::storage::AttachMode;

const ALL: &[&str] = &["attach", "eject", "unplug", "unplug_force", "insert", "plug", "pause", "unpause"];

pub(super) fn allowed(db: &Database, vbd: &str) -> Vec<&'static str> {
    ALL.iter().copied().filter(|operation| check(db, vbd, operation, false).is_ok()).collect()
}

/// The first reason why an operation on a device is not possible now.
pub(super) fn check(db: &Database, vbd: &str, operation: &str, sharing: bool) -> Outcome<()> {
    db.check("VBD", vbd)?;
    let pausing = |name: &str| matches!(name, "pause" | "unpause");
    let mut current = db.get("VBD", vbd, "current_operations")?.as_map().iter();
    // A pause and its end go together; and a restart unpauses what it attaches.
    let clash = current.find(|(_, name)| {
        let beside = pausing(name.as_str()) || (operation == "unpause" && name.as_str() == "attach");
        !(pausing(operation) && beside)
    });
    if let Some((task, name)) = clash {
        return Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VBD", vbd, name.as_str(), task]));
    }
    let plugging = matches!(operation, "plug" | "unplug" | "unplug_force");
    if matches!(operation, "unplug" | "unplug_force") && !db.flag("VBD", vbd, "unpluggable") {
        return Err(Failure::new("VBD_NOT_UNPLUGGABLE", [vbd]));
    }
    let cd = db.text("VBD", vbd, "type") == "CD";
    let empty = db.flag("VBD", vbd, "empty");
    if !cd && matches!(operation, "insert" | "eject") {
        return Err(Failure::new("VBD_NOT_REMOVABLE_MEDIA", [vbd]));
    }
    if empty && operation == "eject" {
        return Err(Failure::new("VBD_IS_EMPTY", [vbd]));
    }
    if !empty && operation == "insert" {
        return Err(Failure::new("VBD_NOT_EMPTY", [vbd]));
    }
    let vm = db.text("VBD", vbd, "VM");
    let state = db.text("VM", &vm, "power_state");
    let plugged = db.flag("VBD", vbd, "currently_attached");
    match (state.as_str(), plugged) {
        ("Running", true) if operation == "plug" => return Err(Failure::new("DEVICE_ALREADY_ATTACHED", [vbd])),
        ("Running", false) if matches!(operation, "unplug" | "unplug_force") => {
            return Err(Failure::new("DEVICE_ALREADY_DETACHED", [vbd]));
        }
        ("Running", _) if cd && plugging => {
            let text = "HVM CDROMs cannot be hotplugged/unplugged, only inserted or ejected";
            return Err(Failure::not_allowed(text));
        }
        ("Running", _) => {}
        ("Paused", _) if pausing(operation) => {}
        _ if plugging || matches!(operation, "pause" | "unpause") => {
            return Err(Failure::new("VM_BAD_POWER_STATE", [vm.as_str(), "running", &state.to_lowercase()]));
        }
        _ => {}
    }
    for (_, name) in db.get("VM", &vm, "current_operations")?.as_map() {
        let ending = matches!(name.as_str(), "clean_shutdown" | "hard_shutdown" | "suspend" | "pause");
        if ending && matches!(operation, "plug" | "unplug") {
            let text = format!("Current operation on VM:{vm} is {}", name.as_str());
            return Err(Failure::not_allowed(text));
        }
    }
    if cd && state == "Suspended" && matches!(operation, "insert" | "eject") {
        return Err(Failure::new("VM_BAD_POWER_STATE", [vm.as_str(), "halted, running", "suspended"]));
    }
    if empty {
        return Ok(());
    }
    let vdi = db.text("VBD", vbd, "VDI");
    if db.exists("VDI", &vdi) && !db.flag("VDI", &vdi, "managed") {
        return Err(Failure::new("VDI_NOT_MANAGED", [vbd]));
    }
    check_disk(db, vbd, operation, sharing && !plugged)
}

fn check_disk(db: &Database, vbd: &str, operation: &str, sharing: bool) -> Outcome<()> {
    if !matches!(operation, "attach" | "plug" | "insert") {
        return Ok(());
    }
    let vdi = db.text("VBD", vbd, "VDI");
    db.check("VDI", &vdi)?;
    let busy = db
        .get("VDI", &vdi, "current_operations")?
        .as_map()
        .iter()
        .find(|(_, name)| !matches!(name.as_str(), "mirror" | "copy"));
    if let Some((task, name)) = busy {
        return Err(Failure::new("OTHER_OPERATION_IN_PROGRESS", ["VDI", &vdi, name.as_str(), task]));
    }
    if !sharing {
        return Ok(());
    }
    let writes = db.text("VBD", vbd, "mode") == "RW";
    let of_system = |vbd: &str| db.flag("VM", &db.text("VBD", vbd, "VM"), "is_control_domain");
    let others: Vec<String> = db
        .set_of("VDI", &vdi, "VBDs")
        .into_iter()
        .filter(|other| {
            let suspended = db.text("VM", &db.text("VBD", other, "VM"), "power_state") == "Suspended";
            let active = db.flag("VBD", other, "currently_attached")
                || db.get("VBD", other, "current_operations").is_ok_and(|map| !map.as_map().is_empty());
            other != vbd && !of_system(other) && !suspended && active
        })
        .collect();
    let written = others.iter().any(|other| db.text("VBD", other, "mode") == "RW");
    let clash = written || (writes && !others.is_empty());
    if clash && !db.flag("VDI", &vdi, "sharable") && !of_system(vbd) {
        return Err(Failure::new("VDI_IN_USE", [vdi]));
    }
    if writes && db.flag("VDI", &vdi, "read_only") {
        return Err(Failure::new("VDI_READONLY", [vdi]));
    }
    Ok(())
}

/// How the storage sees a device; `None` for discs that are no disks of an SR of ours.
pub(super) fn storage_side(db: &Database, vbd: &str) -> Option<(uuid::Uuid, AttachMode)> {
    let vdi = db.text("VBD", vbd, "VDI");
    if db.flag("VBD", vbd, "empty") || db.text("SR", &db.text("VDI", &vdi, "SR"), "content_type") == "iso" {
        return None;
    }
    let id = db.text("VDI", &vdi, "uuid").parse().ok()?;
    let mode = if db.text("VBD", vbd, "mode") == "RW" { AttachMode::ReadWrite } else { AttachMode::ReadOnly };
    Some((id, mode))
}

/// Attaches a device's disk in the storage and marks the device; takes no time.
pub(super) fn attach_now(core: &Core, vbd: &str) -> Outcome<()> {
    let side = storage_side(&core.db(), vbd);
    let mut message = None;
    if let Some((id, mode)) = side {
        message = core.storage.attach(id, mode)?;
    }
    let mut db = core.db();
    let device = device_name(&db, vbd);
    db.set("VBD", vbd, "device", device);
    db.set("VBD", vbd, "currently_attached", true);
    drop(db);
    core.tell(message);
    Ok(())
}

/// The reverse, with a clean end.
pub(super) fn detach_now(core: &Core, vbd: &str) -> Outcome<()> {
    let side = storage_side(&core.db(), vbd);
    if let Some((id, mode)) = side {
        core.storage.detach(id, mode)?;
    }
    core.db().set("VBD", vbd, "currently_attached", false);
    Ok(())
}

fn device_name(db: &Database, vbd: &str) -> String {
    let vm = db.text("VBD", vbd, "VM");
    let number = db.text("VBD", vbd, "userdevice");
    if db.flag("VM", &vm, "is_control_domain") {
        return format!("nbd{number}");
    }
    match number.parse::<u8>() {
        Ok(number) if number < 26 => format!("xvd{}", char::from(b'a' + number)),
        _ => number,
    }
}

/// `SR_NOT_ATTACHED` if the host that runs a device's VM does not see its disk.
fn check_sees(db: &Database, vbd: &str) -> Outcome<()> {
    if db.flag("VBD", vbd, "empty") {
        return Ok(());
    }
    let host = db.text("VM", &db.text("VBD", vbd, "VM"), "resident_on");
    let sr = db.text("VDI", &db.text("VBD", vbd, "VDI"), "SR");
    if sr::hosts(db, &sr).contains(&host) { Ok(()) } else { Err(Failure::new("SR_NOT_ATTACHED", [sr])) }
}

/// `VBD.plug`, with the time that it takes.
pub(super) async fn plug(core: &Arc<Core>, task: &str, vbd: &str) -> Outcome<()> {
    let check = |db: &Database| check(db, vbd, "plug", true);
    let operation = Operation::begin_as(core, task, &[("VBD", vbd, "plug")], check).await?;
    check_sees(&core.db(), vbd)?;
    if !core.options.attach_delay.is_zero() {
        tokio::time::sleep(core.options.attach_delay).await;
    }
    let outcome = attach_now(core, vbd);
    drop(operation);
    outcome
}

/// `VBD.unplug`, with the time that it takes.
pub(super) async fn unplug(core: &Arc<Core>, task: &str, vbd: &str) -> Outcome<()> {
    let check = |db: &Database| check(db, vbd, "unplug", true);
    let operation = Operation::begin_as(core, task, &[("VBD", vbd, "unplug")], check).await?;
    if !core.options.detach_delay.is_zero() {
        tokio::time::sleep(core.options.detach_delay).await;
    }
    let outcome = detach_now(core, vbd);
    drop(operation);
    outcome
}

/// Makes a device in a host's control domain and plugs it: what an NBD open and an HTTP transfer do.
pub(crate) async fn plug_in_control_domain(core: &Arc<Core>, host: usize, vdi: &str, write: bool) -> Outcome<String> {
    let task = new_ref();
    let domain = core.host_at(host)?.control_domain.clone();
    let vbd = {
        let mut db = core.db();
        let record = vec![
            ("VM".to_owned(), Value::Text(domain)),
            ("VDI".to_owned(), vdi.into()),
            ("userdevice".to_owned(), "autodetect".into()),
            ("mode".to_owned(), if write { "RW".into() } else { "RO".into() }),
            ("type".to_owned(), "Disk".into()),
            ("unpluggable".to_owned(), true.into()),
            ("other_config".to_owned(), Value::map([("task_id", task.as_str())])),
            ("metrics".to_owned(), NULL.into()),
        ];
        super::vbd::create_in(&mut db, record)?
    };
    match plug(core, &task, &vbd).await {
        Ok(()) => Ok(vbd),
        Err(failure) => {
            core.db().destroy("VBD", &vbd);
            Err(failure)
        }
    }
}

/// The end of such a device. Whatever goes wrong, its record is gone afterwards.
pub(crate) async fn unplug_and_destroy(core: &Arc<Core>, vbd: &str) {
    if unplug(core, &new_ref(), vbd).await.is_err() {
        core.db().set("VBD", vbd, "currently_attached", false);
    }
    core.db().destroy("VBD", vbd);
}
