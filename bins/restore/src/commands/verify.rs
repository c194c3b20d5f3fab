//! `verify` and `repair`: is everything there, and what can be made again. Damage makes the exit code.

use super::moment;
use crate::Outcome;
use crate::arguments::{RepairArguments, VerifyArguments};
use crate::maintenance::Screen;
use crate::shell::exit::Exit;
use crate::shell::output::Format;
use crate::shell::signals::{Ended, Signals};
use serde_json::{Value, json};
use std::fmt::Write as _;
use xenvault_block::ByteSize;
use xenvault_store::{HurtPoint, RepairReport, VerifyMode, VerifyOptions, VerifyReport};

/// Ranges of one disk that people are shown.
const SHOWN_RANGES: usize = 8;
/// Overwritten objects that people are shown.
const SHOWN_DISTURBED: usize = 20;

pub async fn run(arguments: &VerifyArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let mut signals = Signals::take()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let screen = Screen::new(format);
    let mut options = VerifyOptions::default();
    options.mode = match (arguments.full, arguments.sample) {
        (true, _) => VerifyMode::Full,
        (false, Some(percent)) => VerifyMode::Sample { percent, seed: arguments.seed.unwrap_or_else(today) },
        (false, None) => VerifyMode::Quick,
    };
    options.write = !arguments.read_only && !arguments.repository.ignore_tombstones;
    options.monitor = screen.monitor();
    let ended = match signals.run(repository.verify(options)).await {
        Ended::Done(report) => Ended::Done(report?),
        Ended::Stopped(exit) => Ended::Stopped(exit),
    };
    drop(screen);
    let damaged = matches!(&ended, Ended::Done(report) if !report.is_clean());
    let exit = format.ended(ended, "the verification is not complete; nothing was changed", text, json);
    Ok(if damaged { Exit::Damaged } else { exit })
}

pub async fn repair(arguments: &RepairArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let mut signals = Signals::take()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let ended = match signals.run(repository.repair()).await {
        Ended::Done(report) => Ended::Done(report?),
        Ended::Stopped(exit) => Ended::Stopped(exit),
    };
    Ok(format.ended(ended, "the repair is not complete; run it again", repair_text, repair_json))
}

/// Another part of the packs is read each day.
fn today() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.as_secs() / (24 * 3600)
}

fn text(report: &VerifyReport) -> String {
    let mut text = String::new();
    // Writing to a string can not fail.
    for damage in &report.damage {
        let _ = writeln!(text, "{} {}: {}", damage.kind.to_string().to_uppercase(), damage.object, damage.reason);
    }
    for point in &report.hurt {
        hurt(&mut text, point);
    }
    for point in &report.unconfirmed {
        let _ = writeln!(text, "point {point} has no receipt: `repair` writes one if the point is complete");
    }
    for disturbed in report.disturbed.iter().take(SHOWN_DISTURBED) {
        let (object, younger, deletions) = (&disturbed.object, disturbed.younger, disturbed.deletions);
        let _ = writeln!(
            text,
            "OVERWRITTEN {object}: {younger} later version(s), {deletions} deletion(s); the first one counts"
        );
    }
    if !report.disturbed.is_empty() {
        let _ = writeln!(
            text,
            "{} object(s) were overwritten or deleted by somebody, and are read as they were: find out whose credential did that",
            report.disturbed.len(),
        );
    }
    let _ = writeln!(
        text,
        "read {} of {} pack(s) as a whole and {} point(s): {} object(s) damaged, {} point(s) hurt",
        ByteSize(report.read_bytes),
        report.packs,
        report.points,
        report.damage.len(),
        report.hurt.len(),
    );
    if report.marked_copies > 0 {
        let _ = writeln!(
            text,
            "{} damaged chunk(s) are marked: the next backup that meets their content stores it again; `backup --full` of a VM meets everything",
            report.marked_copies,
        );
    }
    text
}

