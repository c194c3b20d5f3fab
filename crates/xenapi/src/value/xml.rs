//! XML-RPC: the crate `xmlrpc` reads and writes it; this module puts right what it can not do.
//!
//! Before the crate sees a document, one pass over it bounds nesting (the crate recurses) and number, refuses document types
//! and entities, takes dates as the texts that they are, and puts a mark in front of every text. The mark keeps texts
//! of blanks only and empty names of members, both of which the crate would lose; it is taken off afterwards.

use super::{LIST_WEIGHT, MAP_WEIGHT, MOST_VALUES, Value};
use crate::error::BoxError;
use std::io::Cursor;
use xmlrpc::{Request, Transport};

/// Elements inside of each other; a value inside of a map takes four.
const DEEPEST: usize = 256;

/// Stands in front of every text between the two passes: a character for private use.
const MARK: char = '\u{E000}';

/// A document that is not XML-RPC. What it holds is not shown, it may be a secret.
#[derive(Debug, thiserror::Error)]
pub(crate) enum XmlError {
    #[error("it is not UTF-8")]
    Encoding(#[source] std::str::Utf8Error),
    #[error("it declares a document type, which XML-RPC does not have")]
    DocumentType,
    #[error("its elements are nested deeper than {DEEPEST}")]
    Depth,
    #[error("it has more than {MOST_VALUES} elements")]
    Elements,
    #[error("it is not well-formed XML-RPC, around byte {0}")]
    Malformed(usize),
}

/// A call as a document.
pub(crate) fn encode_call(method: &str, arguments: Vec<Value>) -> Vec<u8> {
    let request = arguments.into_iter().fold(Request::new(method), |request, argument| request.arg(foreign(argument)));
    let mut document = Vec::new();
    // Writing to a vector does not fail.
    let _ = request.write_as_xml(&mut document);
    document
}

/// The value that a response carries.
pub(crate) fn decode_response(document: &[u8]) -> Result<Value, BoxError> {
    let text = std::str::from_utf8(document).map_err(XmlError::Encoding)?;
    let prepared = prepare(text)?;
    match Request::new("-").call(Received(prepared)) {
        Ok(value) => Ok(own(value)),
        Err(error) => match error.fault() {
            // Its text may repeat the call, and with it a secret.
            Some(fault) => Err(format!("it is XML-RPC fault {}", fault.fault_code).into()),
            None => Err(XmlError::Malformed(text.len()).into()),
        },
    }
}

/// The value of a fragment such as `<value>OpaqueRef:...</value>`, the form of a task's result. None at all is an empty
/// text.
pub(crate) fn decode_fragment(fragment: &str) -> Result<Value, BoxError> {
    if fragment.trim().is_empty() {
        return Ok(Value::String(String::new()));
    }
    let document = format!("<methodResponse><params><param>{fragment}</param></params></methodResponse>");
    decode_response(document.as_bytes())
}

/// Hands a response that is already here to the crate.
struct Received(String);

impl Transport for Received {
    type Stream = Cursor<Vec<u8>>;

