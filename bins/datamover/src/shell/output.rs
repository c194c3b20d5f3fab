//! What a program prints: results on standard output, everything else on standard error.
//!
//! With `--json`, standard output gets exactly one JSON object, also when the program fails.
use super::exit::Exit;
use super::signals::Ended;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};

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

    /// Prints a result: `text` for people, `value` (an object) for machines. Gives the exit code: the work is done, but a
    /// result that could not be written is not told.
    #[must_use]
    pub fn result(self, text: &str, mut value: Value) -> Exit {
        match self {
            Self::Text => answer(text.trim_end()),
            Self::Json => {
                if let Some(object) = value.as_object_mut() {
                    object.insert("ok".to_owned(), Value::Bool(true));
                }
                answer(&value.to_string())
            }
        }
    }

    /// Prints an error with its causes and gives the exit code that it stands for.
    pub fn error(self, error: &(dyn Error + 'static)) -> Exit {
        let exit = Exit::of(error);
        let causes = causes(error);
        notice(&chain(&error.to_string(), &causes));
        if self == Self::Json {
            // The exit code tells of the error, whoever reads this.
            let _ = answer(&error_record(exit, &error.to_string(), &causes).to_string());
        }
        exit
    }

    /// Prints how a piece of work ended: its result, or that a signal stopped it and `what_is_left`.
    pub fn ended<T>(
        self,
        ended: Ended<T>,
        what_is_left: &str,
        text: impl FnOnce(&T) -> String,
        json: impl FnOnce(&T) -> Value,
    ) -> Exit {
        let exit = match ended {
            Ended::Done(result) => {
                return self.result(&text(&result), json(&result));
            }
            Ended::Stopped(exit) => exit,
        };
        notice(&format!("stopped by a signal: {what_is_left}"));
        if self == Self::Json {
            let _ = answer(&error_record(exit, what_is_left, &[]).to_string());
        }
        exit
    }
}

/// Prints one text on standard output. A reader that left early (`| head`) has what it wanted.
fn answer(text: &str) -> Exit {
    let mut output = io::stdout().lock();
    match writeln!(output, "{}", printable(text)).and_then(|()| output.flush()) {
        Ok(()) => Exit::Success,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Success,
        Err(error) => {
            notice(&format!("error: the work is done, but its result can not be written to standard output ({error})"));
            Exit::Failed
        }
    }
}

/// Prints one text on standard error. Nobody may be there to read it (a closed terminal, a full disk under a log): that
/// never ends the work.
pub fn notice(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", printable(text));
}

/// The text with everything escaped that a terminal would act on, or that turns the direction of writing: names of VMs
/// are given by people who may do no more than that.
fn printable(text: &str) -> Cow<'_, str> {
    let acts = |character: char| {
        (character.is_control() && character != '\n' && character != '\t')
            || matches!(character, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        if acts(character) { plain.extend(character.escape_unicode()) } else { plain.push(character) }
    }
    Cow::Owned(plain)
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
    fn what_a_terminal_would_act_on_is_escaped() {
        assert_eq!(printable("web \u{1b}[31m\r\u{202e}x\ny\tz"), "web \\u{1b}[31m\\u{d}\\u{202e}x\ny\tz");
        assert!(matches!(printable("Büro 東京\n"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_table_lines_up() {
        let mut table = Table::new(&["VM", ">size"]);
        table.row(["web".to_owned(), "1 GiB".to_owned()]);
        table.row(["database".to_owned(), "10 MiB".to_owned()]);
        assert_eq!(table.to_string(), "VM          size\nweb        1 GiB\ndatabase  10 MiB\n");
    }
}
