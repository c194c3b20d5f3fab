//! TPMs of VMs. What one holds is never part of a record; only its host asks for it.

use super::{Call, vm_checks};
use crate::core::Core;
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    Some(match simple {
        "create" => create(call),
        "destroy" => {
            let vtpm = call.text(0);
            let known = core.db().check("VTPM", vtpm);
            known.and_then(|()| check_sleeps(&core.db(), vtpm)).map(|()| {
                destroy(core, vtpm);
                Value::void()
            })
        }
        _ => return None,
    })
}

fn create(call: &Call) -> Outcome {
    let mut db = call.core.db();
    let vm = call.text(0);
    db.check("VM", vm)?;
    let feature = "restrict_vtpm";
    let pools = db.refs("pool");
    let free =
        |pool: &String| db.map_value("pool", pool, "restrictions", feature).is_some_and(|value| value == "false");
    if !pools.iter().all(free) {
        return Err(Failure::new("FEATURE_RESTRICTED", [feature]));
    }
    vm_checks::check(&db, vm, "create_vtpm")?;
    let fields = vec![("VM", vm.into()), ("is_unique", call.flag(1).into())];
    Ok(db.create("VTPM", fields).into())
}

fn check_sleeps(db: &Database, vtpm: &str) -> Outcome<()> {
    let vm = db.text("VTPM", vtpm, "VM");
    let state = db.text("VM", &vm, "power_state").to_lowercase();
    if matches!(state.as_str(), "halted" | "suspended") {
        return Ok(());
    }
    Err(Failure::new("VM_BAD_POWER_STATE", [vm.as_str(), "halted, suspended", &state]))
}

/// Removes a TPM with what it holds.
pub(super) fn destroy(core: &Core, vtpm: &str) {
    core.forget_vtpm(vtpm);
    core.db().destroy("VTPM", vtpm);
}

/// Gives a VM copies of another VM's TPMs; those that are unique begin empty.
pub(super) fn copy_all(core: &Core, from: &str, to: &str) {
    let vtpms = core.db().set_of("VM", from, "VTPMs");
    for vtpm in vtpms {
        let mut db = core.db();
        let unique = db.flag("VTPM", &vtpm, "is_unique");
        let copy = db.create("VTPM", vec![("VM", to.into()), ("is_unique", unique.into())]);
        drop(db);
        if !unique {
            core.set_vtpm(&copy, core.vtpm(&vtpm));
        }
    }
}
