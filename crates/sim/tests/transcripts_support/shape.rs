//! Comparing answers: status, headers that matter, shape of the body, error codes and parameters.

use serde_json::Value;

use super::super::wire::Answer;
use super::recording::described_length;

/// Everything in which an answer differs from the recorded one.
pub fn differences(expected: &Answer, actual: &Answer, exact: bool) -> Vec<String> {
    let mut found = Vec::new();
    if exact && expected.text() != actual.text() && !expected.text().contains("OpaqueRef:") {
        found.push(format!("{} instead of {}", actual.text(), expected.text()));
    }
    if expected.start != actual.start {
        found.push(format!("status {:?} instead of {:?}", actual.start, expected.start));
    }
    headers(expected, actual, &mut found);
    let kind = expected.header("content-type").unwrap_or_default().to_owned();
    let (wanted, got) = (expected.text(), actual.text());
    if wanted.contains("[cut here") {
        let head: String = wanted.chars().take_while(|c| *c != '[').collect();
        if got.is_empty() || !got.starts_with(&head) {
            found.push(format!("begins {:?} instead of {head:?}", got.chars().take(40).collect::<String>()));
        }
    } else if kind == "application/json" {
        rpc(&json_of(&wanted), &json_of(&got), &mut found);
    } else if kind == "text/xml" {
        rpc(&xml_of(&wanted), &xml_of(&got), &mut found);
    } else if let Some(length) = described_length(&wanted) {
        if actual.body.len() != length {
            found.push(format!("{} bytes instead of {length}", actual.body.len()));
        }
    } else {
        let (wanted, got) = (page(&wanted), page(&got));
        if wanted != got {
            found.push(format!("body {got:?} instead of {wanted:?}"));
        }
    }
    found
}

fn headers(expected: &Answer, actual: &Answer, found: &mut Vec<String>) {
    let names = |answer: &Answer| {
        let mut names: Vec<String> = answer.headers.iter().map(|(name, _)| name.to_lowercase()).collect();
        names.sort();
        names
    };
    if names(expected) != names(actual) {
        found.push(format!("headers {:?} instead of {:?}", names(actual), names(expected)));
    }
    for (name, value) in &expected.headers {
        if name.eq_ignore_ascii_case("content-length") {
            continue;
        }
        let got = actual.header(name).unwrap_or_default();
        if normal(got) != normal(value) {
            found.push(format!("{name}: {got:?} instead of {value:?}"));
        }
    }
}

/// A page: lines in one form, references and uuids as such, and no details of a parser's complaint.
fn page(text: &str) -> String {
    let text = normal(&text.replace("\r\n", "\n"));
    let cut = text.find("Xmlm.Error(").or_else(|| text.find("Yojson__Common.Json_error("));
    let text = cut.map_or(text.as_str(), |at| &text[..at]);
    // The length of a page with such details differs.
    text.lines().filter(|line| !line.starts_with("content-length")).collect::<Vec<_>>().join("\n").trim().to_owned()
}

/// A text in which references, uuids and the like are replaced by their kind.
pub fn normal(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("OpaqueRef:") {
            let length = after.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').count();
            out.push_str(if &after[..length] == "nope" { "NOPE" } else { "REF" });
            rest = &after[length..];
        } else if let Some(length) = address(rest).filter(|_| !out.ends_with(|c: char| c.is_ascii_digit())) {
            out.push_str("ADDRESS");
            rest = &rest[length..];
        } else if is_uuid(rest.get(..36).unwrap_or_default()) {
            out.push_str("UUID");
            rest = &rest[36..];
        } else if let Some(after) = rest.strip_prefix("trackid=") {
            out.push_str("trackid=X");
            rest = after.trim_start_matches(|c: char| c.is_ascii_hexdigit());
        } else {
            let mut characters = rest.chars();
            out.extend(characters.next());
            rest = characters.as_str();
        }
    }
    out
}

/// The length of an IPv4 address at the beginning of a text.
fn address(text: &str) -> Option<usize> {
    let length = text.chars().take_while(|c| c.is_ascii_digit() || *c == '.').count();
    text[..length].parse::<std::net::Ipv4Addr>().ok().map(|_| length)
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text
            .char_indices()
            .all(|(at, c)| if matches!(at, 8 | 13 | 18 | 23) { c == '-' } else { c.is_ascii_hexdigit() })
}

