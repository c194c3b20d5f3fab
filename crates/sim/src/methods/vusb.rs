//! USB devices of hosts that are passed through to a VM. The groups of such devices are not in the pool: whatever
//! reference is given for one is kept, and belongs to one device as in xapi. Devices are never plugged.

use super::Call;
use crate::model::Value;
use crate::rpc::{Failure, Outcome};

/// Most devices that one VM can have.
const MOST: usize = 6;

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    Some(match simple {
        "create" => create(call),
        "destroy" => destroy(call),
        // None is ever plugged, so that there is nothing to do but to look whether it is there.
        "unplug" => call.core.db().check("VUSB", call.text(0)).map(|()| Value::void()),
        _ => return None,
    })
}

fn create(call: &Call) -> Outcome {
    let mut db = call.core.db();
    let (vm, group) = (call.text(0), call.text(1));
    db.check("VM", vm)?;
    if db.set_of("VM", vm, "VUSBs").len() >= MOST {
        return Err(Failure::new("TOO_MANY_VUSBS", [MOST.to_string()]));
    }
    if !db.refs_where("VUSB", "USB_group", group).is_empty() {
        return Err(Failure::new("USB_GROUP_CONFLICT", [group]));
    }
    if db.text("VM", vm, "ha_restart_priority") == "restart" {
        let reason = format!("VM {vm} ha_restart_priority has been set to 'restart', cannot create VUSB for it. ");
        return Err(Failure::not_allowed(reason));
    }
    let other_config = call.params.get(2).cloned().unwrap_or_else(|| Value::Map(Vec::new()));
    let record = vec![("VM", vm.into()), ("USB_group", group.into()), ("other_config", other_config)];
    Ok(db.create("VUSB", record).into())
}

fn destroy(call: &Call) -> Outcome {
    let mut db = call.core.db();
    let vusb = call.text(0);
    db.check("VUSB", vusb)?;
    db.destroy("VUSB", vusb);
    Ok(Value::void())
}
