//! The second half of a sweep: what is still needed is stored again, the rest is removed.
//!
//! Every step may have been done before, by a process that died or one that is at it: each is repeated without harm, and
//! nothing is removed before everything that is needed of it is durable in another pack.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use xenvault_store_format::{PackId, PointId, RecordId, SweepEnd, SweepIntent};

use super::begin::lost_for_good;
use super::survey::{Survey, confirm};
use super::{SweepEnded, SweepOptions, SweepReport};
use crate::mark::{MarkedEntry, Marks};
use crate::monitor::MaintenanceStage;
use crate::packs::Sink;
use crate::pool::WorkerPool;
use crate::promise::{is_held, is_promised};
use crate::repository::Inner;
use crate::sweeps::SweepState;
use crate::{StoreError, forget, names, records};

/// Carries out the open sweep, if there is one.
pub(super) async fn out(
    repository: &Arc<Inner>,
    state: &SweepState,
    options: &SweepOptions,
    report: &mut SweepReport,
) -> Result<(), StoreError> {
    let Some(intent) = &state.open else { return Ok(()) };
    repository.bar_copies(state).await?;
    let survey = Survey::take(repository, Some(intent), options).await?;
    let mut ended = SweepEnded { number: intent.number, ..SweepEnded::default() };
    for point in &intent.forgotten {
        let undone =
            point.tombstone != RecordId::from_bytes([0; 16]) && forget::is_undone(repository, &point.tombstone).await?;
        // Whoever has a writer's key can write an intent; that does not end a promise.
        let name = names::point(&point.pool_uuid, &point.vm_uuid, &point.point)?;
        let stays = undone || is_promised(repository, &name).await? || is_held(repository, &name).await?;
        let list = if stays { &mut ended.spared_points } else { &mut ended.removed_points };
        list.push(point.point);
    }
    let going: BTreeSet<PointId> = ended.removed_points.iter().copied().collect();
    repository.index.refresh(&*repository.backend, &repository.keys).await?;
    repository.index.read_all(&*repository.backend, &repository.keys).await?;
    // What a process that died in here has carried and not yet indexed is about to be relied on.
    repository.index.publish_learned(&*repository.backend, &repository.keys).await?;
    let mut marks = Marks::new(repository.index.snapshot());
    let unconfirmed = survey.mark(repository, &mut marks, &going, options).await?;
    report.points = survey.points.keys().filter(|id| !going.contains(id)).count() as u64;

    let condemned: HashSet<PackId> = intent.condemned.iter().copied().collect();
    let tallies = marks.tallies();
    let kept = carry(repository, &marks, &condemned, options, &mut ended).await?;

    confirm(repository, unconfirmed.in_time, intent.number).await?;

    remove_points(repository, intent, &going).await?;
    let mut kept = kept;
    for pack in &condemned {
        if is_held(repository, &names::pack(pack)).await? {
            kept.insert(*pack);
            ended.held_objects += 1;
        }
    }
    let gone: HashSet<PackId> = condemned.difference(&kept).copied().collect();
    let there = gone.iter().filter(|id| !marks.loaded.lost.contains(id)).filter_map(|id| tallies.get(id));
    ended.removed_bytes = there.map(|tally| tally.total_bytes).sum();
    ended.removed_packs = gone.iter().filter(|id| !marks.loaded.lost.contains(id)).count() as u64;
    ended.kept_packs = kept.len() as u64;
    remove_packs(repository, &gone, options).await?;

    options.monitor.tell(MaintenanceStage::Index, 0, 0, 0);
    let mut unnamed = lost_for_good(&marks, &tallies);
    unnamed.extend(&gone);
    report.replaced_segments += repository.index.tidy(&*repository.backend, &repository.keys, &unnamed).await?;
    remove_records(repository, intent).await?;

    let mut kept: Vec<PackId> = kept.into_iter().collect();
    kept.sort_unstable();
    let end = SweepEnd {
        number: intent.number,
        ended_unix_ms: records::unix_ms(),
        removed_points: ended.removed_points.len() as u64,
        removed_packs: ended.removed_packs,
        removed_bytes: ended.removed_bytes,
        carried_bytes: ended.carried_bytes,
        kept,
    };
    records::write(repository, &names::end(intent.number), &end).await?;
    report.ended = Some(ended);
    Ok(())
}