fn is_date(text: &str) -> bool {
    text.len() == 18 && text.as_bytes()[8] == b'T' && text.ends_with('Z')
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or(Value::Null)
}

/// An open element: name, text, and its children's values by their names.
type Open = (String, String, Vec<(String, Value)>);

/// XML-RPC as JSON: structs as objects, untyped as text, `i4` marked.
fn xml_of(text: &str) -> Value {
    use quick_xml::events::Event;
    let mut reader = quick_xml::Reader::from_str(text);
    let mut stack: Vec<Open> = vec![(String::new(), String::new(), Vec::new())];
    loop {
        match reader.read_event() {
            Ok(Event::Start(start)) => stack.push((start.name().as_ref().to_owned(), String::new(), Vec::new())),
            Ok(Event::Text(text)) => stack.last_mut().unwrap().1.push_str(&text),
            Ok(Event::GeneralRef(name)) => stack.last_mut().unwrap().1.push_str(&format!("&{};", &*name)),
            Ok(Event::End(_)) => {
                let (name, text, children) = stack.pop().unwrap();
                let value = value_of(&name, text, children);
                stack.last_mut().unwrap().2.push((name, value));
            }
            Ok(Event::Eof) | Err(_) => break,
            Ok(_) => {}
        }
    }
    stack.pop().and_then(|(_, _, mut children)| children.pop()).map_or(Value::Null, |(_, value)| value)
}

fn value_of(name: &str, text: String, children: Vec<(String, Value)>) -> Value {
    let first = |children: Vec<(String, Value)>| children.into_iter().next().map(|(_, value)| value);
    match name {
        "value" => first(children).unwrap_or(Value::String(text)),
        "i4" => serde_json::json!({ "i4": true }),
        "double" => text.parse::<f64>().map_or(Value::Null, Value::from),
        "boolean" => Value::Bool(text == "1"),
        "array" => first(children).unwrap_or(Value::Array(Vec::new())),
        "data" => children.into_iter().map(|(_, value)| value).collect(),
        "struct" => {
            let members = children
                .into_iter()
                .filter_map(|(_, member)| Some((member.get(0)?.as_str()?.to_owned(), member.get(1)?.clone())));
            Value::Object(members.collect())
        }
        "member" => children.into_iter().map(|(_, value)| value).collect(),
        "name" | "dateTime.iso8601" => Value::String(text),
        _ => first(children).unwrap_or(Value::Null),
    }
}

/// Code and parameters of a failure, in any of the three shapes.
fn failure_of(value: &Value) -> Option<Vec<String>> {
    let texts = |value: &Value| {
        value.as_array().map(|items| items.iter().map(|item| item.as_str().unwrap_or_default().to_owned()).collect())
    };
    if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
        if let Some(message) = error.get("message") {
            let mut all: Vec<String> = vec![message.as_str()?.to_owned()];
            all.extend(texts(&error["data"])?);
            return Some(all);
        }
        return texts(error);
    }
    value.get("ErrorDescription").and_then(texts)
}

fn rpc(expected: &Value, actual: &Value, found: &mut Vec<String>) {
    let keys = |value: &Value| {
        value.as_object().map(|members| members.keys().cloned().collect::<Vec<_>>()).unwrap_or_default()
    };
    if keys(expected) != keys(actual) {
        found.push(format!("members {:?} instead of {:?}: {actual}", keys(actual), keys(expected)));
        return;
    }
    match (failure_of(expected), failure_of(actual)) {
        (Some(wanted), Some(got)) => {
            let normal = |items: &[String]| items.iter().map(|item| normal(item)).collect::<Vec<_>>();
            if normal(&wanted) != normal(&got) {
                found.push(format!("failure {got:?} instead of {wanted:?}"));
            }
        }
        (None, None) => {
            for key in ["result", "Value"] {
                if let (Some(wanted), Some(got)) = (expected.get(key), actual.get(key)) {
                    shape(key, wanted, got, found);
                }
            }
            if expected.get("id") != actual.get("id") {
                found.push(format!("id {:?} instead of {:?}", actual.get("id"), expected.get("id")));
            }
        }
        (wanted, got) => found.push(format!("failure {got:?} instead of {wanted:?}")),
    }
}

