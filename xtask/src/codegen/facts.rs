//! The trimmed data model: what is committed as `facts.json`.

#![allow(clippy::indexing_slicing, reason = "a member that a JSON value does not have reads as null")]

use super::CodegenError;
use super::selection::{CLASSES, Class, ERROR_CODES};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Everything that the code is generated from.
#[derive(Serialize, Deserialize)]
pub struct Facts {
    /// Where the data model came from.
    pub source: String,
    /// Classes by name.
    pub classes: BTreeMap<String, ClassFacts>,
    /// Error codes, sorted.
    pub error_codes: Vec<String>,
}

/// One class.
#[derive(Serialize, Deserialize)]
pub struct ClassFacts {
    /// Fields by name: type and access.
    pub fields: BTreeMap<String, Field>,
    /// Enumerations by name: their values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub enums: BTreeMap<String, Vec<String>>,
    /// Messages with a wrapper, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub messages: BTreeMap<String, Message>,
    /// Whether there is a `create` that takes a record.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub create: bool,
}

/// One field.
#[derive(Serialize, Deserialize)]
pub struct Field {
    /// Its type in the notation of the data model.
    #[serde(rename = "type")]
    pub kind: String,
    /// `RO/runtime`, `RO/constructor` or `RW`.
    pub access: String,
    /// The release it came with.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub since: String,
}

/// One message.
#[derive(Serialize, Deserialize)]
pub struct Message {
    /// Parameters after the session.
    pub params: Vec<Parameter>,
    /// Type of the result.
    pub result: String,
    /// Whether an `_async` wrapper is wanted.
    #[serde(default, rename = "async", skip_serializing_if = "std::ops::Not::not")]
    pub asynchronous: bool,
    /// Whether sending it twice is harmless.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repeatable: bool,
}

/// One parameter.
#[derive(Serialize, Deserialize)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether older servers do not know it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

/// The facts as they are committed: stable order, one line end at the end.
pub fn to_text(facts: &Facts) -> Result<String, serde_json::Error> {
    serde_json::to_string_pretty(facts).map(|text| text + "\n")
}

