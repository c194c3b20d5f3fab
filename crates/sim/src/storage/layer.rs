//! One layer of a disk: the sectors that were written into it, in a sparse file at the offsets that they have on the
//! disk.
//!
//! Knows which sectors it has, not what lies below. Memory follows the written 64 KiB pages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use uuid::Uuid;
use xenvault_block::{ByteRange, ExtentSet, SECTOR_BYTES, VHD_BLOCK_BYTES};

/// Bytes that one mask of the map covers: 128 sectors.
pub(super) const PAGE_BYTES: u64 = 64 * 1024;

/// Which sectors are there: a mask for each page of 64 KiB, lowest bit first.
#[derive(Clone, Debug, Default)]
pub(super) struct SectorMap {
    pages: BTreeMap<u64, u128>,
    blocks: BTreeSet<u64>,
}

/// The mask of the sectors of `page` that `range` touches. Both ends are taken outward.
pub(super) fn page_mask(page: u64, range: ByteRange) -> u128 {
    let base = page * PAGE_BYTES;
    let first = range.start().max(base).saturating_sub(base) / SECTOR_BYTES;
    let end = range.end().min(base + PAGE_BYTES).saturating_sub(base).div_ceil(SECTOR_BYTES);
    if end <= first {
        return 0;
    }
    (u128::MAX >> (128 - (end - first))) << first
}

impl SectorMap {
    pub(super) fn from_extents(extents: &ExtentSet) -> Self {
        let mut map = Self::default();
        for &run in extents.runs() {
            map.insert(run);
        }
        map
    }

    /// The sectors of a page.
    pub(super) fn page(&self, page: u64) -> u128 {
        self.pages.get(&page).copied().unwrap_or_default()
    }

    /// Adds all sectors that `range` touches.
    pub(super) fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        for page in range.start() / PAGE_BYTES..range.end().div_ceil(PAGE_BYTES) {
            self.insert_page(page, page_mask(page, range));
        }
    }

    fn insert_page(&mut self, page: u64, mask: u128) {
        if mask != 0 {
            *self.pages.entry(page).or_default() |= mask;
            self.blocks.insert(page * PAGE_BYTES / VHD_BLOCK_BYTES);
        }
    }

    /// How many 2 MiB blocks of `range` are not there yet.
    pub(super) fn missing_blocks(&self, range: ByteRange) -> u64 {
        let (first, end) = (range.start() / VHD_BLOCK_BYTES, range.end().div_ceil(VHD_BLOCK_BYTES));
        end.saturating_sub(first) - self.blocks.range(first..end).count() as u64
    }

    /// The written sectors.
    pub(super) fn extents(&self) -> ExtentSet {
        let runs = self.pages.iter().flat_map(|(&page, &mask)| runs(page, mask));
        runs.collect()
    }
}

/// The runs of set bits of a page as ranges of the disk.
pub(super) fn runs(page: u64, mut mask: u128) -> impl Iterator<Item = ByteRange> {
    let mut at = page * PAGE_BYTES;
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let skip = mask.trailing_zeros();
        mask >>= skip;
        at += u64::from(skip) * SECTOR_BYTES;
        let length = mask.trailing_ones();
        mask = mask.checked_shr(length).unwrap_or_default();
        let start = at;
        at += u64::from(length) * SECTOR_BYTES;
        ByteRange::new(start, at).ok()
    })
}

/// Where the content of a new disk comes from. Never written.
#[derive(Debug)]
enum Origin {
    /// A file of somebody else's.
    File(File),
    /// Noise that depends on this seed and the place alone: it costs nothing until it is read.
    Noise(u64),
}

#[derive(Debug)]
struct Source {
    origin: Origin,
    map: SectorMap,
}

impl Source {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match &self.origin {
            Origin::File(file) => read_own(Some(file), offset, buffer),
            Origin::Noise(seed) => {
                noise(*seed, offset, buffer);
                Ok(())
            }
        }
    }
}

/// Noise that does not compress: whole words where it can be.
fn noise(seed: u64, offset: u64, buffer: &mut [u8]) {
    let start = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut at = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let mut word = (at / 8).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ start;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let word = (word ^ (word >> 31)).to_le_bytes();
        let skip = usize::try_from(at % 8).unwrap_or_default();
        let bytes = word.get(skip..).unwrap_or_default();
        let length = bytes.len().min(rest.len());
        let (piece, tail) = rest.split_at_mut(length);
        piece.copy_from_slice(bytes.get(..length).unwrap_or_default());
        at += length as u64;
        rest = tail;
    }
}

