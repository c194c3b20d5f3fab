//! Finding chunks: sorted segments in mapped files, each behind a compact filter.
//!
//! Memory: 12 bits per chunk for the filters; the segments themselves stay on the medium. A pack that no readable
//! segment covers (its writer was killed before it published one, or the segment is damaged) is found by the directory
//! at its end, so an index that is lost costs time and nothing else.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use memmap2::Mmap;
use tokio::sync::Mutex;
use xenvault_store_format::{
    ChunkId, ChunkKind, IndexEntry, IndexLayout, Keys, MAX_SEGMENT_BYTES, MAX_SEGMENT_ENTRIES, PACK_HEADER_BYTES,
    PACK_TRAILER_BYTES, PackHeader, PackId, PackKey, PackTrailer, encode_index,
};

use crate::StoreError;
use crate::backend::{Backend, get, put};
use crate::names;

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
}

#[derive(Clone, Debug, Default)]
struct Loaded {
    segments: Vec<Arc<Segment>>,
    /// Packs that segments name and that are not there: what they held is known, and has to be stored again.
    lost: HashSet<PackId>,
}

#[derive(Debug, Default)]
struct Seen {
    segments: HashSet<String>,
    packs: HashSet<PackId>,
}

impl Index {
    /// Finds a chunk in a pack that was there at the last [`Self::refresh`].
    pub(crate) fn find(&self, id: &ChunkId, kind: ChunkKind) -> Option<IndexEntry> {
        let loaded = self.loaded();
        let is_there = |entry: &IndexEntry| loaded.lost.is_empty() || !loaded.lost.contains(&entry.salt.pack_id());
        loaded.copies(id, kind).find(is_there)
    }

    /// Every place of a chunk that is known; those in packs that seem to be gone are the last.
    pub(crate) fn copies(&self, id: &ChunkId, kind: ChunkKind) -> Vec<IndexEntry> {
        let loaded = self.loaded();
        let mut copies: Vec<IndexEntry> = Vec::new();
        for entry in loaded.copies(id, kind) {
            if !copies.contains(&entry) {
                copies.push(entry);
            }
        }
        copies.sort_by_key(|entry| loaded.lost.contains(&entry.salt.pack_id()));
        copies
    }

