//! Finding chunks: sorted segments in mapped files, each behind a compact filter.
//!
//! Opening reads the headers of segments and their lists of packs; entries and filters stay on the medium, and a page of
//! them is authenticated when a look-up comes to it. Memory: one bit per page of 4 KiB, and what names the packs. A pack
//! that no whole run of segments covers (its writer was killed before it published one, or a segment is damaged) is
//! found by the directory at its end, so an index that is lost costs time and nothing else.

mod cache;
mod directory;
mod runs;
mod segment;
mod tidy;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tokio::sync::Mutex;
use uuid::Uuid;
use xenvault_store_format::{
    ChunkId, ChunkKind, FormatError, IndexEntry, Keys, MAX_RUN_PARTS, PackId, RunPart, SegmentContent, encode_index,
    parts_for,
};

use crate::StoreError;
use crate::backend::{Backend, exists, put};
use crate::names;

pub(crate) use cache::IndexCache;
pub use cache::IndexCacheOptions;
pub(crate) use directory::{header_of, read_directory};
use runs::Runs;
pub(crate) use segment::Segment;

/// Packs whose directories are read before their chunks become known together.
const LEARN_PACKS: usize = 64;
/// Chunks of such packs that are held in memory, beyond those of one pack.
const LEARN_ENTRIES: usize = 128 * 1024;
/// Segments that are loaded at the same time.
const LOADS_AT_ONCE: usize = 16;
/// So many packs that seem to be gone are asked for one by one.
const ASKED_FOR: usize = 32;

/// The index of one open repository.
#[derive(Debug, Default)]
pub(crate) struct Index {
    loaded: RwLock<Arc<Loaded>>,
    /// What was looked at already. Also lets one refresh run at a time.
    seen: Mutex<Seen>,
    /// Segments are not believed: everything is read from the directories of the packs.
    is_distrusted: AtomicBool,
    /// Copies on this machine, if they are wanted.
    cache: OnceLock<IndexCache>,
}

/// What was loaded at one moment. Segments come and go; whoever holds this keeps theirs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) segments: Vec<Arc<Segment>>,
    runs: Runs,
    /// Packs that segments may name and that a sweep has removed.
    pub(crate) gone: Arc<HashSet<PackId>>,
    /// Packs that segments name, that no sweep has removed, and that are not there: what they held has to be stored again.
    pub(crate) lost: HashSet<PackId>,
    pub(crate) barred: Arc<Barred>,
}

/// Copies that are there and must not be counted on.
#[derive(Debug, Default)]
pub(crate) struct Barred {
    /// Packs that a sweep has condemned: readable as long as they are there, and never referred to again.
    pub(crate) condemned: HashSet<PackId>,
    /// Packs that a verification found to be unreadable.
    pub(crate) damaged_packs: HashSet<PackId>,
    /// Single copies that a verification found to be unreadable.
    pub(crate) damaged_copies: HashSet<(ChunkId, PackId)>,
}

impl Barred {
    /// Whether a verification has marked this copy.
    pub(crate) fn is_damaged(&self, chunk: &ChunkId, pack: &PackId) -> bool {
        self.damaged_packs.contains(pack) || self.damaged_copies.contains(&(*chunk, *pack))
    }
}

#[derive(Debug, Default)]
struct Seen {
    segments: HashSet<String>,
    /// Packs that are covered by loaded segments.
    packs: HashSet<PackId>,
    /// Packs whose directories can not be read.
    unreadable: HashSet<PackId>,
}

impl Index {
    /// Finds a copy of a chunk that may be referred to: in a pack that was there at the last [`Self::refresh`], that
    /// no sweep has condemned, and that no verification has found to be damaged.
    pub(crate) fn find(&self, id: &ChunkId, kind: ChunkKind) -> Option<IndexEntry> {
        let loaded = self.loaded();
        loaded.copies(id, kind).find(|entry| loaded.is_sound(entry) && !loaded.is_condemned(entry))
    }

    /// The copy of a chunk to be read first, for whoever refers to it already.
    pub(crate) fn find_to_read(&self, id: &ChunkId, kind: ChunkKind) -> Option<IndexEntry> {
        self.find(id, kind).or_else(|| self.copies(id, kind).into_iter().next())
    }

