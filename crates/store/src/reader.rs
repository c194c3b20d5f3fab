//! Reading the disk of a point: at random, as a stream, or only where there is data.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store_format::{
    BLOCK_BYTES, ChunkId, ChunkKind, DiskMapRef, IndexEntry, LEAF_BYTES, LeafPage, MAX_PLAIN_BYTES,
};

use crate::StoreError;
use crate::map::MapReader;
use crate::repository::Inner;

/// Longest content of a frame, in bytes; what one fetch may hold.
const FETCH_BYTES: u64 = MAX_PLAIN_BYTES as u64;
/// Leaves of a map that are read ahead.
const LEAVES_AHEAD: usize = 4;
/// Longest answer of one random read.
const MAX_READ_BYTES: u64 = 256 * 1024 * 1024;

/// Bounds of a stream.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// How many bytes may be on their way at once.
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
        let mut pieces = self.pieces(range, 8);
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

    /// The data of `range` in ascending order as pieces `(offset, bytes)` of at most one chunk each; zero blocks are
    /// left out. Read ahead in parallel within `options.window_bytes`. Ends after the first error.
    pub fn stream(
        &self,
        range: ByteRange,
        options: ReadOptions,
    ) -> BoxStream<'static, Result<(u64, Bytes), StoreError>> {
        let parallel = usize::try_from(options.window_bytes / FETCH_BYTES).unwrap_or(usize::MAX);
        self.pieces(range, parallel.clamp(1, 1024))
    }

    fn pieces(&self, range: ByteRange, parallel: usize) -> BoxStream<'static, Result<(u64, Bytes), StoreError>> {
        let this = self.clone();
        let fetch = move |batch: Result<Batch, StoreError>| {
            let this = this.clone();
            async move {
                match batch {
                    Ok(batch) => this.fetch_batch(batch).await,
                    Err(error) => vec![Err(error)],
                }
            }
        };
        let pieces = self.batches(range).map(fetch).buffered(parallel).map(stream::iter).flatten();
        // Whoever goes on after an error would take a hole for zeros.
        until_error(pieces).boxed()
    }

    /// The chunks that touch `range`, in ascending order, those together that follow each other and share a frame.
    fn batches(&self, range: ByteRange) -> impl Stream<Item = Result<Batch, StoreError>> + Send + use<> {
        let repository = Arc::clone(&self.map.repository);
        self.spans_by_leaf(range)
            .map_ok(move |spans| {
                let mut batches: Vec<Batch> = Vec::new();
                for span in spans {
                    let entry = repository.index.find(&span.chunk, ChunkKind::Data);
                    match (batches.last_mut(), entry) {
                        (Some(last), Some(entry)) if last.is_in_frame_of(&entry) => last.spans.push((span, entry)),
                        _ => batches.push(Batch::begin(span, entry)),
                    }
                }
                stream::iter(batches).map(Ok)
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

    /// The bytes of a batch. Ends with the first error.
    async fn fetch_batch(&self, batch: Batch) -> Vec<Result<(u64, Bytes), StoreError>> {
        let repository = &self.map.repository;
        if let Some((_, entry)) = batch.spans.first() {
            let chunks = batch.spans.iter().map(|(span, entry)| (span.chunk, entry.placement.part)).collect();
            if let Ok(found) = repository.chunks_of_frame(*entry, chunks).await {
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

/// Chunks that are read at once.
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
