//! Reading the disk of a point: at random, as a stream, or only where there is data.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store_format::{BLOCK_BYTES, ChunkId, ChunkKind, DiskMapRef, IndexEntry, LEAF_BYTES, LeafPage};

use crate::StoreError;
use crate::fetch::{FrameKey, Opening, key_of};
use crate::map::MapReader;
use crate::repository::Inner;

/// Frames that are fetched together, in one read where they lie together.
const GROUP_FRAMES: usize = 8;
/// What such a group holds, in bytes: frames as this release writes them. The longest ones have four times that.
const GROUP_BYTES: u64 = GROUP_FRAMES as u64 * 256 * 1024;
/// Leaves of a map that are read ahead.
const LEAVES_AHEAD: usize = 4;
/// Longest answer of one random read.
const MAX_READ_BYTES: u64 = 256 * 1024 * 1024;

/// Bounds of a stream.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// How many bytes may be on their way at once, counted in frames as this release writes them; at least 2 MiB. Frames
    /// of other writers may be four times as long.
    pub window_bytes: u64,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { window_bytes: 16 * 1024 * 1024 }
    }
}

/// The content of one disk. Clones share a cache; reads may run at the same time.
///
/// Every byte that is returned was authenticated, and hashed again to the chunk id that the map names.
#[derive(Clone, Debug)]
pub struct DiskReader {
    map: MapReader,
}

/// A run of a disk that lies in one chunk.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// Where the chunk begins on the disk.
    start: u64,
    /// Length of the chunk in bytes, as the map has it.
    length: u64,
    chunk: ChunkId,
    /// The bytes that are wanted of it; never past the end of the disk.
    wanted: ByteRange,
}

impl DiskReader {
    pub(crate) fn new(repository: Arc<Inner>, map: DiskMapRef) -> Self {
        Self { map: MapReader::new(repository, map) }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.map.map().virtual_size
    }

