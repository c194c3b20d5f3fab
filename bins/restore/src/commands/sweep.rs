//! `sweep`: removes what no point needs, or shows what would go.

use crate::Outcome;
use crate::arguments::SweepArguments;
use crate::maintenance::Screen;
use crate::shell::exit::{Exit, Refusal};
use crate::shell::output::Format;
use crate::shell::progress::duration;
use crate::shell::signals::{Ended, Signals};
use serde_json::{Value, json};
use std::fmt::Write as _;
use xenvault_block::ByteSize;
use xenvault_store::{PointId, SweepOptions, SweepReport};

pub async fn run(arguments: &SweepArguments, format: Format) -> Outcome {
    if !arguments.alone && !arguments.dry_run {
        let text =
            "a sweep must not run beside a backup, a repair or another sweep of the same repository in this release: \
                    chunks that the other one relies on could be removed. Make sure that none runs until the sweep has \
                    ended, and say so with --alone; --dry-run needs nothing"
                .to_owned();
        return Err(Refusal { exit: Exit::Prerequisite, text }.into());
    }
    let passphrase = arguments.repository.passphrase()?;
    let mut signals = Signals::take()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let screen = Screen::new(format);
    let mut options = SweepOptions::default();
    options.grace = arguments.grace;
    options.rewrite_budget_bytes = arguments.rewrite_budget.0;
    options.rewrite_below_percent = arguments.rewrite_below;
    options.confirm_many = arguments.confirm_many;
    options.accept_lost_points = arguments.accept_lost_points;
    options.dry_run = arguments.dry_run;
    options.monitor = screen.monitor();
    let ended = match signals.run(repository.sweep(options)).await {
        Ended::Done(report) => Ended::Done(report?),
        Ended::Stopped(exit) => Ended::Stopped(exit),
    };
    drop(screen);
    Ok(format.ended(ended, "the sweep is not complete, which is no harm; the next one takes it up", text, json))
}

fn text(report: &SweepReport) -> String {
    let mut text = String::new();
    // Writing to a string can not fail.
    if let Some(ended) = &report.ended {
        let _ = writeln!(
            text,
            "sweep {}: removed {} point(s) and {} pack(s) with {}; stored {} again",
            ended.number,
            ended.removed_points.len(),
            ended.removed_packs,
            ByteSize(ended.removed_bytes),
            ByteSize(ended.carried_bytes),
        );
        let unreadable = ended.kept_packs.saturating_sub(ended.held_objects);
        if unreadable > 0 {
            let _ = writeln!(text, "{unreadable} pack(s) stay since something in them can not be read");
        }
        if ended.held_objects > 0 {
            let _ =
                writeln!(text, "{} pack(s) stay since they are locked: a later sweep removes them", ended.held_objects);
        }
        list(&mut text, "taken back in time", &ended.spared_points);
    }
    if let Some(begun) = &report.begun {
        let what = if report.dry_run { "would announce" } else { "announced" };
        let _ = writeln!(
            text,
            "sweep {}: {what} {} point(s), {} pack(s) with {} ({} of it to be stored again), {} record(s)",
            begun.number,
            begun.points.len(),
            begun.packs,
            ByteSize(begun.bytes),
            ByteSize(begun.carry_bytes),
            begun.records,
        );
        list(&mut text, if report.dry_run { "would go" } else { "goes" }, &begun.points);
    }
    match report.waiting {
        Some((number, left)) if left.is_zero() => {
            let _ = writeln!(text, "sweep {number} is announced, and would be carried out now");
        }
        Some((number, left)) => {
            let _ = writeln!(text, "sweep {number} is announced: the next sweep in {} carries it out", duration(left));
        }
        None => {}
    }
    list(&mut text, "was forgotten and stays, since it is immutable until its promise ends", &report.promised);
    list(&mut text, "is complete and is out of quarantine", &report.released);
    list(&mut text, "is not complete and stays in quarantine: forget it", &report.quarantined);
    if text.is_empty() {
        text.push_str("there is nothing to remove\n");
    }
    text
}

fn list(text: &mut String, what: &str, points: &[PointId]) {
    for point in points {
        let _ = writeln!(text, "  point {point} {what}");
    }
}

fn json(report: &SweepReport) -> Value {
    let ids = |points: &[PointId]| points.iter().map(PointId::to_string).collect::<Vec<_>>();
    let ended = report.ended.as_ref().map(|ended| {
        json!({
            "number": ended.number,
            "removed_points": ids(&ended.removed_points),
            "spared_points": ids(&ended.spared_points),
            "removed_packs": ended.removed_packs,
            "removed_bytes": ended.removed_bytes,
            "carried_bytes": ended.carried_bytes,
            "kept_packs": ended.kept_packs,
            "held_objects": ended.held_objects,
        })
    });
    let begun = report.begun.as_ref().map(|begun| {
        json!({
            "number": begun.number,
            "points": ids(&begun.points),
            "packs": begun.packs,
            "bytes": begun.bytes,
            "carry_bytes": begun.carry_bytes,
            "records": begun.records,
        })
    });
    let waiting =
        report.waiting.map(|(number, left)| json!({ "number": number, "seconds_left": left.as_secs_f64().ceil() }));
    json!({
        "dry_run": report.dry_run,
        "ended": ended,
        "begun": begun,
        "waiting": waiting,
        "promised": ids(&report.promised),
        "released": ids(&report.released),
        "quarantined": ids(&report.quarantined),
        "points": report.points,
        "replaced_segments": report.replaced_segments,
    })
}
