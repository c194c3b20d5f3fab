//! Setters of VMs that check, or that change more than one field.

use super::{Call, vm_checks};
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let vm = call.text(0);
    let mut db = call.core.db();
    let outcome = match simple {
        "set_memory_limits" => limits(&mut db, vm, [call.int(1), call.int(3), call.int(4), call.int(2)]),
        "set_memory_static_range" => {
            let (low, high) = (db.int("VM", vm, "memory_dynamic_min"), db.int("VM", vm, "memory_dynamic_max"));
            limits_for(&mut db, vm, "changing_static_range", [call.int(1), low, high, call.int(2)])
        }
        "set_memory_dynamic_range" => {
            let (low, high) = (db.int("VM", vm, "memory_static_min"), db.int("VM", vm, "memory_static_max"));
            limits_for(&mut db, vm, "changing_dynamic_range", [low, call.int(1), call.int(2), high])
        }
        "set_memory" => {
            let low = db.int("VM", vm, "memory_static_min").min(call.int(1));
            limits(&mut db, vm, [low, call.int(1), call.int(1), call.int(1)])
        }
        "set_memory_static_min" | "set_memory_static_max" | "set_memory_dynamic_min" | "set_memory_dynamic_max" => {
            one_limit(&mut db, vm, simple, call.int(1))
        }
        "maximise_memory" => return Some(db.check("VM", vm).map(|()| call.value(1))),
        "compute_memory_overhead" => return Some(db.get("VM", vm, "memory_overhead").cloned()),
        "set_VCPUs_max" | "set_VCPUs_at_startup" => vcpus(&mut db, vm, simple, call.int(1)),
        "set_bios_strings" => bios_strings(&mut db, vm, &call.value(1)),
        "copy_bios_strings" => {
            let strings = db.get("host", call.text(1), "bios_strings").cloned();
            strings.and_then(|strings| bios_strings(&mut db, vm, &strings))
        }
        "set_start_delay" | "set_shutdown_delay" | "set_order" => {
            let field = simple.trim_start_matches("set_");
            if call.int(1) < 0 {
                let value = call.int(1).to_string();
                Err(Failure::new("VALUE_NOT_SUPPORTED", [field, &value, "Value must be non-negative"]))
            } else {
                plain(&mut db, vm, field, call.value(1))
            }
        }
        "set_is_a_template" => template(&mut db, vm, call.flag(1)),
        "set_HVM_shadow_multiplier" => {
            let value = call.params.get(1).map_or(0.0, Value::as_float);
            if value < 1.0 {
                let text = crate::model::float_text(value);
                Err(Failure::new("INVALID_VALUE", ["HVM_shadow_multiplier", &text]))
            } else {
                plain(&mut db, vm, "HVM_shadow_multiplier", value.into())
            }
        }
        "set_HVM_boot_policy" => plain(&mut db, vm, "HVM_boot_policy", call.value(1)).map(|()| {
            let kind = if call.text(1).is_empty() { "pv" } else { "hvm" };
            db.set("VM", vm, "domain_type", kind);
        }),
        "set_domain_type" => {
            vm_checks::check(&db, vm, "start").and_then(|()| plain(&mut db, vm, "domain_type", call.value(1)))
        }
        "set_has_vendor_device" => {
            vm_checks::check(&db, vm, "start").and_then(|()| plain(&mut db, vm, "has_vendor_device", call.value(1)))
        }
        "set_ha_restart_priority" => {
            if matches!(call.text(1), "" | "restart" | "best-effort") {
                plain(&mut db, vm, "ha_restart_priority", call.value(1))
            } else {
                Err(Failure::new("INVALID_VALUE", ["ha_restart_priority", call.text(1)]))
            }
        }
        "set_ha_always_run" | "set_actions_after_crash" | "set_appliance" | "set_suspend_VDI" => {
            plain(&mut db, vm, simple.trim_start_matches("set_"), call.value(1))
        }
        "set_NVRAM" => {
            vm_checks::check(&db, vm, "changing_NVRAM").and_then(|()| plain(&mut db, vm, "NVRAM", call.value(1)))
        }
        "add_to_NVRAM" => vm_checks::check(&db, vm, "changing_NVRAM").and_then(|()| {
            if db.map_value("VM", vm, "NVRAM", call.text(1)).is_some() {
                return Err(Failure::new("MAP_DUPLICATE_KEY", ["VM", "NVRAM", vm, call.text(1)]));
            }
            db.put("VM", vm, "NVRAM", call.text(1), call.value(2));
            Ok(())
        }),
        "remove_from_NVRAM" => vm_checks::check(&db, vm, "changing_NVRAM").map(|()| {
            db.take("VM", vm, "NVRAM", call.text(1));
        }),
        _ => return None,
    };
    Some(outcome.map(|()| Value::void()))
}

fn plain(db: &mut Database, vm: &str, field: &str, value: Value) -> Outcome<()> {
    db.check("VM", vm)?;
    db.set("VM", vm, field, value);
    Ok(())
}

