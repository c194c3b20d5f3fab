//! The pool's database: rows of typed fields, references kept in both directions, and a generation for events.
//!
//! Like xapi's, it keeps the two ends of a relation equal by itself: setting `VBD.VM` changes `VM.VBDs`, and both
//! objects count as modified.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::schema::{Class, schema};
use super::value::{NULL, Value, new_ref, new_uuid};
use super::{defaults, required_fields};
use crate::rpc::{Failure, Outcome};

/// Class and field of the single end, class and field of the many end.
const RELATIONS: &[(&str, &str, &str, &str)] = &[
    ("VBD", "VM", "VM", "VBDs"),
    ("VBD", "VDI", "VDI", "VBDs"),
    ("VIF", "VM", "VM", "VIFs"),
    ("VIF", "network", "network", "VIFs"),
    ("PIF", "network", "network", "PIFs"),
    ("PIF", "host", "host", "PIFs"),
    ("PBD", "host", "host", "PBDs"),
    ("PBD", "SR", "SR", "PBDs"),
    ("VDI", "SR", "SR", "VDIs"),
    ("VDI", "snapshot_of", "VDI", "snapshots"),
    ("VM", "snapshot_of", "VM", "snapshots"),
    ("VM", "parent", "VM", "children"),
    ("VM", "resident_on", "host", "resident_VMs"),
    ("console", "VM", "VM", "consoles"),
    ("VTPM", "VM", "VM", "VTPMs"),
    ("VUSB", "VM", "VM", "VUSBs"),
    ("task", "subtask_of", "task", "subtasks"),
    ("Certificate", "host", "host", "certificates"),
];

/// How many deletions are remembered for events.
const REMEMBERED_DELETIONS: usize = 20_000;

#[derive(Clone, Debug)]
struct Row {
    values: Vec<Value>,
    created: u64,
    modified: u64,
}

/// What happened to an object since a generation.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) class: &'static str,
    pub(crate) reference: String,
    pub(crate) operation: &'static str,
    pub(crate) generation: u64,
}

#[derive(Clone, Debug)]
struct Deletion {
    class: &'static str,
    reference: String,
    created: u64,
    deleted: u64,
}

/// All objects of the pool.
#[derive(Debug, Default)]
pub(crate) struct Database {
    tables: HashMap<&'static str, BTreeMap<String, Row>>,
    /// Every object by the generation of its last change, so that changes are found without a search.
    recent: BTreeMap<u64, (&'static str, String)>,
    deletions: VecDeque<Deletion>,
    generation: u64,
    /// The newest deletion that was forgotten.
    forgotten: u64,
}

fn class(name: &str) -> Outcome<&'static Class> {
    schema().get(name).ok_or_else(|| Failure::internal(&format!("no class {name}")))
}

impl Database {
    /// Counts all changes.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes an object; fields that are not given get their defaults. Gives its reference.
    pub(crate) fn create(&mut self, name: &str, fields: Vec<(&str, Value)>) -> String {
        let reference = new_ref();
        self.create_as(name, &reference, fields);
        reference
    }

    /// Makes an object of a given reference.
    pub(crate) fn create_as(&mut self, name: &str, reference: &str, fields: Vec<(&str, Value)>) {
        let Ok(class) = class(name) else { return };
        let empty = |field: &super::schema::Field| {
            defaults::special(&class.name, &field.name)
                .unwrap_or_else(|| field.kind.empty(&|name| class.first_of(name)))
        };
        let mut values: Vec<Value> = class.fields.iter().map(empty).collect();
        let mut links = Vec::new();
        for (field, value) in fields {
            if let Some(slot) = class.position(field).and_then(|position| values.get_mut(position)) {
                *slot = value.clone();
                links.push((field.to_owned(), value));
            }
        }
        if let Some(slot) = class.position("uuid").and_then(|position| values.get_mut(position))
            && slot.as_str().is_empty()
        {
            *slot = new_uuid().into();
        }
        self.generation += 1;
        let row = Row { values, created: self.generation, modified: self.generation };
        self.recent.insert(self.generation, (class.name.as_str(), reference.to_owned()));
        let replaced = self.tables.entry(class.name.as_str()).or_default().insert(reference.to_owned(), row);
        let new = replaced.is_none();
        if let Some(replaced) = replaced {
            self.recent.remove(&replaced.modified);
        }
        for (field, value) in links {
            self.link(name, reference, &field, NULL, value.as_str(), new);
        }
    }