    /// The bytes of `range`, zeros included. Memory: the length of the range, so ask for at most some MiB.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the range passes the end of the disk or is longer than 256 MiB;
    /// [`StoreError::DiskRange`] with the bytes that can not be read and the object that is to blame.
    pub async fn read_at(&self, range: ByteRange) -> Result<Bytes, StoreError> {
        let size = self.size();
        if range.end() > size || range.len() > MAX_READ_BYTES {
            let what = format!("{range} can not be read at once from a disk of {size} bytes");
            return Err(StoreError::Misuse { what });
        }
        let length = usize::try_from(range.len()).unwrap_or(usize::MAX);
        let mut bytes = BytesMut::zeroed(length);
        let mut pieces = self.pieces(range, 4);
        while let Some((offset, piece)) = pieces.try_next().await? {
            let at = usize::try_from(offset - range.start()).unwrap_or(usize::MAX);
            if let Some(part) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..piece.len())) {
                part.copy_from_slice(&piece);
            }
        }
        Ok(bytes.freeze())
    }

    /// Where in `range` there is data. Reads map pages only. Granularity 4 KiB (cut at the end of the disk).
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub async fn extents(&self, range: ByteRange) -> Result<ExtentSet, StoreError> {
        let mut extents = ExtentSet::new();
        let mut spans = self.spans(range).boxed();
        while let Some(span) = spans.try_next().await? {
            extents.insert(span.wanted);
        }
        Ok(extents)
    }

    /// The chunks that hold the data of `range`: where each begins on the disk, and its id. Reads map pages only. Two
    /// disks of one repository that give the same answer have the same bytes there; different answers say nothing.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub async fn chunks(&self, range: ByteRange) -> Result<Vec<(u64, ChunkId)>, StoreError> {
        self.spans(range).map_ok(|span| (span.start, span.chunk)).try_collect().await
    }

    /// Whether `bytes`, which begin at `offset`, are what the map says of the disk there. Content is not read but hashed,
    /// so every key will do; `range_to_compare` tells which ranges can be asked for.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub async fn is_hash_of(&self, offset: u64, bytes: &[u8]) -> Result<bool, StoreError> {
        let range = ByteRange::with_length(offset, bytes.len() as u64).unwrap_or(ByteRange::up_to(0));
        let keys = Arc::clone(&self.map.repository.keys);
        let mut at = offset;
        let mut spans = self.spans(range).boxed();
        let part = |from: u64, to: u64| {
            let place = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
            bytes.get(place(from)..place(to)).unwrap_or_default()
        };
        while let Some(span) = spans.try_next().await? {
            let mut plain = part(span.start, span.start + span.length).to_vec();
            // The last block of a disk is filled with zeros.
            if span.start + span.length > self.size() {
                plain.resize(usize::try_from(span.length).unwrap_or(plain.len()), 0);
            }
            let is_zero = part(at, span.start).iter().all(|byte| *byte == 0);
            if !is_zero || keys.chunk_id(ChunkKind::Data, &plain) != span.chunk {
                return Ok(false);
            }
            at = span.start + span.length;
        }
        Ok(part(at, range.end()).iter().all(|byte| *byte == 0))
    }

    /// `range`, and as much around it as the chunks reach that it touches; for [`Self::is_hash_of`].
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub async fn range_to_compare(&self, range: ByteRange) -> Result<ByteRange, StoreError> {
        let (mut start, mut end) = (range.start(), range.end());
        let mut spans = self.spans(range).boxed();
        while let Some(span) = spans.try_next().await? {
            start = start.min(span.start);
            end = end.max(span.start + span.length);
        }
        Ok(ByteRange::new(start, end.min(self.size())).unwrap_or(range))
    }

    /// The data of `range` in ascending order as pieces `(offset, bytes)` of at most one chunk each; zero blocks are
    /// left out. Read ahead in parallel within `options.window_bytes`. Ends after the first error.
    pub fn stream(
        &self,
        range: ByteRange,
        options: ReadOptions,
    ) -> BoxStream<'static, Result<(u64, Bytes), StoreError>> {
        let parallel = usize::try_from(options.window_bytes / GROUP_BYTES).unwrap_or(usize::MAX);
        self.pieces(range, parallel.clamp(1, 1024))
    }

    fn pieces(&self, range: ByteRange, parallel: usize) -> BoxStream<'static, Result<(u64, Bytes), StoreError>> {
        let this = self.clone();
        let fetch = move |group: Result<Group, StoreError>| {
            let this = this.clone();
            async move {
                match group {
                    Ok(group) => this.fetch(group).await,
                    Err(error) => vec![Err(error)],
                }
            }
        };
        let pieces = self.groups(range).map(fetch).buffered(parallel).map(stream::iter).flatten();
        // Whoever goes on after an error would take a hole for zeros.
        until_error(pieces).boxed()
    }

    /// The chunks that touch `range`, in ascending order, in groups that are fetched together.
    fn groups(&self, range: ByteRange) -> impl Stream<Item = Result<Group, StoreError>> + Send + use<> {
        let repository = Arc::clone(&self.map.repository);
        self.spans_by_leaf(range)
            .map_ok(move |spans| {
                let mut groups: Vec<Group> = Vec::new();
                for span in spans {
                    let entry = repository.index.find_to_read(&span.chunk, ChunkKind::Data);
                    match groups.last_mut() {
                        Some(last) if last.has_room_for(entry.as_ref()) => last.push(span, entry),
                        _ => groups.push(Group::begin(span, entry)),
                    }
                }
                stream::iter(groups).map(Ok)
            })
            .try_flatten()
    }

    /// The chunks that touch `range`, in ascending order.
    fn spans(&self, range: ByteRange) -> impl Stream<Item = Result<Span, StoreError>> + Send + use<> {
        self.spans_by_leaf(range).map_ok(|spans| stream::iter(spans).map(Ok)).try_flatten()
    }

    fn spans_by_leaf(&self, range: ByteRange) -> impl Stream<Item = Result<Vec<Span>, StoreError>> + Send + use<> {
        let size = self.size();
        let range = ByteRange::up_to(size).intersect(range).unwrap_or(ByteRange::up_to(0));
        let end = range.end().div_ceil(LEAF_BYTES);
        let map = self.map.clone();
        let leaves = stream::try_unfold((map, range.start() / LEAF_BYTES), move |(map, from)| async move {
            let at = ByteRange::new(from.saturating_mul(LEAF_BYTES), size);
            let next = map.next_leaf(from, end).await.map_err(|error| on_disk(at, error))?;
            Ok(next.map(|(number, id)| ((number, id), (map, number + 1))))
        });
        let map = self.map.clone();
        leaves
            .map_ok(move |(number, id)| {
                let map = map.clone();
                async move {
                    let start = number * LEAF_BYTES;
                    let covers = ByteRange::new(start, start.saturating_add(LEAF_BYTES).min(size));
                    let leaf = map.leaf_page(&id).await.map_err(|error| on_disk(covers, error))?;
                    Ok(spans_of(start, &leaf, range))
                }
            })
            .try_buffered(LEAVES_AHEAD)
    }

    /// The bytes of a group. Of each batch in it, up to the first error.
    async fn fetch(&self, group: Group) -> Vec<Result<(u64, Bytes), StoreError>> {
        let openings = self.map.repository.openings(&group.frames);
        let openings: HashMap<FrameKey, Opening> = group.frames.iter().map(key_of).zip(openings).collect();
        let batches = group.batches.into_iter().map(|batch| self.fetch_batch(batch, &openings));
        futures::future::join_all(batches).await.into_iter().flatten().collect()
    }

    async fn fetch_batch(
        &self,
        batch: Batch,
        openings: &HashMap<FrameKey, Opening>,
    ) -> Vec<Result<(u64, Bytes), StoreError>> {
        let repository = &self.map.repository;
        let first = batch.spans.first().map(|(_, entry)| *entry);
        if let Some((entry, opening)) = first.and_then(|entry| Some((entry, openings.get(&key_of(&entry))?))) {
            let wanted: Vec<(ChunkId, u8)> =
                batch.spans.iter().map(|(span, entry)| (span.chunk, entry.placement.part)).collect();
            if let Ok(found) = repository.chunks_of(opening, entry, wanted).await {
                return batch.spans.iter().zip(found).map(|((span, _), bytes)| span.part_of(bytes)).collect();
            }
        }
        // Each by itself: there may be other copies, and an error names one chunk.
        let mut pieces = Vec::new();
        for span in batch.spans.into_iter().map(|(span, _)| span).chain(batch.unknown) {
            let read = repository.chunk(&span.chunk, ChunkKind::Data).await;
            let piece = read.map_err(|error| on_disk(Ok(span.wanted), error)).and_then(|bytes| span.part_of(bytes));
            let failed = piece.is_err();
            pieces.push(piece);
            if failed {
                break;
            }
        }
        pieces
    }
}