    /// Whether there is a copy of a chunk that can be read as far as anybody knows, for whoever refers to it already.
    pub(crate) fn is_there(&self, id: &ChunkId, kind: ChunkKind) -> bool {
        let loaded = self.loaded();
        loaded.copies(id, kind).any(|entry| loaded.is_sound(&entry))
    }

    /// Every place of a chunk that is known; those in packs that seem to be gone or damaged are the last.
    pub(crate) fn copies(&self, id: &ChunkId, kind: ChunkKind) -> Vec<IndexEntry> {
        let loaded = self.loaded();
        let mut copies: Vec<IndexEntry> = Vec::new();
        for entry in loaded.copies(id, kind) {
            if !copies.contains(&entry) {
                copies.push(entry);
            }
        }
        copies.sort_by_key(|entry| (!loaded.is_sound(entry), loaded.is_condemned(entry)));
        copies
    }

    /// As [`Self::copies`], after looking for what is new. A look-up can be the first to meet a page that is damaged:
    /// then what its segment knew is read from the packs.
    pub(crate) async fn fresh_copies(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        id: &ChunkId,
        kind: ChunkKind,
    ) -> Result<Vec<IndexEntry>, StoreError> {
        loop {
            self.refresh(backend, keys).await?;
            let copies = self.copies(id, kind);
            if !copies.is_empty() || !self.loaded().segments.iter().any(|segment| segment.is_damaged()) {
                return Ok(copies);
            }
        }
    }

    /// Whether packs that segments name are gone, or copies are marked as damaged.
    pub(crate) fn has_losses(&self) -> bool {
        let Loaded { lost, barred, .. } = &*self.loaded();
        let marked = !barred.damaged_packs.is_empty() || !barred.damaged_copies.is_empty();
        marked || lost.iter().any(|pack| !barred.condemned.contains(pack))
    }

    /// Keeps copies of segments from now on; the first answer to where counts.
    pub(crate) fn cache(&self, cache: IndexCache) {
        let _ = self.cache.set(cache);
    }

    /// As [`Self::distrust`], before anything was loaded.
    pub(crate) fn believe_packs_only(&mut self) {
        *self.is_distrusted.get_mut() = true;
    }

    /// From now on no segment is believed: the next [`Self::refresh`] reads the directories of all packs. Says whether
    /// that is new. What a segment says is authentic; but whoever has a datamover's key can write one that lies.
    pub(crate) async fn distrust(&self) -> bool {
        let mut seen = self.seen.lock().await;
        let is_new = !self.is_distrusted.swap(true, Ordering::AcqRel);
        if is_new {
            self.retain(|segment| segment.name.is_none());
            seen.segments.clear();
            seen.packs = self.loaded().covered();
        }
        is_new
    }

    /// From now on these copies are not referred to.
    pub(crate) fn bar(&self, barred: Arc<Barred>) {
        self.change(|loaded| loaded.barred = barred);
    }

    pub(crate) fn barred(&self) -> Arc<Barred> {
        Arc::clone(&self.loaded().barred)
    }

    /// What is loaded now.
    pub(crate) fn snapshot(&self) -> Arc<Loaded> {
        self.loaded()
    }

