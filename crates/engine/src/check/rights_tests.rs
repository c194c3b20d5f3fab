//! The table of rights against the calls that the sources make, the data model, and `docs/xenapi.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{RIGHTS, Role, least_role};

#[path = "../../../../tests/support/shared.rs"]
mod shared;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The text of every Rust source in a folder, without the tests that stand at its end.
fn sources(folder: &Path, into: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "generated" {
                sources(&path, into);
            }
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") && !name.ends_with("transcripts.rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            into.push(code.collect::<Vec<_>>().join("\n"));
        }
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The wrappers of `xenvault-xenapi`: `(module, function)` to the message that it sends.
fn wrappers() -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(workspace().join("crates/xenapi/src/generated")).unwrap() {
        let path = entry.unwrap().path();
        let module = path.file_stem().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        for part in text.split("pub async fn ").skip(1) {
            let function: String = part.chars().take_while(|c| is_name(*c)).collect();
            let literal = part.split('"').nth(1).unwrap_or_default();
            if literal.contains('.') {
                let message = literal.trim_start_matches("Async.").to_owned();
                found.insert((module.clone(), function), message);
            }
        }
    }
    assert!(found.len() > 100, "{}", found.len());
    found
}

/// Every message and transfer that our sources name, as `docs/xenapi.md` writes them.
fn calls() -> BTreeSet<String> {
    let mut texts = Vec::new();
    for folder in ["crates/engine/src", "crates/xenapi/src", "bins/datamover/src", "bins/restore/src"] {
        sources(&workspace().join(folder), &mut texts);
    }
    let wrappers = wrappers();
    let messages: BTreeSet<&str> = wrappers.values().map(String::as_str).collect();
    let classes: BTreeSet<&str> = messages.iter().filter_map(|message| Some(message.split_once('.')?.0)).collect();
    let mut found = BTreeSet::new();
    for text in &texts {
        // `vm::snapshot_async(...)`.
        for (at, _) in text.match_indices("::") {
            let module = text[..at].rsplit(|c| !is_name(c)).next().unwrap_or_default();
            let module = if module == "session_class" { "session" } else { module };
            let function: String = text[at + 2..].chars().take_while(|c| is_name(*c)).collect();
            found.extend(wrappers.get(&(module.to_owned(), function)).cloned());
        }
        // Calls without a wrapper stand as texts: `"pool.get_all"`.
        for literal in text.split('"').skip(1).step_by(2) {
            let Some((class, message)) = literal.split_once('.') else { continue };
            let known = classes.contains(class) || ["session", "event"].contains(&class);
            if known && !message.is_empty() && message.chars().all(is_name) {
                found.insert(literal.to_owned());
            }
        }
        for (path, verb) in [("/export_raw_vdi", "GET"), ("/import_raw_vdi", "PUT")] {
            if text.contains(&format!("\"{path}\"")) {
                found.insert(format!("{verb} {path}"));
            }
        }
    }
    found
}

/// Calls that the data model gives to every role, for where it is not beside the checkout.
const WITHOUT_THE_MODEL: [&str; 10] = [
    "event.from",
    "host.get_server_certificate",
    "host.get_servertime",
    "message.get_since",
    "session.login_with_password",
    "session.logout",
    "task.cancel",
    "task.create",
    "task.destroy",
    "task.set_status",
];

/// What the data model says of a message: its least role, `-` for generated getters, and the default of the class for
/// generated setters, constructors and destructors, which the data model leaves out.
fn least(model: Option<&serde_json::Value>, call: &str) -> String {
    if call.contains('/') {
        // Handlers are not in the data model; `reference/nbd-and-disk-http.md` names their role.
        return "vm-admin".to_owned();
    }
    let (class, message) = call.split_once('.').unwrap();
    if let Some(model) = model {
        let known = &model["classes"][class];
        if let Some(role) = known["messages"][message]["min_role"].as_str() {
            return role.to_owned();
        }
    } else if let Some(row) = RIGHTS.iter().find(|row| row.call == call) {
        return row.role.to_string();
    }
    if WITHOUT_THE_MODEL.contains(&call) {
        return "read-only".to_owned();
    }
    if message.starts_with("get_") {
        return "-".to_owned();
    }
    assert!(["VM", "VDI", "VBD", "VIF"].contains(&class), "what is the default role of {call}?");
    "vm-admin".to_owned()
}

