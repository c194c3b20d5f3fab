//! `seal`: the broker of a repository in a local folder.

use crate::arguments::SealArguments;
use crate::shell::exit::{Exit, Refusal};
use crate::shell::output::Format;
use crate::shell::signals::{Ended, Signals};
use crate::{Failure, Outcome};
use serde_json::json;
use std::path::PathBuf;
use xenvault_block::ByteSize;
use xenvault_store::backend::{SealReport, seal_folder};

pub async fn run(arguments: &SealArguments, format: Format) -> Outcome {
    let group = group(&arguments.group)?;
    let mut signals = Signals::take()?;
    loop {
        let report = seal(arguments.folder.clone(), group).await?;
        let Some(every) = arguments.every else { return Ok(tell(format, &report)) };
        if report.sealed > 0 || !report.strange.is_empty() {
            tell(format, &report);
        }
        if let Ended::Stopped(exit) = signals.run(tokio::time::sleep(every)).await {
            return Ok(exit);
        }
    }
}

async fn seal(folder: PathBuf, group: u32) -> Result<SealReport, Failure> {
    let shown = folder.display().to_string();
    let sealed = tokio::task::spawn_blocking(move || seal_folder(&folder, group)).await?;
    sealed.map_err(|error| {
        let exit = match error.kind() {
            std::io::ErrorKind::PermissionDenied => Exit::Prerequisite,
            _ => Exit::Repository,
        };
        Refusal { exit, text: format!("{shown} can not be sealed: {error}") }.into()
    })
}

fn tell(format: Format, report: &SealReport) -> Exit {
    let mut text = String::new();
    for path in &report.strange {
        text.push_str(&format!("STRANGE {path} is no finished object and stays as it is\n"));
    }
    text.push_str(&format!(
        "took over {} object(s) with {}; {} had been taken over before; {} of all are immutable to everybody\n",
        report.sealed,
        ByteSize(report.bytes),
        report.before,
        report.immutable,
    ));
    let record = json!({
        "sealed": report.sealed,
        "bytes": report.bytes,
        "before": report.before,
        "immutable": report.immutable,
        "strange": report.strange,
    });
    format.result(&text, record)
}

/// The number of a group.
fn group(text: &str) -> Result<u32, Refusal> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let found = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(text)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    found.ok_or_else(|| Refusal {
        exit: Exit::NotFound,
        text: format!("there is no group {text:?} in /etc/group: give its number"),
    })
}
