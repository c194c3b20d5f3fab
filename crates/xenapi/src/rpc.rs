//! One call in either encoding: from method and arguments to a document, from the answer to a result or a failure.

use crate::error::{ApiFailure, BoxError, XenApiError};
use crate::secret::Secret;
use crate::value::{FromValue, Value, json, xml};
use std::sync::atomic::{AtomicI64, Ordering};

/// Which encoding calls use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// JSON-RPC 2.0 where the host offers it, else XML-RPC.
    #[default]
    Auto,
    /// XML-RPC, which every host offers.
    Xml,
    /// JSON-RPC 2.0.
    Json,
}

/// The encoding in use, after [`Protocol::Auto`] was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Xml,
    Json,
}

/// What a call gave: a result, or the pool's failure.
pub(crate) type Answer = Result<Value, ApiFailure>;

/// A call, ready to be sent.
pub(crate) struct Document {
    pub(crate) encoding: Encoding,
    /// Holds a session's reference or a password.
    pub(crate) body: Vec<u8>,
    id: i64,
    /// What a failure must not repeat.
    secret: Secret,
}

impl std::fmt::Debug for Document {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Document").field("encoding", &self.encoding).field("id", &self.id).finish_non_exhaustive()
    }
}

static NEXT_ID: AtomicI64 = AtomicI64::new(1);

impl Document {
    /// A call whose arguments hold `secret`.
    pub(crate) fn new(
        encoding: Encoding,
        method: &str,
        arguments: Vec<Value>,
        secret: Secret,
    ) -> Result<Self, XenApiError> {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed) & 0x7fff_ffff;
        let body = match encoding {
            Encoding::Xml => xml::encode_call(method, arguments),
            Encoding::Json => json::encode_call(method, &arguments, id)
                .map_err(|source| XenApiError::Response { operation: method.to_owned(), source })?,
        };
        Ok(Self { encoding, body, id, secret })
    }

    pub(crate) fn path(&self) -> &'static str {
        match self.encoding {
            Encoding::Xml => "/",
            Encoding::Json => "/jsonrpc",
        }
    }

    pub(crate) fn content_type(&self) -> &'static str {
        match self.encoding {
            Encoding::Xml => "text/xml",
            Encoding::Json => "application/json",
        }
    }

    /// Reads the answer to this call.
    pub(crate) fn decode(&self, method: &str, answer: &[u8]) -> Result<Answer, XenApiError> {
        let decoded = match self.encoding {
            Encoding::Xml => xml::decode_response(answer).and_then(unwrap_status),
            Encoding::Json => json::decode_reply(answer, self.id),
        };
        match decoded {
            Ok(outcome) => {
                Ok(outcome
                    .map_err(|description| ApiFailure::from_description(description).without(self.secret.expose())))
            }
            Err(source) => Err(XenApiError::Response { operation: method.to_owned(), source }),
        }
    }
}

/// XenAPI's own envelope inside of XML-RPC: `Status`, then `Value` or `ErrorDescription`.
fn unwrap_status(value: Value) -> Result<Result<Value, Vec<String>>, BoxError> {
    let Value::Map(mut members) = value else {
        return Err("it is not an answer of XenAPI".into());
    };
    match members.remove("Status").as_ref().and_then(Value::as_str) {
        Some("Success") => Ok(Ok(members.remove("Value").unwrap_or(Value::Null))),
        Some("Failure") => {
            Ok(Err(Vec::from_value(members.remove("ErrorDescription").unwrap_or(Value::Array(Vec::new())))?))
        }
        _ => Err("it is not an answer of XenAPI".into()),
    }
}

/// What a fuzzer feeds with the bytes of an answer.
#[doc(hidden)]
pub fn decode_for_fuzzing(answer: &[u8]) {
    let _ = xml::decode_response(answer).and_then(unwrap_status);
    let _ = json::decode_reply(answer, 1);
    if let Ok(text) = std::str::from_utf8(answer) {
        let _ = xml::decode_fragment(text);
    }
}

/// As [`decode_for_fuzzing`], XML-RPC only, and what is read is read on as the records that calls ask for.
#[doc(hidden)]
pub fn decode_xml_for_fuzzing(answer: &[u8]) {
    if let Ok(Ok(value)) = xml::decode_response(answer).and_then(unwrap_status) {
        read_on(value);
    }
    if let Ok(text) = std::str::from_utf8(answer)
        && let Ok(value) = xml::decode_fragment(text)
    {
        read_on(value);
    }
}

/// As [`decode_xml_for_fuzzing`], for JSON-RPC.
#[doc(hidden)]
pub fn decode_json_for_fuzzing(answer: &[u8]) {
    // Whatever call it answers.
    let id = match serde_json::from_slice(answer) {
        Ok(Value::Map(members)) => members.get("id").cloned(),
        _ => None,
    };
    let id = id.and_then(|id| i64::from_value(id).ok()).unwrap_or(1);
    match json::decode_reply(answer, id) {
        Ok(Ok(value)) => read_on(value),
        Ok(Err(description)) => {
            let failure = ApiFailure::from_description(description).without("secret");
            let _ = (failure.class(), failure.to_string());
        }
        Err(_) => {}
    }
}

fn read_on(value: Value) {
    use crate::{host, task, vdi, vm};
    use std::collections::BTreeMap;
    let _ = BTreeMap::<vm::Ref, vm::Record>::from_value(value.clone());
    let _ = BTreeMap::<vdi::Ref, vdi::Record>::from_value(value.clone());
    let _ = BTreeMap::<host::Ref, host::Record>::from_value(value.clone());
    let _ = task::Record::from_value(value.clone());
    let _ = Vec::<String>::from_value(value);
}

#[cfg(test)]
#[path = "rpc_transcripts.rs"]
mod transcripts;