/// Chunks that are fetched together.
#[derive(Debug, Default)]
struct Group {
    /// In the order of the disk.
    batches: Vec<Batch>,
    /// One entry of each frame that they lie in.
    frames: Vec<IndexEntry>,
    /// Length of the chunks in bytes.
    bytes: u64,
}

impl Group {
    fn begin(span: Span, entry: Option<IndexEntry>) -> Self {
        let mut group = Self::default();
        group.push(span, entry);
        group
    }

    fn has_frame_of(&self, entry: &IndexEntry) -> bool {
        self.frames.iter().any(|frame| key_of(frame) == key_of(entry))
    }

    fn has_room_for(&self, entry: Option<&IndexEntry>) -> bool {
        let more = entry.is_none_or(|entry| !self.has_frame_of(entry));
        self.bytes < GROUP_BYTES && (!more || self.frames.len() < GROUP_FRAMES)
    }

    fn push(&mut self, span: Span, entry: Option<IndexEntry>) {
        self.bytes += span.length;
        if let Some(entry) = entry.filter(|entry| !self.has_frame_of(entry)) {
            self.frames.push(entry);
        }
        match (self.batches.last_mut(), entry) {
            (Some(last), Some(entry)) if last.is_in_frame_of(&entry) => last.spans.push((span, entry)),
            _ => self.batches.push(Batch::begin(span, entry)),
        }
    }
}

/// Chunks of a group that follow each other and lie in one frame.
#[derive(Debug, Default)]
struct Batch {
    /// Of one frame.
    spans: Vec<(Span, IndexEntry)>,
    /// One that the index does not know; there is no other in the batch then.
    unknown: Option<Span>,
}

impl Batch {
    fn begin(span: Span, entry: Option<IndexEntry>) -> Self {
        match entry {
            Some(entry) => Self { spans: vec![(span, entry)], unknown: None },
            None => Self { spans: Vec::new(), unknown: Some(span) },
        }
    }

    fn is_in_frame_of(&self, entry: &IndexEntry) -> bool {
        let frame = |entry: &IndexEntry| (entry.pack, entry.placement.offset, entry.placement.length);
        self.spans.first().is_some_and(|(_, first)| frame(first) == frame(entry))
    }
}

impl Span {
    /// What is wanted of the chunk's bytes, with its offset on the disk.
    fn part_of(&self, bytes: Bytes) -> Result<(u64, Bytes), StoreError> {
        if bytes.len() as u64 != self.length {
            let source = format!("{} bytes, its map says {}", bytes.len(), self.length).into();
            let error = StoreError::Damaged { object: format!("chunk {}", self.chunk), source };
            return Err(on_disk(Ok(self.wanted), error));
        }
        let from = usize::try_from(self.wanted.start() - self.start).unwrap_or(usize::MAX).min(bytes.len());
        let to = usize::try_from(self.wanted.end() - self.start).unwrap_or(usize::MAX).min(bytes.len());
        Ok((self.wanted.start(), bytes.slice(from.min(to)..to)))
    }
}

fn spans_of(start: u64, leaf: &LeafPage, range: ByteRange) -> Vec<Span> {
    let span = |(block, entry): (u64, xenvault_store_format::LeafEntry)| {
        let chunk = entry.chunk?;
        let (start, length) = (start + block * BLOCK_BYTES as u64, u64::from(entry.blocks) * BLOCK_BYTES as u64);
        let wanted = ByteRange::with_length(start, length).ok()?.intersect(range)?;
        Some(Span { start, length, chunk, wanted })
    };
    leaf.placed().filter_map(span).collect()
}

fn on_disk(range: Result<ByteRange, xenvault_block::RangeError>, error: StoreError) -> StoreError {
    match range {
        Ok(range) => StoreError::DiskRange { range, source: Box::new(error) },
        Err(_) => error,
    }
}

fn until_error<T: Send>(
    pieces: impl Stream<Item = Result<T, StoreError>> + Send,
) -> impl Stream<Item = Result<T, StoreError>> + Send {
    pieces.scan(false, |failed, item| {
        let stop = std::mem::replace(failed, item.is_err());
        std::future::ready((!stop).then_some(item))
    })
}
