//! Pool messages, and the filter language of `get_all_records_where`.

use super::{Call, fields};
use crate::core::post_message;
use crate::model::{Database, Value, schema};
use crate::rpc::{Failure, Outcome};

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    let mut db = core.db();
    Some(match simple {
        "create" => {
            let known = schema().keys().find(|class| class.as_str() == call.text(2));
            match known.map(|class| db.by_uuid(class, call.text(3))) {
                Some(Err(failure)) => Err(failure),
                _ => {
                    Ok(post_message(&mut db, call.text(0), call.int(1), call.text(2), call.text(3), call.text(4))
                        .into())
                }
            }
        }
        "destroy" => match db.check("message", call.text(0)) {
            Ok(()) => {
                db.destroy("message", call.text(0));
                Ok(Value::void())
            }
            Err(failure) => Err(failure),
        },
        "destroy_many" => {
            for message in call.strings(0) {
                db.destroy("message", &message);
            }
            Ok(Value::void())
        }
        "get" | "get_since" => {
            let chosen = db.refs("message").into_iter().filter(|message| {
                let at = db.text("message", message, "timestamp");
                if simple == "get_since" {
                    return at.as_str() > call.text(0);
                }
                db.text("message", message, "cls") == call.text(0)
                    && db.text("message", message, "obj_uuid") == call.text(1)
                    && at.as_str() > call.text(2)
            });
            let record = |message: String| Ok((message.clone(), fields::record(core, &db, "message", &message)?));
            chosen.map(record).collect::<Outcome<Vec<_>>>().map(Value::Map)
        }
        _ => return None,
    })
}

/// A filter: `true`, `field "name__label" = "x"`, `not`, `and`, `or`, and parentheses.
#[derive(Debug)]
enum Filter {
    Always(bool),
    Equal(String, String),
    Not(Box<Filter>),
    And(Box<Filter>, Box<Filter>),
    Or(Box<Filter>, Box<Filter>),
}

/// References of the objects that a filter takes.
pub(super) fn select(db: &Database, class: &str, expression: &str) -> Outcome<Vec<String>> {
    let bad = || Failure::new("INVALID_VALUE", [expression, "Xapi_database.Db_filter_parse.MenhirBasics.Error"]);
    let tokens = tokens(expression).ok_or_else(bad)?;
    let mut rest = tokens.as_slice();
    let filter = or(&mut rest, 0).filter(|_| rest.is_empty()).ok_or_else(bad)?;
    Ok(db.refs(class).into_iter().filter(|reference| holds(db, class, reference, &filter)).collect())
}

fn holds(db: &Database, class: &str, reference: &str, filter: &Filter) -> bool {
    match filter {
        Filter::Always(value) => *value,
        Filter::Equal(field, wanted) => {
            // The database joins name spaces with two underscores.
            let field = field.replace("__", "_");
            match db.get(class, reference, &field) {
                Ok(Value::Bool(value)) => value.to_string() == *wanted,
                Ok(Value::Int(value)) => value.to_string() == *wanted,
                Ok(value) => value.as_str() == wanted,
                Err(_) => false,
            }
        }
        Filter::Not(inner) => !holds(db, class, reference, inner),
        Filter::And(one, other) => holds(db, class, reference, one) && holds(db, class, reference, other),
        Filter::Or(one, other) => holds(db, class, reference, one) || holds(db, class, reference, other),
    }
}

fn tokens(text: &str) -> Option<Vec<String>> {
    let mut tokens = Vec::new();
    let mut characters = text.chars().peekable();
    while let Some(&character) = characters.peek() {
        match character {
            ' ' | '\n' | '\t' => {
                characters.next();
            }
            '(' | ')' | '=' => {
                characters.next();
                tokens.push(character.to_string());
            }
            '"' | '\'' => {
                characters.next();
                let mut literal = String::from("\"");
                loop {
                    match characters.next()? {
                        end if end == character => break,
                        other => literal.push(other),
                    }
                }
                tokens.push(literal);
            }
            _ => {
                let mut word = String::new();
                while let Some(&next) = characters.peek().filter(|next| next.is_alphanumeric() || **next == '_') {
                    word.push(next);
                    characters.next();
                }
                if word.is_empty() {
                    return None;
                }
                tokens.push(word.to_lowercase());
            }
        }
    }
    Some(tokens)
}

fn eat(rest: &mut &[String], word: &str) -> bool {
    let Some((first, tail)) = rest.split_first() else { return false };
    if first == word {
        *rest = tail;
    }
    first == word
}

fn or(rest: &mut &[String], depth: u8) -> Option<Filter> {
    let mut left = and(rest, depth)?;
    while eat(rest, "or") {
        left = Filter::Or(Box::new(left), Box::new(and(rest, depth)?));
    }
    Some(left)
}

fn and(rest: &mut &[String], depth: u8) -> Option<Filter> {
    let mut left = single(rest, depth)?;
    while eat(rest, "and") {
        left = Filter::And(Box::new(left), Box::new(single(rest, depth)?));
    }
    Some(left)
}

fn single(rest: &mut &[String], depth: u8) -> Option<Filter> {
    if depth > 50 {
        return None;
    }
    if eat(rest, "not") {
        return Some(Filter::Not(Box::new(single(rest, depth + 1)?)));
    }
    if eat(rest, "(") {
        let inner = or(rest, depth + 1)?;
        return eat(rest, ")").then_some(inner);
    }
    if eat(rest, "true") {
        return Some(Filter::Always(true));
    }
    if eat(rest, "false") {
        return Some(Filter::Always(false));
    }
    if !eat(rest, "field") {
        return None;
    }
    let field = literal(rest)?;
    if !eat(rest, "=") {
        return None;
    }
    Some(Filter::Equal(field, literal(rest)?))
}

fn literal(rest: &mut &[String]) -> Option<String> {
    let (first, tail) = rest.split_first()?;
    let text = first.strip_prefix('"')?;
    *rest = tail;
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_choose_by_fields() {
        let mut db = Database::default();
        let vm = db.create("VM", vec![("name_label", "a".into()), ("is_a_template", true.into())]);
        db.create("VM", vec![("name_label", "b".into())]);
        let chosen = select(&db, "VM", "(field \"name__label\" = \"a\") and not field \"is_a_template\" = \"false\"");
        assert_eq!(chosen.unwrap(), [vm]);
        assert_eq!(select(&db, "VM", "field \"nonsense\" =").unwrap_err().code, "INVALID_VALUE");
    }
}