/// One layer.
#[derive(Debug)]
pub(super) struct Layer {
    /// Its name as a base copy.
    pub(super) uuid: Uuid,
    /// The storage repository that it takes space of.
    pub(super) sr: Uuid,
    /// The layer below.
    pub(super) parent: Option<u64>,
    /// The layers right above.
    pub(super) children: BTreeSet<u64>,
    /// Whether it takes a disk's writes; a base copy if not.
    pub(super) leaf: bool,
    /// The virtual size that a base copy was frozen at, in bytes.
    pub(super) size: u64,
    /// Whether what was never written is garbage and not zeros: the bottom of a raw volume.
    pub(super) garbage: bool,
    map: RwLock<SectorMap>,
    file: OnceLock<File>,
    source: Option<Source>,
    writing: Mutex<()>,
}

impl Layer {
    pub(super) fn new(sr: Uuid, parent: Option<u64>) -> Self {
        Self {
            uuid: Uuid::new_v4(),
            sr,
            parent,
            children: BTreeSet::new(),
            leaf: true,
            size: 0,
            garbage: false,
            map: RwLock::default(),
            file: OnceLock::new(),
            source: None,
            writing: Mutex::new(()),
        }
    }

    pub(super) fn with_source(mut self, file: File, content: &ExtentSet) -> Self {
        self.source = Some(Source { origin: Origin::File(file), map: SectorMap::from_extents(content) });
        self
    }

    /// Noise in the first bytes, to the end of the sector.
    pub(super) fn with_noise(mut self, seed: u64, bytes: u64) -> Self {
        let mut map = SectorMap::default();
        map.insert(ByteRange::up_to(bytes));
        self.source = Some(Source { origin: Origin::Noise(seed), map });
        self
    }

    /// The sectors of a page that are here.
    pub(super) fn page(&self, page: u64) -> u128 {
        let own = self.map.read().unwrap_or_else(PoisonError::into_inner).page(page);
        own | self.source.as_ref().map(|source| source.map.page(page)).unwrap_or_default()
    }

    /// Reads sectors that are here; the range lies in one page or in several, all of it in this layer.
    pub(super) fn read(&self, range: ByteRange, buffer: &mut [u8]) -> io::Result<()> {
        let Some(source) = &self.source else { return read_own(self.file.get(), range.start(), buffer) };
        let mut rest = buffer;
        let mut at = range.start();
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        while at < range.end() {
            let page = at / PAGE_BYTES;
            let own = map.page(page);
            // The longest run from here with one origin, within the page.
            let sector = (at % PAGE_BYTES) / SECTOR_BYTES;
            let is_own = own >> sector & 1 == 1;
            let same = if is_own { (own >> sector).trailing_ones() } else { (own >> sector).trailing_zeros() };
            let end = (at / SECTOR_BYTES * SECTOR_BYTES + u64::from(same) * SECTOR_BYTES)
                .min((page + 1) * PAGE_BYTES)
                .min(range.end());
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
            let (piece, tail) = rest.split_at_mut(length);
            if is_own {
                read_own(self.file.get(), at, piece)?;
            } else {
                source.read(at, piece)?;
            }
            rest = tail;
            at = end;
        }
        Ok(())
    }

    /// Keeps others from writing while sectors are read, changed and written.
    pub(super) fn lock_writing(&self) -> std::sync::MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes whole sectors.
    pub(super) fn write(&self, folder: &Path, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = ByteRange::with_length(offset, data.len() as u64).map_err(io::Error::other)?;
        self.own_file(folder)?.write_all_at(data, offset)?;
        self.map.write().unwrap_or_else(PoisonError::into_inner).insert(range);
        Ok(())
    }

    /// Makes whole sectors zero. Only what was written here before costs I/O: a new place of the file is a hole.
    pub(super) fn zero(&self, folder: &Path, range: ByteRange) -> io::Result<()> {
        let file = self.own_file(folder)?;
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        for page in range.start() / PAGE_BYTES..range.end().div_ceil(PAGE_BYTES) {
            let mask = page_mask(page, range);
            for run in runs(page, map.page(page) & mask) {
                let zeros = vec![0; usize::try_from(run.len()).unwrap_or_default()];
                file.write_all_at(&zeros, run.start())?;
            }
            map.insert_page(page, mask);
        }
        Ok(())
    }

