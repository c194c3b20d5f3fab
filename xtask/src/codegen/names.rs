//! Names of XenAPI to names of Rust.

/// The module of a class: `VM_guest_metrics` to `vm_guest_metrics`.
pub fn module(class: &str) -> String {
    class.to_lowercase()
}

/// A field, parameter or function: lower case, with an underscore after words that Rust keeps for itself.
pub fn snake(name: &str) -> String {
    let lower = name.to_lowercase();
    match lower.as_str() {
        "type" | "ref" | "static" | "in" | "enum" | "struct" | "move" | "where" | "use" | "self" | "match" => {
            format!("{lower}_")
        }
        _ => lower,
    }
}

/// A parameter: `self` becomes the name of the class, but for a session, since that is the first parameter of all.
pub fn parameter(class: &str, name: &str) -> String {
    match (class, name) {
        ("session", "self") => "other".to_owned(),
        (_, "self") => module(class),
        _ => snake(name),
    }
}

/// The type of an enumeration: the name without the prefix of its class, `vm_power_state` to `PowerState`.
pub fn enumeration(class: &str, name: &str) -> String {
    let prefix = format!("{}_", module(class));
    camel(name.strip_prefix(&prefix).unwrap_or(name))
}

/// A variant or type: `clean_shutdown` to `CleanShutdown`, `changing_NVRAM` to `ChangingNvram`.
pub fn camel(name: &str) -> String {
    let mut result = String::new();
    for word in name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
        let has_lower = word.chars().any(|c| c.is_ascii_lowercase());
        for (at, c) in word.chars().enumerate() {
            if at == 0 {
                result.push(c.to_ascii_uppercase());
            } else if has_lower {
                result.push(c);
            } else {
                result.push(c.to_ascii_lowercase());
            }
        }
    }
    if result.starts_with(|c: char| c.is_ascii_digit()) {
        result.insert(0, 'N');
    }
    if result.is_empty() || result == "Unknown" {
        result.push_str("Value");
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_rust() {
        assert_eq!(snake("type"), "type_");
        assert_eq!(snake("HVM_boot_params"), "hvm_boot_params");
        assert_eq!(parameter("VDI", "self"), "vdi");
        assert_eq!(enumeration("VM", "vm_power_state"), "PowerState");
        assert_eq!(enumeration("VDI", "on_boot"), "OnBoot");
        assert_eq!(camel("changing_NVRAM"), "ChangingNvram");
        assert_eq!(camel("unknown"), "UnknownValue");
        assert_eq!(camel("SR_BACKEND_FAILURE_44"), "SrBackendFailure44");
    }
}
