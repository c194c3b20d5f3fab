//! Types of fields and parameters, and how xapi reads a value of each from the wire.

use super::Value;
use super::value::NULL;
use crate::rpc::{Failure, Outcome};

/// A type of xapi's data model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Text,
    Int,
    Float,
    Bool,
    Date,
    /// A reference to an object of a class.
    Ref(String),
    /// An enum by name.
    Enum(String),
    Set(Box<Type>),
    Map(Box<Type>, Box<Type>),
    /// A record, or anything else that is taken as it comes.
    Any,
}

impl Type {
    /// Reads the notation of the data model: `(string -> VDI ref) map`, `enum vm_operations set`.
    pub(crate) fn parse(text: &str) -> Self {
        let text = text.trim();
        if let Some(inner) = text.strip_suffix(" set") {
            return Self::Set(Box::new(Self::parse(inner)));
        }
        if let Some(inner) = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(") map")) {
            let (key, value) = inner.split_once(" -> ").unwrap_or((inner, "string"));
            return Self::Map(Box::new(Self::parse(key)), Box::new(Self::parse(value)));
        }
        if let Some(class) = text.strip_suffix(" ref") {
            return Self::Ref(class.to_owned());
        }
        if let Some(name) = text.strip_prefix("enum ") {
            return Self::Enum(name.to_owned());
        }
        match text {
            "string" => Self::Text,
            "int" => Self::Int,
            "float" => Self::Float,
            "bool" => Self::Bool,
            "datetime" => Self::Date,
            _ => Self::Any,
        }
    }

    /// The value of a field that nobody set.
    pub(crate) fn empty(&self, enums: &dyn Fn(&str) -> Option<String>) -> Value {
        match self {
            Self::Text | Self::Any => Value::text(""),
            Self::Int => Value::Int(0),
            Self::Float => Value::Float(0.0),
            Self::Bool => Value::Bool(false),
            Self::Date => Value::Date(super::NEVER.to_owned()),
            Self::Ref(_) => Value::text(NULL),
            Self::Enum(name) => Value::Text(enums(name).unwrap_or_default()),
            Self::Set(_) => Value::List(Vec::new()),
            Self::Map(..) => Value::Map(Vec::new()),
        }
    }

    /// Reads a value from the wire, as lenient and as strict as xapi: integers may come as text.
    pub(crate) fn read(&self, value: Value, enums: &dyn Fn(&str) -> Option<Vec<String>>) -> Outcome {
        match (self, value) {
            (Self::Text | Self::Ref(_), Value::Text(text)) => Ok(Value::Text(text)),
            (Self::Text | Self::Ref(_), other) => Err(expected("string", &other)),
            (Self::Int, Value::Int(number)) => Ok(Value::Int(number)),
            (Self::Int, Value::Int32(number)) => Ok(Value::Int(i64::from(number))),
            (Self::Int, Value::Text(text)) => {
                text.parse().map(Value::Int).map_err(|_| Failure::internal("Int64.of_string"))
            }
            (Self::Int, other) => Err(expected("int64", &other)),
            (Self::Float, Value::Text(text)) => {
                text.parse().map(Value::Float).map_err(|_| Failure::internal("float_of_string"))
            }
            (Self::Float, value @ (Value::Float(_) | Value::Int(_) | Value::Int32(_))) => {
                Ok(Value::Float(value.as_float()))
            }
            (Self::Float, other) => Err(expected("float", &other)),
            (Self::Bool, Value::Bool(value)) => Ok(Value::Bool(value)),
            (Self::Bool, other) => Err(expected("bool", &other)),
            (Self::Date, Value::Date(text) | Value::Text(text)) => Ok(Value::Date(text)),
            (Self::Date, other) => Err(expected("datetime", &other)),
            (Self::Enum(name), Value::Text(text)) => match enums(name) {
                Some(known) if !known.contains(&text) => Err(Failure::internal("Unknown tag/contents")),
                _ => Ok(Value::Text(text)),
            },
            (Self::Enum(_), _) => Err(Failure::internal("Unknown tag/contents")),
            (Self::Set(inner), Value::List(items)) => {
                items.into_iter().map(|item| inner.read(item, enums)).collect::<Outcome<Vec<_>>>().map(Value::List)
            }
            (Self::Set(_), other) => Err(expected("list", &other)),
            (Self::Map(key, inner), Value::Map(items)) => {
                let read = |(name, item): (String, Value)| {
                    key.read(Value::Text(name.clone()), enums)?;
                    Ok((name, inner.read(item, enums)?))
                };
                items.into_iter().map(read).collect::<Outcome<Vec<_>>>().map(Value::Map)
            }
            (Self::Map(..), other) => Err(expected("dictionary", &other)),
            (Self::Any, value) => Ok(value),
        }
    }
}

fn expected(what: &str, found: &Value) -> Failure {
    Failure::internal(&format!("Expected {what}, got '{}'", found.ocaml()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notation_of_the_data_model_is_read() {
        assert_eq!(Type::parse("enum vm_operations set"), Type::Set(Box::new(Type::Enum("vm_operations".into()))));
        assert_eq!(
            Type::parse("(string -> VDI ref) map"),
            Type::Map(Box::new(Type::Text), Box::new(Type::Ref("VDI".into())))
        );
    }

    #[test]
    fn integers_may_come_as_text() {
        assert_eq!(Type::Int.read("12".into(), &|_| None), Ok(Value::Int(12)));
    }
}
