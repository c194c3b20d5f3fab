//! Finding chunks: sorted segments in mapped files, each behind a compact filter.
//!
//! Memory: 12 bits per chunk for the filters; the segments themselves stay on the medium. A pack that no readable
//! segment covers (its writer was killed before it published one, or the segment is damaged) is found by the directory
//! at its end, so an index that is lost costs time and nothing else.

mod cache;
mod directory;
mod segment;
mod tidy;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use bytes::Bytes;
use tokio::sync::Mutex;
use xenvault_store_format::{ChunkId, ChunkKind, IndexEntry, Keys, MAX_SEGMENT_ENTRIES, PackId, encode_index};

use crate::StoreError;
use crate::backend::{Backend, exists, put};
use crate::names;

pub(crate) use cache::IndexCache;
pub use cache::IndexCacheOptions;
pub(crate) use directory::read_directory;
pub(crate) use segment::Segment;

/// Packs whose directories are read before their chunks become known together.
const LEARN_PACKS: usize = 64;
/// Chunks of such packs that are held in memory, beyond those of one pack.
const LEARN_ENTRIES: usize = 128 * 1024;

/// The index of one open repository.
#[derive(Debug, Default)]
pub(crate) struct Index {
    loaded: RwLock<Arc<Loaded>>,
    /// What was looked at already. Also lets one refresh run at a time.
    seen: Mutex<Seen>,
    /// Copies on this machine, if they are wanted.
    cache: OnceLock<IndexCache>,
}

/// What was loaded at one moment. Segments come and go; whoever holds this keeps theirs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) segments: Vec<Arc<Segment>>,
    /// Packs that segments name and that are not there: what they held is known, and has to be stored again.
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
        let listed_segments: HashSet<String> = listed.into_iter().collect();
        for name in listed_segments.iter().filter(|name| !seen.segments.contains(*name)).cloned().collect::<Vec<_>>() {
            match Segment::load(backend, keys, &name, self.cache.get()).await {
                Ok(segment) => {
                    seen.packs.extend(segment.packs());
                    self.push(segment);
                }
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
        self.drop_replaced(backend, &mut seen, &listed_segments).await?;
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
            self.change(|loaded| {
                loaded.segments.retain(|segment| !segment.name.as_ref().is_some_and(|name| gone.contains(name)));
            });
            seen.segments.retain(|name| !gone.contains(name));
            seen.packs = tidy::covered(&self.loaded());
        }
        Ok(())
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
                // A segment holds one place of a chunk, and no copy may become unknown: one of them can be damaged.
                for layer in tidy::layers(std::mem::take(&mut entries)) {
                    let bytes = encode_index(keys, &layer);
                    let bytes = bytes.map_err(|error| StoreError::format(names::INDEX, error))?;
                    self.push(Segment::unpublished(keys, bytes).await?);
                }
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
        let mut lost = HashSet::new();
        for id in seen.packs.iter().filter(|id| !listed.contains_key(id)) {
            let name = names::pack(id);
            match backend.length(&name).await {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    lost.insert(*id);
                }
                Err(error) => return Err(StoreError::io("look for", &name, error)),
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

    /// Publishes a segment, and loads it.
    pub(crate) async fn publish(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        entries: Vec<IndexEntry>,
    ) -> Result<u64, StoreError> {
        let mut stored = 0;
        for part in entries.chunks(MAX_SEGMENT_ENTRIES) {
            let bytes = encode_index(keys, part).map_err(|error| StoreError::format(names::INDEX, error))?;
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
            stored += segment.bytes.len() as u64;
            self.publish_bytes(backend, keys, segment.bytes.to_vec()).await?;
            // Only now: a look-up must find the chunks at every moment.
            self.change(|loaded| loaded.segments.retain(|other| !Arc::ptr_eq(other, segment)));
        }
        Ok(stored)
    }

    async fn publish_bytes(&self, backend: &dyn Backend, keys: &Arc<Keys>, bytes: Vec<u8>) -> Result<(), StoreError> {
        let name = names::new_index();
        put(backend, &name, Bytes::from(bytes)).await.map_err(|error| StoreError::io("write", &name, error))?;
        let segment = Segment::load(backend, keys, &name, self.cache.get()).await?;
        let mut seen = self.seen.lock().await;
        seen.packs.extend(segment.packs());
        seen.segments.insert(name);
        self.push(segment);
        Ok(())
    }

    fn push(&self, segment: Segment) {
        self.change(|loaded| loaded.segments.push(Arc::new(segment)));
    }
}

impl Loaded {
    fn copies<'a>(&'a self, id: &'a ChunkId, kind: ChunkKind) -> impl Iterator<Item = IndexEntry> + 'a {
        let found = self.segments.iter().rev().filter_map(|segment| segment.find(id));
        found.filter(move |entry| entry.kind == kind)
    }

    /// Whether a copy can be read as far as anybody knows.
    pub(crate) fn is_sound(&self, entry: &IndexEntry) -> bool {
        if self.lost.is_empty() && self.barred.damaged_packs.is_empty() && self.barred.damaged_copies.is_empty() {
            return true;
        }
        let pack = entry.salt.pack_id();
        !self.lost.contains(&pack) && !self.barred.is_damaged(&entry.id, &pack)
    }

    fn is_condemned(&self, entry: &IndexEntry) -> bool {
        !self.barred.condemned.is_empty() && self.barred.condemned.contains(&entry.salt.pack_id())
    }
}
