//! Changed block tracking and what leads to NBD.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{Call, nbd_info, vdi};
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};

/// How long `data_destroy` waits for a disk's VBDs to go.
const UNPLUG_PATIENCE: Duration = Duration::from_secs(4);

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    Some(match simple {
        "enable_cbt" => switch(call, true).await,
        "disable_cbt" => switch(call, false).await,
        "data_destroy" => data_destroy(call).await,
        "list_changed_blocks" => list_changed_blocks(call).await,
        _ => nbd_info::get(call),
    })
}

/// `LICENSE_RESTRICTION` where the pool's licence leaves the feature out.
fn check_licence(db: &Database) -> Outcome<()> {
    let restricted = db
        .refs("pool")
        .iter()
        .any(|pool| db.map_value("pool", pool, "restrictions", "restrict_cbt").is_some_and(|value| value == "true"));
    if restricted { Err(Failure::new("LICENSE_RESTRICTION", ["CBT"])) } else { Ok(()) }
}

async fn switch(call: &Call, on: bool) -> Outcome {
    let core = &call.core;
    let vdi = call.text(0);
    let (name, of_sr) = if on { ("enable_cbt", "vdi_enable_cbt") } else { ("disable_cbt", "vdi_disable_cbt") };
    let _operation = vdi::begin_on_sr(call, name, of_sr).await?;
    if on {
        check_licence(&core.db())?;
    }
    if core.db().flag("VDI", vdi, "cbt_enabled") == on {
        return Ok(Value::void());
    }
    let id = core.disk_id(vdi)?;
    if on {
        core.storage.enable_cbt(id, false)?
    } else {
        core.storage.disable_cbt(id, false)?
    }
    core.db().set("VDI", vdi, "cbt_enabled", on);
    Ok(Value::void())
}

async fn list_changed_blocks(call: &Call) -> Outcome {
    let core = &call.core;
    let (from, to) = (call.text(0), call.text(1));
    core.db().check("VDI", from)?;
    let name = "list_changed_blocks";
    let _operation = vdi::begin_on_sr_of(call, to, name, "vdi_list_changed_blocks").await?;
    let bitmap = core.storage.list_changed_blocks(core.disk_id(from)?, core.disk_id(to)?)?;
    Ok(STANDARD.encode(bitmap).into())
}

async fn data_destroy(call: &Call) -> Outcome {
    let core = &call.core;
    let vdi = call.text(0);
    let operation = vdi::begin_on_sr(call, "data_destroy", "vdi_data_destroy").await?;
    let kind = core.db().text("VDI", vdi, "type");
    if kind == "cbt_metadata" {
        return Ok(Value::void());
    }
    // Marked at once, so that nobody makes a new VBD for it meanwhile.
    core.db().set("VDI", vdi, "type", "cbt_metadata");
    let outcome = match wait_for_vbds(call, vdi).await {
        Ok(()) => core.disk_id(vdi).and_then(|id| core.storage.data_destroy(id).map_err(Failure::from)),
        Err(failure) => Err(failure),
    };
    drop(operation);
    let mut db = core.db();
    if let Err(failure) = outcome {
        db.set("VDI", vdi, "type", kind);
        return Err(failure);
    }
    db.put("VDI", vdi, "other_config", "content_id", "/No content: this is a cbt_metadata VDI/");
    vdi::refresh(core, &mut db, vdi);
    for vbd in db.set_of("VDI", vdi, "VBDs") {
        db.destroy("VBD", &vbd);
    }
    Ok(Value::void())
}

async fn wait_for_vbds(call: &Call, vdi: &str) -> Outcome<()> {
    let deadline = tokio::time::Instant::now() + UNPLUG_PATIENCE;
    loop {
        let mut changes = call.core.changes();
        if call.core.db().set_of("VDI", vdi, "VBDs").is_empty() {
            return Ok(());
        }
        if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
            return Err(Failure::new("VDI_IN_USE", [vdi, "data_destroy"]));
        }
    }
}