/// Stores again what is needed and has no copy outside of condemned packs. Returns the packs that hold something needed
/// that can not be read.
async fn carry(
    repository: &Arc<Inner>,
    marks: &Marks,
    condemned: &HashSet<PackId>,
    options: &SweepOptions,
    ended: &mut SweepEnded,
) -> Result<HashSet<PackId>, StoreError> {
    let pool = WorkerPool::start(options.writer.threads);
    let pool = pool.map_err(|error| StoreError::io("start threads for", "this process", error))?;
    let sink = Sink::start(Arc::clone(repository), pool, options.writer);
    // What lies together stays together: they share frames as if they were of one disk.
    let disk = sink.new_disk();
    let mut kept = HashSet::new();
    let (mut done, mut read_bytes) = (0, 0);
    let is_needed_of = |id: &PackId| condemned.contains(id) && !marks.loaded.lost.contains(id);
    for entries in marks.marked_in(is_needed_of) {
        for MarkedEntry { entry, share_bytes } in entries {
            if sink.is_known(&entry.id, entry.kind) {
                continue;
            }
            let read = match repository.copy(entry).await {
                // Another condemned pack may have it too.
                Err(error) if error.is_loss() => repository.chunk(&entry.id, entry.kind).await,
                read => read,
            };
            match read {
                Ok(plain) => {
                    read_bytes += plain.len() as u64;
                    let new = sink.offer_again(entry.id, entry.kind, &plain, disk).await?;
                    ended.carried_bytes += if new { share_bytes } else { 0 };
                }
                Err(error) if error.is_loss() => {
                    let pack = entry.pack;
                    tracing::warn!(object = names::pack(&pack), error = %error, "pack is kept, what is needed of it can not be read");
                    kept.insert(pack);
                }
                Err(error) => return Err(error),
            }
            done += 1;
            options.monitor.tell(MaintenanceStage::Carry, done, 0, read_bytes);
        }
    }
    sink.flush().await?;
    sink.settle().await?;
    Ok(kept)
}

async fn remove_points(repository: &Inner, intent: &SweepIntent, going: &BTreeSet<PointId>) -> Result<(), StoreError> {
    let mut folders = BTreeSet::new();
    let mut objects = Vec::new();
    for point in intent.forgotten.iter().filter(|point| going.contains(&point.point)) {
        let name = names::point(&point.pool_uuid, &point.vm_uuid, &point.point)?;
        folders.extend(name.rsplit_once('/').map(|(folder, _)| folder.to_owned()));
        objects.push(name);
    }
    remove_all(repository, objects).await?;
    // A point must not come back without its chunks.
    settle(repository, folders).await
}

async fn remove_packs(repository: &Inner, gone: &HashSet<PackId>, options: &SweepOptions) -> Result<(), StoreError> {
    let planned = gone.len() as u64;
    options.monitor.tell(MaintenanceStage::Remove, 0, planned, 0);
    remove_all(repository, gone.iter().map(names::pack).collect()).await?;
    options.monitor.tell(MaintenanceStage::Remove, planned, planned, 0);
    settle(repository, gone.iter().map(names::pack_folder).collect()).await
}

/// Removes records kind by kind, in the order of the intent: the next kind when the one before is gone for good.
async fn remove_records(repository: &Inner, intent: &SweepIntent) -> Result<(), StoreError> {
    let folders = [names::RECEIPTS, names::TOMBSTONES, names::UNDONE, names::DAMAGE];
    for folder in folders {
        let names = intent.stale_records.iter().map(|name| format!("{}/{name}", names::RECORDS));
        let names: Vec<String> = names.filter(|name| names::last_segment(name, folder).is_some()).collect();
        if !names.is_empty() {
            for name in &names {
                // The next kind may only go without it.
                if is_held(repository, name).await? {
                    return Ok(());
                }
            }
            remove_all(repository, names).await?;
            settle(repository, BTreeSet::from([folder.to_owned()])).await?;
        }
    }
    Ok(())
}

async fn remove_all(repository: &Inner, names: Vec<String>) -> Result<(), StoreError> {
    let remove = |name: String| async move { records::remove(repository, &name).await };
    stream::iter(names.into_iter().map(remove).collect::<Vec<_>>())
        .buffer_unordered(records::PARALLEL)
        .try_collect::<()>()
        .await
}

/// Makes removals durable. Folders that nobody has made hold nothing.
async fn settle(repository: &Inner, folders: BTreeSet<String>) -> Result<(), StoreError> {
    let folders: Vec<String> = folders.into_iter().collect();
    let settled = repository.backend.settle(&folders).await;
    settled.map_err(|error| StoreError::io("sync", names::PACKS, error))
}
