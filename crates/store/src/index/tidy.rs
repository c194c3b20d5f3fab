//! Index segments are replaced: runs of the same level become one of the next, and entries of packs that are gone are left
//! out once they are many.
//!
//! New segments are published before old ones are removed, so a chunk is found at every moment. Whoever is interrupted in
//! between leaves entries in two runs, or a run that is not whole and so says nothing of its packs; that is no harm, and
//! the next one takes it up. Memory: one segment that is being made.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use xenvault_store_format::{
    FormatError, Keys, MAX_RUN_LEVEL, MAX_RUN_PARTS, MAX_SEGMENT_PACKS, PackId, RunPart, SegmentContent, encode_index,
    parts_for,
};

use super::{Index, Loaded, Segment};
use crate::StoreError;
use crate::backend::{Backend, is_held};
use crate::names;

/// So many runs of one level may lie around: a backup makes one or two of level 0.
const RUNS_PER_LEVEL: usize = 16;
/// A run is made anew when this part of its packs is gone.
const GONE_SHARE: usize = 4;
/// Or when it has so few entries that it costs nothing.
const FEW_ENTRIES: usize = 32 * 1024;
/// So long a run may be on its way: after that, what is there of it is a left-over.
const UNFINISHED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Runs that become one.
#[derive(Debug)]
struct Job {
    old: Vec<Arc<Segment>>,
    level: u8,
}

impl Index {
    /// Puts runs together where there are many, leaves out what lies in the packs `gone` where that is cheap, and has
    /// the others on record. The packs have to be removed already. Returns how many old segments went.
    pub(crate) async fn tidy(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        gone: &HashSet<PackId>,
    ) -> Result<u64, StoreError> {
        self.read_all(backend, keys).await?;
        let mut replaced = self.remove_unfinished(backend).await?;
        let mut gone = gone.clone();
        gone.extend(self.snapshot().gone.iter());
        let gone = Arc::new(gone);
        for job in jobs(&self.snapshot(), &gone) {
            if is_any_held(backend, &job.old).await? {
                // It would only be doubled; a later sweep replaces it.
                continue;
            }
            self.merge(backend, keys, &job, &gone).await?;
            for name in job.old.iter().filter_map(|segment| segment.name.as_ref()) {
                backend.remove(name).await.map_err(|error| StoreError::io("remove", name, error))?;
                replaced += 1;
            }
            let mut seen = self.seen.lock().await;
            self.retain(|segment| !job.old.iter().any(|old| Arc::ptr_eq(old, segment)));
            for name in job.old.iter().filter_map(|segment| segment.name.as_ref()) {
                seen.segments.remove(name);
            }
            seen.packs = self.loaded().covered();
        }
        self.put_on_record(backend, keys, &gone).await?;
        Ok(replaced)
    }

    /// Publishes which of the packs that runs name were removed, so that nobody has to look for them again.
    async fn put_on_record(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        gone: &HashSet<PackId>,
    ) -> Result<(), StoreError> {
        let loaded = self.snapshot();
        let named = loaded.segments.iter().flat_map(|segment| segment.packs());
        let news: HashSet<PackId> = named.filter(|pack| gone.contains(pack) && !loaded.gone.contains(pack)).collect();
        let news: Vec<PackId> = news.into_iter().collect();
        for some in news.chunks(MAX_SEGMENT_PACKS) {
            let place = RunPart::alone(*Uuid::new_v4().as_bytes());
            let content = SegmentContent { gone: some.to_vec(), ..SegmentContent::default() };
            let bytes = encode_index(keys, place, content).map_err(|error| StoreError::format(names::INDEX, error))?;
            self.publish_bytes(backend, keys, bytes).await?;
        }
        Ok(())
    }

    /// Publishes what the old segments know as one run.
    async fn merge(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        job: &Job,
        gone: &Arc<HashSet<PackId>>,
    ) -> Result<(), StoreError> {
        let loaded = self.snapshot();
        let others = loaded.segments.iter().filter(|segment| !job.old.iter().any(|old| Arc::ptr_eq(old, segment)));
        let named: HashSet<PackId> =
            others.flat_map(|segment| segment.packs()).filter(|pack| gone.contains(pack)).collect();
        let named = Arc::new(named);
        let total: u64 = job.old.iter().map(|segment| segment.len() as u64).sum();
        let mut parts = parts_for(total);
        loop {
            let run = *Uuid::new_v4().as_bytes();
            let (mut written, mut is_too_much) = (Vec::new(), false);
            for part in 0..parts {
                let place = RunPart { run, part, parts, level: job.level };
                let (old, keys_of_part) = (job.old.clone(), Arc::clone(keys));
                let (gone, named) = (Arc::clone(gone), Arc::clone(&named));
                let encoded = tokio::task::spawn_blocking(move || encode(&old, &keys_of_part, place, &gone, &named));
                let encoded = encoded
                    .await
                    .map_err(|error| StoreError::io("read", names::INDEX, std::io::Error::other(error)))?;
                match encoded {
                    Ok(None) => {}
                    Ok(Some(bytes)) => written.push(self.publish_bytes(backend, keys, bytes).await?),
                    // Chance has put too much into one part. What was written is of a run that is never whole.
                    Err(FormatError::Limit { .. }) if parts < MAX_RUN_PARTS / 2 => {
                        is_too_much = true;
                        break;
                    }
                    Err(error) => return Err(StoreError::format(names::INDEX, error)),
                }
            }
            if !is_too_much {
                return Ok(());
            }
            self.withdraw(backend, written).await?;
            parts *= 2;
        }
    }

