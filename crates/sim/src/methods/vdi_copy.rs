//! `VDI.copy`: a full copy, into a new disk or an existing one.

use super::{Call, Operation, vdi, vdi_checks};
use crate::core::{Core, parse_uuid};
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};
use xenvault_block::{ByteRange, ReadAt, WriteAt};

pub(super) async fn copy(call: &Call) -> Outcome {
    let core = &call.core;
    let (source, sr, into) = (call.text(0), call.text(1), call.text(3));
    let _operation =
        Operation::begin(call, &[("VDI", source, "copy")], |db: &Database| vdi_checks::check(db, source, "copy"))
            .await?;
    if core.db().exists("VDI", into) {
        into_existing(core, source, into).await?;
        return Ok(into.into());
    }
    // Without an SR it stays where it is.
    let sr = if core.db().exists("SR", sr) { sr.to_owned() } else { core.db().text("VDI", source, "SR") };
    copy_to(core, source, &sr).await.map(Value::Text)
}

/// A full copy on an SR, with what the client controls.
pub(super) async fn copy_to(core: &std::sync::Arc<Core>, source: &str, sr: &str) -> Outcome<String> {
    let id = core.disk_id(source)?;
    let sr_id = parse_uuid(&core.db().text("SR", sr, "uuid"))?;
    let storage = core.storage.clone();
    let work = tokio::task::spawn_blocking(move || storage.copy(id, sr_id, uuid::Uuid::new_v4()));
    let info = work.await.map_err(|_| Failure::internal("copy"))??;
    let mut db = core.db();
    let copied = [
        "name_label",
        "name_description",
        "type",
        "sharable",
        "other_config",
        "xenstore_data",
        "tags",
        "allow_caching",
    ];
    let values: Vec<_> = copied.iter().map(|name| (*name, db.get("VDI", source, name).cloned())).collect();
    let copy = vdi::introduce(&mut db, sr, &info);
    for (name, value) in values {
        db.set("VDI", &copy, name, value?);
    }
    Ok(copy)
}

async fn into_existing(core: &Core, source: &str, target: &str) -> Outcome<()> {
    {
        let db = core.db();
        if db.flag("VDI", target, "read_only") {
            return Err(Failure::new("VDI_READONLY", [target]));
        }
        let size = db.int("VDI", source, "virtual_size");
        if db.int("VDI", target, "virtual_size") < size {
            return Err(Failure::new("VDI_TOO_SMALL", [target.to_owned(), size.to_string()]));
        }
    }
    let from = core.storage.disk(core.disk_id(source)?)?;
    let to = core.storage.disk(core.disk_id(target)?)?;
    let work = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
        const PIECE: u64 = 2 << 20;
        let mut at = 0;
        while at < from.size() {
            let length = PIECE.min(from.size() - at);
            let range = ByteRange::with_length(at, length).map_err(std::io::Error::other)?;
            to.write_all_at(&from.read(range)?, at)?;
            at += length;
        }
        Ok(())
    });
    let outcome = work.await.map_err(|_| Failure::internal("copy"))?;
    outcome.map_err(|_| Failure::new("VDI_IO_ERROR", ["Device I/O errors"]))
}
