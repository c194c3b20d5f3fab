//! One index segment: a sorted table in a mapped file, behind a compact filter.

use std::sync::Arc;

use memmap2::Mmap;
use xenvault_store_format::{ChunkId, IndexEntry, IndexLayout, Keys, MAX_SEGMENT_BYTES, PackId, PackSalt};

use crate::StoreError;
use crate::backend::{Backend, get};
use crate::names;

use super::IndexCache;

/// One sorted segment, mapped.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(super) bytes: Mmap,
    layout: IndexLayout,
    filter: Filter,
    /// Its object; `None` if it was only made up here from directories of packs.
    pub(crate) name: Option<String>,
}

impl Segment {
    pub(super) fn find(&self, id: &ChunkId) -> Option<IndexEntry> {
        self.position(id).and_then(|number| self.entry(number))
    }

    /// The number of a chunk's entry.
    pub(crate) fn position(&self, id: &ChunkId) -> Option<usize> {
        if self.filter.may_hold(id) { self.layout.position(&self.bytes, id) } else { None }
    }

    /// The entry with this number.
    pub(crate) fn entry(&self, number: usize) -> Option<IndexEntry> {
        self.layout.entry(&self.bytes, number)
    }

    /// How many chunks it knows.
    pub(crate) fn len(&self) -> usize {
        self.layout.len()
    }

    /// The entries with their numbers, in the order of ids.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (usize, IndexEntry)> + '_ {
        (0..self.len()).filter_map(|number| Some((number, self.entry(number)?)))
    }

    /// Salts of the packs that it names.
    pub(crate) fn salts(&self) -> impl Iterator<Item = PackSalt> + '_ {
        self.layout.salts(&self.bytes)
    }

    /// The packs that it names.
    pub(crate) fn packs(&self) -> impl Iterator<Item = PackId> + '_ {
        self.salts().map(|salt| salt.pack_id())
    }

    pub(super) async fn load(
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        name: &str,
        cache: Option<&IndexCache>,
    ) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io("read", name, error);
        if let Some(path) = backend.local_path(name) {
            let file = std::fs::File::open(path).map_err(failed)?;
            return Self::from_file(keys, file, Some(name.to_owned())).await;
        }
        if let Some(cache) = cache {
            let copy = on_a_thread(cache, name, |cache, name| cache.open(name)).await;
            if let Some(copy) = copy {
                match Self::from_file(keys, copy, Some(name.to_owned())).await {
                    Ok(segment) => return Ok(segment),
                    Err(error) => {
                        tracing::warn!(object = name, error = %error, "the copy of an index segment here is not whole");
                        on_a_thread(cache, name, |cache, name| cache.discard(name)).await;
                    }
                }
            }
        }
        let bytes = get(backend, name, MAX_SEGMENT_BYTES).await.map_err(failed)?;
        // Only what is whole is kept: what is damaged where it comes from would stay so here after it has been healed.
        let file = temporary(&bytes).map_err(failed)?;
        let segment = Self::from_file(keys, file, Some(name.to_owned())).await?;
        let Some(cache) = cache else { return Ok(segment) };
        match on_a_thread(cache, name, move |cache, name| cache.keep(name, &bytes)).await {
            // The anonymous file would take room beside the copy.
            Some(copy) => Self::from_file(keys, copy, Some(name.to_owned())).await.or(Ok(segment)),
            None => Ok(segment),
        }
    }

    pub(super) async fn unpublished(keys: &Arc<Keys>, bytes: Vec<u8>) -> Result<Self, StoreError> {
        let file = temporary(&bytes).map_err(|error| StoreError::io("map", names::INDEX, error))?;
        Self::from_file(keys, file, None).await
    }

    async fn from_file(keys: &Arc<Keys>, file: std::fs::File, object: Option<String>) -> Result<Self, StoreError> {
        let keys = Arc::clone(keys);
        let work = move || {
            let name = object.clone().unwrap_or_else(|| names::INDEX.to_owned());
            touch(&file).map_err(|error| StoreError::io("read", &name, error))?;
            let bytes = map(&file).map_err(|error| StoreError::io("map", &name, error))?;
            let layout = IndexLayout::check(&bytes, &keys).map_err(|error| StoreError::format(&name, error))?;
            let filter = Filter::new(layout.len(), layout.ids(&bytes));
            forget_pages(&bytes);
            Ok(Self { bytes, layout, filter, name: object })
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| StoreError::io("read", names::INDEX, std::io::Error::other(error)))?
    }
}

/// Does what touches the disk off the async threads; nothing comes of it if the runtime ends.
async fn on_a_thread<T: Default + Send + 'static>(
    cache: &IndexCache,
    name: &str,
    work: impl FnOnce(&IndexCache, &str) -> T + Send + 'static,
) -> T {
    let (cache, name) = (cache.clone(), name.to_owned());
    tokio::task::spawn_blocking(move || work(&cache, &name)).await.unwrap_or_default()
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
