//! Marking what points refer to: one bit per entry of the index, over the segments of one moment.
//!
//! A page that is marked was read already, by this point or another, so what points share is read once. Memory: one bit
//! per chunk of the repository and one page per read under way.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use xenvault_store_format::{
    BlobRef, ChunkId, ChunkKind, IndexEntry, LeafPage, NodePage, PACK_HEADER_BYTES, PackId, PointManifest,
    decode_piece_list, level_of,
};

use crate::StoreError;
use crate::index::{Loaded, Segment};
use crate::repository::Inner;

/// Pages that are read at the same time.
const PARALLEL: usize = 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct Marks {
    pub(crate) loaded: Arc<Loaded>,
    bits: Vec<Vec<u64>>,
    /// Pages that were read.
    pub(crate) pages: u64,
    /// Bytes of these pages.
    pub(crate) read_bytes: u64,
    /// Chunks of disks that no pack holds.
    pub(crate) missing: u64,
}

/// What one pack holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Bytes of all its frames that the index knows.
    pub(crate) total_bytes: u64,
    /// Of these, the share of the chunks that are marked: those of one frame count alike. Not 0 if one is marked.
    pub(crate) live_bytes: u64,
}

/// A frame of a pack, as far as one segment knows it.
#[derive(Clone, Copy, Debug, Default)]
struct FrameTally {
    length: u64,
    end: u64,
    chunks: u64,
    live_chunks: u64,
}

impl FrameTally {
    /// What one chunk of it counts for.
    fn share(&self) -> u64 {
        self.length.div_ceil(self.chunks.max(1))
    }
}

/// A marked entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MarkedEntry {
    pub(crate) entry: IndexEntry,
    /// What the chunk counts for of its frame, in bytes.
    pub(crate) share_bytes: u64,
}

/// A page or list that has to be read.
enum Open {
    Page(ChunkId, u8),
    Pieces(BlobRef),
}

#[derive(PartialEq)]
enum Marked {
    New,
    Before,
    Unknown,
}

impl Marks {
    /// Nothing is marked.
    pub(crate) fn new(loaded: Arc<Loaded>) -> Self {
        let bits = loaded.segments.iter().map(|segment| vec![0; segment.len().div_ceil(64)]).collect();
        Self { loaded, bits, pages: 0, read_bytes: 0, missing: 0 }
    }

    /// Marks everything that a point refers to.
    ///
    /// # Errors
    /// If a page or a list can not be read: what lies under it is then unknown. Chunks of disks are not read, and those
    /// that are in no pack are counted.
    pub(crate) async fn point(&mut self, repository: &Arc<Inner>, point: &PointManifest) -> Result<(), StoreError> {
        let mut open = Vec::new();
        for disk in &point.disks {
            if let Some(root) = disk.map.root {
                self.open_page(root, level_of(disk.map.virtual_size), &mut open);
            }
            disk.bitmap.iter().for_each(|bitmap| self.open_blob(bitmap, &mut open));
        }
        self.open_blob(&point.vm_config, &mut open);
        let mut reading = FuturesUnordered::new();
        loop {
            while reading.len() < PARALLEL {
                let Some(next) = open.pop() else { break };
                let repository = Arc::clone(repository);
                reading.push(async move {
                    let read = match &next {
                        Open::Page(id, _) => repository.chunk(id, ChunkKind::Map).await,
                        Open::Pieces(blob) => repository.chunk(&blob.id, ChunkKind::List).await,
                    };
                    read.map(|bytes| (next, bytes))
                });
            }
            let Some(read) = reading.next().await else { return Ok(()) };
            let (what, bytes) = read?;
            self.pages += 1;
            self.read_bytes += bytes.len() as u64;
            match what {
                Open::Page(id, 0) => {
                    let leaf = LeafPage::decode(&bytes).map_err(|error| page_error(&id, error))?;
                    for chunk in leaf.entries().iter().filter_map(|entry| entry.chunk) {
                        self.chunk(&chunk, ChunkKind::Data);
                    }
                }
                Open::Page(id, level) => {
                    let node = NodePage::decode(&bytes, level).map_err(|error| page_error(&id, error))?;
                    node.present().for_each(|(_, child)| self.open_page(child, level - 1, &mut open));
                }
                Open::Pieces(blob) => {
                    let pieces = decode_piece_list(&bytes, blob.length);
                    for piece in pieces.map_err(|error| StoreError::format(&format!("blob {}", blob.id), error))? {
                        self.chunk(&piece, ChunkKind::Blob);
                    }
                }
            }
        }
    }

    fn open_page(&mut self, id: ChunkId, level: u8, open: &mut Vec<Open>) {
        // A page that is unknown is tried too: it may be known by the time that it is read, or be an error.
        if self.set(&id, ChunkKind::Map) != Marked::Before {
            open.push(Open::Page(id, level));
        }
    }

