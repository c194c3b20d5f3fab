//! Values as they travel and as the database keeps them, and what can be said about them.

use std::collections::BTreeMap;

/// A XenAPI value. References, enums and strings are all [`Value::Text`], as on the wire.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// A string, enum or reference.
    Text(String),
    /// A 64-bit integer of the API.
    Int(i64),
    /// A 32-bit integer that XML-RPC marks as `i4`.
    Int32(i32),
    /// A float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A date in the form `20261122T18:22:53Z`.
    Date(String),
    /// An array.
    List(Vec<Value>),
    /// A map or record, in order.
    Map(Vec<(String, Value)>),
    /// JSON's null.
    Nil,
}

/// The null reference.
pub(crate) const NULL: &str = "OpaqueRef:NULL";
/// The date that means never.
pub(crate) const NEVER: &str = "19700101T00:00:00Z";

impl Value {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    pub(crate) fn null() -> Self {
        Self::text(NULL)
    }

    /// What a void method gives.
    pub(crate) fn void() -> Self {
        Self::text("")
    }

    pub(crate) fn texts<S: Into<String>>(items: impl IntoIterator<Item = S>) -> Self {
        Self::List(items.into_iter().map(Self::text).collect())
    }

    pub(crate) fn map<K: Into<String>, V: Into<String>>(items: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::Map(items.into_iter().map(|(key, value)| (key.into(), Self::text(value))).collect())
    }

    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Text(text) | Self::Date(text) => text,
            _ => "",
        }
    }

    pub(crate) fn as_int(&self) -> i64 {
        match self {
            Self::Int(value) => *value,
            Self::Int32(value) => i64::from(*value),
            Self::Text(text) => text.parse().unwrap_or(0),
            _ => 0,
        }
    }

    pub(crate) fn as_float(&self) -> f64 {
        match self {
            Self::Float(value) => *value,
            Self::Text(text) => text.parse().unwrap_or(0.0),
            #[expect(clippy::cast_precision_loss, reason = "time-outs and progress are small")]
            other => other.as_int() as f64,
        }
    }

    pub(crate) fn as_bool(&self) -> bool {
        matches!(self, Self::Bool(true))
    }

    pub(crate) fn as_list(&self) -> &[Value] {
        match self {
            Self::List(items) => items,
            _ => &[],
        }
    }

    pub(crate) fn as_map(&self) -> &[(String, Value)] {
        match self {
            Self::Map(items) => items,
            _ => &[],
        }
    }

    /// The member of a map.
    pub(crate) fn member(&self, key: &str) -> Option<&Value> {
        self.as_map().iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The strings of a list.
    pub(crate) fn strings(&self) -> Vec<String> {
        self.as_list().iter().map(|item| item.as_str().to_owned()).collect()
    }

    /// OCaml's short text of an RPC value, as it stands in messages of type errors.
    pub(crate) fn ocaml(&self) -> String {
        match self {
            Self::Text(text) => format!("S({text})"),
            Self::Int(value) => format!("I({value})"),
            Self::Int32(value) => format!("I({value})"),
            Self::Float(value) => format!("F({})", float_text(*value)),
            Self::Bool(value) => format!("B({value})"),
            Self::Date(date) => format!("D({date})"),
            Self::List(items) => format!("[{}]", items.iter().map(Self::ocaml).collect::<Vec<_>>().join(";")),
            Self::Map(items) => {
                let items: Vec<_> = items.iter().map(|(key, value)| format!("{key}:{}", value.ocaml())).collect();
                format!("{{{}}}", items.join(";"))
            }
            Self::Nil => "N".to_owned(),
        }
    }

    /// As JSON, for the control interface.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        match self {
            Self::Text(text) | Self::Date(text) => text.clone().into(),
            Self::Int(value) => (*value).into(),
            Self::Int32(value) => (*value).into(),
            Self::Float(value) => (*value).into(),
            Self::Bool(value) => (*value).into(),
            Self::List(items) => items.iter().map(Self::to_json).collect(),
            Self::Map(items) => {
                let items: BTreeMap<_, _> = items.iter().map(|(key, value)| (key.clone(), value.to_json())).collect();
                serde_json::Value::Object(items.into_iter().collect())
            }
            Self::Nil => serde_json::Value::Null,
        }
    }

    /// From JSON.
    pub(crate) fn from_json(value: &serde_json::Value) -> Self {
        match value {
            serde_json::Value::Null => Self::Nil,
            serde_json::Value::Bool(value) => Self::Bool(*value),
            serde_json::Value::Number(number) => {
                number.as_i64().map_or_else(|| Self::Float(number.as_f64().unwrap_or(0.0)), Self::Int)
            }
            serde_json::Value::String(text) => Self::text(text),
            serde_json::Value::Array(items) => Self::List(items.iter().map(Self::from_json).collect()),
            serde_json::Value::Object(items) => {
                Self::Map(items.iter().map(|(key, value)| (key.clone(), Self::from_json(value))).collect())
            }
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

/// A float as OCaml prints it into XML: `1`, `0.25`.
pub(crate) fn float_text(value: f64) -> String {
    format!("{value}")
}

/// A moment as XenAPI writes it.
pub(crate) fn date_text(moment: jiff::Timestamp) -> String {
    moment.strftime("%Y%m%dT%H:%M:%SZ").to_string()
}

/// Now, as XenAPI writes it.
pub(crate) fn now() -> String {
    date_text(jiff::Timestamp::now())
}

/// A new opaque reference.
pub(crate) fn new_ref() -> String {
    format!("OpaqueRef:{}", uuid::Uuid::new_v4())
}

/// A new uuid.
pub(crate) fn new_uuid() -> String {
    uuid::Uuid::new_v4().to_string()
}
