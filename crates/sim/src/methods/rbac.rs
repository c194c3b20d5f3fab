//! Roles: which calls an account may make, as the data model of xapi has it. The local `root` may everything.
//!
//! Each call is a permission of its own name in lower case, some keys of maps are permissions too, and so are the
//! HTTP handlers. An account's session carries all permissions of its role, fixed at the login.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde::Deserialize;

use crate::Role;
use crate::core::Core;
use crate::model::{Database, NULL, Value, schema};
use crate::rpc::{Failure, Outcome};

const ROLES: &str = include_str!("../../data/roles.json");

/// HTTP handlers with the least role for each.
const HANDLERS: &[(&str, Role)] = &[
    ("http/get_export", Role::VmAdmin),
    ("http/get_export_metadata", Role::VmAdmin),
    ("http/get_export_raw_vdi", Role::VmAdmin),
    ("http/put_import", Role::VmAdmin),
    ("http/put_import_metadata", Role::VmAdmin),
    ("http/put_import_raw_vdi", Role::VmAdmin),
    ("http/get_pool_xml_db_sync", Role::PoolAdmin),
    ("http/get_audit_log", Role::ReadOnly),
    ("http/get_host_rrd", Role::ReadOnly),
    ("http/get_rrd_updates", Role::ReadOnly),
];

/// Permissions that are neither a call nor a handler.
const EXTRA: &[(&str, Role)] = &[("task.destroy/any", Role::PoolOperator)];

#[derive(Deserialize)]
struct File {
    classes: Vec<FileClass>,
}

#[derive(Deserialize)]
struct FileClass {
    name: String,
    /// Least role for generated setters.
    setters: String,
    /// Names by least role.
    messages: HashMap<String, Vec<String>>,
    #[serde(default)]
    fields: HashMap<String, String>,
    #[serde(default)]
    keys: HashMap<String, HashMap<String, String>>,
}

struct Table {
    /// Least role of every permission; `None` for those of the local `root` alone.
    least: HashMap<String, Option<Role>>,
    /// Protected keys by call in lower case; an ending `*` stands for anything.
    keys: HashMap<String, Vec<String>>,
}

fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        #[expect(clippy::expect_used, reason = "part of the source, read by a test")]
        let file: File = serde_json::from_str(ROLES).expect("the table of roles is JSON");
        let mut table = Table { least: HashMap::new(), keys: HashMap::new() };
        for class in &file.classes {
            read_class(&mut table, class);
        }
        let fixed = HANDLERS.iter().chain(EXTRA);
        table.least.extend(fixed.map(|(name, role)| ((*name).to_owned(), Some(*role))));
        table
    })
}

fn read_class(table: &mut Table, class: &FileClass) {
    let listed: HashMap<&str, &str> = class
        .messages
        .iter()
        .flat_map(|(role, names)| names.iter().map(move |name| (name.as_str(), role.as_str())))
        .collect();
    let methods = schema().get(&class.name).map(|known| known.methods.keys()).into_iter().flatten();
    for method in methods {
        let field = ["set_", "add_to_", "remove_from_", "add_", "remove_"]
            .iter()
            .find_map(|prefix| method.strip_prefix(prefix))
            .unwrap_or_default();
        let generated = || {
            if method.starts_with("get_") {
                "read-only"
            } else {
                class.fields.get(field).map_or(class.setters.as_str(), String::as_str)
            }
        };
        let role = Role::from_name(listed.get(method.as_str()).copied().unwrap_or_else(generated));
        let permission = format!("{}.{method}", class.name).to_lowercase();
        let by_key = method.starts_with("add_to_") || method.starts_with("remove_from_");
        for (key, role) in class.keys.get(field).into_iter().flatten().filter(|_| by_key) {
            let name = format!("{permission}/key:{}", key.to_lowercase());
            table.least.insert(name, Role::from_name(role));
            table.keys.entry(permission.clone()).or_default().push(key.clone());
        }
        table.least.insert(permission, role);
    }
}