    fn open_blob(&mut self, blob: &BlobRef, open: &mut Vec<Open>) {
        let marked = self.set(&blob.id, blob.kind());
        if blob.kind() == ChunkKind::List && marked != Marked::Before {
            open.push(Open::Pieces(*blob));
        } else if marked == Marked::Unknown {
            self.missing += 1;
        }
    }

    fn chunk(&mut self, id: &ChunkId, kind: ChunkKind) {
        if self.set(id, kind) == Marked::Unknown {
            self.missing += 1;
        }
    }

    /// Marks every copy of a chunk; of one that has a sound copy, the damaged ones are not needed.
    fn set(&mut self, id: &ChunkId, kind: ChunkKind) -> Marked {
        let loaded = Arc::clone(&self.loaded);
        let copies: Vec<(usize, usize, IndexEntry)> =
            loaded.positions(id).filter(|(_, _, entry)| entry.kind == kind).collect();
        let any_sound = copies.iter().any(|(_, _, entry)| loaded.is_sound(entry));
        let mut marked = Marked::Unknown;
        for (at, number, entry) in copies {
            if any_sound && !loaded.is_sound(&entry) {
                continue;
            }
            if let Some(word) = self.bits.get_mut(at).and_then(|bits| bits.get_mut(number / 64)) {
                let bit = 1 << (number % 64);
                let before = *word & bit != 0;
                *word |= bit;
                if marked == Marked::Unknown {
                    marked = if before { Marked::Before } else { Marked::New };
                }
            }
        }
        marked
    }

    fn is_set(&self, segment: usize, number: usize) -> bool {
        let word = self.bits.get(segment).and_then(|bits| bits.get(number / 64));
        word.is_some_and(|word| word & (1 << (number % 64)) != 0)
    }

    /// What each pack holds and what of it is marked.
    pub(crate) fn tallies(&self) -> HashMap<PackId, Tally> {
        let (mut tallies, mut ends) = (HashMap::<PackId, Tally>::new(), HashMap::<PackId, u64>::new());
        for (at, segment) in self.loaded.segments.iter().enumerate() {
            for ((pack, _), frame) in self.frames_of(at, segment, |_| true) {
                let tally = tallies.entry(pack).or_default();
                tally.total_bytes += frame.length;
                tally.live_bytes += (frame.share() * frame.live_chunks).min(frame.length);
                let end = ends.entry(pack).or_default();
                *end = frame.end.max(*end);
            }
        }
        for (pack, tally) in &mut tallies {
            // Frames lie one behind the other. More than that are frames that several segments know.
            let most = ends.get(pack).map_or(0, |end| end.saturating_sub(PACK_HEADER_BYTES as u64));
            if tally.total_bytes > most {
                tally.live_bytes = tally.live_bytes.saturating_mul(most).div_ceil(tally.total_bytes);
                tally.total_bytes = most;
            }
        }
        tallies
    }

    /// The frames that a segment knows of some packs, by the pack and their number.
    fn frames_of(
        &self,
        at: usize,
        segment: &Segment,
        wanted: impl Fn(&PackId) -> bool,
    ) -> HashMap<(PackId, u16), FrameTally> {
        let mut frames: HashMap<(PackId, u16), FrameTally> = HashMap::new();
        for (number, entry) in segment.entries().filter(|(_, entry)| wanted(&entry.pack)) {
            let frame = frames.entry((entry.pack, entry.placement.frame)).or_default();
            frame.length = entry.placement.length.into();
            frame.end = u64::from(entry.placement.offset) + frame.length;
            frame.chunks += 1;
            frame.live_chunks += u64::from(self.is_set(at, number));
        }
        frames
    }

    /// The marked entries of some packs, pack by pack in the order of segments; chunks of one frame follow each other.
    /// Memory: those of one segment.
    pub(crate) fn marked_in<'a>(
        &'a self,
        wanted: impl Fn(&PackId) -> bool + 'a,
    ) -> impl Iterator<Item = Vec<MarkedEntry>> + 'a {
        self.loaded.segments.iter().enumerate().filter_map(move |(at, segment)| {
            let frames = self.frames_of(at, segment, &wanted);
            let marked = segment.entries().filter(|(number, entry)| self.is_set(at, *number) && wanted(&entry.pack));
            let share =
                |entry: &IndexEntry| frames.get(&(entry.pack, entry.placement.frame)).map_or(0, FrameTally::share);
            let mut entries: Vec<MarkedEntry> =
                marked.map(|(_, entry)| MarkedEntry { entry, share_bytes: share(&entry) }).collect();
            // In the order of the medium.
            entries.sort_by_cached_key(|MarkedEntry { entry, .. }| {
                (entry.pack, entry.placement.offset, entry.placement.part)
            });
            (!entries.is_empty()).then_some(entries)
        })
    }
}

fn page_error(id: &ChunkId, error: xenvault_store_format::FormatError) -> StoreError {
    StoreError::format(&format!("map page {id}"), error)
}