    /// Removes segments of runs that somebody began and did not end.
    async fn remove_unfinished(&self, backend: &dyn Backend) -> Result<u64, StoreError> {
        let loaded = self.snapshot();
        let parts = loaded.runs.iter().filter(|run| !run.is_whole()).flat_map(|run| run.segments(&loaded.segments));
        let names: Vec<String> = parts.filter_map(|segment| segment.name.clone()).collect();
        if names.is_empty() {
            return Ok(0);
        }
        let now = backend.now().await.map_err(|error| StoreError::io("ask for the time of", "the store", error))?;
        let mut old = Vec::new();
        for name in names {
            match backend.modified(&name).await {
                Ok(appeared) if now.duration_since(appeared).unwrap_or_default() >= UNFINISHED => old.push(name),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(StoreError::io("ask for the time of", &name, error)),
            }
        }
        let count = old.len() as u64;
        self.withdraw(backend, old).await?;
        Ok(count)
    }

    async fn withdraw(&self, backend: &dyn Backend, names: Vec<String>) -> Result<(), StoreError> {
        for name in &names {
            backend.remove(name).await.map_err(|error| StoreError::io("remove", name, error))?;
        }
        let mut seen = self.seen.lock().await;
        self.retain(|segment| !segment.name.as_ref().is_some_and(|name| names.contains(name)));
        names.iter().for_each(|name| {
            seen.segments.remove(name);
        });
        seen.packs = self.loaded().covered();
        Ok(())
    }
}

/// Whether one of the segments is locked.
async fn is_any_held(backend: &dyn Backend, segments: &[Arc<Segment>]) -> Result<bool, StoreError> {
    for name in segments.iter().filter_map(|segment| segment.name.as_ref()) {
        if is_held(backend, name).await.map_err(|error| StoreError::io("remove", name, error))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What is worth doing.
fn jobs(loaded: &Loaded, gone: &HashSet<PackId>) -> Vec<Job> {
    let mut levels: BTreeMap<u8, (usize, Vec<Arc<Segment>>)> = BTreeMap::new();
    let mut jobs = Vec::new();
    for run in loaded.runs.iter().filter(|run| run.is_whole()) {
        let segments: Vec<Arc<Segment>> = run.segments(&loaded.segments).cloned().collect();
        if segments.iter().any(|segment| segment.name.is_none()) {
            continue;
        }
        let packs = segments.iter().flat_map(|segment| segment.packs());
        let (total, dead) =
            packs.fold((0, 0), |(total, dead), pack| (total + 1, dead + usize::from(gone.contains(&pack))));
        let entries: usize = segments.iter().map(|segment| segment.len()).sum();
        if dead > 0 && (entries <= FEW_ENTRIES || dead * GONE_SHARE >= total) {
            jobs.push(Job { old: segments, level: run.level });
        } else {
            let (runs, together) = levels.entry(run.level).or_default();
            *runs += 1;
            together.extend(segments);
        }
    }
    let many = levels.into_iter().filter(|(_, (runs, _))| *runs >= RUNS_PER_LEVEL);
    jobs.extend(many.map(|(level, (_, old))| Job { old, level: (level + 1).min(MAX_RUN_LEVEL) }));
    jobs
}

/// One part of what the segments know, without what lies in packs that are gone. Of these, the ones that other runs name
/// stay on record. `None` if nothing is left of a run.
fn encode(
    old: &[Arc<Segment>],
    keys: &Keys,
    place: RunPart,
    gone: &HashSet<PackId>,
    named: &HashSet<PackId>,
) -> Result<Option<Vec<u8>>, FormatError> {
    let is_here = |pack: &PackId| RunPart::of_pack(pack, place.parts) == place.part;
    let mut content = SegmentContent::default();
    for segment in old {
        content.entries.extend(segment.entries_of(place).filter(|entry| !gone.contains(&entry.pack)));
        content.packs.extend(segment.packs().filter(|pack| is_here(pack) && !gone.contains(pack)));
        content.gone.extend(segment.gone().filter(|pack| is_here(pack) && named.contains(pack)));
    }
    let nothing = content.packs.is_empty() && content.gone.is_empty() && content.entries.is_empty();
    if nothing && place.parts == 1 { Ok(None) } else { encode_index(keys, place, content).map(Some) }
}
