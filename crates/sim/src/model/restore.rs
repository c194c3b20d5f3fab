//! A database out of the XML document that [`Database::dump`] writes, and what is changed in it before it is used.

use std::collections::{BTreeMap, HashMap};

use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

use super::{Class, Database, Type, Value, schema};
use crate::rpc::{Failure, Outcome};

/// The version of the schema; another one is refused.
const SCHEMA: (&str, &str) = ("5", "798");

/// Deepest nesting of elements that a dump has.
const DEEPEST: usize = 8;

/// A dump that was read: rows of known classes with their times.
#[derive(Debug, Default)]
pub(crate) struct Dump {
    schema: (String, String),
    generation: u64,
    rows: Vec<(&'static Class, String, u64, Vec<Value>)>,
}

fn malformed(what: impl std::fmt::Display) -> Failure {
    Failure::internal(&format!("Db_xml.Unmarshall_error({what})"))
}

impl Dump {
    /// Reads a document. Tables and columns that are not known here are left out.
    ///
    /// `INTERNAL_ERROR` for what is no such document, `RESTORE_INCOMPATIBLE_VERSION` for another schema.
    pub(crate) fn read(text: &str) -> Outcome<Self> {
        let mut reader = Reader::from_str(text);
        let mut dump = Self::default();
        let mut table: Option<&'static Class> = None;
        let mut depth = 0_usize;
        let mut complete = false;
        loop {
            match reader.read_event().map_err(malformed)? {
                Event::Start(element) => {
                    depth += 1;
                    if depth > DEEPEST {
                        return Err(malformed("depth"));
                    }
                    dump.element(&element, &mut table)?;
                }
                Event::Empty(element) => dump.element(&element, &mut table)?,
                Event::End(element) => {
                    depth = depth.saturating_sub(1);
                    complete |= depth == 0 && element.name().as_ref() == "database";
                }
                Event::Eof => break,
                _ => {}
            }
        }
        if !complete {
            return Err(malformed("database"));
        }
        if (dump.schema.0.as_str(), dump.schema.1.as_str()) != SCHEMA {
            return Err(Failure::bare("RESTORE_INCOMPATIBLE_VERSION"));
        }
        Ok(dump)
    }

    fn element(&mut self, element: &BytesStart<'_>, table: &mut Option<&'static Class>) -> Outcome<()> {
        let mut attributes: BTreeMap<String, String> = BTreeMap::new();
        for attribute in element.attributes() {
            let attribute = attribute.map_err(malformed)?;
            let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(malformed)?;
            attributes.insert(attribute.key.as_ref().to_owned(), value.into_owned());
        }
        let get = |name: &str| attributes.get(name).map(String::as_str).unwrap_or_default();
        match element.name().as_ref() {
            "pair" => match get("key") {
                "schema_major_vsn" => get("value").clone_into(&mut self.schema.0),
                "schema_minor_vsn" => get("value").clone_into(&mut self.schema.1),
                "generation_count" => self.generation = get("value").parse().map_err(malformed)?,
                _ => {}
            },
            "table" => *table = schema().get(get("name")),
            "row" => {
                let Some(class) = table.as_ref() else { return Ok(()) };
                let modified = get("__mtime").parse().unwrap_or_default();
                let mut values = Vec::new();
                for field in &class.fields {
                    let value = match attributes.get(&super::dump::column(&field.name)) {
                        Some(text) => read_value(&field.kind, &plain(text))?,
                        None => field.kind.empty(&|name| class.first_of(name)),
                    };
                    values.push(value);
                }
                self.rows.push((class, get("ref").to_owned(), modified, values));
            }
            _ => {}
        }
        Ok(())
    }

