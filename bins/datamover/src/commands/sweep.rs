//! `sweep`: removes what dead runs left in the pool, or shows what it would remove.

use crate::Outcome;
use crate::arguments::SweepArguments;
use crate::shell::output::{Format, Table};
use crate::shell::pool::Job;
use crate::shell::progress::{Monitor, duration};
use crate::shell::signals::Signals;
use serde_json::{Value, json};
use std::sync::Arc;
use xenvault_block::ByteSize;
use xenvault_engine::{SweepItem, SweepOptions, SweepReport};

pub async fn run(arguments: SweepArguments, format: Format) -> Outcome {
    let password = arguments.pool.password()?;
    let state = arguments.state.folder()?;
    let signals = Signals::take()?;
    let monitor = Arc::new(Monitor::new(format));
    let options = arguments.pool.engine_options(state, monitor.clone());
    let sweep = if arguments.dry_run { SweepOptions::dry_run() } else { SweepOptions::default() };
    let job = Job { pool: &arguments.pool, password, repository: None, options, monitor };
    let ended = job.run(signals, |engine| async move { engine.sweep(sweep).await }).await?;
    Ok(format.ended(ended, "the sweep is not complete; run it again", text, json))
}

fn text(report: &SweepReport) -> String {
    let mut table = Table::new(&["action", "kind", "uuid", ">age", ">size", "name", "reason"]);
    for item in report.plan.remove.iter().chain(&report.plan.keep) {
        table.row([
            item.action.to_string(),
            item.kind.to_string(),
            item.uuid.clone(),
            item.age.map_or_else(|| "-".to_owned(), duration),
            ByteSize(item.size_bytes).to_string(),
            item.name.clone(),
            item.reason.clone(),
        ]);
    }
    let table = if table.is_empty() {
        "nothing of this installation is left in the pool\n".to_owned()
    } else {
        table.to_string()
    };
    format!("{table}removed {} of {}", report.removed, report.plan.remove.len())
}

fn json(report: &SweepReport) -> Value {
    let items = |items: &[SweepItem]| -> Vec<Value> {
        items
            .iter()
            .map(|item| {
                json!({
                    "kind": item.kind.to_string(),
                    "uuid": item.uuid,
                    "name": item.name,
                    "age_seconds": item.age.map(|age| age.as_secs()),
                    "size_bytes": item.size_bytes,
                    "action": item.action.to_string(),
                    "reason": item.reason,
                })
            })
            .collect()
    };
    let warnings: Vec<Value> =
        report.warnings.iter().map(|warning| json!({ "code": warning.code, "text": warning.text })).collect();
    json!({
        "remove": items(&report.plan.remove),
        "keep": items(&report.plan.keep),
        "removed": report.removed,
        "warnings": warnings,
    })
}