fn model() -> Option<serde_json::Value> {
    let path = shared::shared("xapi-datamodel.json")?;
    Some(serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
}

#[test]
fn the_scan_of_the_sources_finds_calls_of_every_kind() {
    let calls = calls();
    for call in [
        "VM.snapshot",
        "VDI.list_changed_blocks",
        "session.login_with_password",
        "pool.get_all",
        "event.from",
        "session.get_record",
        "task.set_status",
        "GET /export_raw_vdi",
        "PUT /import_raw_vdi",
    ] {
        assert!(calls.contains(call), "{call} is not found: {calls:#?}");
    }
}

#[test]
fn the_table_has_every_call_that_needs_more_than_reading_and_its_least_role() {
    let model = model();
    let needed: BTreeMap<String, String> = calls()
        .into_iter()
        .map(|call| (call.clone(), least(model.as_ref(), &call)))
        .filter(|(_, role)| role != "-" && role != "read-only")
        .collect();
    let told: BTreeMap<String, String> =
        RIGHTS.iter().map(|right| (right.call.to_owned(), right.role.to_string())).collect();
    assert_eq!(told.len(), RIGHTS.len(), "a call stands twice");
    assert_eq!(told, needed);
}

#[test]
fn the_document_has_every_call_with_its_least_role() {
    let document = std::fs::read_to_string(workspace().join("docs/xenapi.md")).unwrap();
    let mut told: BTreeMap<String, String> = BTreeMap::new();
    for line in document.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, calls, role, _, _, _, _, _] = cells.as_slice() else { continue };
        for call in calls.split(", ").filter_map(|call| call.strip_prefix('`')?.strip_suffix('`')) {
            assert_eq!(told.insert(call.to_owned(), (*role).to_owned()), None, "{call} stands twice");
        }
    }
    let model = model();
    let made: BTreeMap<String, String> =
        calls().into_iter().map(|call| (call.clone(), least(model.as_ref(), &call))).collect();
    let missing: Vec<_> = made.iter().filter(|(call, role)| told.get(*call) != Some(*role)).collect();
    assert!(missing.is_empty(), "not in docs/xenapi.md, or with another role: {missing:#?}");
    let surplus: Vec<_> = told.keys().filter(|call| !made.contains_key(*call)).collect();
    assert!(surplus.is_empty(), "nothing makes these calls: {surplus:?}");
}

#[test]
fn rights_are_named_as_a_session_lists_them() {
    let named: Vec<String> = RIGHTS.iter().map(super::Right::permission).collect();
    for name in ["vm.snapshot", "vdi.get_nbd_info", "http/get_export_raw_vdi", "http/put_import_raw_vdi"] {
        assert!(named.iter().any(|known| known == name), "{named:?}");
    }
}

#[test]
fn the_least_role_for_backups_and_restores() {
    let least = |wanted: fn(&super::Right) -> bool| least_role(RIGHTS.iter().filter(|right| wanted(right)));
    assert_eq!(least(|right| right.need.for_backup()), Some(Role::VmPowerAdmin));
    assert_eq!(least(|right| right.need.for_restore()), Some(Role::VmPowerAdmin));
    assert_eq!(least(|_| false), None);
}

#[test]
fn without_the_data_model_the_same_is_held() {
    let Some(model) = model() else { return };
    for call in calls() {
        assert_eq!(least(None, &call), least(Some(&model), &call), "{call}");
    }
    let calls = calls();
    assert!(WITHOUT_THE_MODEL.iter().all(|call| calls.contains(*call)), "{calls:?}");
}