    fn transmit(self, _: &Request<'_>) -> Result<Self::Stream, BoxError> {
        Ok(Cursor::new(self.0.into_bytes()))
    }
}

/// The first pass, see the module's text.
fn prepare(text: &str) -> Result<String, XmlError> {
    let mut prepared = String::with_capacity(text.len() + text.len() / 4);
    let mut rest = text;
    let mut depth = 0_usize;
    let mut elements = 0_usize;
    // Whether only text was read since the start of an element that holds text.
    let mut in_text = false;
    while let Some((before, from_tag)) = rest.find('<').and_then(|at| rest.split_at_checked(at)) {
        let at = text.len() - from_tag.len();
        let malformed = || XmlError::Malformed(at);
        let end_with = |end: &str| from_tag.find(end).map(|found| found + end.len());
        if from_tag.starts_with("<![CDATA[") {
            let (section, after) =
                end_with("]]>").and_then(|end| from_tag.split_at_checked(end)).ok_or_else(malformed)?;
            if in_text {
                prepared.push(MARK);
            }
            prepared.push_str(before);
            prepared.push_str(section);
            (rest, in_text) = (after, false);
            continue;
        }
        if from_tag.starts_with("<!--") {
            let (_, after) = end_with("-->").and_then(|end| from_tag.split_at_checked(end)).ok_or_else(malformed)?;
            if in_text {
                prepared.push(MARK);
            }
            prepared.push_str(before);
            (rest, in_text) = (after, false);
            continue;
        }
        if from_tag.starts_with("<!") {
            return Err(XmlError::DocumentType);
        }
        let (tag, after) = end_with(">").and_then(|end| from_tag.split_at_checked(end)).ok_or_else(malformed)?;
        rest = after;
        let name = tag.trim_start_matches(['<', '/']).trim_end_matches(['>', '/']).trim();
        let closing = tag.starts_with("</");
        if !closing {
            elements += match name {
                "struct" => MAP_WEIGHT,
                "data" => LIST_WEIGHT,
                _ => 1,
            };
            if elements > MOST_VALUES {
                return Err(XmlError::Elements);
            }
        }
        if closing {
            depth = depth.checked_sub(1).ok_or_else(malformed)?;
        } else if !tag.ends_with("/>") && !tag.starts_with("<?") {
            depth += 1;
            if depth > DEEPEST {
                return Err(XmlError::Depth);
            }
        }
        if name == "dateTime.iso8601" {
            // The date stays as the text of its value.
            if closing {
                prepared.push(MARK);
                prepared.push_str(before);
            }
            in_text = false;
            continue;
        }
        if in_text && closing {
            prepared.push(MARK);
        }
        prepared.push_str(before);
        if name == "name" && tag.ends_with("/>") {
            prepared.push_str("<name>");
            prepared.push(MARK);
            prepared.push_str("</name>");
        } else {
            prepared.push_str(tag);
        }
        in_text = !closing && !tag.ends_with("/>") && matches!(name, "value" | "string" | "name");
    }
    prepared.push_str(rest);
    Ok(prepared)
}

fn unmarked(text: String) -> String {
    match text.strip_prefix(MARK) {
        Some(rest) => rest.to_owned(),
        None => text,
    }
}

/// The crate's value as ours. Its depth was bounded before.
fn own(value: xmlrpc::Value) -> Value {
    use base64::Engine as _;
    match value {
        xmlrpc::Value::Int(number) => Value::Int(number.into()),
        xmlrpc::Value::Int64(number) => Value::Int(number),
        xmlrpc::Value::Bool(truth) => Value::Bool(truth),
        xmlrpc::Value::String(text) => Value::String(unmarked(text)),
        xmlrpc::Value::Double(number) => Value::Float(number),
        xmlrpc::Value::DateTime(date) => Value::String(date.to_string()),
        xmlrpc::Value::Base64(bytes) => Value::String(base64::engine::general_purpose::STANDARD.encode(bytes)),
        xmlrpc::Value::Struct(members) => {
            Value::Map(members.into_iter().map(|(name, value)| (unmarked(name), own(value))).collect())
        }
        xmlrpc::Value::Array(items) => Value::Array(items.into_iter().map(own).collect()),
        xmlrpc::Value::Nil => Value::Null,
    }
}

/// Our value as the crate's: integers as texts, as XenAPI has them.
fn foreign(value: Value) -> xmlrpc::Value {
    match value {
        Value::Null => xmlrpc::Value::String(String::new()),
        Value::Bool(truth) => xmlrpc::Value::Bool(truth),
        Value::Int(number) => xmlrpc::Value::String(number.to_string()),
        Value::Float(number) => xmlrpc::Value::Double(number),
        Value::String(text) => xmlrpc::Value::String(text),
        Value::Array(items) => xmlrpc::Value::Array(items.into_iter().map(foreign).collect()),
        Value::Map(members) => {
            xmlrpc::Value::Struct(members.into_iter().map(|(name, value)| (name, foreign(value))).collect())
        }
    }
}

/// A response as a server would write it.
#[cfg(test)]
pub(crate) fn encode_response(value: Value) -> Vec<u8> {
    let mut bytes = b"<?xml version=\"1.0\"?><methodResponse><params><param>".to_vec();
    foreign(value).write_as_xml(&mut bytes).unwrap();
    bytes.extend_from_slice(b"</param></params></methodResponse>");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn texts_that_the_crate_would_lose_are_kept() {
        let text = "<value><struct><member><name></name><value>  </value></member><member><name/><value/></member>\
                    <member><name> k</name><value> a &lt; b </value></member>\
                    <member><name>d</name><value><dateTime.iso8601>20261122T18:22:53Z</dateTime.iso8601></value></member>\
                    </struct></value>";
        let members = [("", ""), (" k", " a < b "), ("d", "20261122T18:22:53Z")];
        let expected = members.map(|(name, text)| (name.to_owned(), Value::from(text)));
        assert_eq!(decode_fragment(text).unwrap(), Value::Map(BTreeMap::from(expected)));
        assert_eq!(decode_fragment("<value>  </value>").unwrap(), Value::from("  "));
        assert_eq!(decode_fragment("<value><![CDATA[<x>]]></value>").unwrap(), Value::from("<x>"));
        assert_eq!(decode_fragment("").unwrap(), Value::from(""));
    }

    #[test]
    fn deep_nesting_and_document_types_are_refused() {
        let deep = "<value><array><data>".repeat(100_000);
        assert!(decode_fragment(&deep).is_err());
        let hidden =
            format!("<value><array><data>{}", "<![CDATA[</a></a></a></a>]]><value><array><data>".repeat(50_000));
        assert!(decode_fragment(&hidden).is_err());
        let bomb = "<!DOCTYPE x [<!ENTITY a \"aaaa\">]><methodResponse/>";
        assert!(decode_response(bomb.as_bytes()).is_err());
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::Bool),
            "[ -~\u{e000}\u{20ac}\n\t]{0,12}".prop_map(Value::String),
            any::<f64>().prop_filter("finite", |number| number.is_finite()).prop_map(Value::Float),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::Array),
                prop::collection::btree_map("[ -~\u{e000}]{0,8}", inner, 0..6).prop_map(Value::Map),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value in any_value()) {
            prop_assert_eq!(decode_response(&encode_response(value.clone())).unwrap(), value);
        }

        #[test]
        fn integers_are_read_back_as_integers(number in any::<i64>()) {
            use crate::value::FromValue;
            let value = decode_response(&encode_response(Value::Int(number))).unwrap();
            prop_assert_eq!(i64::from_value(value).unwrap(), number);
        }

        #[test]
        fn no_document_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_response(&bytes);
        }

        #[test]
        fn no_fragment_panics(text in "(<[/!?]?(value|struct|member|name|array|data|i4|double|nil|\\[CDATA\\[)[ /]?>?|[ -~]|\u{e000}){0,40}") {
            let _ = decode_fragment(&text);
        }
    }
}