    /// Whether packs that segments name are gone.
    pub(crate) fn has_lost(&self) -> bool {
        !self.loaded().lost.is_empty()
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
        for name in listed.into_iter().filter(|name| !seen.segments.contains(name)).collect::<Vec<_>>() {
            match Segment::load(backend, keys, &name).await {
                Ok(segment) => {
                    seen.packs.extend(segment.packs());
                    self.push(segment);
                }
                Err(error @ StoreError::NewerFormat { .. }) => return Err(error),
                Err(error) => {
                    tracing::warn!(object = name, error = %error, "index segment left out, its packs are read instead");
                    // What is damaged stays so; what could not be reached is tried again.
                    if !matches!(error, StoreError::Damaged { .. }) {
                        continue;
                    }
                }
            }
            seen.segments.insert(name);
        }
        let listed: BTreeMap<PackId, String> =
            packs.into_iter().filter_map(|name| names::pack_id(&name).map(|id| (id, name))).collect();
        self.learn(backend, keys, &mut seen, &listed).await?;
        self.look_for_lost(backend, &seen, &listed).await
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
        let unknown: Vec<_> = listed.iter().filter(|(id, _)| !seen.packs.contains(id)).collect();
        for (number, &(id, name)) in unknown.iter().enumerate() {
            match read_directory(backend, keys, *id, name).await {
                Ok(found) => entries.extend(found),
                Err(error @ (StoreError::Damaged { .. } | StoreError::NewerFormat { .. })) => {
                    tracing::warn!(object = name, error = %error, "pack left out of the index");
                }
                Err(error) => return Err(error),
            }
            learned.push(*id);
            if number + 1 == unknown.len() || learned.len() >= LEARN_PACKS || entries.len() >= LEARN_ENTRIES {
                if !entries.is_empty() {
                    let bytes = encode_index(keys, &entries);
                    let bytes = bytes.map_err(|error| StoreError::format(names::INDEX, error))?;
                    self.push(Segment::unpublished(keys, bytes).await?);
                }
                // Not before their chunks can be found, and nothing in between may end this call.
                seen.packs.extend(learned.drain(..));
                entries.clear();
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
            tracing::warn!(packs = lost.len(), "packs that the index names are gone; what they held is stored again");
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
        for segment in loaded.segments.iter().filter(|segment| !segment.published) {
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
        let segment = Segment::load(backend, keys, &name).await?;
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
}

#[derive(Debug)]
struct Segment {
    bytes: Mmap,
    layout: IndexLayout,
    filter: Filter,
    /// Whether it is an object of the repository, and not only made up here from directories of packs.
    published: bool,
}

impl Segment {
    fn find(&self, id: &ChunkId) -> Option<IndexEntry> {
        if self.filter.may_hold(id) { self.layout.find(&self.bytes, id) } else { None }
    }

    fn packs(&self) -> Vec<PackId> {
        self.layout.salts(&self.bytes).map(|salt| salt.pack_id()).collect()
    }

    async fn load(backend: &dyn Backend, keys: &Arc<Keys>, name: &str) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io("read", name, error);
        let file = match backend.local_path(name) {
            Some(path) => std::fs::File::open(path).map_err(failed)?,
            None => {
                let bytes = get(backend, name, MAX_SEGMENT_BYTES).await.map_err(failed)?;
                temporary(&bytes).map_err(failed)?
            }
        };
        Self::from_file(keys, file, name.to_owned(), true).await
    }

    async fn unpublished(keys: &Arc<Keys>, bytes: Vec<u8>) -> Result<Self, StoreError> {
        let file = temporary(&bytes).map_err(|error| StoreError::io("map", names::INDEX, error))?;
        Self::from_file(keys, file, names::INDEX.to_owned(), false).await
    }

    async fn from_file(
        keys: &Arc<Keys>,
        file: std::fs::File,
        name: String,
        published: bool,
    ) -> Result<Self, StoreError> {
        let keys = Arc::clone(keys);
        let work = move || {
            touch(&file).map_err(|error| StoreError::io("read", &name, error))?;
            let bytes = map(&file).map_err(|error| StoreError::io("map", &name, error))?;
            let layout = IndexLayout::check(&bytes, &keys).map_err(|error| StoreError::format(&name, error))?;
            let filter = Filter::new(layout.len(), layout.ids(&bytes));
            forget_pages(&bytes);
            Ok(Self { bytes, layout, filter, published })
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| StoreError::io("read", names::INDEX, std::io::Error::other(error)))?
    }
}

/// Reads the file once in the ordinary way: a bad sector is an error here, and the end of the process where a mapping
/// meets it first.
fn touch(file: &std::fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let length = file.metadata()?.len();
    if length > MAX_SEGMENT_BYTES as u64 {
        let what = format!("{length} bytes, at most {MAX_SEGMENT_BYTES} expected");
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what));
    }
    let mut buffer = vec![0; 256 * 1024];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(()),
            count => at += count as u64,
        }
    }
}

fn temporary(bytes: &[u8]) -> std::io::Result<std::fs::File> {
    use std::io::Write as _;
    let write = || {
        let mut file = tempfile::tempfile()?;
        file.write_all(bytes)?;
        Ok(file)
    };
    // Of another file system than the repository's: it must not be that one which is called full.
    write().map_err(|error: std::io::Error| {
        std::io::Error::other(format!("temporary file in {}: {error}", std::env::temp_dir().display()))
    })
}

#[expect(unsafe_code, reason = "objects of a repository are never changed or shortened once they have their name")]
fn map(file: &std::fs::File) -> std::io::Result<Mmap> {
    // SAFETY: the file is either an anonymous temporary file of ours or a published object, which nobody writes to.
    let map = unsafe { Mmap::map(file)? };
    map.advise(memmap2::Advice::Random)?;
    Ok(map)
}

