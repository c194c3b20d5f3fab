//! The trimmed list of classes against the data model that it was made from.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, clippy::panic, reason = "a test")]

#[path = "../../../tests/support/shared.rs"]
mod shared;

use serde_json::{Value, json};

#[test]
fn the_list_of_classes_is_that_of_the_data_model() {
    let Some(path) = shared::shared("xapi-datamodel.json") else { return };
    let model: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ours: Value = serde_json::from_str(include_str!("../data/classes.json")).unwrap();
    for class in ours["classes"].as_array().unwrap() {
        let name = class["name"].as_str().unwrap();
        let theirs = &model["classes"][name];
        // Events are no objects: they have no fields to ask for.
        let fields = if name == "event" { json!({}) } else { theirs["fields"].clone() };
        assert_eq!(class["fields"].as_array().unwrap().len(), fields.as_object().unwrap().len(), "{name}");
        for field in class["fields"].as_array().unwrap() {
            let known = &fields[field[0].as_str().unwrap()];
            assert_eq!((&field[1], &field[2]), (&known["type"], &known["access"]), "{name}.{}", field[0]);
        }
        assert_eq!(class["enums"], theirs["enums"], "{name}");
        for (method, known) in theirs["messages"].as_object().unwrap() {
            let ours = class["messages"].as_array().unwrap().iter().find(|ours| ours[0] == *method);
            let ours = ours.unwrap_or_else(|| panic!("{name}.{method} is missing"));
            let params: Vec<Value> = known["params"]
                .as_array()
                .unwrap()
                .iter()
                .map(|param| json!([param["name"], param["type"], param.get("required").unwrap_or(&json!(true))]))
                .collect();
            assert_eq!(ours[1], Value::Array(params), "{name}.{method}");
        }
    }
}

#[test]
fn the_table_of_roles_is_that_of_the_data_model() {
    let Some(path) = shared::shared("xapi-datamodel.json") else { return };
    let model: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let ours: Value = serde_json::from_str(include_str!("../data/roles.json")).unwrap();
    for class in ours["classes"].as_array().unwrap() {
        let name = class["name"].as_str().unwrap();
        let role_of = |method: &str| {
            let roles = class["messages"].as_object().unwrap();
            let holds = |names: &&Value| names.as_array().unwrap().iter().any(|known| known == method);
            roles.iter().find(|(_, names)| holds(names)).map(|(role, _)| role.clone())
        };
        for (method, known) in model["classes"][name]["messages"].as_object().unwrap() {
            let ours = role_of(method).unwrap_or_else(|| panic!("{name}.{method} has no role"));
            match known["min_role"].as_str() {
                // The role of programs with certificates stands beside another one, which only the sources tell.
                Some("client-cert") => assert!(ours.starts_with("vm-") || ours == "pool-operator", "{name}.{method}"),
                Some(least) => assert_eq!(ours, least, "{name}.{method}"),
                None => assert_eq!(ours, "local-root", "{name}.{method}"),
            }
        }
    }
}