    fn loaded(&self) -> Arc<Loaded> {
        Arc::clone(&self.loaded.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut Loaded)) {
        let mut slot = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut slot));
    }

    /// Loads segments that appeared since, and the directories of packs that no segment covers.
    ///
    /// What is damaged is left out with a warning: chunks that only it knows are missing, others are not. If the call
    /// fails or is dropped half way, the next one takes up what this one did not get to.
    pub(crate) async fn refresh(&self, backend: &dyn Backend, keys: &Arc<Keys>) -> Result<(), StoreError> {
        let mut seen = self.seen.lock().await;
        // Packs are listed before segments: a pack that is indexed in between is then covered and not read needlessly.
        let packs = backend.list(names::PACKS).await.map_err(|error| StoreError::io("list", names::PACKS, error))?;
        let listed = backend.list(names::INDEX).await.map_err(|error| StoreError::io("list", names::INDEX, error))?;
        let listed_segments: HashSet<String> =
            if self.is_distrusted.load(Ordering::Acquire) { HashSet::new() } else { listed.into_iter().collect() };
        let new: Vec<String> = listed_segments.iter().filter(|name| !seen.segments.contains(*name)).cloned().collect();
        let mut loads = stream::iter(new.into_iter().map(|name| async move {
            let loaded = Segment::load(backend, keys, &name, self.cache.get()).await;
            (name, loaded)
        }))
        .buffer_unordered(LOADS_AT_ONCE);
        let mut loaded = Vec::new();
        while let Some((name, segment)) = loads.next().await {
            match segment {
                Ok(segment) => loaded.push(segment),
                // A sweep has put another one in its place.
                Err(error) if error.is_gone() => continue,
                Err(error) => {
                    tracing::warn!(object = name, error = %error, "index segment left out, its packs are read instead");
                    // What is damaged, or of a later release, stays so; what could not be reached is tried again.
                    if !error.is_loss() {
                        continue;
                    }
                }
            }
            seen.segments.insert(name);
        }
        drop(loads);
        // All at once: look-ups go on, and the runs are put together once.
        self.push(loaded);
        self.drop_replaced(backend, &mut seen, &listed_segments).await?;
        self.drop_damaged(&mut seen);
        seen.packs = self.loaded().covered();
        let listed: BTreeMap<PackId, String> =
            packs.into_iter().filter_map(|name| names::pack_id(&name).map(|id| (id, name))).collect();
        self.learn(backend, keys, &mut seen, &listed).await?;
        self.look_for_lost(backend, &seen, &listed).await
    }

    /// Lets go of segments that a sweep has replaced. That a listing lacks them is not enough: each is asked for.
    async fn drop_replaced(
        &self,
        backend: &dyn Backend,
        seen: &mut Seen,
        listed: &HashSet<String>,
    ) -> Result<(), StoreError> {
        let mut gone = HashSet::new();
        for name in self.loaded().segments.iter().filter_map(|segment| segment.name.as_ref()) {
            if !listed.contains(name) {
                let there = exists(backend, name).await.map_err(|error| StoreError::io("look for", name, error))?;
                if !there {
                    gone.insert(name.clone());
                }
            }
        }
        if !gone.is_empty() {
            self.retain(|segment| !segment.name.as_ref().is_some_and(|name| gone.contains(name)));
            seen.segments.retain(|name| !gone.contains(name));
        }
        Ok(())
    }

    /// Lets go of segments of which a page turned out to be damaged. Their objects are not loaded again: what they knew
    /// is read from the directories of the packs. Of those that are copies only the copy was damaged, as far as anybody
    /// knows: the next time they are fetched again.
    fn drop_damaged(&self, seen: &mut Seen) {
        let loaded = self.loaded();
        let damaged: Vec<&Arc<Segment>> = loaded.segments.iter().filter(|segment| segment.is_damaged()).collect();
        if !damaged.is_empty() {
            let copies = damaged.iter().filter(|segment| segment.is_copy());
            copies.filter_map(|segment| segment.name.as_ref()).for_each(|name| {
                seen.segments.remove(name);
            });
            self.retain(|segment| !segment.is_damaged());
        }
    }

    /// Reads every page of the index, so that from now on nothing of it turns out to be damaged, and makes up for what
    /// is. Whoever is going to remove something does this first.
    pub(crate) async fn read_all(&self, backend: &dyn Backend, keys: &Arc<Keys>) -> Result<(), StoreError> {
        loop {
            let loaded = self.loaded();
            let read = tokio::task::spawn_blocking(move || {
                let damage = loaded.segments.iter().filter_map(|segment| segment.use_all().err());
                damage.inspect(|error| tracing::warn!(error = %error, "index segment is damaged")).count()
            });
            let damaged = read.await.map_err(|error| StoreError::io("read", names::INDEX, io::Error::other(error)))?;
            if damaged == 0 {
                return Ok(());
            }
            self.refresh(backend, keys).await?;
        }
    }

    /// Reads the directories of packs that no segment covers.
    async fn learn(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        seen: &mut Seen,
        listed: &BTreeMap<PackId, String>,
    ) -> Result<(), StoreError> {
        let (mut entries, mut learned) = (Vec::new(), Vec::new());
        let is_unknown = |id: &PackId| !seen.packs.contains(id) && !seen.unreadable.contains(id);
        let unknown: Vec<_> = listed.iter().filter(|(id, _)| is_unknown(id)).collect();
        for (number, &(id, name)) in unknown.iter().enumerate() {
            match read_directory(backend, keys, *id, name).await {
                Ok(found) => {
                    entries.extend(found.index_entries());
                    learned.push(*id);
                }
                // A sweep was faster.
                Err(error) if error.is_gone() => {}
                Err(error @ (StoreError::Damaged { .. } | StoreError::NewerFormat { .. })) => {
                    tracing::warn!(object = name, error = %error, "pack left out of the index");
                    seen.unreadable.insert(*id);
                }
                Err(error) => return Err(error),
            }
            if number + 1 == unknown.len() || learned.len() >= LEARN_PACKS || entries.len() >= LEARN_ENTRIES {
                let mut segments = Vec::new();
                for bytes in encode_run(keys, 0, &learned, &std::mem::take(&mut entries))? {
                    segments.push(Segment::unpublished(keys, bytes).await?);
                }
                self.push(segments);
                // Not before their chunks can be found, and nothing in between may end this call.
                seen.packs.extend(learned.drain(..));
            }
        }
        Ok(())
    }

    /// Packs that segments name and that are not listed. They were listed before the segments, so one that has only
    /// just appeared may be among them: each is asked for by its name.
    async fn look_for_lost(
        &self,
        backend: &dyn Backend,
        seen: &Seen,
        listed: &BTreeMap<PackId, String>,
    ) -> Result<(), StoreError> {
        let gone = Arc::clone(&self.loaded().gone);
        let is_missing = |id: &&PackId| !listed.contains_key(id) && !gone.contains(id);
        let mut missing: Vec<PackId> = seen.packs.iter().filter(is_missing).copied().collect();
        if missing.len() > ASKED_FOR {
            // A listing costs less then. One that is late makes a chunk be stored once more, and that is all.
            let again = backend.list(names::PACKS).await;
            let again = again.map_err(|error| StoreError::io("list", names::PACKS, error))?;
            let again: HashSet<PackId> = again.iter().filter_map(|name| names::pack_id(name)).collect();
            missing.retain(|id| !again.contains(id));
        }
        let mut lost = HashSet::new();
        for (number, id) in missing.into_iter().enumerate() {
            let name = names::pack(&id);
            let there =
                number < ASKED_FOR && exists(backend, &name).await.map_err(|e| StoreError::io("look for", &name, e))?;
            if !there {
                lost.insert(id);
            }
        }
        if lost != self.loaded().lost {
            let condemned = self.barred();
            let unexpected = lost.iter().filter(|id| !condemned.condemned.contains(id)).count();
            tracing::warn!(packs = unexpected, "packs that the index names are gone; what they held is stored again");
            self.change(|loaded| loaded.lost = lost);
        }
        Ok(())
    }

    /// Publishes everything that is known of some packs as one run, and loads it.
    pub(crate) async fn publish(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        entries: Vec<IndexEntry>,
    ) -> Result<u64, StoreError> {
        let mut packs: Vec<PackId> = entries.iter().map(|entry| entry.pack).collect();
        packs.sort_unstable();
        packs.dedup();
        let mut stored = 0;
        for bytes in encode_run(keys, 0, &packs, &entries)? {
            stored += bytes.len() as u64;
            self.publish_bytes(backend, keys, bytes).await?;
        }
        Ok(stored)
    }

    /// Publishes what [`Self::refresh`] learned from directories of packs, so that nobody has to read them again.
    pub(crate) async fn publish_learned(&self, backend: &dyn Backend, keys: &Arc<Keys>) -> Result<u64, StoreError> {
        let loaded = self.loaded();
        let mut stored = 0;
        for segment in loaded.segments.iter().filter(|segment| segment.name.is_none()) {
            if segment.packs().any(|pack| loaded.barred.condemned.contains(&pack)) {
                // A sweep is about to remove it: what is still needed of it will be in another pack.
                continue;
            }
            stored += segment.bytes().len() as u64;
            self.publish_bytes(backend, keys, segment.bytes().to_vec()).await?;
            // Only now: a look-up must find the chunks at every moment.
            self.retain(|other| !Arc::ptr_eq(other, segment));
        }
        Ok(stored)
    }

    /// Returns the name of the object.
    async fn publish_bytes(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        bytes: Vec<u8>,
    ) -> Result<String, StoreError> {
        let name = names::new_index();
        put(backend, &name, Bytes::from(bytes)).await.map_err(|error| StoreError::io("write", &name, error))?;
        let segment = Segment::load(backend, keys, &name, self.cache.get()).await?;
        let mut seen = self.seen.lock().await;
        seen.segments.insert(name.clone());
        self.push(vec![segment]);
        seen.packs = self.loaded().covered();
        Ok(name)
    }

    fn push(&self, segments: Vec<Segment>) {
        if !segments.is_empty() {
            self.change(|loaded| {
                loaded.segments.extend(segments.into_iter().map(Arc::new));
                loaded.put_together();
            });
        }
    }

    fn retain(&self, keep: impl Fn(&Arc<Segment>) -> bool) {
        self.change(|loaded| {
            loaded.segments.retain(keep);
            loaded.put_together();
        });
    }
}

