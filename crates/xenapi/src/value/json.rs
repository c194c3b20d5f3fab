//! JSON-RPC 2.0, and the answers of 1.0.

use super::{FromValue, LIST_WEIGHT, MAP_WEIGHT, MOST_VALUES, Value};
use crate::error::BoxError;
use serde::{Deserialize, Serialize};

#[derive(Serialize)]
struct Call<'a> {
    jsonrpc: &'a str,
    method: &'a str,
    params: &'a [Value],
    id: i64,
}

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    result: Option<Value>,
    #[serde(default)]
    error: Option<Value>,
    id: Option<Value>,
}

/// An answer that breaks the protocol. What it holds is not shown, it may be a secret.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JsonError {
    #[error("it is not JSON-RPC, around line {line}, column {column}")]
    Malformed { line: usize, column: usize },
    #[error("it has more than {MOST_VALUES} values")]
    Values,
    #[error("it answers another call")]
    OtherCall,
    #[error("it holds neither a result nor an error")]
    Empty,
}

/// A call as a document.
pub(crate) fn encode_call(method: &str, params: &[Value], id: i64) -> Result<Vec<u8>, BoxError> {
    Ok(serde_json::to_vec(&Call { jsonrpc: "2.0", method, params, id })?)
}

/// The answer to call `id`: a result, or the description of an error.
pub(crate) fn decode_reply(document: &[u8], id: i64) -> Result<Result<Value, Vec<String>>, BoxError> {
    if values(document) > MOST_VALUES {
        return Err(JsonError::Values.into());
    }
    let reply: Reply = serde_json::from_slice(document)
        .map_err(|error| JsonError::Malformed { line: error.line(), column: error.column() })?;
    if reply.id != Some(Value::Int(id)) {
        return Err(JsonError::OtherCall.into());
    }
    match (reply.error, reply.result) {
        (None | Some(Value::Null), Some(result)) => Ok(Ok(result)),
        // 1.0: the description as it is.
        (Some(description @ Value::Array(_)), _) => Ok(Err(Vec::from_value(description)?)),
        // 2.0: the code is in the message, the parameters in the data.
        (Some(Value::Map(mut error)), _) => {
            let message = String::from_value(error.remove("message").unwrap_or(Value::Null))?;
            let params: Vec<String> = match error.remove("data") {
                Some(data @ Value::Array(_)) => Vec::from_value(data)?,
                _ => Vec::new(),
            };
            Ok(Err(std::iter::once(message).chain(params).collect()))
        }
        _ => Err(JsonError::Empty.into()),
    }
}

/// What the values of a document weigh at most, if it is JSON: there is one more than there are separators and opening
/// brackets outside of texts.
fn values(document: &[u8]) -> usize {
    let (mut in_text, mut escaped, mut count) = (false, false, 1_usize);
    for byte in document {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b',' if !in_text => count += 1,
            b'[' if !in_text => count += LIST_WEIGHT,
            b'{' if !in_text => count += MAP_WEIGHT,
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_versions_are_understood() {
        let ok = br#"{"jsonrpc":"2.0","result":9007199254740993,"id":7}"#;
        assert_eq!(decode_reply(ok, 7).unwrap(), Ok(Value::Int(9_007_199_254_740_993)));
        assert!(decode_reply(ok, 8).is_err());
        let two = br#"{"jsonrpc":"2.0","error":{"code":1,"message":"HANDLE_INVALID","data":["VM","x"]},"id":7}"#;
        let one = br#"{"result":null,"error":["HANDLE_INVALID","VM","x"],"id":7}"#;
        assert_eq!(decode_reply(two, 7).unwrap(), decode_reply(one, 7).unwrap());
        assert_eq!(decode_reply(one, 7).unwrap(), Err(vec!["HANDLE_INVALID".into(), "VM".into(), "x".into()]));
        assert_eq!(decode_reply(br#"{"result":"","error":null,"id":7}"#, 7).unwrap(), Ok(Value::from("")));
        assert!(decode_reply(br#"{"id":7}"#, 7).is_err());
        assert!(decode_reply(format!(r#"{{"id":7,"result":{}"#, "[".repeat(100_000)).as_bytes(), 7).is_err());
    }

    #[test]
    fn values_are_counted_outside_of_texts() {
        let nested = 2 + MAP_WEIGHT + LIST_WEIGHT;
        for (text, count) in [("1", 1), ("[1,2]", 2 + LIST_WEIGHT), (r#"{"a,[{":"\\\",,","b":[]}"#, nested)] {
            assert_eq!(values(text.as_bytes()), count, "{text}");
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            any::<f64>().prop_filter("finite", |number| number.is_finite()).prop_map(Value::Float),
            any::<String>().prop_map(Value::String),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::Array),
                prop::collection::btree_map(any::<String>(), inner, 0..6).prop_map(Value::Map),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value in any_value()) {
            let text = serde_json::to_vec(&value).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), value);
        }

        #[test]
        fn no_answer_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_reply(&bytes, 1);
        }
    }
}