/// Gives back the memory of the pages that the check has touched; a look-up reads the few that it needs again.
#[expect(
    unsafe_code,
    reason = "the mapping is of a file and read-only, so dropped pages come back with the same bytes"
)]
fn forget_pages(map: &Mmap) {
    // SAFETY: see the reason above. Whether the system follows the advice does not matter.
    let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
}

/// A Bloom filter: 12 bits per chunk, 1 look-up in 200 goes to the segment in vain.
#[derive(Debug)]
struct Filter {
    words: Vec<u64>,
}

const FILTER_BITS_PER_ENTRY: usize = 12;
const FILTER_PROBES: u64 = 6;

impl Filter {
    fn new(count: usize, ids: impl Iterator<Item = ChunkId>) -> Self {
        let mut words = vec![0_u64; (count * FILTER_BITS_PER_ENTRY).div_ceil(64).max(1)];
        let bits = words.len() as u64 * 64;
        for id in ids {
            for bit in probes(&id, bits) {
                if let Some(word) = usize::try_from(bit / 64).ok().and_then(|at| words.get_mut(at)) {
                    *word |= 1 << (bit % 64);
                }
            }
        }
        Self { words }
    }

    fn may_hold(&self, id: &ChunkId) -> bool {
        probes(id, self.words.len() as u64 * 64).all(|bit| {
            let word = usize::try_from(bit / 64).ok().and_then(|at| self.words.get(at));
            word.is_some_and(|word| word & (1 << (bit % 64)) != 0)
        })
    }
}

/// Ids are hashes already, so their own bytes serve as the filter's hash functions.
fn probes(id: &ChunkId, bits: u64) -> impl Iterator<Item = u64> {
    let part = |at: usize| id.as_bytes().get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_le_bytes(*b));
    let (first, step) = (part(8), part(16) | 1);
    (0..FILTER_PROBES).map(move |n| first.wrapping_add(step.wrapping_mul(n)) % bits)
}

async fn read_directory(
    backend: &dyn Backend,
    keys: &Keys,
    id: PackId,
    name: &str,
) -> Result<Vec<IndexEntry>, StoreError> {
    let damaged = |error| StoreError::format(name, error);
    let read = |offset: u64, length: usize| async move {
        backend.read(name, offset, length).await.map_err(|error| StoreError::io("read", name, error))
    };
    let length = backend.length(name).await.map_err(|error| StoreError::io("read", name, error))?;
    let header = PackHeader::decode(&read(0, PACK_HEADER_BYTES).await?).map_err(damaged)?;
    if header.repository != keys.repository() || header.salt.pack_id() != id {
        let what = "the pack does not belong under this name".into();
        return Err(StoreError::Damaged { object: name.to_owned(), source: what });
    }
    let at = length.saturating_sub(PACK_TRAILER_BYTES as u64);
    let trailer = PackTrailer::decode(&read(at, PACK_TRAILER_BYTES).await?, length).map_err(damaged)?;
    let directory = read(trailer.directory_offset.into(), trailer.directory_length as usize).await?;
    let key = PackKey::derive(keys, &header.salt).map_err(damaged)?;
    let entries = key.open_directory(&trailer, directory).map_err(damaged)?;
    let entry = |entry: xenvault_store_format::DirectoryEntry| IndexEntry {
        id: entry.id,
        kind: entry.kind,
        salt: header.salt,
        placement: entry.placement,
    };
    Ok(entries.into_iter().map(entry).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_never_denies_what_it_holds_and_rarely_invents() {
        let id = |n: u32| {
            let mut bytes = [0; 32];
            let seed = u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            for (at, byte) in bytes.iter_mut().enumerate() {
                *byte = u8::try_from(
                    (seed.rotate_left(u32::try_from(at).unwrap() * 7).wrapping_mul(seed | 1) >> 40) & 0xff,
                )
                .unwrap();
            }
            ChunkId::from_bytes(bytes)
        };
        let filter = Filter::new(10_000, (0..10_000).map(id));
        assert!((0..10_000).all(|n| filter.may_hold(&id(n))));
        assert!((10_000..20_000).filter(|&n| filter.may_hold(&id(n))).count() < 200);
    }
}