    /// Removes an object and its mentions in other objects' sets.
    pub(crate) fn destroy(&mut self, name: &str, reference: &str) {
        let Ok(class) = class(name) else { return };
        for (one, field, ..) in RELATIONS.iter().filter(|relation| relation.0 == name) {
            let old = self.text(one, reference, field);
            self.link(one, reference, field, &old, NULL, false);
        }
        let Some(row) = self.tables.get_mut(class.name.as_str()).and_then(|table| table.remove(reference)) else {
            return;
        };
        self.recent.remove(&row.modified);
        self.generation += 1;
        self.deletions.push_back(Deletion {
            class: class.name.as_str(),
            reference: reference.to_owned(),
            created: row.created,
            deleted: self.generation,
        });
        if self.deletions.len() > REMEMBERED_DELETIONS {
            self.forgotten = self.deletions.pop_front().map_or(self.forgotten, |deletion| deletion.deleted);
        }
    }

    pub(crate) fn exists(&self, name: &str, reference: &str) -> bool {
        self.tables.get(name).is_some_and(|table| table.contains_key(reference))
    }

    /// `HANDLE_INVALID` if there is no such object.
    pub(crate) fn check(&self, name: &str, reference: &str) -> Outcome<()> {
        if self.exists(name, reference) { Ok(()) } else { Err(Failure::handle_invalid(name, reference)) }
    }

    /// References of all objects of a class.
    pub(crate) fn refs(&self, name: &str) -> Vec<String> {
        self.tables.get(name).map(|table| table.keys().cloned().collect()).unwrap_or_default()
    }

    /// The number of objects of a class.
    pub(crate) fn count(&self, name: &str) -> usize {
        self.tables.get(name).map_or(0, BTreeMap::len)
    }

    /// References of the objects whose field has that text.
    pub(crate) fn refs_where(&self, name: &str, field: &str, value: &str) -> Vec<String> {
        let Some(position) = schema().get(name).and_then(|class| class.position(field)) else { return Vec::new() };
        let matches = |row: &Row| row.values.get(position).is_some_and(|found| found.as_str() == value);
        self.tables
            .get(name)
            .map(|table| table.iter().filter(|(_, row)| matches(row)).map(|(reference, _)| reference.clone()).collect())
            .unwrap_or_default()
    }

    /// The object of that uuid.
    pub(crate) fn by_uuid(&self, name: &str, uuid: &str) -> Outcome<String> {
        let found = self.refs_where(name, "uuid", uuid).into_iter().next();
        found.ok_or_else(|| Failure::new("UUID_INVALID", [name, uuid]))
    }

    /// The generations at which an object was made and last changed.
    pub(crate) fn times(&self, name: &str, reference: &str) -> (u64, u64) {
        self.row(name, reference).map(|row| (row.created, row.modified)).unwrap_or_default()
    }

    /// A field.
    pub(crate) fn get(&self, name: &str, reference: &str, field: &str) -> Outcome<&Value> {
        let row = self.row(name, reference)?;
        let position = class(name)?.position(field);
        position
            .and_then(|position| row.values.get(position))
            .ok_or_else(|| Failure::internal(&format!("no field {name}.{field}")))
    }

    /// A field's text, empty if there is no such object.
    pub(crate) fn text(&self, name: &str, reference: &str, field: &str) -> String {
        self.get(name, reference, field).map(|value| value.as_str().to_owned()).unwrap_or_default()
    }

    pub(crate) fn int(&self, name: &str, reference: &str, field: &str) -> i64 {
        self.get(name, reference, field).map(Value::as_int).unwrap_or_default()
    }

    pub(crate) fn flag(&self, name: &str, reference: &str, field: &str) -> bool {
        self.get(name, reference, field).map(Value::as_bool).unwrap_or_default()
    }

    /// A set of references or strings, empty if there is no such object.
    pub(crate) fn set_of(&self, name: &str, reference: &str, field: &str) -> Vec<String> {
        self.get(name, reference, field).map(Value::strings).unwrap_or_default()
    }

    /// A map's value.
    pub(crate) fn map_value(&self, name: &str, reference: &str, field: &str, key: &str) -> Option<String> {
        self.get(name, reference, field).ok()?.member(key).map(|value| value.as_str().to_owned())
    }

    /// All fields as stored, in the order of the data model.
    pub(crate) fn fields(&self, name: &str, reference: &str) -> Outcome<Vec<(String, Value)>> {
        let row = self.row(name, reference)?;
        let names = class(name)?.fields.iter().map(|field| field.name.clone());
        Ok(names.zip(row.values.iter().cloned()).collect())
    }