/// Takes what the selection names out of the whole data model.
pub fn trim(model: &Value) -> Result<Facts, CodegenError> {
    let mut codes: BTreeSet<String> = ERROR_CODES.iter().map(|code| (*code).to_owned()).collect();
    let mut classes = BTreeMap::new();
    for class in CLASSES {
        let found = &model["classes"][class.name];
        if !found.is_object() {
            return Err(CodegenError::Model(format!("class {} is missing", class.name)));
        }
        classes.insert(class.name.to_owned(), trim_class(class, found, &mut codes)?);
    }
    keep_foreign_enums(model, &mut classes);
    Ok(Facts { source: text(&model["source"]), classes, error_codes: codes.into_iter().collect() })
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn trim_class(class: &Class, found: &Value, codes: &mut BTreeSet<String>) -> Result<ClassFacts, CodegenError> {
    let mut fields = BTreeMap::new();
    for (name, field) in found["fields"].as_object().into_iter().flatten() {
        let field = Field { kind: text(&field["type"]), access: text(&field["access"]), since: text(&field["since"]) };
        fields.insert(name.clone(), field);
    }
    let mut enums = BTreeMap::new();
    for (name, values) in found["enums"].as_object().into_iter().flatten() {
        enums.insert(name.clone(), values.as_array().into_iter().flatten().map(text).collect());
    }

    let mut messages = BTreeMap::new();
    for marked in class.messages {
        let name = marked.trim_start_matches(['~', '+']);
        let marks = &marked[..marked.len() - name.len()];
        let mut message = find_message(class.name, found, name, codes)?;
        message.asynchronous = marks.contains('+');
        message.repeatable = marks.contains('~') || name.starts_with("get_") || name.starts_with("assert_");
        messages.insert(name.to_owned(), message);
    }
    for field in class.getters {
        let name = format!("get_{field}");
        let mut message = find_message(class.name, found, &name, codes)?;
        message.repeatable = true;
        messages.insert(name, message);
    }
    if class.setters {
        for implicit in found["implicit_messages"].as_array().into_iter().flatten() {
            let name = text(&implicit[0]);
            let setter = name.starts_with("set_") || name.starts_with("remove_");
            if setter || name.starts_with("add_") {
                let mut message = find_message(class.name, found, &name, codes)?;
                message.repeatable = setter;
                messages.entry(name).or_insert(message);
            }
        }
    }
    Ok(ClassFacts { fields, enums, messages, create: class.create })
}

fn find_message(class: &str, found: &Value, name: &str, codes: &mut BTreeSet<String>) -> Result<Message, CodegenError> {
    let explicit = &found["messages"][name];
    if explicit.is_object() {
        codes.extend(explicit["errors"].as_array().into_iter().flatten().map(text));
        let params = explicit["params"].as_array().into_iter().flatten();
        let params = params.map(|param| Parameter {
            name: text(&param["name"]),
            kind: text(&param["type"]),
            optional: param["required"].as_bool() == Some(false),
        });
        return Ok(Message {
            params: params.collect(),
            result: text(&explicit["result"]),
            asynchronous: false,
            repeatable: false,
        });
    }
    let implicit = found["implicit_messages"].as_array().into_iter().flatten().find(|message| message[0] == name);
    if let Some(implicit) = implicit {
        let params = implicit[1].as_array().into_iter().flatten();
        let params = params.map(|param| Parameter { name: text(&param[0]), kind: text(&param[1]), optional: false });
        return Ok(Message {
            params: params.collect(),
            result: text(&implicit[2]),
            asynchronous: false,
            repeatable: false,
        });
    }
    // The generator of the data model leaves the read functions of a few classes implicit.
    let parameter = |name: &str, kind: &str| Parameter { name: name.into(), kind: kind.into(), optional: false };
    let (params, result) = match name {
        "get_all_records" => (vec![], format!("({class} ref -> {class} record) map")),
        "get_all" => (vec![], format!("{class} ref set")),
        "get_record" => (vec![parameter("self", &format!("{class} ref"))], format!("{class} record")),
        "get_by_uuid" => (vec![parameter("uuid", "string")], format!("{class} ref")),
        _ => match name.strip_prefix("get_").map(|field| &found["fields"][field]) {
            Some(field) if field.is_object() => {
                (vec![parameter("self", &format!("{class} ref"))], text(&field["type"]))
            }
            _ => return Err(CodegenError::Model(format!("{class} has no message {name}"))),
        },
    };
    Ok(Message { params, result, asynchronous: false, repeatable: false })
}

/// Enumerations that a selected class uses but another, unselected one defines move to the first class that uses them.
fn keep_foreign_enums(model: &Value, classes: &mut BTreeMap<String, ClassFacts>) {
    let known: BTreeSet<String> = classes.values().flat_map(|class| class.enums.keys().cloned()).collect();
    let mut missing: BTreeMap<String, String> = BTreeMap::new();
    for (name, class) in classes.iter() {
        let kinds = class.fields.values().map(|field| &field.kind);
        let kinds = kinds.chain(class.messages.values().flat_map(|message| message.params.iter().map(|p| &p.kind)));
        for kind in kinds {
            let mut words = kind.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            while let Some(word) = words.next() {
                if word == "enum"
                    && let Some(used) = words.next()
                    && !known.contains(used)
                {
                    missing.entry(used.to_owned()).or_insert_with(|| name.clone());
                }
            }
        }
    }
    for class in model["classes"].as_object().into_iter().flatten().map(|(_, class)| class) {
        for (name, values) in class["enums"].as_object().into_iter().flatten() {
            if let Some(user) = missing.get(name)
                && let Some(class) = classes.get_mut(user)
            {
                class.enums.insert(name.clone(), values.as_array().into_iter().flatten().map(text).collect());
            }
        }
    }
}
