//! The table of error codes: the code, `docs/xenapi.md` and the data model say the same, and no code is without a class.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests")]

#[path = "../../../tests/support/shared.rs"]
mod shared;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use xenvault_xenapi::FailureClass;

fn facts() -> Value {
    serde_json::from_str(include_str!("../datamodel/facts.json")).unwrap()
}

fn classified() -> BTreeSet<&'static str> {
    FailureClass::table().iter().map(|row| row.code).collect()
}

fn texts(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}

#[test]
fn every_code_that_the_client_knows_by_name_has_a_class() {
    let known = classified();
    let facts = facts();
    let without: Vec<&str> = texts(&facts["error_codes"]).filter(|code| !known.contains(code)).collect();
    assert!(without.is_empty(), "no class for {without:?}");
}

#[test]
fn every_code_that_the_data_model_names_for_our_messages_has_a_class() {
    let Some(path) = shared::shared("xapi-datamodel.json") else { return };
    let model: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let known = classified();
    let (mut named, mut without) = (0, BTreeSet::new());
    for (class, selected) in facts()["classes"].as_object().unwrap() {
        for message in selected["messages"].as_object().into_iter().flatten().map(|(name, _)| name) {
            for code in texts(&model["classes"][class]["messages"][message]["errors"]) {
                named += 1;
                if !known.contains(code) {
                    without.insert(format!("{class}.{message}: {code}"));
                }
            }
        }
    }
    assert!(named > 50, "the data model names errors of our messages, {named} were found");
    assert!(without.is_empty(), "no class for {without:?}");
}

#[test]
fn every_code_in_the_recordings_has_a_class() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    let known = classified();
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let text = String::from_utf8_lossy(&std::fs::read(entry.unwrap().path()).unwrap()).into_owned();
        // JSON-RPC 2.0 keeps the code in `message`.
        for part in text.split("\"message\":\"").skip(1) {
            seen.insert(part.split('"').next().unwrap().to_owned());
        }
    }
    seen.retain(|code| code.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
    assert!(seen.len() > 10, "{seen:?}");
    let without: Vec<&String> = seen.iter().filter(|code| !known.contains(code.as_str())).collect();
    assert!(without.is_empty(), "no class for {without:?}");
}

#[test]
fn the_rights_in_the_document_are_those_of_the_data_model() {
    let Some(path) = shared::shared("xapi-datamodel.json") else { return };
    let model: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut held = 0;
    for line in include_str!("../../../docs/xenapi.md").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, calls, role, _, _, _, _, _] = cells.as_slice() else { continue };
        for call in calls.split(", ").filter_map(|call| call.strip_prefix('`')?.strip_suffix('`')) {
            let Some((class, message)) = call.split_once('.') else { continue };
            let class = &model["classes"][class];
            let implicit = || class["implicit_messages"].as_array().into_iter().flatten();
            let explicit = &class["messages"][message];
            let known = explicit.is_object()
                || implicit().any(|found| found[0] == message)
                || ["get_record", "get_all_records"].contains(&message);
            assert!(known, "{call} is no message");
            if let Some(least) = explicit["min_role"].as_str() {
                assert_eq!(*role, least, "{call}");
                held += 1;
            }
        }
    }
    assert!(held > 15, "{held} rights were compared");
}

#[test]
fn the_document_shows_the_same_table() {
    let document = include_str!("../../../docs/xenapi.md");
    let mut shown = BTreeMap::new();
    for line in document.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let code = cells.get(1).and_then(|cell| cell.strip_prefix('`')).and_then(|cell| cell.strip_suffix('`'));
        if let (Some(code), [_, _, class, meaning, _]) = (code, cells.as_slice())
            && code.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
        {
            let before = shown.insert(code.to_owned(), (class.to_string(), meaning.to_string()));
            assert!(before.is_none(), "{code} is shown twice");
        }
    }
    let expected: BTreeMap<_, _> = FailureClass::table()
        .iter()
        .map(|row| (row.code.to_owned(), (row.class.to_string(), row.meaning.to_owned())))
        .collect();
    let lines = |table: &BTreeMap<String, (String, String)>| {
        table.iter().map(|(code, (class, meaning))| format!("| `{code}` | {class} | {meaning} |")).collect::<Vec<_>>()
    };
    let (shown, expected) = (lines(&shown), lines(&expected));
    let missing: Vec<&String> = expected.iter().filter(|line| !shown.contains(line)).collect();
    let surplus: Vec<&String> = shown.iter().filter(|line| !expected.contains(line)).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "missing: {missing:#?}\nnot in the code: {surplus:#?}");
}

#[test]
fn the_document_explains_every_class() {
    let classes: BTreeSet<String> = FailureClass::table().iter().map(|row| row.class.to_string()).collect();
    assert!(classes.len() >= 8, "{classes:?}");
    // Class, what the client does, what reaches the caller, when to try again.
    let rows = include_str!("../../../docs/xenapi.md").lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        match cells.as_slice() {
            ["", class, does, reaches, retry, ""] => Some((class.to_string(), [*does, *reaches, *retry])),
            _ => None,
        }
    });
    let explained: BTreeMap<String, [&str; 3]> = rows.filter(|(class, _)| classes.contains(class)).collect();
    let without: Vec<&String> = classes.iter().filter(|class| !explained.contains_key(*class)).collect();
    assert!(without.is_empty(), "no line for {without:?}");
    for (class, cells) in &explained {
        assert!(cells.iter().all(|cell| !cell.is_empty()), "{class}: {cells:?}");
        assert!(["`Later`", "`Never`", "`AfterLogin`"].contains(&cells[2]), "{class}: {cells:?}");
    }
}