fn is_record(path: &str, members: &serde_json::Map<String, Value>) -> bool {
    path.ends_with("valid_ref_counts")
        || ["uuid", "exportname", "token"].iter().any(|key| members.contains_key(*key))
        || (members.contains_key("class") && members.contains_key("operation"))
}

fn kind(text: &str) -> &'static str {
    if text.starts_with("OpaqueRef:") {
        "reference"
    } else if is_date(text) {
        "date"
    } else if is_uuid(text) {
        "uuid"
    } else {
        "text"
    }
}

fn shape(path: &str, expected: &Value, actual: &Value, found: &mut Vec<String>) {
    match (expected, actual) {
        (Value::String(wanted), Value::String(got)) => {
            // The database of the recorded server left some references empty.
            let either = wanted.is_empty() && kind(got) == "reference";
            if kind(wanted) != kind(got) && !either {
                found.push(format!("{path}: {got:?} is not like {wanted:?}"));
            }
            if matches!(path, "result.status" | "Value.status") && wanted != got {
                found.push(format!("{path}: {got:?} instead of {wanted:?}"));
            }
        }
        (Value::Number(wanted), Value::Number(got)) => {
            if wanted.is_f64() != got.is_f64() {
                found.push(format!("{path}: {got} is not like {wanted}"));
            }
        }
        (Value::Bool(_), Value::Bool(_)) | (Value::Null, Value::Null) => {}
        (Value::Array(wanted), Value::Array(got)) => {
            if path.ends_with(".events") {
                return events(path, wanted, got, found);
            }
            if path.ends_with(".allowed_operations") && path.matches(['[', '{']).count() == 0 {
                let sorted = |items: &[Value]| {
                    let mut items: Vec<_> = items.iter().filter_map(Value::as_str).map(str::to_owned).collect();
                    items.sort();
                    items
                };
                if sorted(wanted) != sorted(got) {
                    found.push(format!("{path}: {actual} instead of {expected}"));
                }
            }
            if path.ends_with(".error_info") && normal(&expected.to_string()) != normal(&actual.to_string()) {
                found.push(format!("{path}: {actual} instead of {expected}"));
            }
            if let (Some(wanted), Some(got)) = (wanted.first(), got.first()) {
                shape(&format!("{path}[]"), wanted, got, found);
            }
        }
        (Value::Object(wanted), Value::Object(got)) => {
            if is_record(path, wanted) {
                let (one, other): (Vec<_>, Vec<_>) = (wanted.keys().collect(), got.keys().collect());
                if one != other {
                    let missing: Vec<_> = one.iter().filter(|key| !other.contains(key)).collect();
                    let more: Vec<_> = other.iter().filter(|key| !one.contains(key)).collect();
                    found.push(format!("{path}: lacks {missing:?}, has {more:?}"));
                }
                for (key, wanted) in wanted {
                    if let Some(got) = got.get(key) {
                        shape(&format!("{path}.{key}"), wanted, got, found);
                    }
                }
            } else if let (Some(wanted), false) = (wanted.values().next(), got.is_empty()) {
                for got in got.values() {
                    // Maps of strings hold whatever their keys mean.
                    if wanted.is_string() && got.is_string() {
                        continue;
                    }
                    shape(&format!("{path}{{}}"), wanted, got, found);
                }
            }
        }
        _ => found.push(format!("{path}: {actual} is not like {expected}")),
    }
}

/// Events are compared with one of the same class and operation, of which there must be one for the first.
fn events(path: &str, wanted: &[Value], got: &[Value], found: &mut Vec<String>) {
    if wanted.is_empty() != got.is_empty() {
        found.push(format!("{path}: {} events instead of {}", got.len(), wanted.len()));
    }
    let same = |one: &Value, other: &Value| one["class"] == other["class"] && one["operation"] == other["operation"];
    let mut compared = wanted.is_empty();
    for event in got {
        if let Some(like) = wanted.iter().find(|like| same(like, event)) {
            shape(&format!("{path}[]"), like, event, found);
            compared = true;
        }
    }
    if !compared {
        found.push(format!("{path}: no event is like a recorded one"));
    }
}
