//! VMs that sleep: suspend to a disk of its own, resume, and checkpoints, which are snapshots with the memory.
//!
//! A suspended VM's devices stay "attached" by their records, so that nobody else takes the disks, while the storage
//! has let go of them.

use super::vm_clone::{Way, copy_vm};
use super::{Call, Operation, host_life, sr, vbd_plug, vdi, vm_checks, vm_power};
use crate::core::Core;
use crate::model::{Database, NULL, Value};
use crate::rpc::{Failure, Outcome};

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    Some(match simple {
        "suspend" => suspend(call).await,
        "resume" => resume(call, simple, None, call.flag(1)).await,
        "resume_on" => resume(call, simple, Some(call.text(1)), call.flag(2)).await,
        "checkpoint" => checkpoint(call).await.map(Value::Text),
        _ => return None,
    })
}

async fn suspend(call: &Call) -> Outcome {
    let core = &call.core;
    let vm = call.text(0);
    let check = |db: &Database| vm_checks::check(db, vm, "suspend");
    let _operation = Operation::begin(call, &[("VM", vm, "suspend")], check).await?;
    sleep(core, vm, false)?;
    vm_power::say(&mut core.db(), vm, "VM_SUSPENDED", "suspended");
    Ok(Value::void())
}

/// Room for the memory, with what the toolstack adds, in bytes.
fn image_size(db: &Database, vm: &str) -> u64 {
    let memory = u64::try_from(db.int("VM", vm, "memory_static_max")).unwrap_or_default();
    // 1.2 times 1.05, and 100 MiB.
    memory / 100 * 126 + memory % 100 * 126 / 100 + (100 << 20)
}

/// The first of the VM's, the pool's and the host's choice that the VM's host sees.
fn image_sr(db: &Database, vm: &str) -> Outcome<String> {
    let host = db.text("VM", vm, "resident_on");
    let of_pool = db.refs("pool").iter().map(|pool| db.text("pool", pool, "suspend_image_SR")).next();
    let choices =
        [db.text("VM", vm, "suspend_SR"), of_pool.unwrap_or_default(), db.text("host", &host, "suspend_image_sr")];
    let usable = |sr: &String| db.exists("SR", sr) && sr::hosts(db, sr).contains(&host);
    choices.into_iter().find(usable).ok_or_else(|| Failure::new("VM_NO_SUSPEND_SR", [vm]))
}

fn plugged(db: &Database, vm: &str) -> Vec<String> {
    let mut vbds = db.set_of("VM", vm, "VBDs");
    vbds.retain(|vbd| db.flag("VBD", vbd, "currently_attached"));
    vbds
}

/// Puts a running VM to sleep. For a checkpoint it keeps its host.
fn sleep(core: &Core, vm: &str, keeps_host: bool) -> Outcome<()> {
    let (sr, size, uuid) = {
        let db = core.db();
        (image_sr(&db, vm)?, image_size(&db, vm), db.text("VM", vm, "uuid"))
    };
    let fields = vec![
        ("name_label".to_owned(), "Suspend image".into()),
        ("name_description".to_owned(), "Suspend image".into()),
        ("type".to_owned(), "suspend".into()),
        (
            "sm_config".to_owned(),
            Value::map([("vmhint".to_owned(), uuid), ("initial_allocation".to_owned(), size.to_string())]),
        ),
    ];
    let image = vdi::create_disk(core, &sr, size, fields).map_err(|failure| match failure.code.as_str() {
        "SR_BACKEND_FAILURE_44" => Failure::new("SR_SUSPEND_SPACE_INSUFFICIENT", [sr.as_str()]),
        _ => failure,
    })?;
    let mut db = core.db();
    for (disk, mode) in plugged(&db, vm).iter().filter_map(|vbd| vbd_plug::storage_side(&db, vbd)) {
        // A disk that is gone has nothing to be detached.
        drop(core.storage.detach(disk, mode));
    }
    db.set("VM", vm, "suspend_VDI", image);
    db.set("VM", vm, "ha_always_run", false);
    db.set("VM", vm, "domid", Value::Int(-1));
    if !keeps_host {
        db.set("VM", vm, "resident_on", NULL);
    }
    db.set("VM", vm, "power_state", "Suspended");
    Ok(())
}

