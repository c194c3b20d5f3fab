//! The records of an archive: which objects it has, under which short references, and `ova.xml`.

use std::collections::HashMap;

use crate::model::{Database, NULL, Type, Value, schema};
use crate::rpc::{Failure, Outcome, read_xml_value, xml_fragment};

/// Classes of an archive, in the order of `ova.xml`.
const CLASSES: &[&str] =
    &["host", "VM", "VM_metrics", "VM_guest_metrics", "VBD", "VIF", "network", "VDI", "SR", "VTPM"];

/// The objects of an archive.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    names: HashMap<String, String>,
    objects: Vec<(&'static str, String)>,
}

impl Selection {
    /// `Ref:N` of an object of the pool.
    pub(crate) fn name(&self, reference: &str) -> Option<&str> {
        self.names.get(reference).map(String::as_str)
    }

    fn add(&mut self, db: &Database, class: &'static str, reference: &str) -> bool {
        if !db.exists(class, reference) || self.names.contains_key(reference) {
            return false;
        }
        self.names.insert(reference.to_owned(), format!("Ref:{}", self.names.len()));
        self.objects.push((class, reference.to_owned()));
        true
    }

    fn add_vm(&mut self, db: &Database, vm: &str, snapshots: bool) {
        if !self.add(db, "VM", vm) {
            return;
        }
        for vif in db.set_of("VM", vm, "VIFs") {
            self.add(db, "VIF", &vif);
            self.add(db, "network", &db.text("VIF", &vif, "network"));
        }
        let disks = db.set_of("VM", vm, "VBDs").into_iter().map(|vbd| {
            self.add(db, "VBD", &vbd);
            db.text("VBD", &vbd, "VDI")
        });
        let mut disks: Vec<String> = disks.collect();
        disks.push(db.text("VM", vm, "suspend_VDI"));
        for vdi in disks {
            self.add(db, "VDI", &vdi);
            self.add(db, "SR", &db.text("VDI", &vdi, "SR"));
        }
        for vtpm in db.set_of("VM", vm, "VTPMs") {
            self.add(db, "VTPM", &vtpm);
        }
        self.add(db, "VM_guest_metrics", &db.text("VM", vm, "guest_metrics"));
        self.add(db, "VM_metrics", &db.text("VM", vm, "metrics"));
        for host in ["affinity", "resident_on"] {
            self.add(db, "host", &db.text("VM", vm, host));
        }
        if snapshots {
            for snapshot in db.set_of("VM", vm, "snapshots") {
                self.add_vm(db, &snapshot, false);
            }
        }
    }
}

/// The objects that belong to VMs, their snapshots too if wanted.
pub(crate) fn select(db: &Database, vms: &[String], snapshots: bool) -> Selection {
    let mut selection = Selection::default();
    for vm in vms {
        selection.add_vm(db, vm, snapshots);
    }
    selection
}

/// References become short ones; what is not in the archive becomes null or leaves its set.
fn shortened(selection: &Selection, kind: &Type, value: &Value) -> Value {
    let of_reference = |value: &Value| Value::text(selection.name(value.as_str()).unwrap_or(NULL));
    match (kind, value) {
        (Type::Ref(_), value) => of_reference(value),
        (Type::Set(inner), Value::List(items)) if matches!(**inner, Type::Ref(_)) => {
            Value::List(items.iter().map(of_reference).filter(|item| item.as_str() != NULL).collect())
        }
        (_, value) => value.clone(),
    }
}

/// `ova.xml`. `vtpm` gives the contents of a VTPM: they travel in its record.
pub(crate) fn write(
    db: &Database,
    selection: &Selection,
    snapshots: bool,
    vtpm: &dyn Fn(&str) -> String,
) -> Outcome<String> {
    let mut objects = Vec::new();
    for class in CLASSES {
        for (_, reference) in selection.objects.iter().filter(|(known, _)| known == class) {
            let Some(kinds) = schema().get(*class) else { continue };
            let mut snapshot = Vec::new();
            for (name, value) in db.fields(class, reference)? {
                let dropped = matches!(name.as_str(), "current_operations" | "allowed_operations");
                // Without their records, the ties to snapshots would dangle.
                let ties = !snapshots && matches!(name.as_str(), "snapshots" | "parent" | "children");
                let value = match kinds.field(&name) {
                    _ if dropped => Value::List(Vec::new()),
                    Some(field) if ties && matches!(field.kind, Type::Ref(_)) => Value::null(),
                    Some(_) if ties => Value::List(Vec::new()),
                    Some(field) => shortened(selection, &field.kind, &value),
                    None => value,
                };
                snapshot.push((name, value));
            }
            if *class == "VTPM" {
                snapshot.push(("content".to_owned(), Value::text(vtpm(reference))));
            }
            objects.push(Value::Map(vec![
                ("class".to_owned(), (*class).into()),
                ("id".to_owned(), selection.name(reference).unwrap_or(NULL).into()),
                ("snapshot".to_owned(), Value::Map(snapshot)),
            ]));
        }
    }
    let host = db.refs("host").first().cloned().unwrap_or_default();
    let of_host = |key: &str| db.map_value("host", &host, "software_version", key).unwrap_or_default();
    let version = Value::Map(vec![
        ("hostname".to_owned(), of_host("hostname").into()),
        ("date".to_owned(), of_host("date").into()),
        ("product_version".to_owned(), of_host("product_version").into()),
        ("product_brand".to_owned(), of_host("product_brand").into()),
        ("build_number".to_owned(), of_host("build_number").into()),
        ("xapi_major".to_owned(), Value::Int32(1)),
        ("xapi_minor".to_owned(), Value::Int32(20)),
        ("export_vsn".to_owned(), Value::Int32(2)),
    ]);
    Ok(xml_fragment(&Value::Map(vec![("version".to_owned(), version), ("objects".to_owned(), Value::List(objects))])))
}

/// One object of an archive that is read; its references are the archive's.
#[derive(Clone, Debug)]
pub(crate) struct Archived {
    pub(crate) class: &'static str,
    pub(crate) id: String,
    pub(crate) fields: Vec<(String, Value)>,
}

impl Archived {
    pub(crate) fn value(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    pub(crate) fn text(&self, name: &str) -> &str {
        self.value(name).map_or("", Value::as_str)
    }
}

/// Reads `ova.xml`. Objects of classes that are not known here are left out.
pub(crate) fn read(text: &str) -> Outcome<Vec<Archived>> {
    let generic = |what: String| Failure::new("IMPORT_ERROR_GENERIC", [what]);
    let root = read_xml_value(text).map_err(generic)?;
    let objects = root.member("objects").ok_or_else(|| generic("objects".to_owned()))?;
    let mut found = Vec::new();
    for object in objects.as_list() {
        let text = |name: &str| object.member(name).map(Value::as_str).unwrap_or_default();
        let Some(class) = CLASSES.iter().find(|class| **class == text("class")).and_then(|class| schema().get(*class))
        else {
            continue;
        };
        let mut fields = Vec::new();
        for (name, value) in object.member("snapshot").map(Value::as_map).unwrap_or_default() {
            match class.field(name) {
                Some(field) if !matches!(name.as_str(), "allowed_operations" | "current_operations") => {
                    fields.push((name.clone(), class.read(&field.kind, value.clone())?));
                }
                None if name == "content" => fields.push((name.clone(), value.clone())),
                _ => {}
            }
        }
        found.push(Archived { class: &class.name, id: text("id").to_owned(), fields });
    }
    Ok(found)
}
