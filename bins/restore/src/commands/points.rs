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
    let mut others = String::new();
    let forgotten = listing.forgotten.iter().map(|point| (point, "forgotten"));
    let quarantined = listing.quarantined.iter().map(|point| (point, "quarantined"));
    let mut other_records = Vec::new();
    for (point, state) in forgotten.chain(quarantined).filter(|(point, _)| wanted(point)) {
        others.push_str(&format!(
            "{}: {} of {}, {}\n",
            state.to_uppercase(),
            point.id,
            point.vm_name,
            moment(point.created_unix_ms)
        ));
        other_records.push(json!({
            "point": point.id.to_string(),
            "vm_uuid": point.vm_uuid,
            "vm_name": point.vm_name,
            "created_unix_ms": point.created_unix_ms,
            "state": state,
        }));
    }
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
            "forgotten": listing.promised.contains(&point.id),
        }));
    }
    for id in &listing.promised {
        others.push_str(&format!("FORGOTTEN: {id}, immutable until its promise ends, and listed until then\n"));
    }
    let mut text = if table.is_empty() { "there are no restore points\n".to_owned() } else { table.to_string() };
    text.push_str(&others);
    let mut damaged: Vec<Value> = Vec::new();
    for point in &listing.damaged {
        text.push_str(&format!("DAMAGED {}: {}\n", point.object, point.error));
        damaged.push(json!({ "object": point.object, "error": point.error.to_string() }));
    }
    let told = format.result(&text, json!({ "points": records, "damaged": damaged, "others": other_records }));
    Ok(if listing.damaged.is_empty() { told } else { Exit::Damaged })
}
