//! References to objects: opaque texts of the server, typed by class.

use crate::model::Class;
use crate::value::{DecodeError, FromValue, ToValue, Value};
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::sync::Arc;

/// The text of a reference to nothing.
const NULL: &str = "OpaqueRef:NULL";

/// A reference to an object of class `T`; valid in one pool, until the object is destroyed.
///
/// `Debug` shows the text, but never that of a session, which is as good as a password.
pub struct Ref<T> {
    text: Arc<str>,
    class: PhantomData<fn() -> T>,
}

/// A reference to an object of a class that this crate does not model.
pub type AnyRef = Ref<AnyClass>;

/// Stands for every class that this crate does not model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnyClass {}

impl Class for AnyClass {
    const NAME: &'static str = "object";
}

impl<T> Ref<T> {
    /// The reference with this text.
    pub fn new(text: &str) -> Self {
        Self { text: Arc::from(text), class: PhantomData }
    }

    /// The reference to nothing.
    pub fn null() -> Self {
        Self::new(NULL)
    }

    /// Whether it refers to nothing.
    pub fn is_null(&self) -> bool {
        self.text.is_empty() || &*self.text == NULL
    }

    /// `Some` unless it refers to nothing.
    pub fn non_null(&self) -> Option<&Self> {
        (!self.is_null()).then_some(self)
    }

    /// Its text. A session's is a secret.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl<T> Clone for Ref<T> {
    fn clone(&self) -> Self {
        Self { text: Arc::clone(&self.text), class: PhantomData }
    }
}

impl<T> PartialEq for Ref<T> {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl<T> Eq for Ref<T> {}

impl<T> PartialOrd for Ref<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Ref<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.text.cmp(&other.text)
    }
}

impl<T> Hash for Ref<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl<T> Default for Ref<T> {
    fn default() -> Self {
        Self::null()
    }
}

impl<T: Class> fmt::Debug for Ref<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if T::NAME == "session" { f.write_str("session <hidden>") } else { write!(f, "{} {}", T::NAME, self.text) }
    }
}

impl<T> FromValue for Ref<T> {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match value {
            Value::String(text) => Ok(Self::new(&text)),
            other => Err(DecodeError::kind("a reference", &other)),
        }
    }
}

impl<T> ToValue for Ref<T> {
    fn to_value(&self) -> Value {
        Value::String(self.text.to_string())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn null_is_null_and_sessions_are_not_shown() {
        let vm = crate::vm::Ref::null();
        assert!(vm.is_null() && vm.non_null().is_none());
        assert_eq!(format!("{:?}", crate::vm::Ref::new("OpaqueRef:1")), "VM OpaqueRef:1");
        assert_eq!(format!("{:?}", crate::session::Ref::new("OpaqueRef:1")), "session <hidden>");
    }
}
