//! XML-RPC as xapi speaks it: API integers and strings untyped, failures as a successful response with a status.

use quick_xml::Reader;
use quick_xml::events::Event;

use super::Outcome;
use crate::model::{Value, float_text};

/// An element with its children and its own text.
#[derive(Debug, Default)]
struct Element {
    name: String,
    children: Vec<Element>,
    text: String,
}

impl Element {
    fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }
}

/// How deep elements may be nested.
const DEEPEST: usize = 64;

/// Reads a `methodCall`: name and parameters, or the text of the parser's error.
pub(crate) fn read_xml_call(body: &str) -> Result<(String, Vec<Value>), String> {
    let root = read_tree(body)?;
    if root.name != "methodCall" {
        return Err(format!("Xmlrpc.Parse_error(&quot;{}&quot;)", root.name));
    }
    let name = root.child("methodName").map(|element| element.text.trim().to_owned()).unwrap_or_default();
    let params = root.child("params").map(|params| {
        params.children.iter().filter_map(|param| param.child("value")).map(read_value).collect::<Result<Vec<_>, _>>()
    });
    Ok((name, params.transpose()?.unwrap_or_default()))
}

/// Reads a value alone, as it stands in an archive of VMs.
pub(crate) fn read_xml_value(text: &str) -> Result<Value, String> {
    let root = read_tree(text)?;
    if root.name == "value" { read_value(&root) } else { Err(format!("no value but {}", root.name)) }
}

fn read_tree(body: &str) -> Result<Element, String> {
    let mut reader = Reader::from_str(body);
    let failure = |at: u64, what: &str| format!("Xmlm.Error(1:{}, &quot;{what}&quot;)", at + 1);
    let mut stack: Vec<Element> = Vec::new();
    loop {
        let event = reader.read_event().map_err(|_| failure(reader.buffer_position(), "unexpected end of input"))?;
        match event {
            Event::Start(start) => {
                if stack.len() >= DEEPEST {
                    return Err(failure(reader.buffer_position(), "too deep"));
                }
                let name = start.name().as_ref().to_owned();
                stack.push(Element { name, ..Element::default() });
            }
            Event::Empty(start) => {
                let name = start.name().as_ref().to_owned();
                let element = Element { name, ..Element::default() };
                match stack.last_mut() {
                    Some(parent) => parent.children.push(element),
                    None => return Ok(element),
                }
            }
            Event::Text(text) => match stack.last_mut() {
                Some(top) => top.text.push_str(&text),
                None if text.trim().is_empty() => {}
                None => return Err(failure(0, "expected root element")),
            },
            Event::CData(text) => {
                if let Some(top) = stack.last_mut() {
                    top.text.push_str(&text);
                }
            }
            Event::GeneralRef(name) => {
                let resolved = resolve(&name).ok_or_else(|| failure(reader.buffer_position(), "unknown entity"))?;
                if let Some(top) = stack.last_mut() {
                    top.text.push_str(&resolved);
                }
            }
            Event::End(_) => {
                let Some(element) = stack.pop() else { return Err(failure(reader.buffer_position(), "end")) };
                match stack.last_mut() {
                    Some(parent) => parent.children.push(element),
                    None => return Ok(element),
                }
            }
            Event::Eof => {
                let what = if stack.is_empty() { "expected root element" } else { "unexpected end of input" };
                return Err(failure(reader.buffer_position(), what));
            }
            Event::Decl(_) | Event::PI(_) | Event::Comment(_) | Event::DocType(_) => {}
        }
    }
}

fn resolve(name: &quick_xml::events::BytesRef<'_>) -> Option<String> {
    if let Ok(Some(character)) = name.resolve_char_ref() {
        return Some(character.to_string());
    }
    let text = match &**name {
        "amp" => "&",
        "lt" => "<",
        "gt" => ">",
        "quot" => "\"",
        "apos" => "'",
        _ => return None,
    };
    Some(text.to_owned())
}

fn read_value(element: &Element) -> Result<Value, String> {
    let Some(inner) = element.children.first() else { return Ok(Value::text(&element.text)) };
    let bad = |what: &str| format!("Xmlrpc.Parse_error({what}, {})", inner.text);
    Ok(match inner.name.as_str() {
        "string" => Value::text(&inner.text),
        "int" | "i4" | "i8" => Value::Int(inner.text.trim().parse().map_err(|_| bad("int"))?),
        "double" => Value::Float(inner.text.trim().parse().map_err(|_| bad("double"))?),
        "boolean" => match inner.text.trim() {
            "0" => Value::Bool(false),
            "1" => Value::Bool(true),
            _ => return Err(bad("boolean")),
        },
        "dateTime.iso8601" => Value::Date(inner.text.clone()),
        "nil" => Value::Nil,
        "array" => {
            let items = inner.child("data").map(|data| data.children.as_slice()).unwrap_or_default();
            Value::List(items.iter().map(read_value).collect::<Result<_, _>>()?)
        }
        "struct" => {
            let member = |member: &Element| {
                let name = member.child("name").map(|name| name.text.clone()).unwrap_or_default();
                let value = member.child("value").ok_or_else(|| bad("member"))?;
                Ok::<_, String>((name, read_value(value)?))
            };
            Value::Map(inner.children.iter().map(member).collect::<Result<_, _>>()?)
        }
        other => return Err(bad(other)),
    })
}

