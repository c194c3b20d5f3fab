//! Types in the notation of the data model (`(VDI ref -> VDI record) map`, `enum on_boot`) to types of Rust.

use super::facts::Facts;
use super::{CodegenError, names};

/// A type of the data model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// No result.
    Void,
    /// Text.
    String,
    /// 64-bit signed integer.
    Int,
    /// Double.
    Float,
    /// Boolean.
    Bool,
    /// A moment.
    DateTime,
    /// An enumeration, by its name in XenAPI.
    Enum(String),
    /// A reference to an object of a class.
    Ref(String),
    /// A record of a class.
    Record(String),
    /// A set, which the wire carries as a list.
    Set(Box<Type>),
    /// A map.
    Map(Box<Type>, Box<Type>),
}

impl Type {
    /// Reads the notation.
    pub fn parse(text: &str) -> Result<Self, CodegenError> {
        let text = text.trim();
        if let Some(inner) = text.strip_suffix(" set") {
            return Ok(Self::Set(Box::new(Self::parse(inner)?)));
        }
        if let Some(inner) = text.strip_suffix(" map") {
            let inner = inner.trim().strip_prefix('(').and_then(|inner| inner.strip_suffix(')'));
            if let Some((key, value)) = inner.and_then(|inner| inner.split_once(" -> ")) {
                return Ok(Self::Map(Box::new(Self::parse(key)?), Box::new(Self::parse(value)?)));
            }
        }
        if let Some(class) = text.strip_suffix(" ref") {
            return Ok(Self::Ref(class.to_owned()));
        }
        if let Some(class) = text.strip_suffix(" record") {
            return Ok(Self::Record(class.to_owned()));
        }
        if let Some(name) = text.strip_prefix("enum ") {
            return Ok(Self::Enum(name.to_owned()));
        }
        Ok(match text {
            "void" => Self::Void,
            "string" => Self::String,
            "int" => Self::Int,
            "float" => Self::Float,
            "bool" => Self::Bool,
            "datetime" => Self::DateTime,
            _ => return Err(CodegenError::Model(format!("type `{text}` is not known"))),
        })
    }

    /// The owned type, seen from the module of `home`.
    pub fn owned(&self, facts: &Facts, home: &str) -> String {
        match self {
            Self::Void => "()".into(),
            Self::String => "String".into(),
            Self::Int => "i64".into(),
            Self::Float => "f64".into(),
            Self::Bool => "bool".into(),
            Self::DateTime => "DateTime".into(),
            Self::Enum(name) => enum_path(facts, home, name),
            Self::Ref(class) if class == home => "Ref".into(),
            Self::Ref(class) if facts.classes.contains_key(class) => format!("super::{}::Ref", names::module(class)),
            Self::Ref(_) => "AnyRef".into(),
            Self::Record(class) if class == home => "Record".into(),
            Self::Record(class) if facts.classes.contains_key(class) => {
                format!("super::{}::Record", names::module(class))
            }
            Self::Record(_) => "Value".into(),
            Self::Set(inner) => format!("Vec<{}>", inner.owned(facts, home)),
            Self::Map(key, value) => format!("BTreeMap<{}, {}>", key.owned(facts, home), value.owned(facts, home)),
        }
    }

    /// The type of a parameter.
    pub fn borrowed(&self, facts: &Facts, home: &str) -> String {
        match self {
            Self::String => "&str".into(),
            Self::Int | Self::Float | Self::Bool | Self::DateTime => self.owned(facts, home),
            Self::Set(inner) => format!("&[{}]", inner.owned(facts, home)),
            _ => format!("&{}", self.owned(facts, home)),
        }
    }
}

/// The path of an enumeration: in the module of the class that defines it.
fn enum_path(facts: &Facts, home: &str, name: &str) -> String {
    let owner = facts.classes.iter().find(|(_, class)| class.enums.contains_key(name));
    match owner {
        Some((class, _)) if class == home => names::enumeration(class, name),
        Some((class, _)) => format!("super::{}::{}", names::module(class), names::enumeration(class, name)),
        None => "String".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notation_is_read() {
        let map = Type::parse("(VDI ref -> VDI record) map").unwrap();
        let boxed = |kind| Box::new(kind);
        assert_eq!(map, Type::Map(boxed(Type::Ref("VDI".into())), boxed(Type::Record("VDI".into()))));
        let nested = Type::parse("(VM ref -> (string -> string) map) map").unwrap();
        assert!(matches!(nested, Type::Map(_, inner) if matches!(*inner, Type::Map(..))));
        assert_eq!(Type::parse("string set set").unwrap(), Type::Set(boxed(Type::Set(boxed(Type::String)))));
        assert!(Type::parse("an event batch").is_err());
    }
}
