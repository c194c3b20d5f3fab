//! The classes of xapi's data model that the simulator has, read from a trimmed list that is part of the source.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde::Deserialize;

use super::{Type, Value};
use crate::rpc::Outcome;

const CLASSES: &str = include_str!("../../data/classes.json");

/// A field of a class.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: String,
    pub(crate) kind: Type,
    /// `RW`, `RO/constructor` or `RO/runtime`.
    pub(crate) access: String,
}

/// A method of a class.
#[derive(Debug)]
pub(crate) struct Method {
    /// Parameters without the session: name, type, required.
    pub(crate) params: Vec<(String, Type, bool)>,
    pub(crate) without_session: bool,
}

/// A class of objects.
#[derive(Debug)]
pub(crate) struct Class {
    pub(crate) name: String,
    pub(crate) fields: Vec<Field>,
    index: HashMap<String, usize>,
    pub(crate) methods: HashMap<String, Method>,
    enums: HashMap<String, Vec<String>>,
}

impl Class {
    /// The position of a field in a row.
    pub(crate) fn position(&self, field: &str) -> Option<usize> {
        self.index.get(field).copied()
    }

    pub(crate) fn field(&self, name: &str) -> Option<&Field> {
        self.fields.get(self.position(name)?)
    }

    /// The first value of an enum.
    pub(crate) fn first_of(&self, name: &str) -> Option<String> {
        self.enums.get(name)?.first().cloned()
    }

    /// Reads a value of a type from the wire.
    pub(crate) fn read(&self, kind: &Type, value: Value) -> Outcome {
        kind.read(value, &|name| self.enums.get(name).cloned())
    }
}

#[derive(Deserialize)]
struct File {
    classes: Vec<FileClass>,
}

/// Name, parameters (name, type, required), result, without session.
type FileMethod = (String, Vec<(String, String, bool)>, String, bool);

#[derive(Deserialize)]
struct FileClass {
    name: String,
    fields: Vec<(String, String, String)>,
    messages: Vec<FileMethod>,
    enums: HashMap<String, Vec<String>>,
}

/// All classes by name.
pub(crate) fn schema() -> &'static HashMap<String, Class> {
    static SCHEMA: OnceLock<HashMap<String, Class>> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        #[expect(clippy::expect_used, reason = "part of the source, read by a test")]
        let file: File = serde_json::from_str(CLASSES).expect("the list of classes is JSON");
        file.classes.into_iter().map(|class| (class.name.clone(), read_class(class))).collect()
    })
}

fn read_class(class: FileClass) -> Class {
    let fields: Vec<Field> =
        class.fields.into_iter().map(|(name, kind, access)| Field { name, kind: Type::parse(&kind), access }).collect();
    let index = fields.iter().enumerate().map(|(position, field)| (field.name.clone(), position)).collect();
    let mut methods = HashMap::new();
    for (name, params, _, without_session) in class.messages {
        let params = params.into_iter().map(|(name, kind, required)| (name, Type::parse(&kind), required)).collect();
        methods.insert(name, Method { params, without_session });
    }
    // The generated getters, for the classes whose list leaves them out.
    let own = Type::Ref(class.name.clone());
    let mut getter = |name: String, params: Vec<(String, Type, bool)>| {
        methods.entry(name).or_insert(Method { params, without_session: false });
    };
    if class.name != "event" {
        let of_self = || vec![("self".to_owned(), own.clone(), true)];
        getter("get_record".to_owned(), of_self());
        getter("get_by_uuid".to_owned(), vec![("uuid".to_owned(), Type::Text, true)]);
        if class.name != "session" {
            getter("get_all".to_owned(), Vec::new());
            getter("get_all_records".to_owned(), Vec::new());
            getter("get_all_where".to_owned(), vec![("expr".to_owned(), Type::Text, true)]);
            getter("get_all_records_where".to_owned(), vec![("expr".to_owned(), Type::Text, true)]);
        }
        if class.name != "message" {
            for field in &fields {
                getter(format!("get_{}", field.name), of_self());
            }
        }
    }
    Class { name: class.name, fields, index, methods, enums: class.enums }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_model_is_there() {
        let vm = &schema()["VM"];
        assert_eq!(vm.fields.len(), 92);
        assert_eq!(vm.methods["snapshot"].params.len(), 3);
        assert!(vm.methods.contains_key("add_to_other_config"));
        assert!(schema()["Certificate"].methods.contains_key("get_fingerprint_sha256"));
        assert!(!schema()["session"].methods.contains_key("get_all_records"));
    }
}
