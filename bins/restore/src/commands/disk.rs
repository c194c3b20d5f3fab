//! `disk`: one disk of a point into a raw file.

use crate::Outcome;
use crate::arguments::DiskArguments;
use crate::points::choose;
use crate::shell::output::Format;
use crate::shell::progress::Monitor;
use crate::shell::signals::{Ended, Signals};
use serde_json::{Value, json};
use std::sync::Arc;
use xenvault_block::ByteSize;
use xenvault_engine::points::{self, DiskFileReport};

pub async fn run(arguments: &DiskArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let mut signals = Signals::take()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let point = choose(&repository, &arguments.point).await?;
    let monitor = Arc::new(Monitor::new(format));
    let work = points::restore_disk(&repository, &point, &arguments.disk, &arguments.to, Arc::clone(&monitor) as _);
    let ended = match signals.run(work).await {
        Ended::Done(result) => Ended::Done(result?),
        Ended::Stopped(exit) => Ended::Stopped(exit),
    };
    monitor.finish();
    Ok(format.ended(ended, "the file was removed", text, json))
}

fn text(report: &DiskFileReport) -> String {
    format!(
        "wrote {} of a disk of {}; the rest of the file are holes",
        ByteSize(report.written_bytes),
        ByteSize(report.virtual_size)
    )
}

fn json(report: &DiskFileReport) -> Value {
    json!({ "virtual_size": report.virtual_size, "written_bytes": report.written_bytes })
}