/// All permissions of a role, in order.
pub(super) fn permissions(role: Role) -> Vec<String> {
    let least = table().least.iter();
    let mut names: Vec<String> =
        least.filter(|(_, needed)| needed.is_some_and(|needed| role >= needed)).map(|(name, _)| name.clone()).collect();
    names.sort();
    names
}

/// The permission that a call needs.
fn permission_of(method: &str, params: &[Value]) -> String {
    let name = method.to_lowercase();
    let Some(keys) = table().keys.get(&name) else { return name };
    let given = params.get(1).map_or("", Value::as_str);
    let matches = |key: &&String| match key.strip_suffix('*') {
        Some(start) => given.starts_with(start),
        None => given == key.as_str(),
    };
    match keys.iter().find(matches) {
        Some(key) => format!("{name}/key:{}", key.to_lowercase()),
        None => name,
    }
}

/// `RBAC_PERMISSION_DENIED` unless the session's account may make a call.
pub(super) fn check_call(core: &Core, session: &str, method: &str, params: &[Value]) -> Outcome<()> {
    if session.is_empty() { Ok(()) } else { check(core, session, &permission_of(method, params)) }
}

/// The same for a permission by its name.
pub(crate) fn check(core: &Core, session: &str, permission: &str) -> Outcome<()> {
    let db = core.db();
    // It may have ended since it was looked at; then it is not a matter of permissions.
    if !db.exists("session", session) {
        return Err(Failure::new("SESSION_INVALID", [session]));
    }
    if db.flag("session", session, "is_local_superuser") {
        return Ok(());
    }
    let granted = match db.get("session", session, "rbac_permissions") {
        Ok(Value::List(names)) => names.iter().any(|name| name.as_str() == permission),
        _ => false,
    };
    if granted {
        return Ok(());
    }
    let least = table().least.get(permission).copied().flatten();
    let able: Vec<&str> = Role::ALL
        .iter()
        .rev()
        .filter(|role| least.is_some_and(|least| **role >= least))
        .map(|role| role.name())
        .collect();
    let text = format!("No permission in user session. (Roles with this permission: {})", able.join(", "));
    Err(Failure::new("RBAC_PERMISSION_DENIED", [permission, &text]))
}

/// The subject of an account, made with the role objects at its first login.
pub(super) fn subject(db: &mut Database, name: &str, role: Role) -> String {
    let sid = sid_of(name);
    if let Some(known) = db.refs_where("subject", "subject_identifier", &sid).into_iter().next() {
        return known;
    }
    let role = role_object(db, role);
    db.create(
        "subject",
        vec![
            ("subject_identifier", sid.into()),
            ("other_config", Value::map([("subject-name", name), ("subject-account-disabled", "false")])),
            ("roles", Value::texts([role])),
        ],
    )
}

fn role_object(db: &mut Database, wanted: Role) -> String {
    for role in Role::ALL {
        if db.refs_where("role", "name_label", role.name()).is_empty() {
            db.create(
                "role",
                vec![("name_label", role.name().into()), ("name_description", role.description().into())],
            );
        }
    }
    db.refs_where("role", "name_label", wanted.name()).into_iter().next().unwrap_or_else(|| NULL.to_owned())
}

/// An identifier in the manner of a directory, the same for the same name.
pub(super) fn sid_of(name: &str) -> String {
    let number = name.bytes().fold(0_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
    format!("S-1-5-21-1-2-3-{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_a_permission() {
        for class in schema().values() {
            for method in class.methods.keys() {
                let name = format!("{}.{method}", class.name).to_lowercase();
                assert!(table().least.contains_key(&name), "{name}");
            }
        }
    }

    #[test]
    fn roles_grow() {
        let counts: Vec<usize> = Role::ALL.iter().map(|role| permissions(*role).len()).collect();
        assert!(counts.is_sorted() && counts.first() < counts.last(), "{counts:?}");
    }

    #[test]
    fn a_protected_key_is_a_permission_of_its_own() {
        let with = |key: &str| permission_of("VM.add_to_other_config", &["".into(), key.into(), "".into()]);
        assert_eq!(with("XenCenter.CustomFields.a"), "vm.add_to_other_config/key:xencenter.customfields.*");
        assert_eq!(with("anything"), "vm.add_to_other_config");
    }
}
