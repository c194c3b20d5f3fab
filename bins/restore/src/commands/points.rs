//! `points`: what there is to restore. Damaged points are listed too, and make the exit code.

use super::moment;
use crate::Outcome;
use crate::arguments::PointsArguments;
use crate::points::is_of;
use crate::shell::exit::Exit;
use crate::shell::output::{Format, Table};
use serde_json::{Value, json};
use xenvault_block::ByteSize;
use xenvault_engine::points;
use xenvault_store::PointFilter;

pub async fn run(arguments: &PointsArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let listing = points::list(&repository, &PointFilter::default()).await?;
    let wanted = |point: &&_| arguments.vm.as_ref().is_none_or(|vm| is_of(point, vm));

    let mut table = Table::new(&["point", "VM", "time", "level", "reason", ">disks", ">size", ">changed"]);
    let mut records = Vec::new();
    for point in listing.points.iter().filter(wanted) {
        table.row([
            point.id.to_string(),
            point.vm_name.clone(),
            moment(point.created_unix_ms),
            point.level.to_string(),
            point.reason.clone(),
            point.disks.to_string(),
            ByteSize(point.virtual_bytes).to_string(),
            ByteSize(point.changed_bytes).to_string(),
        ]);
        records.push(json!({
            "point": point.id.to_string(),
            "pool_uuid": point.pool_uuid,
            "vm_uuid": point.vm_uuid,
            "vm_name": point.vm_name,
            "level": point.level.to_string(),
            "reason": point.reason,
            "created_unix_ms": point.created_unix_ms,
            "disks": point.disks,
            "virtual_bytes": point.virtual_bytes,
            "changed_bytes": point.changed_bytes,
        }));
    }
    let mut text = if table.is_empty() { "there are no restore points\n".to_owned() } else { table.to_string() };
    let mut damaged: Vec<Value> = Vec::new();
    for point in &listing.damaged {
        text.push_str(&format!("DAMAGED {}: {}\n", point.object, point.error));
        damaged.push(json!({ "object": point.object, "error": point.error.to_string() }));
    }
    let told = format.result(&text, json!({ "points": records, "damaged": damaged }));
    Ok(if listing.damaged.is_empty() { told } else { Exit::Damaged })
}
