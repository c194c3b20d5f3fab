//! `check`: names what stands in the way of backups, and how to put it right.

use crate::Outcome;
use crate::arguments::CheckArguments;
use crate::shell::exit::Exit;
use crate::shell::output::Format;
use crate::shell::pool::Job;
use crate::shell::progress::Monitor;
use crate::shell::signals::{Ended, Signals};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::Arc;
use xenvault_engine::{CheckFinding, CheckReport, CheckRequest, Severity, VmSelector};

pub async fn run(arguments: CheckArguments, format: Format) -> Outcome {
    let password = arguments.pool.password()?;
    let state = arguments.state.folder()?;
    let signals = Signals::take()?;
    let monitor = Arc::new(Monitor::new(format));
    let options = arguments.pool.engine_options(state, monitor.clone());
    let request = CheckRequest::new(arguments.vm.into_iter().map(VmSelector::UuidOrName).collect());
    let job = Job { pool: &arguments.pool, password, repository: None, options, monitor };
    let ended = job.run(signals, |engine| async move { engine.check(&request).await }).await?;
    let found_errors = matches!(&ended, Ended::Done(report) if report.count(Severity::Error) > 0);
    let exit = format.ended(ended, "the check is not complete; nothing was changed", text, json);
    Ok(if found_errors { Exit::Prerequisite } else { exit })
}

fn text(report: &CheckReport) -> String {
    let mut text = format!("pool {:?}: {}, {} host(s)\n", report.pool, report.product, report.hosts);
    let names: Vec<&str> = report.vms.iter().map(|(_, name)| name.as_str()).collect();
    // Writing to a string can not fail.
    let _ = writeln!(text, "checked {} VM(s): {}", names.len(), names.join(", "));
    let groups = [(Severity::Error, "ERRORS"), (Severity::Warning, "WARNINGS"), (Severity::Note, "NOTES")];
    for (severity, title) in groups {
        let group: Vec<&CheckFinding> = report.findings.iter().filter(|finding| finding.severity == severity).collect();
        if group.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\n{title}");
        for finding in group {
            let object = &finding.object;
            let _ = writeln!(text, "  {}: {} {:?} {}", finding.code, object.class, object.name, object.uuid);
            let _ = writeln!(text, "      found:   {}", finding.reason);
            let _ = writeln!(text, "      effect:  {}", finding.consequence);
            let _ = writeln!(text, "      remedy:  {}", finding.remedy);
        }
    }
    let count = |severity| report.count(severity);
    let (errors, warnings, notes) = (count(Severity::Error), count(Severity::Warning), count(Severity::Note));
    let _ = write!(text, "\n{errors} error(s), {warnings} warning(s), {notes} note(s)");
    text
}

fn json(report: &CheckReport) -> Value {
    let findings: Vec<Value> = report
        .findings
        .iter()
        .map(|finding| {
            json!({
                "severity": finding.severity.word(),
                "code": finding.code,
                "object": {
                    "class": finding.object.class,
                    "uuid": finding.object.uuid,
                    "name": finding.object.name,
                },
                "reason": finding.reason,
                "consequence": finding.consequence,
                "remedy": finding.remedy,
            })
        })
        .collect();
    let vms: Vec<Value> = report.vms.iter().map(|(uuid, name)| json!({ "uuid": uuid, "name": name })).collect();
    json!({
        "pool": report.pool,
        "product": report.product,
        "hosts": report.hosts,
        "vms": vms,
        "errors": report.count(Severity::Error),
        "warnings": report.count(Severity::Warning),
        "notes": report.count(Severity::Note),
        "findings": findings,
    })
}
