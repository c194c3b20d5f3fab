//! Typed values from and to [`Value`]: lenient where the two encodings differ, strict otherwise.

use super::Value;
use std::collections::BTreeMap;
use std::fmt;

/// A value that does not have the expected form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeError {
    /// Where: class, field, position; outermost first, separated by dots.
    path: String,
    expected: &'static str,
    found: &'static str,
}

impl DecodeError {
    /// `expected` was expected and `found` was there. Its content is not kept, it may be a secret.
    pub fn kind(expected: &'static str, found: &Value) -> Self {
        Self { path: String::new(), expected, found: found.kind() }
    }

    /// The same error, seen from outside of `place`.
    #[must_use]
    pub fn within(mut self, place: &str) -> Self {
        self.path = if self.path.is_empty() { place.to_owned() } else { format!("{place}.{}", self.path) };
        self
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        write!(f, "expected {}, found {} that is not one", self.expected, self.found)
    }
}

impl std::error::Error for DecodeError {}

/// A type that can be read from a [`Value`].
pub trait FromValue: Sized {
    /// Reads it.
    ///
    /// # Errors
    /// [`DecodeError`] where the value has another form.
    fn from_value(value: Value) -> Result<Self, DecodeError>;
}

/// A type that can be written as a [`Value`].
pub trait ToValue {
    /// Writes it.
    fn to_value(&self) -> Value;
}

impl FromValue for Value {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        Ok(value)
    }
}

impl ToValue for Value {
    fn to_value(&self) -> Value {
        self.clone()
    }
}

impl FromValue for () {
    fn from_value(_: Value) -> Result<Self, DecodeError> {
        Ok(())
    }
}

impl FromValue for String {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match value {
            Value::String(text) => Ok(text),
            // Some servers number things that others name (event ids).
            Value::Int(number) => Ok(number.to_string()),
            Value::Null => Ok(Self::new()),
            other => Err(DecodeError::kind("a text", &other)),
        }
    }
}

impl ToValue for String {
    fn to_value(&self) -> Value {
        Value::String(self.clone())
    }
}

impl ToValue for str {
    fn to_value(&self) -> Value {
        Value::String(self.to_owned())
    }
}

impl FromValue for i64 {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match &value {
            Value::Int(number) => Ok(*number),
            Value::String(text) => text.trim().parse().map_err(|_| DecodeError::kind("an integer", &value)),
            _ => Err(DecodeError::kind("an integer", &value)),
        }
    }
}

impl ToValue for i64 {
    fn to_value(&self) -> Value {
        Value::Int(*self)
    }
}

impl FromValue for f64 {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match &value {
            Value::Float(number) => Ok(*number),
            #[expect(clippy::cast_precision_loss, reason = "an integral float that was written without a point")]
            Value::Int(number) => Ok(*number as f64),
            Value::String(text) => text.trim().parse().map_err(|_| DecodeError::kind("a number", &value)),
            _ => Err(DecodeError::kind("a number", &value)),
        }
    }
}

impl ToValue for f64 {
    fn to_value(&self) -> Value {
        Value::Float(*self)
    }
}

impl FromValue for bool {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match &value {
            Value::Bool(truth) => Ok(*truth),
            Value::String(text) if text == "true" || text == "1" => Ok(true),
            Value::String(text) if text == "false" || text == "0" => Ok(false),
            _ => Err(DecodeError::kind("a truth value", &value)),
        }
    }
}

impl ToValue for bool {
    fn to_value(&self) -> Value {
        Value::Bool(*self)
    }
}

impl<T: FromValue> FromValue for Vec<T> {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match value {
            Value::Array(items) => items
                .into_iter()
                .enumerate()
                .map(|(at, item)| T::from_value(item).map_err(|error| error.within(&format!("[{at}]"))))
                .collect(),
            // An empty set is an empty text in results of tasks.
            Value::String(text) if text.is_empty() => Ok(Self::new()),
            other => Err(DecodeError::kind("a list", &other)),
        }
    }
}

impl<T: ToValue> ToValue for Vec<T> {
    fn to_value(&self) -> Value {
        self.as_slice().to_value()
    }
}

impl<T: ToValue> ToValue for [T] {
    fn to_value(&self) -> Value {
        Value::Array(self.iter().map(ToValue::to_value).collect())
    }
}

impl<K: FromValue + Ord, T: FromValue> FromValue for BTreeMap<K, T> {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match value {
            Value::Map(members) => members
                .into_iter()
                .map(|(name, item)| {
                    let item = T::from_value(item).map_err(|error| error.within(&name))?;
                    Ok((K::from_value(Value::String(name))?, item))
                })
                .collect(),
            other => Err(DecodeError::kind("a map", &other)),
        }
    }
}

impl<K: ToValue, T: ToValue> ToValue for BTreeMap<K, T> {
    fn to_value(&self) -> Value {
        let members = self.iter().map(|(name, item)| {
            let name = match name.to_value() {
                Value::String(text) => text,
                Value::Int(number) => number.to_string(),
                Value::Bool(truth) => truth.to_string(),
                Value::Float(number) => number.to_string(),
                Value::Null | Value::Array(_) | Value::Map(_) => String::new(),
            };
            (name, item.to_value())
        });
        Value::Map(members.collect())
    }
}