    /// Makes it the database of the coordinator that it is restored on, as another machine may be: every other host
    /// leaves it, and the coordinator gets the names and addresses that it has now.
    ///
    /// `RESTORE_TARGET_MISSING_DEVICE` for a network device that this machine has not,
    /// `RESTORE_TARGET_MGMT_IF_NOT_IN_BACKUP` if the management interface is not in the dump.
    pub(crate) fn prepare(self, now: &Database, host: &str) -> Outcome<Database> {
        let Self { generation, rows, .. } = self;
        let mut db = Database::default();
        db.fill(rows, generation);
        let pool = db.refs("pool").into_iter().next().ok_or_else(|| malformed("pool"))?;
        let master = db.text("pool", &pool, "master");
        db.check("host", &master)?;
        for other in db.refs("host").into_iter().filter(|known| *known != master) {
            for pif in db.set_of("host", &other, "PIFs") {
                db.destroy("PIF", &pif);
            }
            db.destroy("host", &other);
        }
        let dom0 = db.text("host", &master, "control_domain");
        let own_dom0 = now.text("host", host, "control_domain");
        for (class, theirs, ours) in [("host", &master, host), ("VM", &dom0, own_dom0.as_str())] {
            db.set(class, theirs, "uuid", now.text(class, ours, "uuid"));
        }
        let own: HashMap<String, String> = now
            .set_of("host", host, "PIFs")
            .into_iter()
            .filter(|pif| now.flag("PIF", pif, "physical"))
            .map(|pif| (now.text("PIF", &pif, "device"), pif))
            .collect();
        let managing: Vec<&String> =
            own.iter().filter(|(_, pif)| now.flag("PIF", pif, "management")).map(|(device, _)| device).collect();
        let mut devices = Vec::new();
        for pif in db.set_of("host", &master, "PIFs") {
            let device = db.text("PIF", &pif, "device");
            db.set("PIF", &pif, "management", managing.contains(&&device));
            if db.flag("PIF", &pif, "physical") {
                let here =
                    own.get(&device).ok_or_else(|| Failure::new("RESTORE_TARGET_MISSING_DEVICE", [device.as_str()]))?;
                db.set("PIF", &pif, "MAC", now.text("PIF", here, "MAC"));
            }
            devices.push(device);
        }
        if managing.iter().any(|device| !devices.contains(device)) {
            return Err(Failure::new("RESTORE_TARGET_MGMT_IF_NOT_IN_BACKUP", devices));
        }
        // A dump of another pool names this machine in its own way.
        db.rename(&[(master.as_str(), host), (dom0.as_str(), own_dom0.as_str())]);
        Ok(db)
    }
}

/// Undoes what stands for white space.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (character, character == '%') {
            (_, false) => out.push(character),
            _ => match characters.next() {
                Some('.') => out.push(' '),
                Some('t') => out.push('\t'),
                Some('n') => out.push('\n'),
                Some('r') => out.push('\r'),
                Some(other) => out.push(other),
                None => out.push('%'),
            },
        }
    }
    out
}

fn read_value(kind: &Type, text: &str) -> Outcome {
    Ok(match kind {
        Type::Text | Type::Ref(_) | Type::Enum(_) | Type::Any => Value::text(text),
        Type::Date => Value::Date(text.to_owned()),
        Type::Int => Value::Int(text.parse().map_err(malformed)?),
        Type::Float => Value::Float(text.parse().map_err(malformed)?),
        Type::Bool => Value::Bool(text == "true"),
        Type::Set(inner) => {
            let items = items(text)?.iter().map(|item| read_value(inner, item)).collect::<Outcome<Vec<_>>>()?;
            Value::List(items)
        }
        Type::Map(_, inner) => {
            let mut pairs = Vec::new();
            for pair in items(text)? {
                match items(&pair)?.as_slice() {
                    [key, value] => pairs.push((key.clone(), read_value(inner, value)?)),
                    _ => return Err(malformed("pair")),
                }
            }
            Value::Map(pairs)
        }
    })
}

