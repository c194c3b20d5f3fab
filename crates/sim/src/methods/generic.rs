//! The methods that every class has: getters, setters, maps and sets, by the access that the data model gives.

use super::{Call, fields};
use crate::model::{Class, Type, Value, schema};
use crate::rpc::{Failure, Outcome};

/// Whether a method is one of these.
pub(super) fn supports(class: &Class, simple: &str) -> bool {
    matches!(
        simple,
        "get_all"
            | "get_all_records"
            | "get_record"
            | "get_by_uuid"
            | "get_by_name_label"
            | "get_all_records_where"
            | "get_all_where"
    ) || field_of(class, simple, "get_").is_some()
        || ["set_", "add_to_", "remove_from_", "add_", "remove_"]
            .iter()
            .any(|prefix| field_of(class, simple, prefix).is_some_and(|field| writable(class, field)))
}

fn field_of<'a>(class: &Class, simple: &'a str, prefix: &str) -> Option<&'a str> {
    simple.strip_prefix(prefix).filter(|field| class.field(field).is_some())
}

fn writable(class: &Class, field: &str) -> bool {
    // Setters of read-only fields are in the list of methods only where xapi has them, done elsewhere.
    class.field(field).is_some_and(|known| known.access == "RW")
        || matches!(
            (class.name.as_str(), field),
            ("VM", "other_config" | "platform" | "blocked_operations" | "HVM_boot_params" | "VCPUs_params")
                | ("VM", "xenstore_data" | "NVRAM" | "tags" | "actions_after_shutdown" | "actions_after_reboot")
                | ("task" | "session" | "pool" | "host" | "SR" | "VDI" | "VBD" | "VIF" | "network", "other_config")
        )
}

/// Does one of these methods; `None` if it is not one.
pub(super) fn call(call: &Call, class_name: &str, simple: &str) -> Option<Outcome> {
    let class = schema().get(class_name)?;
    if !supports(class, simple) {
        return None;
    }
    let mut db = call.core.db();
    let reference = call.text(0).to_owned();
    let with_records = |refs: Vec<String>| -> Outcome {
        let record =
            |reference: String| Ok((reference.clone(), fields::record(&call.core, &db, class_name, &reference)?));
        refs.into_iter().map(record).collect::<Outcome<Vec<_>>>().map(Value::Map)
    };
    match simple {
        "get_all" => return Some(Ok(Value::texts(db.refs(class_name)))),
        "get_all_records" => return Some(with_records(db.refs(class_name))),
        "get_record" => return Some(fields::record(&call.core, &db, class_name, &reference)),
        "get_by_uuid" => return Some(db.by_uuid(class_name, &reference).map(Value::Text)),
        "get_by_name_label" => return Some(Ok(Value::texts(db.refs_where(class_name, "name_label", &reference)))),
        "get_all_records_where" | "get_all_where" => {
            let chosen = super::message::select(&db, class_name, &reference);
            return Some(
                chosen.and_then(
                    |refs| {
                        if simple == "get_all_where" { Ok(Value::texts(refs)) } else { with_records(refs) }
                    },
                ),
            );
        }
        _ => {}
    }
    if let Some(field) = field_of(class, simple, "get_") {
        return Some(fields::field(&call.core, &db, class_name, &reference, field));
    }
    if let Err(failure) = db.check(class_name, &reference) {
        return Some(Err(failure));
    }
    if let Some(field) = field_of(class, simple, "set_") {
        db.set(class_name, &reference, field, call.value(1));
        return Some(Ok(Value::void()));
    }
    if let Some(field) = field_of(class, simple, "add_to_") {
        let key = call.text(1);
        if db.get(class_name, &reference, field).is_ok_and(|map| map.member(key).is_some()) {
            return Some(Err(Failure::new("MAP_DUPLICATE_KEY", [class_name, field, &reference, key])));
        }
        db.put(class_name, &reference, field, key, call.value(2));
        return Some(Ok(Value::void()));
    }
    if let Some(field) = field_of(class, simple, "remove_from_") {
        db.take(class_name, &reference, field, call.text(1));
        return Some(Ok(Value::void()));
    }
    for (prefix, add) in [("add_", true), ("remove_", false)] {
        let Some(field) = field_of(class, simple, prefix) else { continue };
        if !matches!(class.field(field).map(|field| &field.kind), Some(Type::Set(_))) {
            return None;
        }
        let mut items = db.set_of(class_name, &reference, field);
        items.retain(|item| item != call.text(1));
        if add {
            items.push(call.text(1).to_owned());
        }
        db.set(class_name, &reference, field, Value::texts(items));
        return Some(Ok(Value::void()));
    }
    None
}
