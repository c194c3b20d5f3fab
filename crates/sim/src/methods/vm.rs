//! VMs: making, copies, snapshots, and their end.

use super::vm_clone::{Way, copy_vm};
use super::{Call, Operation, vbd, vm_checks, vm_set};
use crate::model::{Database, NULL, Value, new_uuid, read_record};
use crate::rpc::{Failure, Outcome};

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    Some(match simple {
        "create" => create(call),
        "destroy" => destroy(call).await,
        "snapshot" => copy(call, Way::Snapshot, "snapshot").await,
        "clone" => copy(call, Way::Clone, "clone").await,
        "copy" => {
            let sr = Some(call.text(2).to_owned()).filter(|sr| core.db().exists("SR", sr));
            copy(call, Way::Copy(sr), "copy").await
        }
        "snapshot_with_quiesce" => Err(Failure::bare("MESSAGE_REMOVED")),
        "provision" => {
            let mut db = core.db();
            vm_checks::check(&db, call.text(0), "provision").map(|()| {
                db.take("VM", call.text(0), "other_config", "disks");
                db.set("VM", call.text(0), "is_a_template", false);
                Value::void()
            })
        }
        "update_allowed_operations" => core.db().check("VM", call.text(0)).map(|()| Value::void()),
        "assert_operation_valid" => vm_checks::check(&core.db(), call.text(0), call.text(1)).map(|()| Value::void()),
        "get_allowed_VBD_devices" => {
            let db = core.db();
            db.check("VM", call.text(0))
                .map(|()| Value::texts(vbd::free_numbers(&db, call.text(0)).iter().map(ToString::to_string)))
        }
        "get_allowed_VIF_devices" => {
            let db = core.db();
            let used: Vec<String> =
                db.set_of("VM", call.text(0), "VIFs").iter().map(|vif| db.text("VIF", vif, "device")).collect();
            let free = (0..7).map(|number: u8| number.to_string()).filter(|number| !used.contains(number));
            db.check("VM", call.text(0)).map(|()| Value::texts(free))
        }
        "get_possible_hosts" => {
            let db = core.db();
            db.check("VM", call.text(0)).map(|()| Value::texts(super::vm_power::possible_hosts(&db, call.text(0))))
        }
        "get_SRs_required_for_recovery" => {
            let db = core.db();
            db.check("VM", call.text(0)).map(|()| {
                let mut srs: Vec<String> = db
                    .set_of("VM", call.text(0), "VBDs")
                    .iter()
                    .map(|vbd| db.text("VDI", &db.text("VBD", vbd, "VDI"), "SR"))
                    .filter(|sr| !sr.is_empty())
                    .collect();
                srs.sort();
                srs.dedup();
                Value::texts(srs)
            })
        }
        _ => return None,
    })
}

async fn copy(call: &Call, way: Way, name: &str) -> Outcome {
    let vm = call.text(0);
    let _operation =
        Operation::begin(call, &[("VM", vm, name)], |db: &Database| vm_checks::check(db, vm, name)).await?;
    let copy = copy_vm(call, vm, call.text(1), &way, &call.strings(2)).await?;
    let of_checkpoint = {
        let db = call.core.db();
        db.flag("VM", vm, "is_a_snapshot") && db.text("VM", &copy, "power_state") != "Halted"
    };
    if of_checkpoint {
        super::vm_power::hard_shutdown(&call.core, &copy);
    }
    Ok(copy.into())
}

/// Fields that belong to the server whatever the record says.
const NOT_FROM_CLIENT: &[&str] = &["uuid", "is_a_snapshot", "is_control_domain", "resident_on", "metrics", "version"];

fn create(call: &Call) -> Outcome {
    let mut fields = read_record("VM", &call.value(0))?;
    fields.retain(|(name, _)| !NOT_FROM_CLIENT.contains(&name.as_str()));
    let given = fields.clone();
    let text = |name: &str| {
        given.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str().to_owned()).unwrap_or_default()
    };
    let int = |name: &str| given.iter().find(|(known, _)| known == name).map_or(0, |(_, value)| value.as_int());
    let power_state = text("power_state");
    if !matches!(power_state.as_str(), "" | "Halted" | "Suspended") {
        let reason = "Only Halted or Suspended power states can be used when creating a VM";
        return Err(Failure::new("VALUE_NOT_SUPPORTED", ["power_state", &power_state.to_lowercase(), reason]));
    }
    vm_set::check_memory(
        int("memory_static_min"),
        int("memory_dynamic_min"),
        int("memory_dynamic_max"),
        int("memory_static_max"),
    )?;
    vm_set::check_vcpus(int("VCPUs_max"), int("VCPUs_at_startup"))?;
    let mut db = call.core.db();
    let policy = text("HVM_boot_policy");
    let domain_type = text("domain_type");
    if matches!(domain_type.as_str(), "" | "unspecified") {
        let derived = if policy.is_empty() { "pv" } else { "hvm" };
        fields.retain(|(name, _)| name != "domain_type");
        fields.push(("domain_type".into(), derived.into()));
    }
    let affinity = text("affinity");
    if !db.exists("host", &affinity) {
        fields.retain(|(name, _)| name != "affinity");
    }
    let hvm = fields.iter().any(|(name, value)| name == "domain_type" && value.as_str() == "hvm");
    let metrics = db.create(
        "VM_metrics",
        vec![("current_domain_type", "unspecified".into()), ("VCPUs_number", int("VCPUs_at_startup").into())],
    );
    let mut record: Vec<(&str, Value)> = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    record.push(("metrics", metrics.into()));
    record.push(("memory_overhead", Value::Int(5 << 20)));
    record.push(("hardware_platform_version", Value::Int(if hvm { 2 } else { 0 })));
    let vm = db.create("VM", record);
    if db.map_value("VM", &vm, "other_config", "mac_seed").is_none() {
        db.put("VM", &vm, "other_config", "mac_seed", new_uuid());
    }
    Ok(vm.into())
}

/// The record goes; disks stay.
async fn destroy(call: &Call) -> Outcome {
    let core = &call.core;
    let vm = call.text(0);
    let check = |db: &Database| vm_checks::check(db, vm, "destroy");
    let operation = Operation::begin(call, &[("VM", vm, "destroy")], check).await?;
    drop(operation);
    let vtpms = core.db().set_of("VM", vm, "VTPMs");
    for vtpm in vtpms {
        super::vtpm::destroy(core, &vtpm);
    }
    let mut db = core.db();
    let parent = db.text("VM", vm, "parent");
    for child in db.set_of("VM", vm, "children") {
        db.set("VM", &child, "parent", parent.as_str());
    }
    for vbd in db.set_of("VM", vm, "VBDs") {
        vbd::remove(&mut db, &vbd);
    }
    for vif in db.set_of("VM", vm, "VIFs") {
        db.destroy("VIF", &vif);
    }
    for vusb in db.set_of("VM", vm, "VUSBs") {
        db.destroy("VUSB", &vusb);
    }
    for (class, field) in [("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")] {
        let reference = db.text("VM", vm, field);
        if reference != NULL {
            db.destroy(class, &reference);
        }
    }
    db.destroy("VM", vm);
    Ok(Value::void())
}
