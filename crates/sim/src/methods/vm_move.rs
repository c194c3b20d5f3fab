//! Moving disks to other SRs under a VM: copies that keep up with the guest, then one moment in which everything that
//! names the old disks names the new ones.

use std::sync::Arc;

use uuid::Uuid;

use super::{vbd_plug, vdi};
use crate::core::{Core, parse_uuid};
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};

/// One disk and the SR that it goes to.
#[derive(Clone, Debug)]
pub(super) struct Move {
    pub(super) vdi: String,
    pub(super) sr: String,
}

/// A disk on its way.
struct Step {
    old: String,
    old_id: Uuid,
    new: String,
    new_id: Uuid,
}

/// A migration in progress. Dropped before its end it takes its copies back, and the old disks stay.
pub(super) struct Moving {
    core: Arc<Core>,
    moves: Vec<Move>,
    steps: Vec<Step>,
}

impl Drop for Moving {
    fn drop(&mut self) {
        for step in &self.steps {
            // What led here is the thing to tell.
            drop(self.core.storage.end_mirror(step.old_id, false));
            drop(self.core.storage.destroy(step.new_id));
            self.core.db().destroy("VDI", &step.new);
        }
    }
}

impl Moving {
    pub(super) fn begin(core: &Arc<Core>, moves: Vec<Move>) -> Self {
        Self { core: Arc::clone(core), moves, steps: Vec::new() }
    }

    /// Copies, waits as long as a test wants it, and switches the VM over to `host`.
    pub(super) async fn run(mut self, task: &str, vm: &str, host: &str) -> Outcome<()> {
        let core = Arc::clone(&self.core);
        let moves = std::mem::take(&mut self.moves);
        let count = moves.len();
        for (index, step) in moves.into_iter().enumerate() {
            self.copy(&step).await?;
            let done = u32::try_from(index + 1).unwrap_or(u32::MAX);
            let all = u32::try_from(count).unwrap_or(u32::MAX);
            core.db().set("task", task, "progress", 0.9 * f64::from(done) / f64::from(all));
        }
        let mut held = core.migrations_held.subscribe();
        // The sender lives as long as the pool.
        let _ = held.wait_for(|held| !held).await;
        if let Some(step) = self.steps.iter().find(|step| !core.storage.mirror_is_whole(step.old_id)) {
            return Err(Failure::new("MIRROR_FAILED", [step.old.as_str()]));
        }
        let steps = std::mem::take(&mut self.steps);
        switch(&core, &steps, vm, host)
    }

    async fn copy(&mut self, step: &Move) -> Outcome<()> {
        let core = &self.core;
        let old_id = core.disk_id(&step.vdi)?;
        let sr_id = parse_uuid(&core.db().text("SR", &step.sr, "uuid"))?;
        let new_id = Uuid::new_v4();
        let info = core.storage.begin_mirror(old_id, sr_id, new_id)?;
        let new = record(&mut core.db(), &step.vdi, &step.sr, &info)?;
        self.steps.push(Step { old: step.vdi.clone(), old_id, new, new_id });
        let storage = core.storage.clone();
        let work = tokio::task::spawn_blocking(move || storage.fill_mirror(old_id));
        work.await.map_err(|_| Failure::internal("mirror"))??;
        Ok(())
    }
}

/// The record of a copy: what the storage manager knows of a disk comes along, what only the old record had does not.
fn record(db: &mut Database, old: &str, sr: &str, info: &crate::storage::VdiInfo) -> Outcome<String> {
    let kept = ["name_label", "name_description", "type", "read_only"];
    let values: Vec<_> = kept.iter().map(|name| (*name, db.get("VDI", old, name).cloned())).collect();
    let content = db.map_value("VDI", old, "other_config", "content_id");
    let new = vdi::introduce(db, sr, info);
    for (name, value) in values {
        db.set("VDI", &new, name, value?);
    }
    let content = content.unwrap_or_else(crate::model::new_uuid);
    db.put("VDI", &new, "other_config", "content_id", content);
    Ok(new)
}

/// The one key of a disk's `other_config` that follows it.
const SYNCED: &str = "config-drive";

