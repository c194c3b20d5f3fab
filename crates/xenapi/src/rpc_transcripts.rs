//! The answers of a real xapi, in both encodings: the same call gives equal typed results or equal errors.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

#[path = "../../../tests/support/shared.rs"]
mod shared;

use super::*;
use crate::error::XenApiError;
use crate::value::ToValue;
use std::collections::BTreeMap;
use std::path::Path;

/// One recorded response: status and body.
struct Recorded {
    status: u16,
    body: String,
}

fn recorded(path: &Path) -> Option<Recorded> {
    let bytes = std::fs::read(path).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let (_, response) = text.split_once("=== response ===\n")?;
    let (head, body) = response.split_once("\n\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Recorded { status, body: body.trim_end_matches('\n').to_owned() })
}

fn decode(encoding: Encoding, method: &str, recorded: &Recorded) -> Result<Answer, XenApiError> {
    // The recordings all use id 1.
    Document { encoding, body: Vec::new(), id: 1, secret: Secret::from("") }.decode(method, recorded.body.as_bytes())
}

/// The typed result as text and as values written again, by method.
fn typed(method: &str, value: Value) -> String {
    fn as_type<T: FromValue + std::fmt::Debug>(value: Value) -> String {
        format!("{:?}", T::from_value(value).unwrap())
    }
    fn as_record<T: FromValue + ToValue + std::fmt::Debug + PartialEq>(value: Value) -> String {
        let record = T::from_value(value).unwrap();
        let again = T::from_value(record.to_value()).unwrap();
        assert_eq!(record, again, "a record survives being written and read");
        format!("{record:?}")
    }
    macro_rules! records {
        ($($class:literal => $module:ident),* $(,)?) => {
            match method.split_once('.') {
                $(
                    Some(($class, "get_record")) => return as_record::<crate::$module::Record>(value),
                    Some(($class, "get_all_records" | "get_all_records_where")) => {
                        return as_record::<BTreeMap<crate::$module::Ref, crate::$module::Record>>(value);
                    }
                )*
                _ => {}
            }
        };
    }
    records! {
        "VM" => vm, "VDI" => vdi, "VBD" => vbd, "VIF" => vif, "SR" => sr, "PBD" => pbd, "SM" => sm, "host" => host,
        "pool" => pool, "network" => network, "PIF" => pif, "task" => task, "message" => message, "session" => session,
    }
    match method {
        "VDI.get_nbd_info" => as_type::<Vec<crate::vdi_nbd_server_info::Record>>(value),
        "event.from" => {
            let batch = crate::event::EventBatch::from_value(value).unwrap();
            let records: Vec<String> = batch
                .events
                .iter()
                .filter(|event| event.class == "vm")
                .map(|event| format!("{:?}", event.record::<crate::vm::Record>().unwrap()))
                .collect();
            let kinds: Vec<String> =
                batch.events.iter().map(|e| format!("{} {:?} {}", e.class, e.operation, e.reference)).collect();
            format!("{} {:?} {:?} {:?}", batch.token, batch.valid_ref_counts.get("vm"), kinds, records)
        }
        "host.get_API_version_major" | "event.get_current_id" => as_type::<i64>(value),
        "host.get_servertime" => as_type::<crate::DateTime>(value),
        "host.get_software_version" => as_type::<BTreeMap<String, String>>(value),
        "VM.get_allowed_operations" => as_type::<Vec<String>>(value),
        "VM.get_by_name_label" | "VM.get_all" => as_type::<Vec<crate::vm::Ref>>(value),
        // Classes and calls that are not used: as they are, but for the integers that XML-RPC writes as texts.
        _ => format!("{:?}", untyped(value)),
    }
}

/// Integers as texts, as XML-RPC has them.
fn untyped(value: Value) -> Value {
    match value {
        Value::Int(number) => Value::String(number.to_string()),
        Value::Array(items) => Value::Array(items.into_iter().map(untyped).collect()),
        Value::Map(members) => Value::Map(members.into_iter().map(|(name, value)| (name, untyped(value))).collect()),
        other => other,
    }
}

/// What differs between two recordings of one call because they were two calls: references, times, counters.
fn blurred(text: &str) -> String {
    let mut result = String::new();
    let mut digits = String::new();
    for c in text.chars().chain(['\n']) {
        if c.is_ascii_hexdigit() || c == '-' {
            digits.push(c);
            continue;
        }
        if digits.chars().filter(char::is_ascii_digit).count() >= 1 {
            result.push('#');
        } else {
            result.push_str(&digits);
        }
        digits.clear();
        result.push(c);
    }
    result
}

fn method_of(stem: &str) -> String {
    if let Some(code) = stem.strip_prefix("error.") {
        return match code.split('.').next().unwrap() {
            "unknown-method" => "VM.no_such_method".to_owned(),
            _ => "VM.get_record".to_owned(),
        };
    }
    let stem = stem.strip_prefix("Async.").map_or(stem, |_| "task-reference");
    stem.split('.').take(2).collect::<Vec<_>>().join(".")
}

/// Recordings whose two halves are not of the same thing.
const NOT_PAIRED: [&str; 5] = [
    // Objects were made between the two.
    "message.get_all_records",
    "network.get_all_records",
    "PIF.get_all_records",
    // The second call met the end of the first.
    "session.logout",
    // Not a call of XenAPI: its answer in XML-RPC has no envelope.
    "system.listMethods",
];

#[test]
fn both_encodings_give_equal_results() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    let mut pairs = 0;
    let mut differing = Vec::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let Some(stem) = name.strip_suffix(".xmlrpc.txt") else { continue };
        let json_path = folder.join(format!("{stem}.jsonrpc.txt"));
        if !json_path.exists() {
            continue;
        }
        if NOT_PAIRED.contains(&stem) {
            continue;
        }
        let (Some(xml), Some(json)) = (recorded(&path), recorded(&json_path)) else { continue };
        assert_eq!(xml.status, json.status, "{stem}");
        if xml.status != 200 {
            continue;
        }
        let method = method_of(stem);
        let xml = decode(Encoding::Xml, &method, &xml).unwrap_or_else(|error| panic!("{stem}: {error:?}"));
        let json = decode(Encoding::Json, &method, &json).unwrap_or_else(|error| panic!("{stem}: {error:?}"));
        let shown = |answer: Answer| match answer {
            Ok(value) => typed(&method, value),
            Err(failure) => format!("{} {:?}", failure.code, failure.params),
        };
        let (xml, json) = (shown(xml), shown(json));
        pairs += 1;
        // Two calls a moment apart: values that move are blurred, everything else is equal to the letter.
        if xml != json && blurred(&xml) != blurred(&json) {
            differing.push(format!("{stem}\n  xml  {xml}\n  json {json}"));
        }
    }
    assert!(pairs >= 50, "only {pairs} pairs were compared");
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}