/// The segments of a run that holds everything that is known of these packs.
fn encode_run(keys: &Keys, level: u8, packs: &[PackId], entries: &[IndexEntry]) -> Result<Vec<Vec<u8>>, StoreError> {
    let run = *Uuid::new_v4().as_bytes();
    let mut parts = parts_for(entries.len() as u64);
    loop {
        let encode = |part: u32| {
            let entries = entries.iter().filter(|entry| RunPart::of_chunk(&entry.id, parts) == part);
            let packs = packs.iter().filter(|pack| RunPart::of_pack(pack, parts) == part);
            let content = SegmentContent {
                packs: packs.copied().collect(),
                entries: entries.copied().collect(),
                gone: Vec::new(),
            };
            encode_index(keys, RunPart { run, part, parts, level }, content)
        };
        match (0..parts).map(encode).collect::<Result<Vec<_>, _>>() {
            // Chance has put too much into one part.
            Err(FormatError::Limit { .. }) if parts < MAX_RUN_PARTS / 2 => parts *= 2,
            encoded => return encoded.map_err(|error| StoreError::format(names::INDEX, error)),
        }
    }
}

impl Loaded {
    fn copies<'a>(&'a self, id: &'a ChunkId, kind: ChunkKind) -> impl Iterator<Item = IndexEntry> + 'a {
        self.positions(id).map(|(_, _, entry)| entry).filter(move |entry| entry.kind == kind)
    }