fn switch(core: &Core, steps: &[Step], vm: &str, host: &str) -> Outcome<()> {
    // Under one lock: who asks for the VM's disk gets the old one or the new one, and the old one takes no write
    // after the new one has stopped to get it.
    let mut db = core.db();
    let machines: Vec<String> = std::iter::once(vm.to_owned()).chain(db.set_of("VM", vm, "snapshots")).collect();
    let live = matches!(db.text("VM", vm, "power_state").as_str(), "Running" | "Paused");
    let mut stuck = Vec::new();
    let plugged = |db: &Database| -> Vec<String> {
        let vbds = db.set_of("VM", vm, "VBDs").into_iter();
        vbds.filter(|vbd| db.flag("VBD", vbd, "currently_attached")).collect()
    };
    if live {
        for (disk, mode) in plugged(&db).iter().filter_map(|vbd| vbd_plug::storage_side(&db, vbd)) {
            drop(core.storage.detach(disk, mode));
        }
    }
    for step in steps {
        let of_machines = |vbd: &String| machines.contains(&db.text("VBD", vbd, "VM"));
        let (ours, others): (Vec<String>, Vec<String>) =
            db.set_of("VDI", &step.old, "VBDs").into_iter().partition(of_machines);
        let in_use = others.iter().any(|vbd| db.flag("VBD", vbd, "currently_attached"));
        let ended = core.storage.end_mirror(step.old_id, !in_use);
        for vbd in ours {
            db.set("VBD", &vbd, "VDI", step.new.as_str());
        }
        if let Some(value) = db.map_value("VDI", &step.old, "other_config", SYNCED) {
            db.put("VDI", &step.new, "other_config", SYNCED, value);
        }
        for machine in &machines {
            if db.text("VM", machine, "suspend_VDI") == step.old {
                db.set("VM", machine, "suspend_VDI", step.new.as_str());
            }
        }
        links(&mut db, step, steps);
        if in_use || ended.is_err() {
            stuck.push(step.old.clone());
        } else {
            for vbd in others {
                db.destroy("VBD", &vbd);
            }
        }
    }
    for step in steps.iter().filter(|step| !stuck.contains(&step.old)) {
        for snapshot in db.set_of("VDI", &step.old, "snapshots") {
            // Those without a VM stay behind, and what they name is gone.
            db.touch("VDI", &snapshot);
        }
        db.destroy("VDI", &step.old);
    }
    let mut messages = Vec::new();
    if live {
        for (disk, mode) in plugged(&db).iter().filter_map(|vbd| vbd_plug::storage_side(&db, vbd)) {
            messages.push(core.storage.attach(disk, mode)?);
        }
        db.set("VM", vm, "resident_on", host);
    }
    forget_unseen_suspend_sr(&mut db, &machines, host);
    drop(db);
    for message in messages {
        core.tell(message);
    }
    // The VM has moved; an old disk that somebody else has attached is left behind.
    stuck.first().map_or(Ok(()), |vdi| Err(Failure::new("VDI_IN_USE", [vdi.as_str(), "destroy"])))
}

/// A moved snapshot is a snapshot of the moved disk.
fn links(db: &mut Database, step: &Step, steps: &[Step]) {
    if !db.flag("VDI", &step.old, "is_a_snapshot") {
        return;
    }
    let original = db.text("VDI", &step.old, "snapshot_of");
    let original = steps.iter().find(|other| other.old == original).map_or(original, |other| other.new.clone());
    let time = db.text("VDI", &step.old, "snapshot_time");
    db.set("VDI", &step.new, "is_a_snapshot", true);
    db.set("VDI", &step.new, "snapshot_of", original.as_str());
    db.set("VDI", &step.new, "snapshot_time", Value::Date(time));
}

fn forget_unseen_suspend_sr(db: &mut Database, machines: &[String], host: &str) {
    for machine in machines {
        let sr = db.text("VM", machine, "suspend_SR");
        if db.exists("SR", &sr) && !super::sr::hosts(db, &sr).iter().any(|known| known == host) {
            db.set("VM", machine, "suspend_SR", crate::model::NULL);
        }
    }
}