    /// Sets a field. Without effect if the object is gone; equal values count as no change.
    pub(crate) fn set(&mut self, name: &str, reference: &str, field: &str, value: impl Into<Value>) {
        let value = value.into();
        let Some(class) = schema().get(name) else { return };
        let Some(position) = class.position(field) else { return };
        let generation = self.generation + 1;
        let Some(row) = self.tables.get_mut(name).and_then(|table| table.get_mut(reference)) else { return };
        let Some(slot) = row.values.get_mut(position) else { return };
        if *slot == value {
            return;
        }
        let old = std::mem::replace(slot, value.clone());
        let entry = self.recent.remove(&row.modified);
        row.modified = generation;
        self.generation = generation;
        if let Some(entry) = entry {
            self.recent.insert(generation, entry);
        }
        self.link(name, reference, field, old.as_str(), value.as_str(), false);
    }

    /// Sets a key of a map.
    pub(crate) fn put(&mut self, name: &str, reference: &str, field: &str, key: &str, value: impl Into<Value>) {
        let Ok(Value::Map(mut items)) = self.get(name, reference, field).cloned() else { return };
        items.retain(|(known, _)| known != key);
        items.insert(0, (key.to_owned(), value.into()));
        self.set(name, reference, field, Value::Map(items));
    }

    /// Removes a key of a map.
    pub(crate) fn take(&mut self, name: &str, reference: &str, field: &str, key: &str) {
        let Ok(Value::Map(mut items)) = self.get(name, reference, field).cloned() else { return };
        items.retain(|(known, _)| known != key);
        self.set(name, reference, field, Value::Map(items));
    }

    /// Counts an object as modified (`event.inject`, fields that are computed when they are read).
    pub(crate) fn touch(&mut self, name: &str, reference: &str) {
        self.generation += 1;
        let generation = self.generation;
        if let Some(row) = self.tables.get_mut(name).and_then(|table| table.get_mut(reference)) {
            let entry = self.recent.remove(&row.modified);
            row.modified = generation;
            if let Some(entry) = entry {
                self.recent.insert(generation, entry);
            }
        }
    }

    /// The newest generation whose deletions may be forgotten.
    pub(crate) fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// What changed after a generation, oldest first, without deletions that are forgotten.
    pub(crate) fn changes_since(&self, since: u64) -> Vec<Change> {
        let mut changes = Vec::new();
        for (&generation, (class, reference)) in self.recent.range(since.saturating_add(1)..) {
            let created = self.row(class, reference).map(|row| row.created).unwrap_or_default();
            let operation = if created > since { "add" } else { "mod" };
            changes.push(Change { class, reference: reference.clone(), operation, generation });
        }
        let newest = self.deletions.iter().rev().take_while(|deletion| deletion.deleted > since);
        let gone = newest.filter(|deletion| deletion.created <= since);
        changes.extend(gone.map(|deletion| Change {
            class: deletion.class,
            reference: deletion.reference.clone(),
            operation: "del",
            generation: deletion.deleted,
        }));
        changes.sort_by_key(|change| change.generation);
        changes
    }

    /// Forgets which objects were deleted, as a toolstack does when it starts: only rows are kept in its file.
    pub(crate) fn forget_deletions(&mut self) {
        self.deletions.clear();
        self.forgotten = self.generation;
    }

    /// Counts from the database as another host had it, `behind` changes ago: rows keep their order and get lower
    /// numbers, so that tokens from before can be ahead of every change to come.
    pub(crate) fn fall_behind(&mut self, behind: u64) {
        self.forget_deletions();
        let mut number = 0;
        for (_, (class, reference)) in std::mem::take(&mut self.recent) {
            let Some(row) = self.tables.get_mut(class).and_then(|table| table.get_mut(&reference)) else { continue };
            number += 1;
            row.modified = number;
            row.created = row.created.min(number);
            self.recent.insert(number, (class, reference));
        }
        self.generation = number.max(self.generation.saturating_sub(behind));
        self.forgotten = self.generation;
    }

