//! What a program prints: results on standard output, everything else on standard error.
//!
//! With `--json`, standard output gets exactly one JSON object, also when the program fails.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the one place of a program that prints results")]

use super::exit::Exit;
use super::signals::Ended;
use serde_json::{Value, json};
use std::error::Error;
use std::fmt::Write as _;

/// For whom results and progress are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// People.
    Text,
    /// Machines.
    Json,
}

impl Format {
    /// What `--json` asks for.
    pub fn json(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }

    /// Prints a result: `text` for people, `value` (an object) for machines.
    pub fn result(self, text: &str, mut value: Value) {
        match self {
            Self::Text => println!("{}", text.trim_end()),
            Self::Json => {
                if let Some(object) = value.as_object_mut() {
                    object.insert("ok".to_owned(), Value::Bool(true));
                }
                println!("{value}");
            }
        }
    }

    /// Prints an error with its causes and gives the exit code that it stands for.
    pub fn error(self, error: &(dyn Error + 'static)) -> Exit {
        let exit = Exit::of(error);
        let causes = causes(error);
        eprintln!("{}", chain(&error.to_string(), &causes));
        if self == Self::Json {
            println!("{}", error_record(exit, &error.to_string(), &causes));
        }
        exit
    }

    /// Prints how a piece of work ended: its result, or that a signal stopped it and `what_is_left`.
    pub fn ended<T>(self, ended: Ended<T>, what_is_left: &str, text: fn(&T) -> String, json: fn(&T) -> Value) -> Exit {
        let exit = match ended {
            Ended::Done(result) => {
                self.result(&text(&result), json(&result));
                return Exit::Success;
            }
            Ended::Stopped(exit) => exit,
        };
        eprintln!("stopped by a signal: {what_is_left}");
        if self == Self::Json {
            println!("{}", error_record(exit, what_is_left, &[]));
        }
        exit
    }
}

fn error_record(exit: Exit, message: &str, causes: &[String]) -> Value {
    let error = json!({ "exit_code": exit.code(), "kind": exit.word(), "message": message, "causes": causes });
    json!({ "ok": false, "error": error })
}

fn causes(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut causes = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    causes
}

/// The error and one line for each cause; a cause that only repeats the line above is left out.
fn chain(message: &str, causes: &[String]) -> String {
    let mut text = format!("error: {message}");
    let mut above = message;
    for cause in causes {
        if !above.ends_with(cause.as_str()) {
            // Writing to a string can not fail.
            let _ = write!(text, "\n  because: {cause}");
        }
        above = cause;
    }
    text
}

/// A table for people: columns as wide as their widest cell, numbers to the right.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings; one that begins with `>` is a column of numbers.
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|heading| (*heading).to_owned()).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Whether there are no rows below the headings.
    pub fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let headings = self.rows.first().map_or(&[][..], Vec::as_slice);
        let columns: Vec<(bool, usize)> = headings
            .iter()
            .enumerate()
            .map(|(index, heading)| {
                let width = self
                    .rows
                    .iter()
                    .filter_map(|row| row.get(index))
                    .map(|cell| cell.trim_start_matches('>').chars().count());
                (heading.starts_with('>'), width.max().unwrap_or(0))
            })
            .collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, (right, width)) in row.iter().zip(&columns) {
                let cell = cell.trim_start_matches('>');
                if *right {
                    write!(line, "{cell:>width$}  ")?;
                } else {
                    write!(line, "{cell:<width$}  ")?;
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let text = chain(
            "the pool failed",
            &["a session is gone".to_owned(), "a session is gone".to_owned(), "reset".to_owned()],
        );
        assert_eq!(text, "error: the pool failed\n  because: a session is gone\n  because: reset");
    }

    #[test]
    fn a_table_lines_up() {
        let mut table = Table::new(&["VM", ">size"]);
        table.row(["web".to_owned(), "1 GiB".to_owned()]);
        table.row(["database".to_owned(), "10 MiB".to_owned()]);
        assert_eq!(table.to_string(), "VM          size\nweb        1 GiB\ndatabase  10 MiB\n");
    }
}
