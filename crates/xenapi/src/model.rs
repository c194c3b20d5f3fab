//! What generated modules lean on: the class trait, taking fields out of a record, enumerations, argument lists.

use crate::value::{DecodeError, FromValue, Value};
use std::collections::BTreeMap;

/// A class of XenAPI.
pub trait Class {
    /// Its name, as in the first half of a method's name.
    const NAME: &'static str;
}

/// Whether a call may be sent twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// Sending it twice does the same as sending it once (reads, setters, destroying): repeated after a new login or a
    /// connection that broke.
    Harmless,
    /// It is sent again only when the server has certainly not begun it.
    Never,
}

/// The members of a record while it is decoded.
#[derive(Debug)]
pub struct Fields {
    class: &'static str,
    members: BTreeMap<String, Value>,
}

impl Fields {
    /// The members of `value`, which must be a map.
    ///
    /// # Errors
    /// [`DecodeError`] for any other kind of value.
    pub fn of(class: &'static str, value: Value) -> Result<Self, DecodeError> {
        match value {
            Value::Map(members) => Ok(Self { class, members }),
            other => Err(DecodeError::kind("a record", &other).within(class)),
        }
    }

    /// Takes one member; one that is missing has its type's default.
    ///
    /// # Errors
    /// [`DecodeError`] that names the field, if its value does not fit.
    pub fn take<T: FromValue + Default>(&mut self, name: &str) -> Result<T, DecodeError> {
        match self.members.remove(name) {
            Some(value) => T::from_value(value).map_err(|error| error.within(name).within(self.class)),
            None => Ok(T::default()),
        }
    }

    /// What was not taken.
    pub fn rest(self) -> BTreeMap<String, Value> {
        self.members
    }
}

/// Arguments of a message whose parameters after the first `required` came with newer servers: those at the end that
/// have their default value are left out, so that older servers can be called.
pub fn arguments(required: usize, mut values: Vec<Value>) -> Vec<Value> {
    while values.len() > required && values.last().is_some_and(Value::is_default) {
        values.pop();
    }
    values
}

/// Texts of an enumeration's variants, both ways.
macro_rules! enumeration {
    ($name:ident { $($variant:ident = $text:literal,)* }) => {
        impl $name {
            /// The text that XenAPI uses.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)*
                    Self::Unknown(text) => text,
                }
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                match text.as_str() {
                    $($text => Self::$variant,)*
                    _ => Self::Unknown(text),
                }
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self::from(text.to_owned())
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::Unknown(String::new())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl crate::value::FromValue for $name {
            fn from_value(value: crate::value::Value) -> Result<Self, crate::value::DecodeError> {
                String::from_value(value).map(Self::from)
            }
        }

        impl crate::value::ToValue for $name {
            fn to_value(&self) -> crate::value::Value {
                crate::value::Value::String(self.as_str().to_owned())
            }
        }
    };
}
pub(crate) use enumeration;