async fn resume(call: &Call, operation: &str, host: Option<&str>, paused: bool) -> Outcome {
    let core = &call.core;
    let vm = call.text(0);
    if let Some(host) = host {
        core.db().check("host", host)?;
        host_life::check_host_live(core, host)?;
    }
    let check = |db: &Database| vm_checks::check(db, vm, operation);
    let _operation = Operation::begin(call, &[("VM", vm, operation)], check).await?;
    let host = vm_power::choose_host(&core.db(), vm, host)?;
    wake(core, vm, &host, if paused { "Paused" } else { "Running" })?;
    vm_power::say_on_host(&mut core.db(), vm, "VM_RESUMED", "resumed", &host);
    Ok(Value::void())
}

/// Wakes a suspended VM; its image goes.
fn wake(core: &Core, vm: &str, host: &str, state: &str) -> Outcome<()> {
    let mut messages = Vec::new();
    {
        let mut db = core.db();
        let image = db.text("VM", vm, "suspend_VDI");
        if !db.exists("VDI", &image) {
            drop(db);
            vm_power::hard_shutdown(core, vm);
            return Err(Failure::new("VM_HAS_NO_SUSPEND_VDI", ["VM", vm]));
        }
        for vbd in plugged(&db, vm) {
            vbd_plug::check(&db, &vbd, "attach", true)?;
        }
        let sides: Vec<_> = plugged(&db, vm).iter().filter_map(|vbd| vbd_plug::storage_side(&db, vbd)).collect();
        for (index, (disk, mode)) in sides.iter().enumerate() {
            match core.storage.attach(*disk, *mode) {
                Ok(message) => messages.push(message),
                Err(error) => {
                    for (disk, mode) in sides.iter().take(index) {
                        // The failure that led here is the one to tell.
                        drop(core.storage.detach(*disk, *mode));
                    }
                    return Err(error.into());
                }
            }
        }
        db.set("VM", vm, "resident_on", host);
        let domain = i64::try_from(db.generation() % 30_000).unwrap_or(1);
        db.set("VM", vm, "domid", domain);
        db.set("VM", vm, "power_state", state);
    }
    drop_image(core, vm);
    for message in messages {
        core.tell(message);
    }
    Ok(())
}

/// Removes a VM's suspend image, if it has one.
pub(super) fn drop_image(core: &Core, vm: &str) {
    let image = core.db().text("VM", vm, "suspend_VDI");
    if let Ok(id) = core.disk_id(&image) {
        // Whether or not that works, the VM forgets it.
        drop(core.storage.destroy(id));
    }
    let mut db = core.db();
    db.destroy("VDI", &image);
    db.set("VM", vm, "suspend_VDI", NULL);
}

async fn checkpoint(call: &Call) -> Outcome<String> {
    let core = &call.core;
    let vm = call.text(0);
    let check = |db: &Database| vm_checks::check(db, vm, "checkpoint");
    let _operation = Operation::begin(call, &[("VM", vm, "checkpoint")], check).await?;
    let (running, host) = {
        let db = core.db();
        let restricted = db.refs("pool").iter().any(|pool| {
            db.map_value("pool", pool, "restrictions", "restrict_checkpoint").is_some_and(|value| value == "true")
        });
        if restricted {
            return Err(Failure::new("LICENSE_RESTRICTION", ["Checkpoint"]));
        }
        (db.text("VM", vm, "power_state") == "Running", db.text("VM", vm, "resident_on"))
    };
    if running {
        check_can_snapshot(&core.db(), vm)?;
        sleep(core, vm, true)?;
    }
    let made = copy_vm(call, vm, call.text(1), &Way::Checkpoint { running }, &[]).await;
    if running {
        // Whatever became of the snapshot, the VM goes on.
        wake(core, vm, &host, "Running")?;
    }
    let made = made?;
    let what = format!("checkpointed, snapshot name: {}", call.text(1));
    vm_power::say(&mut core.db(), vm, "VM_CHECKPOINTED", &what);
    Ok(made)
}

fn check_can_snapshot(db: &Database, vm: &str) -> Outcome<()> {
    let mut disks = db.set_of("VM", vm, "VBDs");
    disks.retain(|vbd| db.text("VBD", vbd, "type") != "CD" && !db.flag("VBD", vbd, "empty"));
    let able = |vbd: &String| sr::has_feature(db, &db.text("VDI", &db.text("VBD", vbd, "VDI"), "SR"), "VDI_SNAPSHOT");
    if disks.iter().all(able) { Ok(()) } else { Err(Failure::new("SR_OPERATION_NOT_SUPPORTED", [vm])) }
}
