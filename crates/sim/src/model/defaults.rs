//! Values of fields that a constructor leaves out, where they differ from the empty value of the type.

use super::Value;

/// The default of a field, if it is a special one.
pub(super) fn special(class: &str, field: &str) -> Option<Value> {
    Some(match (class, field) {
        ("VM", "power_state") => Value::text("Halted"),
        ("VM", "HVM_shadow_multiplier") => Value::Float(1.0),
        ("VM", "actions_after_softreboot") => Value::text("soft_reboot"),
        ("VM", "actions_after_shutdown") => Value::text("destroy"),
        ("VM", "actions_after_reboot" | "actions_after_crash") => Value::text("restart"),
        ("VM", "generation_id") => Value::text("0:0"),
        ("VM", "has_vendor_device") => Value::Bool(true),
        ("VM", "domain_type") => Value::text("unspecified"),
        ("VM", "secureboot_certificates_state") => Value::text("ok"),
        ("VM", "domid") => Value::Int(-1),
        ("VM", "hardware_platform_version") => Value::Int(0),
        ("VM", "user_version") => Value::Int(1),
        ("VDI", "managed") => Value::Bool(true),
        ("VDI", "type") => Value::text("user"),
        ("VDI", "on_boot") => Value::text("persist"),
        ("VBD", "mode") => Value::text("RW"),
        ("VBD", "type") => Value::text("Disk"),
        ("VBD", "unpluggable") => Value::Bool(true),
        ("VIF", "locking_mode") => Value::text("network_default"),
        ("VIF", "ipv4_configuration_mode" | "ipv6_configuration_mode") => Value::text("None"),
        ("VIF" | "network", "MTU") | ("PIF", "MTU") => Value::Int(1500),
        ("network", "managed") => Value::Bool(true),
        ("network", "default_locking_mode") => Value::text("unlocked"),
        ("PIF", "managed" | "physical") => Value::Bool(true),
        ("PIF", "VLAN") => Value::Int(-1),
        ("PIF", "igmp_snooping_status") => Value::text("unknown"),
        ("PIF", "ip_configuration_mode") => Value::text("Static"),
        ("PIF", "primary_address_type") => Value::text("IPv4"),
        ("task", "type") => Value::text("<none/>"),
        ("task", "backtrace") => Value::text("()"),
        ("SR", "content_type") => Value::text("user"),
        ("SM", "required_api_version") => Value::text("1.0"),
        _ => return None,
    })
}

/// Fields that a constructor refuses to do without.
pub(crate) fn required_fields(class: &str) -> &'static [&'static str] {
    match class {
        "VM" => &[
            "user_version",
            "is_a_template",
            "affinity",
            "memory_static_max",
            "memory_dynamic_max",
            "memory_dynamic_min",
            "memory_static_min",
            "VCPUs_params",
            "VCPUs_max",
            "VCPUs_at_startup",
            "actions_after_shutdown",
            "actions_after_reboot",
            "actions_after_crash",
            "PV_bootloader",
            "PV_kernel",
            "PV_ramdisk",
            "PV_args",
            "PV_bootloader_args",
            "PV_legacy_args",
            "platform",
            "PCI_bus",
            "other_config",
            "recommendations",
        ],
        "VDI" => &["SR", "virtual_size", "type", "sharable", "read_only", "other_config"],
        "VBD" => &[
            "VM",
            "VDI",
            "userdevice",
            "bootable",
            "mode",
            "type",
            "empty",
            "other_config",
            "qos_algorithm_type",
            "qos_algorithm_params",
        ],
        "VIF" => {
            &["device", "network", "VM", "MAC", "MTU", "other_config", "qos_algorithm_type", "qos_algorithm_params"]
        }
        _ => &[],
    }
}
