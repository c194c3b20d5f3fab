//! `backup`: one VM into the repository.

use crate::Outcome;
use crate::arguments::BackupArguments;
use crate::shell::output::{Format, Table};
use crate::shell::pool::Job;
use crate::shell::progress::{Monitor, duration, totals};
use crate::shell::signals::Signals;
use serde_json::{Value, json};
use std::sync::Arc;
use xenvault_block::ByteSize;
use xenvault_engine::{BackupReport, BackupRequest, Verification, VmSelector};

pub async fn run(arguments: BackupArguments, format: Format) -> Outcome {
    // The order in which two secrets stand on one standard input.
    let password = arguments.pool.password()?;
    let passphrase = arguments.repository.passphrase()?;
    let state = arguments.state.folder()?;
    let signals = Signals::take()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let immutability = repository.immutability();

    let monitor = Arc::new(Monitor::new(format));
    let mut options = arguments.pool.engine_options(state, monitor.clone());
    options.connections_per_disk = arguments.connections;
    let vm = VmSelector::UuidOrName(arguments.vm);
    let request = if arguments.full { BackupRequest::full(vm) } else { BackupRequest::incremental(vm) };
    let request = request.verified_every(arguments.verify_every);
    let job = Job { pool: &arguments.pool, password, repository: Some(repository), options, monitor };
    let ended = job.run(signals, |engine| async move { engine.backup(request).await }).await?;
    Ok(format.ended(
        ended,
        "what this backup made in the pool was removed, except where a warning says otherwise",
        |report| format!("{}\nimmutability: {immutability}", text(report)),
        |report| {
            let mut record = json(report);
            if let Some(fields) = record.as_object_mut() {
                fields.insert("immutability".to_owned(), json!(immutability.to_string()));
            }
            record
        },
    ))
}

fn text(report: &BackupReport) -> String {
    let mut table = Table::new(&["disk", "level", "reason", ">size", ">changed", ">read"]);
    for disk in &report.disks {
        table.row([
            disk.device.clone(),
            disk.level.to_string(),
            disk.reason.clone(),
            ByteSize(disk.virtual_size).to_string(),
            ByteSize(disk.changed_bytes).to_string(),
            ByteSize(disk.read_bytes).to_string(),
        ]);
    }
    let mut text =
        format!("point {} of VM {} ({}): {}\n{table}", report.point, report.vm_name, report.vm_uuid, report.level);
    for (disk, found) in report.disks.iter().filter_map(|disk| Some((disk, disk.verification.as_ref()?))) {
        text.push_str(&format!(
            "disk {}: checked the list of changes over {}: {} had changed without being listed\n",
            disk.device,
            ByteSize(found.compared_bytes),
            ByteSize(found.unlisted_bytes),
        ));
    }
    for skipped in &report.skipped {
        text.push_str(&format!("left out: device {}: {}\n", skipped.device, skipped.reason));
    }
    text.push_str(&format!(
        "read {} and a check sample of {}, stored {}, in {} (of which {:.1} s attaching and detaching disks)",
        ByteSize(report.totals.read_bytes),
        ByteSize(report.totals.sample_bytes),
        ByteSize(report.totals.stored_bytes),
        duration(report.elapsed),
        report.attach_elapsed.as_secs_f64(),
    ));
    text
}

fn verification(found: &Verification) -> Value {
    let ranges: Vec<Value> =
        found.unlisted.iter().map(|range| json!({ "offset": range.start(), "length": range.len() })).collect();
    json!({
        "compared_bytes": found.compared_bytes,
        "unlisted_bytes": found.unlisted_bytes,
        "unlisted": ranges,
    })
}

fn json(report: &BackupReport) -> Value {
    let disks: Vec<Value> = report
        .disks
        .iter()
        .map(|disk| {
            json!({
                "device": disk.device,
                "vdi_uuid": disk.vdi_uuid,
                "name": disk.name,
                "virtual_size": disk.virtual_size,
                "level": disk.level.to_string(),
                "reason": disk.reason,
                "changed_bytes": disk.changed_bytes,
                "read_bytes": disk.read_bytes,
                "sample_bytes": disk.sample_bytes,
                "verification": disk.verification.as_ref().map(verification),
            })
        })
        .collect();
    let skipped: Vec<Value> =
        report.skipped.iter().map(|device| json!({ "device": device.device, "reason": device.reason })).collect();
    let warnings: Vec<Value> =
        report.warnings.iter().map(|warning| json!({ "code": warning.code, "text": warning.text })).collect();
    json!({
        "point": report.point.to_string(),
        "run": report.run_id,
        "vm_uuid": report.vm_uuid,
        "vm_name": report.vm_name,
        "level": report.level.to_string(),
        "reason": report.reason,
        "disks": disks,
        "skipped": skipped,
        "totals": totals(&report.totals),
        "warnings": warnings,
        "elapsed_seconds": report.elapsed.as_secs_f64(),
        "attach_seconds": report.attach_elapsed.as_secs_f64(),
    })
}
