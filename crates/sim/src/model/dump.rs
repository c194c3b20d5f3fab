//! The database as one XML document: the form of `GET /pool/xmldbdump`.

use std::fmt::Write;

use super::{Database, Value, float_text, schema};

/// Classes whose objects are not kept on disk, or are no objects.
const NOT_KEPT: &[&str] = &["event", "session", "task", "message"];

impl Database {
    /// The whole database. Holds no contents of secrets: those stand elsewhere.
    pub(crate) fn dump(&self) -> String {
        let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<database><manifest>");
        let pairs = [("schema_major_vsn", 5), ("schema_minor_vsn", 798), ("generation_count", self.generation())];
        for (key, value) in pairs {
            // Writing to a string cannot fail.
            let _ = write!(out, "<pair key=\"{key}\" value=\"{value}\"/>");
        }
        out.push_str("</manifest>");
        let mut classes: Vec<&str> = schema().keys().map(String::as_str).collect();
        classes.retain(|class| !NOT_KEPT.contains(class));
        classes.sort_unstable();
        for class in classes {
            let rows = self.refs(class);
            if rows.is_empty() {
                let _ = write!(out, "<table name=\"{class}\"/>");
                continue;
            }
            let _ = write!(out, "<table name=\"{class}\">");
            for reference in rows {
                self.dump_row(&mut out, class, &reference);
            }
            out.push_str("</table>");
        }
        out.push_str("</database>");
        out
    }

    fn dump_row(&self, out: &mut String, class: &str, reference: &str) {
        let (created, modified) = self.times(class, reference);
        let _ = write!(out, "<row ref=\"{reference}\" __ctime=\"{created}\" __mtime=\"{modified}\"");
        let mut columns = vec![("_ref".to_owned(), reference.to_owned())];
        for (name, value) in self.fields(class, reference).unwrap_or_default() {
            columns.push((column(&name), notation(&value)));
        }
        columns.sort();
        for (name, value) in columns {
            let _ = write!(out, " {name}=\"{}\"", attribute(&value));
        }
        out.push_str("/>");
    }
}

/// The database joins name spaces with two underscores.
pub(super) fn column(field: &str) -> String {
    for space in ["name_", "memory_", "VCPUs_", "PV_", "HVM_", "actions_"] {
        if let Some(rest) = field.strip_prefix(space) {
            return format!("{space}_{rest}");
        }
    }
    field.to_owned()
}

fn notation(value: &Value) -> String {
    let quote = |value: &Value| format!("'{}'", notation(value).replace('\\', "\\\\").replace('\'', "\\'"));
    match value {
        Value::Text(text) | Value::Date(text) => text.clone(),
        Value::Int(number) => number.to_string(),
        Value::Int32(number) => number.to_string(),
        Value::Float(number) => float_text(*number),
        Value::Bool(flag) => flag.to_string(),
        Value::List(items) => format!("({})", items.iter().map(quote).collect::<Vec<_>>().join(" ")),
        Value::Map(items) => {
            let pair = |(key, value): &(String, Value)| format!("({} {})", quote(&key.as_str().into()), quote(value));
            format!("({})", items.iter().map(pair).collect::<Vec<_>>().join(" "))
        }
        Value::Nil => String::new(),
    }
}

/// White space would not survive a parser: it is written in the database's own way.
fn attribute(text: &str) -> String {
    let mut out = String::new();
    for character in text.chars() {
        match character {
            '%' => out.push_str("%%"),
            ' ' => out.push_str("%."),
            '\t' => out.push_str("%t"),
            '\n' => out.push_str("%n"),
            '\r' => out.push_str("%r"),
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_names_every_object_in_the_databases_notation() {
        let mut db = Database::default();
        let config = Value::map([("a b", "it's")]);
        let vm = db.create("VM", vec![("name_label", "one two".into()), ("other_config", config)]);
        let dump = db.dump();
        assert!(dump.contains(&format!("<row ref=\"{vm}\" __ctime=\"1\" __mtime=\"1\" ")), "{dump}");
        assert!(dump.contains(" name__label=\"one%.two\""));
        assert!(dump.contains(" other_config=\"(('a%.b'%.'it\\'s'))\""), "{dump}");
        assert!(dump.contains("<table name=\"VBD\"/>") && dump.ends_with("</database>"));
    }
}