/// The order that memory limits must have.
pub(super) fn check_memory(static_min: i64, dynamic_min: i64, dynamic_max: i64, static_max: i64) -> Outcome<()> {
    if 0 <= static_min && static_min <= dynamic_min && dynamic_min <= dynamic_max && dynamic_max <= static_max {
        return Ok(());
    }
    let text = "Memory limits must satisfy: static_min <= dynamic_min <= dynamic_max <= static_max";
    Err(Failure::new("MEMORY_CONSTRAINT_VIOLATION_ORDER", [text]))
}

/// Limits as static min, dynamic min, dynamic max, static max.
fn limits(db: &mut Database, vm: &str, values: [i64; 4]) -> Outcome<()> {
    limits_for(db, vm, "changing_memory_limits", values)
}

fn limits_for(db: &mut Database, vm: &str, operation: &str, values: [i64; 4]) -> Outcome<()> {
    vm_checks::check(db, vm, operation)?;
    let [static_min, dynamic_min, dynamic_max, static_max] = values;
    check_memory(static_min, dynamic_min, dynamic_max, static_max)?;
    let names = ["memory_static_min", "memory_dynamic_min", "memory_dynamic_max", "memory_static_max"];
    for (name, value) in names.iter().zip(values) {
        db.set("VM", vm, name, value);
    }
    Ok(())
}

fn one_limit(db: &mut Database, vm: &str, method: &str, value: i64) -> Outcome<()> {
    let field = method.trim_start_matches("set_");
    let get = |name: &str| if name == field { value } else { db.int("VM", vm, name) };
    let values =
        [get("memory_static_min"), get("memory_dynamic_min"), get("memory_dynamic_max"), get("memory_static_max")];
    let operation = if field.contains("static") { "changing_static_range" } else { "changing_dynamic_range" };
    limits_for(db, vm, operation, values)
}

/// The order that numbers of processors must have.
pub(super) fn check_vcpus(max: i64, at_startup: i64) -> Outcome<()> {
    if 0 < at_startup && at_startup <= max {
        return Ok(());
    }
    let rule = "VCPU values must satisfy: 0 < VCPUs_at_startup <= VCPUs_max";
    let found = format!("VCPUs_max = {max}, VCPUs_at_startup = {at_startup}");
    Err(Failure::new("INVALID_VALUE", [rule.to_owned(), found]))
}

fn vcpus(db: &mut Database, vm: &str, method: &str, value: i64) -> Outcome<()> {
    vm_checks::check(db, vm, "changing_VCPUs")?;
    let max = if method == "set_VCPUs_max" { value } else { db.int("VM", vm, "VCPUs_max") };
    let at_startup = if method == "set_VCPUs_max" { db.int("VM", vm, "VCPUs_at_startup") } else { value };
    check_vcpus(max, at_startup)?;
    db.set("VM", vm, method.trim_start_matches("set_"), value);
    Ok(())
}

/// The keys that a client may set, with the values that others get.
const BIOS_KEYS: &[(&str, &str)] = &[
    ("bios-vendor", "Xen"),
    ("bios-version", ""),
    ("system-manufacturer", "Xen"),
    ("system-product-name", "HVM domU"),
    ("system-version", ""),
    ("system-serial-number", ""),
    ("baseboard-manufacturer", ""),
    ("baseboard-product-name", ""),
    ("baseboard-version", ""),
    ("baseboard-serial-number", ""),
    ("baseboard-asset-tag", ""),
    ("baseboard-location-in-chassis", ""),
    ("enclosure-asset-tag", ""),
    ("hp-rombios", ""),
    ("oem-1", "Xen"),
    ("oem-2", "MS_VM_CERT/SHA1/bdbeb6e0a816d43fa6d3fe8aaef04c2bad9d3e3d"),
];

fn bios_strings(db: &mut Database, vm: &str, strings: &Value) -> Outcome<()> {
    db.check("VM", vm)?;
    if !db.get("VM", vm, "bios_strings")?.as_map().is_empty() {
        return Err(Failure::bare("VM_BIOS_STRINGS_ALREADY_SET"));
    }
    if let Some((key, _)) = strings.as_map().iter().find(|(key, _)| !BIOS_KEYS.iter().any(|(known, _)| known == key)) {
        return Err(Failure::new("INVALID_VALUE", [key.as_str(), "Unknown key"]));
    }
    let full = BIOS_KEYS.iter().map(|(key, generic)| {
        let value = strings.member(key).map_or((*generic).to_owned(), |value| value.as_str().to_owned());
        ((*key).to_owned(), value)
    });
    let full = Value::map(full.collect::<Vec<_>>());
    db.set("VM", vm, "bios_strings", full);
    Ok(())
}

fn template(db: &mut Database, vm: &str, on: bool) -> Outcome<()> {
    if on {
        vm_checks::check(db, vm, "make_into_template")?;
        db.set("VM", vm, "ha_restart_priority", "");
    } else {
        db.check("VM", vm)?;
        if db.flag("VM", vm, "is_default_template") {
            return Err(Failure::new("INVALID_VALUE", ["is_a_template", "is_default_template"]));
        }
    }
    db.set("VM", vm, "is_a_template", on);
    Ok(())
}