    /// Takes rows of a dump over, in the order of their last changes.
    pub(super) fn fill(&mut self, mut rows: Vec<(&'static Class, String, u64, Vec<Value>)>, generation: u64) {
        rows.sort_by_key(|(_, _, modified, _)| *modified);
        let mut number = 0;
        for (class, reference, _, values) in rows {
            number += 1;
            self.recent.insert(number, (class.name.as_str(), reference.clone()));
            let row = Row { values, created: number, modified: number };
            let replaced = self.tables.entry(class.name.as_str()).or_default().insert(reference, row);
            if let Some(replaced) = replaced {
                self.recent.remove(&replaced.modified);
            }
        }
        self.generation = number.max(generation);
        self.forgotten = self.generation;
    }

    /// Gives objects other references, wherever they are named.
    pub(super) fn rename(&mut self, names: &[(&str, &str)]) {
        let renamed = |text: &str| names.iter().find(|(old, _)| *old == text).map(|(_, new)| (*new).to_owned());
        fn walk(value: &mut Value, renamed: &dyn Fn(&str) -> Option<String>) {
            match value {
                Value::Text(text) => {
                    if let Some(new) = renamed(text) {
                        *text = new;
                    }
                }
                Value::List(items) => items.iter_mut().for_each(|item| walk(item, renamed)),
                Value::Map(items) => items.iter_mut().for_each(|(_, item)| walk(item, renamed)),
                _ => {}
            }
        }
        for table in self.tables.values_mut() {
            for row in table.values_mut() {
                row.values.iter_mut().for_each(|value| walk(value, &renamed));
            }
            for (old, new) in names {
                if let Some(row) = table.remove(*old) {
                    table.insert((*new).to_owned(), row);
                }
            }
        }
        for (_, reference) in self.recent.values_mut() {
            if let Some(new) = renamed(reference) {
                *reference = new;
            }
        }
    }

    /// Takes the messages of another database over: they are kept elsewhere and outlive it.
    pub(crate) fn keep_messages(&mut self, of: &Self) {
        for message in of.refs("message") {
            let fields = of.fields("message", &message).unwrap_or_default();
            let fields = fields.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
            self.create_as("message", &message, fields);
        }
    }

    fn row(&self, name: &str, reference: &str) -> Outcome<&Row> {
        let row = self.tables.get(name).and_then(|table| table.get(reference));
        row.ok_or_else(|| Failure::handle_invalid(name, reference))
    }

    /// Keeps the many end of a relation equal to the single end. A `first` object can be in no set yet, which then needs
    /// no search.
    fn link(&mut self, name: &str, reference: &str, field: &str, old: &str, new: &str, first: bool) {
        let Some(&(.., many, set)) = RELATIONS.iter().find(|relation| relation.0 == name && relation.1 == field) else {
            return;
        };
        for (target, add) in [(old, false), (new, true)] {
            let Some(position) = schema().get(many).and_then(|class| class.position(set)) else { continue };
            let Some(row) = self.tables.get_mut(many).and_then(|table| table.get_mut(target)) else { continue };
            let Some(Value::List(items)) = row.values.get_mut(position) else { continue };
            // In place: an SR has thousands of disks.
            let before = items.len();
            if !first {
                items.retain(|item| item.as_str() != reference);
            }
            if add {
                items.insert(0, reference.into());
            }
            if add || items.len() != before {
                self.touch(many, target);
            }
        }
    }
}

/// Reads a constructor's record: types, defaults, and the fields that it must have.
pub(crate) fn read_record(name: &str, record: &Value) -> Outcome<Vec<(String, Value)>> {
    let class = class(name)?;
    let Value::Map(items) = record else { return Err(Failure::internal("bad __structure")) };
    if let Some(missing) = required_fields(name).iter().find(|&&field| record.member(field).is_none()) {
        return Err(Failure::new("FIELD_TYPE_ERROR", [*missing]));
    }
    let mut fields = Vec::new();
    for (field, value) in items {
        // Fields that a constructor does not take, and unknown ones, are ignored.
        let Some(known) = class.field(field).filter(|known| known.access != "RO/runtime") else { continue };
        fields.push((field.clone(), class.read(&known.kind, value.clone())?));
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_a_relation_agree() {
        let mut db = Database::default();
        let vm = db.create("VM", vec![("name_label", "a".into())]);
        let vbd = db.create("VBD", vec![("VM", vm.as_str().into())]);
        assert_eq!(db.set_of("VM", &vm, "VBDs"), [vbd.as_str()]);
        let before = db.generation();
        db.destroy("VBD", &vbd);
        assert!(db.set_of("VM", &vm, "VBDs").is_empty());
        let changes = db.changes_since(before);
        assert!(changes.iter().any(|change| change.operation == "del" && change.reference == vbd));
        assert!(changes.iter().any(|change| change.operation == "mod" && change.reference == vm));
    }

    #[test]
    fn a_handle_that_is_not_there_is_told_with_its_class() {
        let db = Database::default();
        assert_eq!(db.get("VM", "OpaqueRef:x", "uuid"), Err(Failure::handle_invalid("VM", "OpaqueRef:x")));
    }
}
