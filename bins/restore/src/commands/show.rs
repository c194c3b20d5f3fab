//! `show`: one point in detail.

use super::moment;
use crate::Outcome;
use crate::arguments::ShowArguments;
use crate::points::choose;
use crate::shell::output::{Format, Table};
use serde_json::{Value, json};
use xenvault_block::ByteSize;
use xenvault_engine::points::{self, PointDetails};

pub async fn run(arguments: &ShowArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let point = choose(&repository, &arguments.point).await?;
    let details = points::show(&repository, &point).await?;
    Ok(format.result(&text(&details), json(&details)))
}

pub(super) fn text(details: &PointDetails) -> String {
    let summary = &details.point;
    let mut text = format!(
        "point {}\nVM {} ({}) of pool {}\ntaken {}, {}: {}\n{} vCPUs, {} memory, networks: {}\n",
        summary.id,
        summary.vm_name,
        summary.vm_uuid,
        summary.pool_uuid,
        moment(summary.created_unix_ms),
        summary.level,
        summary.reason,
        details.vcpus,
        ByteSize(details.memory_bytes),
        details.networks.join(", "),
    );
    let mut table = Table::new(&["disk", "name", ">size", "level", "reason", ">changed", "uuid"]);
    for disk in &details.disks {
        table.row([
            disk.device.clone(),
            disk.name.clone(),
            ByteSize(disk.virtual_size).to_string(),
            disk.level.to_string(),
            disk.reason.clone(),
            ByteSize(disk.changed_bytes).to_string(),
            disk.vdi_uuid.clone(),
        ]);
    }
    text.push_str(&table.to_string());
    for (device, reason) in &details.skipped {
        text.push_str(&format!("left out: device {device}: {reason}\n"));
    }
    text
}

pub(super) fn json(details: &PointDetails) -> Value {
    let summary = &details.point;
    let disks: Vec<Value> = details
        .disks
        .iter()
        .map(|disk| {
            json!({
                "device": disk.device,
                "name": disk.name,
                "vdi_uuid": disk.vdi_uuid,
                "virtual_size": disk.virtual_size,
                "level": disk.level.to_string(),
                "reason": disk.reason,
                "changed_bytes": disk.changed_bytes,
            })
        })
        .collect();
    json!({
        "point": summary.id.to_string(),
        "pool_uuid": summary.pool_uuid,
        "vm_uuid": summary.vm_uuid,
        "vm_name": summary.vm_name,
        "created_unix_ms": summary.created_unix_ms,
        "level": summary.level.to_string(),
        "reason": summary.reason,
        "vcpus": details.vcpus,
        "memory_bytes": details.memory_bytes,
        "networks": details.networks,
        "disks": disks,
        "skipped": details.skipped,
    })
}