fn hurt(text: &mut String, point: &HurtPoint) {
    let id = point.id.map_or_else(|| "of an unknown id".to_owned(), |id| id.to_string());
    if point.unreadable {
        let _ = writeln!(text, "HURT point {id} of VM {}: it is gone or can not be read at all", point.vm_uuid);
        return;
    }
    let (name, vm, when) = (&point.vm_name, &point.vm_uuid, moment(point.created_unix_ms));
    let _ = writeln!(text, "HURT point {id} of VM {name} ({vm}), {when}");
    if point.configuration {
        let _ = writeln!(text, "  the VM's configuration can not be read");
    }
    for disk in &point.disks {
        let _ = write!(text, "  disk {} ({}, {}): {}", disk.device, disk.name, disk.vdi_uuid, ByteSize(disk.bytes));
        let _ = write!(text, " can not be read");
        for range in disk.ranges.iter().take(SHOWN_RANGES) {
            let _ = write!(text, ", {range}");
        }
        if disk.ranges.len() > SHOWN_RANGES {
            let _ = write!(text, ", and {} more ranges", disk.ranges.len() - SHOWN_RANGES);
        }
        let _ = writeln!(text, "{}", if disk.bitmap { "; nor can its list of changes" } else { "" });
    }
}

fn json(report: &VerifyReport) -> Value {
    let damage: Vec<Value> = report
        .damage
        .iter()
        .map(|damage| json!({ "object": damage.object, "kind": damage.kind.to_string(), "reason": damage.reason }))
        .collect();
    let hurt: Vec<Value> = report
        .hurt
        .iter()
        .map(|point| {
            let disks: Vec<Value> = point
                .disks
                .iter()
                .map(|disk| {
                    let ranges: Vec<[u64; 2]> = disk.ranges.iter().map(|range| [range.start(), range.end()]).collect();
                    json!({
                        "device": disk.device,
                        "vdi_uuid": disk.vdi_uuid,
                        "name": disk.name,
                        "bytes": disk.bytes,
                        "ranges": ranges,
                        "bitmap": disk.bitmap,
                    })
                })
                .collect();
            json!({
                "point": point.id.map(|id| id.to_string()),
                "pool_uuid": point.pool_uuid,
                "vm_uuid": point.vm_uuid,
                "vm_name": point.vm_name,
                "created_unix_ms": point.created_unix_ms,
                "unreadable": point.unreadable,
                "configuration": point.configuration,
                "disks": disks,
            })
        })
        .collect();
    json!({
        "clean": report.is_clean(),
        "share_percent": f64::from(report.share) / 100.0,
        "packs": report.packs,
        "read_bytes": report.read_bytes,
        "points": report.points,
        "damage": damage,
        "hurt": hurt,
        "unconfirmed": report.unconfirmed.iter().map(|id| id.to_string()).collect::<Vec<_>>(),
        "disturbed": report
            .disturbed
            .iter()
            .map(|found| json!({ "object": found.object, "younger": found.younger, "deletions": found.deletions }))
            .collect::<Vec<_>>(),
        "marked_copies": report.marked_copies,
    })
}

fn repair_text(report: &RepairReport) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "wrote {} of index segments, removed {} damaged one(s)",
        ByteSize(report.index_bytes),
        report.removed_segments.len()
    );
    for point in &report.confirmed {
        let _ = writeln!(text, "point {point} is complete and has its receipt");
    }
    for point in &report.incomplete {
        let _ = writeln!(text, "point {point} is not complete");
    }
    text
}

fn repair_json(report: &RepairReport) -> Value {
    json!({
        "index_bytes": report.index_bytes,
        "removed_segments": report.removed_segments,
        "confirmed": report.confirmed.iter().map(|id| id.to_string()).collect::<Vec<_>>(),
        "incomplete": report.incomplete.iter().map(|id| id.to_string()).collect::<Vec<_>>(),
    })
}