/// The parts of `('a' 'b' (...))`: quoted ones without their quotes, those in parentheses with them.
fn items(text: &str) -> Outcome<Vec<String>> {
    let inner = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(')'));
    let inner = inner.ok_or_else(|| malformed("parentheses"))?;
    let mut found = Vec::new();
    let mut rest = inner.chars().peekable();
    while let Some(&next) = rest.peek() {
        if next.is_whitespace() {
            rest.next();
            continue;
        }
        let mut item = String::new();
        let mut open = 0_usize;
        let mut quoted = false;
        while let Some(character) = rest.next() {
            let inside = open > 0;
            match character {
                '\\' if quoted => {
                    let escaped = rest.next().ok_or_else(|| malformed("escape"))?;
                    if inside {
                        item.push('\\');
                    }
                    item.push(escaped);
                }
                '\'' => {
                    quoted = !quoted;
                    if inside {
                        item.push(character);
                    }
                }
                '(' | ')' if !quoted => {
                    open = if character == '(' { open + 1 } else { open.saturating_sub(1) };
                    item.push(character);
                }
                _ => item.push(character),
            }
            if !quoted && open == 0 {
                break;
            }
        }
        if quoted || open > 0 {
            return Err(malformed("end"));
        }
        found.push(item);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(db: &mut Database) -> String {
        let host = db.create("host", vec![("name_label", "it's a \"host\" 100%\n\t<&".into())]);
        let dom0 = db.create("VM", vec![("resident_on", host.as_str().into())]);
        db.set("host", &host, "control_domain", dom0.as_str());
        let fields = vec![
            ("host", host.as_str().into()),
            ("device", "eth0".into()),
            ("management", true.into()),
            ("physical", true.into()),
        ];
        db.create("PIF", fields);
        db.create("pool", vec![("master", host.as_str().into())]);
        host
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_was_dumped_is_read_again(
            name in "\\PC{0,30}",
            pairs in proptest::collection::btree_map("[ -~]{0,12}", "[ -~\\t\\n]{0,12}", 0..4),
            tags in proptest::collection::vec("[ -~]{0,12}", 0..4),
        ) {
            let mut db = Database::default();
            let host = pool(&mut db);
            let vm = db.create("VM", vec![
                ("name_label", name.as_str().into()),
                ("other_config", Value::map(pairs)),
                ("tags", Value::texts(tags)),
            ]);
            let read = Dump::read(&db.dump()).unwrap().prepare(&db, &host).unwrap();
            prop_assert_eq!(read.fields("VM", &vm).unwrap(), db.fields("VM", &vm).unwrap());
            prop_assert_eq!(read.fields("host", &host).unwrap(), db.fields("host", &host).unwrap());
        }

        #[test]
        fn no_text_is_taken_for_a_dump_by_chance(text in "[<>/a-z\"'=()%. ]{0,200}") {
            prop_assert!(Dump::read(&text).is_err());
        }
    }

    #[test]
    fn other_schemas_hosts_and_devices_are_told_apart() {
        let mut db = Database::default();
        let host = pool(&mut db);
        let dump = db.dump();
        let code = |text: &str, now: &Database| {
            Dump::read(text).and_then(|dump| dump.prepare(now, &host)).err().map(|failure| failure.code)
        };
        assert_eq!(code(&dump, &db), None);
        let older = dump.replace("value=\"798\"", "value=\"797\"");
        assert_eq!(code(&older, &db).as_deref(), Some("RESTORE_INCOMPATIBLE_VERSION"));
        let half = dump.get(..dump.len() / 2).unwrap();
        assert_eq!(code(half, &db).as_deref(), Some("INTERNAL_ERROR"));
        let other = dump.replace("device=\"eth0\"", "device=\"eth7\"");
        assert_eq!(code(&other, &db).as_deref(), Some("RESTORE_TARGET_MISSING_DEVICE"));
        let virtual_one = other.replace("physical=\"true\"", "physical=\"false\"");
        assert_eq!(code(&virtual_one, &db).as_deref(), Some("RESTORE_TARGET_MGMT_IF_NOT_IN_BACKUP"));
        // A dump of another machine is made into one of this one.
        let mut foreign = Database::default();
        let their_host = pool(&mut foreign);
        let slave = foreign.create("host", vec![]);
        let read = Dump::read(&foreign.dump()).unwrap().prepare(&db, &host).unwrap();
        assert_eq!(read.refs("host"), std::slice::from_ref(&host));
        assert!(!read.exists("host", &their_host) && !read.exists("host", &slave));
        assert_eq!(read.text("host", &host, "uuid"), db.text("host", &host, "uuid"));
        let domain = db.text("host", &host, "control_domain");
        assert_eq!(read.text("VM", &domain, "resident_on"), host);
        assert_eq!(read.text("host", &host, "control_domain"), domain);
    }
}
