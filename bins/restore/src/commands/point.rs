//! `point`: which points there are, and that some are to be forgotten or not.

use super::{points, proof};
use crate::Outcome;
use crate::arguments::{ChangeArguments, PointCommand};
use crate::points::choose;
use crate::shell::output::Format;
use serde_json::json;
use xenvault_store::{ForgetReport, PointId, Repository};

pub async fn run(command: PointCommand, format: Format) -> Outcome {
    match command {
        PointCommand::List(arguments) => points::run(&arguments, format).await,
        PointCommand::Show(arguments) => proof::run(&arguments, format).await,
        PointCommand::Forget(arguments) => {
            let (repository, points) = open(&arguments.change).await?;
            let report = repository.forget(&points, &arguments.reason).await?;
            Ok(told(format, &report, "forgotten; `sweep` removes what only they need", "forgotten before"))
        }
        PointCommand::Undo(arguments) => {
            let (repository, points) = open(&arguments).await?;
            let report = repository.undo_forget(&points).await?;
            Ok(told(format, &report, "taken back", "not forgotten"))
        }
    }
}

async fn open(arguments: &ChangeArguments) -> Result<(Repository, Vec<PointId>), crate::Failure> {
    let passphrase = arguments.repository.passphrase()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let mut points = Vec::new();
    for text in &arguments.points {
        points.push(choose(&repository, text).await?);
    }
    Ok((repository, points))
}

fn told(format: Format, report: &ForgetReport, changed: &str, unchanged: &str) -> crate::shell::exit::Exit {
    let lines =
        |points: &[PointId], what: &str| -> String { points.iter().map(|point| format!("{point} {what}\n")).collect() };
    let text = lines(&report.changed, changed) + &lines(&report.unchanged, unchanged);
    let ids = |points: &[PointId]| points.iter().map(PointId::to_string).collect::<Vec<_>>();
    format.result(&text, json!({ "changed": ids(&report.changed), "unchanged": ids(&report.unchanged) }))
}
