//! JSON-RPC 1.0 and 2.0 as xapi speaks them: one shape of failure for each, `error.code` always 1.

use super::Outcome;
use crate::model::Value;

/// A call and how to answer it.
#[derive(Debug)]
pub(crate) struct JsonCall {
    pub(crate) method: String,
    pub(crate) params: Vec<Value>,
    /// The id as it came: a string or an integer.
    id: Value,
    version_two: bool,
}

/// Reads a call, or gives the text of the parser's error as xapi's page shows it.
pub(crate) fn read_json_call(body: &str) -> Result<JsonCall, String> {
    let parsed: serde_json::Value = serde_json::from_str(body).map_err(|error| {
        let what = if error.is_eof() { "Unexpected end of input" } else { "Invalid token" };
        format!("Yojson__Common.Json_error(&quot;Line {}, bytes {}-:\\n{what}&quot;)", error.line(), error.column())
    })?;
    let malformed = |what: &str| format!("Jsonrpc.Malformed_method_request(&quot;{what}&quot;)");
    let field = |name: &str| malformed(&format!("Invalid field &apos;{name}&apos; in request body"));
    let serde_json::Value::Object(members) = &parsed else { return Err(malformed("Invalid request body")) };
    let id = match members.get("id") {
        Some(serde_json::Value::String(id)) => Value::text(id),
        Some(serde_json::Value::Number(id)) => Value::Int(id.as_i64().ok_or_else(|| field("id"))?),
        _ => return Err(field("id")),
    };
    let Some(serde_json::Value::String(method)) = members.get("method") else { return Err(field("method")) };
    let params = match members.get("params") {
        Some(serde_json::Value::Array(items)) => items.iter().map(Value::from_json).collect(),
        // A structure is one positional value.
        Some(other @ serde_json::Value::Object(_)) => vec![Value::from_json(other)],
        _ => return Err(field("params")),
    };
    let version_two = match members.get("jsonrpc") {
        None => false,
        Some(serde_json::Value::String(version)) if version == "2.0" => true,
        Some(_) => return Err(field("jsonrpc")),
    };
    Ok(JsonCall { method: method.clone(), params, id, version_two })
}

/// The answer to a call.
pub(crate) fn json_answer(call: &JsonCall, outcome: &Outcome) -> String {
    let id = json_text(&call.id);
    match (outcome, call.version_two) {
        (Ok(value), true) => format!("{{\"jsonrpc\":\"2.0\",\"result\":{},\"id\":{id}}}", json_text(value)),
        (Ok(value), false) => format!("{{\"result\":{},\"error\":null,\"id\":{id}}}", json_text(value)),
        (Err(failure), true) => format!(
            "{{\"jsonrpc\":\"2.0\",\"error\":{{\"code\":1,\"message\":{},\"data\":{}}},\"id\":{id}}}",
            json_text(&Value::text(&failure.code)),
            json_text(&Value::texts(failure.params.iter().cloned())),
        ),
        (Err(failure), false) => {
            let error = json_text(&Value::texts(failure.description()));
            format!("{{\"result\":null,\"error\":{error},\"id\":{id}}}")
        }
    }
}

/// A value as JSON, members in their order.
pub(crate) fn json_text(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value);
    out
}

fn write_value(out: &mut String, value: &Value) {
    match value {
        Value::Text(text) | Value::Date(text) => write_text(out, text),
        Value::Int(number) => out.push_str(&number.to_string()),
        Value::Int32(number) => out.push_str(&number.to_string()),
        Value::Float(number) if number.fract() == 0.0 => out.push_str(&format!("{number:.1}")),
        Value::Float(number) => out.push_str(&number.to_string()),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Nil => out.push_str("null"),
        Value::List(items) => {
            out.push('[');
            for (number, item) in items.iter().enumerate() {
                if number > 0 {
                    out.push(',');
                }
                write_value(out, item);
            }
            out.push(']');
        }
        Value::Map(items) => {
            out.push('{');
            for (number, (name, item)) in items.iter().enumerate() {
                if number > 0 {
                    out.push(',');
                }
                write_text(out, name);
                out.push(':');
                write_value(out, item);
            }
            out.push('}');
        }
    }
}

fn write_text(out: &mut String, text: &str) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::Failure;

    proptest::proptest! {
        #[test]
        fn no_body_panics(body in ".{0,300}") {
            let _ = read_json_call(&body);
        }
    }

    #[test]
    fn the_id_comes_back_as_it_went() {
        let call = read_json_call(r#"{"jsonrpc":"2.0","method":"a","params":[],"id":9007199254740993}"#).unwrap();
        assert_eq!(
            json_answer(&call, &Ok(Value::Float(1.0))),
            r#"{"jsonrpc":"2.0","result":1.0,"id":9007199254740993}"#
        );
        let call = read_json_call(r#"{"method":"a","params":[],"id":"abc"}"#).unwrap();
        let failure = Err(Failure::new("SESSION_INVALID", ["OpaqueRef:x"]));
        assert_eq!(
            json_answer(&call, &failure),
            r#"{"result":null,"error":["SESSION_INVALID","OpaqueRef:x"],"id":"abc"}"#
        );
    }

    #[test]
    fn a_call_without_a_usable_id_is_malformed() {
        for body in [r#"{"method":"a","params":[]}"#, r#"{"method":"a","params":[],"id":null}"#] {
            assert!(read_json_call(body).unwrap_err().contains("&apos;id&apos;"));
        }
        assert!(read_json_call("[]").unwrap_err().contains("Invalid request body"));
    }
}