    /// How many 2 MiB blocks of `range` would be new here.
    pub(super) fn missing_blocks(&self, range: ByteRange) -> u64 {
        let own = self.map.read().unwrap_or_else(PoisonError::into_inner);
        match &self.source {
            None => own.missing_blocks(range),
            Some(source) => (range.start() / VHD_BLOCK_BYTES..range.end().div_ceil(VHD_BLOCK_BYTES))
                .filter(|block| !own.blocks.contains(block) && !source.map.blocks.contains(block))
                .count() as u64,
        }
    }

    /// The 2 MiB blocks, by index, that hold anything.
    pub(super) fn blocks(&self) -> BTreeSet<u64> {
        let mut blocks = self.map.read().unwrap_or_else(PoisonError::into_inner).blocks.clone();
        if let Some(source) = &self.source {
            blocks.extend(&source.map.blocks);
        }
        blocks
    }

    /// How many 2 MiB blocks hold anything.
    pub(super) fn block_count(&self) -> u64 {
        match &self.source {
            None => self.map.read().unwrap_or_else(PoisonError::into_inner).blocks.len() as u64,
            Some(_) => self.blocks().len() as u64,
        }
    }

    /// How many 64 KiB pages hold anything of its own.
    pub(super) fn page_count(&self) -> u64 {
        let source = self.source.as_ref().map(|source| source.map.pages.len()).unwrap_or_default();
        (self.map.read().unwrap_or_else(PoisonError::into_inner).pages.len() + source) as u64
    }

    /// How many 64 KiB pages hold anything that would have to be copied to get it elsewhere.
    pub(super) fn own_page_count(&mut self) -> u64 {
        self.map.get_mut().unwrap_or_else(PoisonError::into_inner).pages.len() as u64
    }

    /// The written sectors.
    pub(super) fn extents(&self) -> ExtentSet {
        let own = self.map.read().unwrap_or_else(PoisonError::into_inner).extents();
        match &self.source {
            None => own,
            Some(source) => own.union(&source.map.extents()),
        }
    }

    /// Takes over all that `below` has and this layer has not, so that `below` can go.
    pub(super) fn absorb_below(&mut self, folder: &Path, below: &mut Self) -> io::Result<()> {
        let theirs = below.map.get_mut().unwrap_or_else(PoisonError::into_inner);
        let pages: Vec<(u64, u128)> = theirs.pages.iter().map(|(&page, &mask)| (page, mask)).collect();
        for (page, mask) in pages {
            let mine = self.map.get_mut().unwrap_or_else(PoisonError::into_inner).page(page);
            self.copy_page(folder, below, page, mask & !mine)?;
        }
        self.source = below.source.take();
        self.garbage = below.garbage;
        Ok(())
    }

    /// Takes over all that `above` has, so that `above` can go.
    pub(super) fn absorb_above(&mut self, folder: &Path, above: &mut Self) -> io::Result<()> {
        let theirs = above.map.get_mut().unwrap_or_else(PoisonError::into_inner);
        let pages: Vec<(u64, u128)> = theirs.pages.iter().map(|(&page, &mask)| (page, mask)).collect();
        pages.into_iter().try_for_each(|(page, mask)| self.copy_page(folder, above, page, mask))
    }

    fn copy_page(&mut self, folder: &Path, from: &Self, page: u64, mask: u128) -> io::Result<()> {
        for run in runs(page, mask) {
            let mut data = vec![0; usize::try_from(run.len()).unwrap_or_default()];
            read_own(from.file.get(), run.start(), &mut data)?;
            self.write(folder, run.start(), &data)?;
        }
        Ok(())
    }

    fn own_file(&self, folder: &Path) -> io::Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        // Nameless: it goes with the process, however that ends.
        let file = tempfile::tempfile_in(folder)?;
        Ok(self.file.get_or_init(|| file))
    }
}

/// Reads from a sparse file; what lies past its end is zeros.
fn read_own(file: Option<&File>, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let count = match file {
            Some(file) => match file.read_at(rest, offset + done as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            },
            None => 0,
        };
        if count == 0 {
            rest.fill(0);
            break;
        }
        done += count;
    }
    Ok(())
}

/// The parts of a file that are not holes.
pub(super) fn data_extents(file: &File, length: u64) -> io::Result<ExtentSet> {
    use rustix::fs::{SeekFrom, seek};
    let mut extents = ExtentSet::new();
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(length);
        if let Ok(run) = ByteRange::new(start.min(end), end) {
            extents.insert(run);
        }
        at = end.max(at + 1);
    }
    Ok(extents)
}
