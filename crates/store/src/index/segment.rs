//! One index segment: a sorted table in a mapped file, of which a page is authenticated before it is used.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memmap2::Mmap;
use xenvault_store_format::{
    ChunkId, INDEX_HEADER_BYTES, IndexEntry, IndexLayout, Keys, MAX_SEGMENT_BYTES, PackId, RunPart,
};

use super::IndexCache;
use crate::StoreError;
use crate::backend::{Backend, get};
use crate::names;

/// One sorted segment, mapped.
#[derive(Debug)]
pub(crate) struct Segment {
    bytes: Mmap,
    file: File,
    layout: IndexLayout,
    keys: Arc<Keys>,
    /// One bit per page that was read and authenticated.
    checked: Vec<AtomicU64>,
    /// A page was not what was written: nothing that this segment does not say means anything any more.
    damaged: AtomicBool,
    /// Where the copy of it lies that is mapped, if it is one.
    copy_in: Option<IndexCache>,
    /// Its object; `None` if it was only made up here from directories of packs.
    pub(crate) name: Option<String>,
}

impl Segment {
    pub(super) async fn load(
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        name: &str,
        cache: Option<&IndexCache>,
    ) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io("read", name, error);
        if let Some(path) = backend.local_path(name) {
            let file = File::open(path).map_err(failed)?;
            return Self::from_file(keys, file, Some(name.to_owned())).await;
        }
        if let Some(cache) = cache {
            let copy = on_a_thread(cache, name, |cache, name| cache.open(name)).await;
            if let Some(copy) = copy {
                match Self::from_file(keys, copy, Some(name.to_owned())).await {
                    Ok(segment) => return Ok(Self { copy_in: Some(cache.clone()), ..segment }),
                    Err(error) => {
                        tracing::warn!(object = name, error = %error, "the copy of an index segment here is not whole");
                        on_a_thread(cache, name, |cache, name| cache.discard(name)).await;
                    }
                }
            }
        }
        let bytes = get(backend, name, MAX_SEGMENT_BYTES).await.map_err(failed)?;
        let file = temporary(&bytes).map_err(failed)?;
        let segment = Self::from_file(keys, file, Some(name.to_owned())).await?;
        let Some(cache) = cache else { return Ok(segment) };
        // Only what is whole is kept: what is damaged where it comes from would stay so here after it has been healed.
        IndexLayout::check(&bytes, keys).map_err(|error| StoreError::format(name, error))?;
        match on_a_thread(cache, name, move |cache, name| cache.keep(name, &bytes)).await {
            // The anonymous file would take room beside the copy.
            Some(copy) => match Self::from_file(keys, copy, Some(name.to_owned())).await {
                Ok(copied) => Ok(Self { copy_in: Some(cache.clone()), ..copied }),
                Err(_) => Ok(segment),
            },
            None => Ok(segment),
        }
    }

    pub(super) async fn unpublished(keys: &Arc<Keys>, bytes: Vec<u8>) -> Result<Self, StoreError> {
        let file = temporary(&bytes).map_err(|error| StoreError::io("map", names::INDEX, error))?;
        Self::from_file(keys, file, None).await
    }

    async fn from_file(keys: &Arc<Keys>, file: File, name: Option<String>) -> Result<Self, StoreError> {
        let keys = Arc::clone(keys);
        tokio::task::spawn_blocking(move || Self::open(keys, file, name))
            .await
            .map_err(|error| StoreError::io("read", names::INDEX, io::Error::other(error)))?
    }

    /// Reads the header and the list of packs; nothing else, however long it is.
    fn open(keys: Arc<Keys>, file: File, name: Option<String>) -> Result<Self, StoreError> {
        let object = name.clone().unwrap_or_else(|| names::INDEX.to_owned());
        let failed = |action, error| StoreError::io(action, &object, error);
        let length = file.metadata().map_err(|error| failed("read", error))?.len();
        let mut header = vec![0; INDEX_HEADER_BYTES.min(usize::try_from(length).unwrap_or(usize::MAX))];
        file.read_exact_at(&mut header, 0).map_err(|error| failed("read", error))?;
        let layout = IndexLayout::open(&header, length, &keys).map_err(|error| StoreError::format(&object, error))?;
        let bytes = map(&file).map_err(|error| failed("map", error))?;
        let checked = (0..layout.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let segment = Self { bytes, file, layout, keys, checked, damaged: AtomicBool::new(false), copy_in: None, name };
        for page in 0..layout.pack_pages() {
            segment.use_page(page)?;
        }
        Ok(segment)
    }

    /// Reads a page in the ordinary way, where a bad sector is an error and not the end of the process, and
    /// authenticates it. After that it is as good as memory.
    fn use_page(&self, page: usize) -> Result<(), StoreError> {
        let bit = 1 << (page % 64);
        let word = self.checked.get(page / 64);
        if word.is_some_and(|word| word.load(Ordering::Acquire) & bit != 0) {
            return Ok(());
        }
        let checked = self.read_page(page);
        match (&checked, word) {
            (Ok(()), Some(word)) => {
                word.fetch_or(bit, Ordering::Release);
            }
            _ => {
                self.damaged.store(true, Ordering::Release);
                // The object itself may be whole.
                if let (Some(cache), Some(name)) = (&self.copy_in, &self.name) {
                    cache.discard(name);
                }
            }
        }
        checked
    }

    fn read_page(&self, page: usize) -> Result<(), StoreError> {
        let range = self.layout.page_range(page);
        let mut buffer = [0; 4_096];
        let buffer = buffer.get_mut(..range.len()).unwrap_or_default();
        let read = self.file.read_exact_at(buffer, range.start as u64);
        read.map_err(|error| StoreError::io("read", self.object(), error))?;
        let checked = self.layout.check_page(&self.bytes, page, &self.keys);
        checked.map_err(|error| StoreError::format(self.object(), error))
    }

    /// Authenticates every page.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], or what reading it returns.
    pub(super) fn use_all(&self) -> Result<(), StoreError> {
        (0..self.layout.pages()).try_for_each(|page| self.use_page(page))
    }

    /// Whether a page could not be used.
    pub(super) fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Acquire)
    }

    /// Whether it is a copy on this machine of an object that is somewhere else.
    pub(super) fn is_copy(&self) -> bool {
        self.copy_in.is_some()
    }

    /// The numbers of a chunk's entries, one for each copy. A page that can not be used is told once: from then on the
    /// segment is damaged, and says of nothing that it is not there.
    pub(crate) fn positions(&self, id: &ChunkId) -> Range<usize> {
        match self.layout.find(&self.bytes, id, |page| self.use_page(page)) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(object = self.object(), error = %error, "index segment is damaged");
                0..0
            }
        }
    }

    /// The entry with this number.
    pub(crate) fn entry(&self, number: usize) -> Option<IndexEntry> {
        self.use_page(self.layout.entry_page(number)).ok()?;
        self.layout.entry(&self.bytes, number)
    }

    /// How many entries it has.
    pub(crate) fn len(&self) -> usize {
        self.layout.len()
    }

    /// The entries with their numbers, in the order of ids. Those on pages that can not be used are missing:
    /// [`Self::is_damaged`] tells afterwards.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (usize, IndexEntry)> + '_ {
        (0..self.len()).filter_map(|number| Some((number, self.entry(number)?)))
    }

    /// The entries that belong into this part of another run.
    pub(super) fn entries_of(&self, place: RunPart) -> impl Iterator<Item = IndexEntry> + '_ {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let before = self.entry(middle).is_some_and(|entry| RunPart::of_chunk(&entry.id, place.parts) < place.part);
            (low, high) = if before { (middle + 1, high) } else { (low, middle) };
        }
        let entries = (low..self.len()).map_while(|number| self.entry(number));
        entries.take_while(move |entry| RunPart::of_chunk(&entry.id, place.parts) == place.part)
    }

    /// The packs that it lists.
    pub(crate) fn packs(&self) -> impl Iterator<Item = PackId> + '_ {
        self.layout.packs(&self.bytes)
    }

    /// The packs that were removed and that runs may name.
    pub(crate) fn gone(&self) -> impl Iterator<Item = PackId> + '_ {
        self.layout.gone(&self.bytes)
    }

    /// Its place in its run.
    pub(crate) fn place(&self) -> RunPart {
        self.layout.place()
    }

    /// The bytes of its object.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn object(&self) -> &str {
        self.name.as_deref().unwrap_or(names::INDEX)
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

fn temporary(bytes: &[u8]) -> io::Result<File> {
    use std::io::Write as _;
    let write = || {
        let mut file = tempfile::tempfile()?;
        file.write_all(bytes)?;
        Ok(file)
    };
    // Of another file system than the repository's: it must not be that one which is called full.
    write().map_err(|error: io::Error| {
        io::Error::other(format!("temporary file in {}: {error}", std::env::temp_dir().display()))
    })
}

#[expect(unsafe_code, reason = "objects of a repository are never changed or shortened once they have their name")]
fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the file is either an anonymous temporary file of ours or a published object, which nobody writes to.
    let map = unsafe { Mmap::map(file)? };
    map.advise(memmap2::Advice::Random)?;
    Ok(map)
}