    /// The places of a chunk: number of the segment, number of the entry, and the entry.
    pub(crate) fn positions<'a>(&'a self, id: &'a ChunkId) -> impl Iterator<Item = (usize, usize, IndexEntry)> + 'a {
        self.runs.candidates(id).flat_map(move |at| {
            let segment = self.segments.get(at);
            let numbers = segment.map_or(0..0, |segment| segment.positions(id));
            numbers.filter_map(move |number| Some((at, number, segment?.entry(number)?)))
        })
    }

    /// The packs of which everything is known.
    fn covered(&self) -> HashSet<PackId> {
        self.runs.covered(&self.segments)
    }

    /// Everything that is known of a pack, in no order. Reads every run that lists it.
    pub(crate) fn entries_in(&self, pack: &PackId) -> Vec<IndexEntry> {
        let lists_it = |segment: &Arc<Segment>| segment.packs().any(|listed| listed == *pack);
        let runs = self.runs.iter().filter(|run| run.segments(&self.segments).any(lists_it));
        let segments = runs.flat_map(|run| run.segments(&self.segments));
        let entries = segments.flat_map(|segment| segment.entries().map(|(_, entry)| entry));
        entries.filter(|entry| entry.pack == *pack).collect()
    }

    fn put_together(&mut self) {
        self.runs = Runs::of(&self.segments);
        self.gone = Arc::new(self.segments.iter().flat_map(|segment| segment.gone()).collect());
    }

    /// Whether a copy can be read as far as anybody knows.
    pub(crate) fn is_sound(&self, entry: &IndexEntry) -> bool {
        let pack = &entry.pack;
        !self.gone.contains(pack) && !self.lost.contains(pack) && !self.barred.is_damaged(&entry.id, pack)
    }

    fn is_condemned(&self, entry: &IndexEntry) -> bool {
        !self.barred.condemned.is_empty() && self.barred.condemned.contains(&entry.pack)
    }
}
