//! The storage manager's garbage collector as the pool sees it: records of base copies, merges that take their time,
//! and what it says when there is no space for them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::Notify;
use uuid::Uuid;

use super::{complete, new_task, sr};
use crate::GarbageCollection;
use crate::core::{Core, parse_uuid, post_message};
use crate::model::{Database, Value};
use crate::rpc::Outcome;
use crate::storage::{ChainChange, CoalesceStart, CoalesceSwitches};

/// Key of `sm_config` that names the message about missing space, on the SR and on what could not be merged.
const NO_SPACE: &str = "gc_no_space";

/// The collectors of all repositories.
#[derive(Debug, Default)]
pub(crate) struct Collectors {
    by_sr: RwLock<HashMap<Uuid, Arc<Collector>>>,
}

/// The collector of one repository.
#[derive(Debug, Default)]
struct Collector {
    kicked: Notify,
    stopped: AtomicBool,
}

impl Collectors {
    fn of(&self, sr: Uuid) -> Arc<Collector> {
        if let Some(known) = self.by_sr.read().unwrap_or_else(PoisonError::into_inner).get(&sr) {
            return Arc::clone(known);
        }
        Arc::clone(self.by_sr.write().unwrap_or_else(PoisonError::into_inner).entry(sr).or_default())
    }

    /// There may be work: a disk was deleted, or the repository was scanned or attached.
    pub(crate) fn kick(&self, sr: Uuid) {
        self.of(sr).kicked.notify_one();
    }

    /// Stops a collector, whose merge in progress is given up, or lets it go on.
    pub(crate) fn stop(&self, sr: Uuid, stopped: bool) {
        let collector = self.of(sr);
        collector.stopped.store(stopped, Ordering::SeqCst);
        collector.kicked.notify_one();
    }
}

/// Brings the records into line with chains that moved: what the storage manager introduces, forgets and notes itself.
pub(crate) fn apply(db: &mut Database, changes: Vec<ChainChange>) {
    for change in changes {
        let name = change.vdi.to_string();
        let record = db.by_uuid("VDI", &name).ok();
        match (change.now, record) {
            (None, Some(vdi)) if !db.flag("VDI", &vdi, "managed") => db.destroy("VDI", &vdi),
            (Some(now), record) if now.kind.is_vhd() => {
                let record = match record {
                    Some(vdi) => vdi,
                    None if change.hidden => introduce_base(db, &change, &name),
                    // Its record is about to be made by who made the disk.
                    None => continue,
                };
                match now.parent.filter(|_| !now.metadata_only) {
                    Some(parent) => db.put("VDI", &record, "sm_config", "vhd-parent", parent.to_string()),
                    None => db.take("VDI", &record, "sm_config", "vhd-parent"),
                }
            }
            _ => {}
        }
    }
}

fn introduce_base(db: &mut Database, change: &ChainChange, name: &str) -> String {
    let sr = db.refs_where("SR", "uuid", &change.sr.to_string()).into_iter().next().unwrap_or_default();
    db.create(
        "VDI",
        vec![
            ("uuid", name.into()),
            ("name_label", "base copy".into()),
            ("SR", sr.into()),
            ("virtual_size", change.now.map_or(0, |now| now.virtual_size).into()),
            ("location", name.into()),
            ("managed", false.into()),
            ("read_only", true.into()),
        ],
    )
}

/// Starts the collectors of repositories whose garbage takes its time. They end with the pool.
pub(crate) fn serve(core: &Arc<Core>, srs: &[String]) {
    let GarbageCollection::Timed { .. } = core.options.garbage_collection else { return };
    for sr in srs {
        let Ok(uuid) = parse_uuid(&core.db().text("SR", sr, "uuid")) else { continue };
        let (core, sr) = (Arc::clone(core), sr.clone());
        let collector = core.collectors.of(uuid);
        tokio::spawn(async move {
            let end = core.end.clone();
            tokio::select! {
                () = end.cancelled() => {}
                () = async {
                    loop {
                        collector.kicked.notified().await;
                        collect(&core, &sr, uuid, &collector).await;
                    }
                } => {}
            }
        });
    }
}

