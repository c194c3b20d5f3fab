//! The one form in the middle: what both encodings are read to and written from, and the typed codecs over it.
//!
//! XML-RPC carries XenAPI's integers as untyped texts and JSON as numbers, so a [`Value`] of the same answer may
//! differ in that; the typed readers accept both, and typed results are equal.

mod codec;
pub(crate) mod json;
pub(crate) mod xml;

pub use codec::{DecodeError, FromValue, ToValue};

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};
use std::collections::BTreeMap;
use std::fmt;

/// A value of XenAPI. Dates are texts.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// JSON's `null` and XML-RPC's `nil`; XenAPI itself sends an empty text for "no result".
    Null,
    /// A truth value.
    Bool(bool),
    /// An integer that was marked as one.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// A text; with XML-RPC also every integer.
    String(String),
    /// A list; sets are lists too.
    Array(Vec<Value>),
    /// A map or a record.
    Map(BTreeMap<String, Value>),
}

/// Values (or elements) in one answer, by their weight. An honest answer of 256 MiB has fewer; one of empty values would
/// take many times its own length in memory.
pub(crate) const MOST_VALUES: usize = 8 << 20;

/// What a map weighs besides its members: it takes room for eleven of them, however few it has.
pub(crate) const MAP_WEIGHT: usize = 20;

/// What a list weighs besides its members: it takes room for four of them.
pub(crate) const LIST_WEIGHT: usize = 4;

impl Value {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a truth value",
            Self::Int(_) => "an integer",
            Self::Float(_) => "a number",
            Self::String(_) => "a text",
            Self::Array(_) => "a list",
            Self::Map(_) => "a map",
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether it is what a server takes for a parameter that is not given: nothing, no text, an empty list or map.
    pub fn is_default(&self) -> bool {
        match self {
            Self::Null => true,
            Self::String(text) => text.is_empty() || text == "OpaqueRef:NULL",
            Self::Array(items) => items.is_empty(),
            Self::Map(members) => members.is_empty(),
            Self::Bool(_) | Self::Int(_) | Self::Float(_) => false,
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Float(value) => serializer.serialize_f64(*value),
            Self::String(text) => serializer.serialize_str(text),
            Self::Array(items) => serializer.collect_seq(items),
            Self::Map(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                for (name, value) in members {
                    map.serialize_entry(name, value)?;
                }
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

/// Takes whatever comes.
struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of XenAPI")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        i64::try_from(value).map(Value::Int).map_err(|_| E::custom("an integer has more than 63 bits"))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::String(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::String(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = BTreeMap::new();
        while let Some((name, value)) = map.next_entry()? {
            members.insert(name, value);
        }
        Ok(Value::Map(members))
    }
}
