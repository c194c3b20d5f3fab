//! `keep`: locks last as long as they have to.

use super::{instant, unix_ms};
use crate::Outcome;
use crate::arguments::KeepArguments;
use crate::maintenance::Screen;
use crate::shell::exit::Exit;
use crate::shell::output::Format;
use crate::shell::signals::{Ended, Signals};
use serde_json::{Value, json};
use std::fmt::Write as _;
use xenvault_store::{KeepOptions, KeepReport, PointId};

pub async fn run(arguments: &KeepArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let mut signals = Signals::take()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let screen = Screen::new(format);
    let mut options = KeepOptions::default();
    options.dry_run = arguments.dry_run;
    options.monitor = screen.monitor();
    let ended = match signals.run(repository.keep(options)).await {
        Ended::Done(report) => Ended::Done(report?),
        Ended::Stopped(exit) => Ended::Stopped(exit),
    };
    drop(screen);
    let damaged = matches!(&ended, Ended::Done(report) if !report.missing.is_empty() || !report.hurt.is_empty());
    let exit = format.ended(ended, "not all locks were looked at; run it again", text, json);
    Ok(if damaged { Exit::Damaged } else { exit })
}

fn text(report: &KeepReport) -> String {
    let mut text = String::new();
    // Writing to a string can not fail.
    for object in &report.unlocked {
        let what = if report.dry_run { "is not locked" } else { "was not locked" };
        let _ = writeln!(text, "UNLOCKED {object} {what}");
    }
    for object in &report.missing {
        let _ = writeln!(text, "MISSING {object}");
    }
    for point in &report.hurt {
        let _ = writeln!(text, "HURT point {point}: it can not be read as a whole; what can be read is kept");
    }
    let what = if report.dry_run { "would be locked for longer" } else { "are locked for longer now" };
    let _ = writeln!(
        text,
        "{} point(s), {} pack(s), {} object(s) in all: {} {what}",
        report.points, report.packs, report.objects, report.extended,
    );
    if let Some(earliest) = report.earliest {
        let _ = writeln!(text, "the first of their locks ends {}", instant(earliest));
    }
    text
}

fn json(report: &KeepReport) -> Value {
    json!({
        "dry_run": report.dry_run,
        "points": report.points,
        "packs": report.packs,
        "objects": report.objects,
        "extended": report.extended,
        "unlocked": report.unlocked,
        "missing": report.missing,
        "hurt": report.hurt.iter().map(PointId::to_string).collect::<Vec<_>>(),
        "earliest_unix_ms": report.earliest.map(unix_ms),
    })
}