/// One run: a quiet time, then one merge after the other until nothing is left to do.
async fn collect(core: &Arc<Core>, sr: &str, uuid: Uuid, collector: &Collector) {
    let GarbageCollection::Timed { quiet, merge, bytes_per_second } = core.options.garbage_collection else { return };
    if !may_run(core, sr, collector) || !has_work(core, uuid) {
        return;
    }
    let host = core.coordinator();
    let task = new_task(core, host, "Garbage Collection", &format!("Garbage collection for SR {uuid}"));
    tokio::time::sleep(quiet).await;
    while may_run(core, sr, collector) {
        let Ok(start) = begin(core, sr, uuid) else { break };
        let Some(work) = start.work else { break };
        let copying = bytes_per_second.map(|speed| work.bytes.saturating_mul(1000) / speed.max(1));
        let copying = std::time::Duration::from_millis(copying.unwrap_or_default());
        let stop = async {
            while !collector.stopped.load(Ordering::SeqCst) {
                collector.kicked.notified().await;
            }
        };
        tokio::select! {
            () = tokio::time::sleep(merge + copying) => end(core, sr, uuid).await,
            () = stop => {
                // The repository is known: it was there a moment ago.
                let _ = core.storage.abort_coalesce(uuid);
            }
        }
    }
    complete(core, &task, None);
}

/// Whether an administrator, a test, or a repository that is nowhere attached is in the way.
fn may_run(core: &Core, sr: &str, collector: &Collector) -> bool {
    let db = core.db();
    let forbidden = db.map_value("SR", sr, "other_config", "gc").is_some_and(|value| value == "false");
    !forbidden && !collector.stopped.load(Ordering::SeqCst) && !sr::hosts(&db, sr).is_empty()
}

fn has_work(core: &Core, sr: Uuid) -> bool {
    let bases = core.storage.base_copies(sr).unwrap_or_default();
    let disks = core.storage.vdis(sr).unwrap_or_default();
    // More than one child keeps a base copy; so does nothing else.
    bases.iter().any(|base| bases.iter().chain(&disks).filter(|disk| disk.parent == Some(base.vdi)).count() < 2)
}

/// Begins a merge, and tells what there is no space for.
pub(crate) fn begin(core: &Core, sr: &str, uuid: Uuid) -> Outcome<CoalesceStart> {
    let switches = {
        let db = core.db();
        let on = |key: &str| db.map_value("SR", sr, "other_config", key).is_none_or(|value| value != "false");
        CoalesceSwitches { coalesce: on("coalesce"), leaf: on("leaf-coalesce") }
    };
    let start = core.storage.begin_coalesce(uuid, switches)?;
    let mut db = core.db();
    tell_no_space(&mut db, sr, uuid, &start);
    db.touch("SR", sr);
    Ok(start)
}

/// Ends the merge that is in progress; the copying is done now, away from the other work.
pub(crate) async fn end(core: &Arc<Core>, sr: &str, uuid: Uuid) {
    let storage = core.storage.clone();
    // A merge that fails leaves the chain as it is, and says so in the log.
    let _ = tokio::task::spawn_blocking(move || storage.end_coalesce(uuid)).await;
    core.db().touch("SR", sr);
}

/// One message for a repository as long as something can not be merged.
fn tell_no_space(db: &mut Database, sr: &str, uuid: Uuid, start: &CoalesceStart) {
    let standing = db.map_value("SR", sr, "sm_config", NO_SPACE).filter(|message| db.exists("message", message));
    if start.no_space.is_empty() {
        if start.work.is_none()
            && let Some(message) = standing
        {
            db.destroy("message", &message);
            db.take("SR", sr, "sm_config", NO_SPACE);
        }
        return;
    }
    let message = standing.unwrap_or_else(|| {
        let body = format!("Unable to perform data coalesce due to a lack of space in SR {uuid}");
        post_message(db, "SM_GC_NO_SPACE", 3, "SR", &uuid.to_string(), &body)
    });
    db.put("SR", sr, "sm_config", NO_SPACE, message.as_str());
    for vdi in &start.no_space {
        if let Ok(vdi) = db.by_uuid("VDI", &vdi.to_string()) {
            db.put("VDI", &vdi, "sm_config", NO_SPACE, Value::text(message.as_str()));
        }
    }
}