/// The answer to `system.listMethods`: the one method whose result stands without a status.
pub(crate) fn xml_bare(outcome: &Outcome) -> String {
    match outcome {
        Ok(value) => response(value),
        Err(_) => xml_answer(outcome),
    }
}

/// A whole `methodResponse`.
pub(crate) fn xml_answer(outcome: &Outcome) -> String {
    let body = match outcome {
        Ok(value) => Value::Map(vec![("Status".into(), "Success".into()), ("Value".into(), value.clone())]),
        Err(failure) => Value::Map(vec![
            ("Status".into(), "Failure".into()),
            ("ErrorDescription".into(), Value::texts(failure.description())),
        ]),
    };
    response(&body)
}

fn response(body: &Value) -> String {
    let mut text = String::from("<?xml version=\"1.0\"?><methodResponse><params><param>");
    write_value(&mut text, body);
    text.push_str("</param></params></methodResponse>");
    text
}

/// A value alone, as in `task.result`.
pub(crate) fn xml_fragment(value: &Value) -> String {
    let mut text = String::new();
    write_value(&mut text, value);
    text
}

fn write_value(out: &mut String, value: &Value) {
    out.push_str("<value>");
    match value {
        Value::Text(text) => escape(out, text),
        Value::Int(number) => out.push_str(&number.to_string()),
        Value::Int32(number) => tagged(out, "i4", &number.to_string()),
        Value::Float(number) => tagged(out, "double", &float_text(*number)),
        Value::Bool(flag) => tagged(out, "boolean", if *flag { "1" } else { "0" }),
        Value::Date(date) => tagged(out, "dateTime.iso8601", date),
        Value::Nil => out.push_str("<nil/>"),
        Value::List(items) => {
            out.push_str("<array><data>");
            items.iter().for_each(|item| write_value(out, item));
            out.push_str("</data></array>");
        }
        Value::Map(items) => {
            out.push_str("<struct>");
            for (name, item) in items {
                out.push_str("<member><name>");
                escape(out, name);
                out.push_str("</name>");
                write_value(out, item);
                out.push_str("</member>");
            }
            out.push_str("</struct>");
        }
    }
    out.push_str("</value>");
}

fn tagged(out: &mut String, tag: &str, text: &str) {
    out.push_str(&format!("<{tag}>{text}</{tag}>"));
}

fn escape(out: &mut String, text: &str) {
    for character in text.chars() {
        match character {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            // What XML 1.0 cannot carry becomes a question mark, as with xapi's encoder for bad bytes.
            character if character < ' ' && !matches!(character, '\n' | '\r' | '\t') => out.push('?'),
            character => out.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_body_panics(body in ".{0,300}", cut in 0_usize..400) {
            let call = "<methodCall><methodName>a</methodName><params><param><value><struct><member><name>n</name>\
                <value><i4>1</i4></value></member></struct></value></param></params></methodCall>";
            let _ = read_xml_call(&body);
            let _ = read_xml_call(&format!("{}{body}", call.get(..cut.min(call.len())).unwrap_or_default()));
        }

        #[test]
        fn what_is_written_is_read_again(text in "[ -~\n]{0,80}", number: i64, flag: bool) {
            let value = Value::List(vec![Value::text(&text), Value::Bool(flag), Value::Int(number)]);
            let body = format!("<methodCall><methodName>m</methodName><params><param>{}</param></params></methodCall>", xml_fragment(&value));
            let read = Value::List(vec![Value::text(&text), Value::Bool(flag), Value::Text(number.to_string())]);
            proptest::prop_assert_eq!(read_xml_call(&body).unwrap().1, vec![read]);
        }
    }

    #[test]
    fn a_call_is_read() {
        let body = "<?xml version=\"1.0\"?><methodCall><methodName>VM.create</methodName><params><param><value>\
            <string>a &amp; b</string></value></param><param><value><struct><member><name>n</name><value>12</value>\
            </member><member><name>f</name><value><boolean>1</boolean></value></member></struct></value></param>\
            </params></methodCall>";
        let (name, params) = read_xml_call(body).unwrap();
        assert_eq!(name, "VM.create");
        let record = Value::Map(vec![("n".into(), "12".into()), ("f".into(), true.into())]);
        assert_eq!(params, [Value::text("a & b"), record]);
    }

    #[test]
    fn a_cut_call_is_an_error() {
        let error = read_xml_call("<?xml version=\"1.0\"?><methodCall><methodName>VM.get_all</meth").unwrap_err();
        assert!(error.contains("unexpected end of input"), "{error}");
        assert!(read_xml_call("{\"jsonrpc\":\"2.0\"}").unwrap_err().contains("expected root element"));
    }

    #[test]
    fn integers_go_out_untyped_and_floats_short() {
        let value = Value::List(vec![Value::Int(5), Value::Float(1.0), Value::Int32(3), Value::void()]);
        assert_eq!(
            xml_fragment(&value),
            "<value><array><data><value>5</value><value><double>1</double></value><value><i4>3</i4></value>\
             <value></value></data></array></value>"
        );
    }
}
