//! Reading the disk of a point: at random, as a stream, or only where there is data.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store_format::{BLOCK_BYTES, ChunkId, ChunkKind, DiskMapRef, LEAF_BYTES, LeafPage};

use crate::StoreError;
use crate::map::MapReader;
use crate::repository::Inner;

/// Longest chunk that a map of this format names, in bytes; what one fetch may hold.
const FETCH_BYTES: u64 = 256 * 1024;
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

    /// The data of `range` in ascending order as pieces `(offset, bytes)` of at most 256 KiB; zero blocks are left
    /// out. Read ahead in parallel within `options.window_bytes`. Ends after the first error.
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
        let fetch = move |span: Span| {
            let this = this.clone();
            async move { this.fetch(span).await.map(|bytes| (span.wanted.start(), bytes)) }
        };
        let pieces = self.spans(range).map_ok(fetch).try_buffered(parallel);
        // Whoever goes on after an error would take a hole for zeros.
        until_error(pieces).boxed()
    }

    /// The chunks that touch `range`, in ascending order.
    fn spans(&self, range: ByteRange) -> impl Stream<Item = Result<Span, StoreError>> + Send + use<> {
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
                    Ok(stream::iter(spans_of(start, &leaf, range)).map(Ok))
                }
            })
            .try_buffered(LEAVES_AHEAD)
            .try_flatten()
    }

    async fn fetch(&self, span: Span) -> Result<Bytes, StoreError> {
        let repository = &self.map.repository;
        let bytes = match repository.data.get(&span.chunk) {
            Some(bytes) => bytes,
            None => {
                let read = repository.chunk(&span.chunk, ChunkKind::Data).await;
                let bytes = read.map_err(|error| on_disk(Ok(span.wanted), error))?;
                if bytes.len() as u64 != span.length {
                    let source = format!("{} bytes, its map says {}", bytes.len(), span.length).into();
                    let error = StoreError::Damaged { object: format!("chunk {}", span.chunk), source };
                    return Err(on_disk(Ok(span.wanted), error));
                }
                // A chunk that is wanted only in part is likely to be asked for again.
                if span.wanted.len() < span.length {
                    repository.data.put(span.chunk, bytes.clone(), bytes.len());
                }
                bytes
            }
        };
        let from = usize::try_from(span.wanted.start() - span.start).unwrap_or(usize::MAX).min(bytes.len());
        let to = usize::try_from(span.wanted.end() - span.start).unwrap_or(usize::MAX).min(bytes.len());
        Ok(bytes.slice(from.min(to)..to))
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
