//! `vm`: a point as a new VM.

use crate::Outcome;
use crate::arguments::VmArguments;
use crate::points::choose;
use crate::shell::output::{Format, Table};
use crate::shell::pool::Job;
use crate::shell::progress::{Monitor, duration, totals};
use crate::shell::signals::Signals;
use serde_json::{Value, json};
use std::sync::Arc;
use xenvault_block::ByteSize;
use xenvault_engine::{RestoreReport, RestoreRequest, SrSelector};

pub async fn run(arguments: VmArguments, format: Format) -> Outcome {
    // The order in which two secrets stand on one standard input.
    let password = arguments.pool.password()?;
    let passphrase = arguments.repository.passphrase()?;
    let state = arguments.state.folder()?;
    let signals = Signals::take()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let point = choose(&repository, &arguments.point).await?;

    let mut request = RestoreRequest::new(point, arguments.sr.map_or(SrSelector::Default, SrSelector::UuidOrName));
    request.name = arguments.name;
    request.network_map = arguments.networks.into_iter().collect();
    request.mac = arguments.mac.into();

    let monitor = Arc::new(Monitor::new(format));
    let options = arguments.pool.engine_options(state, monitor.clone());
    let job = Job { pool: &arguments.pool, password, repository: Some(repository), options, monitor };
    let ended = job.run(signals, |engine| async move { engine.restore(request).await }).await?;
    Ok(format.ended(
        ended,
        "what this restore made in the pool was removed, except where a warning says otherwise",
        text,
        json,
    ))
}

fn text(report: &RestoreReport) -> String {
    let mut text = format!("restored VM {} ({}), halted\n", report.vm_name, report.vm_uuid);
    let mut table = Table::new(&["disk", ">size", ">sent", "uuid"]);
    for disk in &report.disks {
        table.row([
            disk.device.clone(),
            ByteSize(disk.virtual_size).to_string(),
            ByteSize(disk.sent_bytes).to_string(),
            disk.vdi_uuid.clone(),
        ]);
    }
    text.push_str(&table.to_string());
    for vif in &report.vifs {
        let place = match (&vif.mapped_to, &vif.mac) {
            (Some(network), Some(mac)) => format!("on {network} with {mac}"),
            (Some(network), None) => format!("on {network}"),
            (None, _) => format!("left out: no network {:?} here; name one with --network", vif.network),
        };
        text.push_str(&format!("VIF {}: {place}\n", vif.device));
    }
    for setting in &report.not_restored {
        text.push_str(&format!("not restored: {}: {}\n", setting.field, setting.reason));
    }
    text.push_str(&format!("sent {} in {}", ByteSize(report.totals.done_bytes), duration(report.elapsed)));
    text
}

fn json(report: &RestoreReport) -> Value {
    let disks: Vec<Value> = report
        .disks
        .iter()
        .map(|disk| {
            json!({
                "device": disk.device,
                "vdi_uuid": disk.vdi_uuid,
                "virtual_size": disk.virtual_size,
                "sent_bytes": disk.sent_bytes,
            })
        })
        .collect();
    let vifs: Vec<Value> = report
        .vifs
        .iter()
        .map(|vif| json!({ "device": vif.device, "network": vif.network, "mapped_to": vif.mapped_to, "mac": vif.mac }))
        .collect();
    let not_restored: Vec<Value> =
        report.not_restored.iter().map(|setting| json!({ "field": setting.field, "reason": setting.reason })).collect();
    let warnings: Vec<Value> =
        report.warnings.iter().map(|warning| json!({ "code": warning.code, "text": warning.text })).collect();
    json!({
        "run": report.run_id,
        "vm_uuid": report.vm_uuid,
        "vm_name": report.vm_name,
        "disks": disks,
        "vifs": vifs,
        "not_restored": not_restored,
        "totals": totals(&report.totals),
        "warnings": warnings,
        "elapsed_seconds": report.elapsed.as_secs_f64(),
    })
}