#[test]
fn every_recorded_answer_is_read_or_refused() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let encoding = if name.ends_with(".xmlrpc.txt") {
            Encoding::Xml
        } else if name.ends_with(".jsonrpc.txt") || name.ends_with(".jsonrpc1.txt") {
            Encoding::Json
        } else {
            continue;
        };
        let Some(answer) = recorded(&path) else { continue };
        let outcome = decode(encoding, "VM.get_record", &answer);
        // These have other ids, or are answers to what we never send.
        let odd = name.starts_with("jsonrpc.")
            || name == "system.listMethods.xmlrpc.txt"
            || answer.body.contains("[cut here");
        assert!(odd || outcome.is_ok() == (answer.status == 200), "{name}: {outcome:?}");
    }
}

/// Every answer in JSON, written again as XML-RPC in the manner of hosts, gives the same typed result.
#[test]
fn answers_do_not_depend_on_the_encoding() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    let mut compared = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let Some(stem) = name.strip_suffix(".jsonrpc.txt") else { continue };
        let method = if stem.contains(".task-afterwards") { "task.get_record".to_owned() } else { method_of(stem) };
        let Some(answer) = recorded(&path) else { continue };
        let Ok(Ok(value)) = decode(Encoding::Json, &method, &answer) else { continue };
        let again = xml::decode_response(&xml::encode_response(value.clone())).unwrap();
        assert_eq!(typed(&method, value), typed(&method, again), "{stem}");
        compared += 1;
    }
    assert!(compared >= 100, "only {compared} answers were compared");
}

/// No field of these records is unknown: the generated code knows the version that was recorded.
#[test]
fn recorded_records_have_no_unknown_fields() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    let answer = recorded(&folder.join("VM.get_all_records.jsonrpc.txt")).unwrap();
    let value = decode(Encoding::Json, "VM.get_all_records", &answer).unwrap().unwrap();
    let records = BTreeMap::<crate::vm::Ref, crate::vm::Record>::from_value(value).unwrap();
    assert!(!records.is_empty());
    for record in records.into_values() {
        assert_eq!(record.extra, BTreeMap::new());
        assert!(!matches!(record.power_state, crate::vm::PowerState::Unknown(_)));
    }
}

/// The answers of a plain clone's own making: every failure shape, and records of another version.
#[test]
fn failures_and_records_of_other_versions() {
    let xml = "<?xml version=\"1.0\"?><methodResponse><params><param><value><struct><member><name>Status</name>\
               <value>Failure</value></member><member><name>ErrorDescription</name><value><array><data>\
               <value>SR_BACKEND_FAILURE_460</value><value></value><value>text</value><value></value>\
               </data></array></value></member></struct></value></param></params></methodResponse>";
    let xml = Recorded { status: 200, body: xml.to_owned() };
    let json =
        r#"{"jsonrpc":"2.0","error":{"code":1,"message":"SR_BACKEND_FAILURE_460","data":["","text",""]},"id":1}"#;
    let json = Recorded { status: 200, body: json.to_owned() };
    let failure = decode(Encoding::Xml, "VDI.list_changed_blocks", &xml).unwrap().unwrap_err();
    assert_eq!(failure, decode(Encoding::Json, "VDI.list_changed_blocks", &json).unwrap().unwrap_err());
    assert_eq!(failure.sr_backend_failure(), Some(460));

    let newer = r#"{"uuid":"u","power_state":"Dreaming","VCPUs_max":"4","new_field":{"a":[1]}}"#;
    let record = crate::vm::Record::from_value(serde_json::from_str(newer).unwrap()).unwrap();
    assert_eq!(record.power_state, crate::vm::PowerState::Unknown("Dreaming".into()));
    assert_eq!(record.vcpus_max, 4);
    assert_eq!(record.name_label, "");
    assert!(record.extra.contains_key("new_field") && record.to_value() != Value::Null);
    let wrong = crate::vm::Record::from_value(serde_json::from_str(r#"{"VCPUs_max":[]}"#).unwrap()).unwrap_err();
    assert_eq!(wrong.to_string(), "VM.VCPUs_max: expected an integer, found a list that is not one");
}
