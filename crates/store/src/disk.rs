//! Writing one disk: cutting, over a base where there is one.
//!
//! The writer goes over the disk from left to right. What is handed in is cut; what lies between comes from the base:
//! whole leaves are skipped, whole chunks are taken over by their ids, and only where a change has broken a chunk are
//! its unchanged bytes read back and cut again, up to the next cut that stands in the base too. Cutting depends on
//! nothing before the last cut, so from there on the base's chunks are right again.

mod cutting;

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use xenvault_block::ByteRange;
use xenvault_store_format::{
    BLOCK_BYTES, ChunkId, ChunkKind, Chunker, CutRule, DiskMapRef, LEAF_BLOCKS, LeafEntry, LeafPage,
};

use crate::counters::{add, add_time};
use crate::leaf::OpenLeaf;
use crate::map::MapReader;
use crate::packs::Sink;
use crate::tree::TreeBuilder;
use crate::{DiskReader, StoreError};

/// How a disk is written.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// The map of the base point. With it, what is never written keeps the base's content; without, it is zero.
    /// The base may be smaller than the disk (bytes beyond it were zero), never larger.
    pub base: Option<DiskMapRef>,
}

/// What one disk cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskStats {
    /// Bytes handed in, zeros that were declared included.
    pub read_bytes: u64,
    /// Bytes in all-zero blocks.
    pub zero_bytes: u64,
    /// Bytes of chunks that the repository knew already.
    pub dedup_bytes: u64,
    /// Plain bytes of new chunks.
    pub new_bytes: u64,
    /// Unchanged bytes read back from the repository.
    pub base_bytes: u64,
    /// New map pages.
    pub new_pages: u64,
}

/// A disk that was written to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskResult {
    /// The content, for the point's manifest.
    pub map: DiskMapRef,
    /// What it cost.
    pub stats: DiskStats,
}

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Writes one disk in ascending order. Several disks of one [`crate::Writer`] may be written at the same time.
#[derive(Debug)]
pub struct DiskWriter {
    sink: Arc<Sink>,
    /// Its number among the disks of the run.
    number: u64,
    virtual_size: u64,
    base: Option<MapReader>,
    tree: TreeBuilder,
    /// Away while a piece is being cut.
    chunker: Option<Chunker>,
    /// A call has begun and not ended well: bytes may be missing, so the disk can not be finished.
    broken: bool,
    /// Every block before this one is dealt with.
    position: u64,
    leaf: Option<OpenLeaf>,
    partial: Option<PartialBlock>,
    /// First byte that may still be handed in.
    next_byte: u64,
    stats: DiskStats,
}

/// A block of which only a part was handed in so far. The rest is the base's.
#[derive(Debug)]
struct PartialBlock {
    number: u64,
    bytes: Vec<u8>,
}

/// What comes after the unchanged blocks that are being gone over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Data,
    Zeros,
    End,
}

impl DiskWriter {
    pub(crate) async fn begin(sink: Arc<Sink>, options: DiskOptions) -> Result<Self, StoreError> {
        let DiskOptions { virtual_size, base } = options;
        if let Some(base) = base.filter(|base| base.virtual_size > virtual_size) {
            let what = format!(
                "a disk of {virtual_size} bytes can not have a base of {} bytes: read a disk that has shrunk as a whole",
                base.virtual_size
            );
            return Err(StoreError::Misuse { what });
        }
        let base = base.map(|base| MapReader::new(Arc::clone(&sink.repository), base));
        if let Some(base) = base.as_ref().filter(|_| sink.repository.index.has_losses()) {
            base.check_chunks().await?;
        }
        let tree = TreeBuilder::begin(Arc::clone(&sink), virtual_size, base.clone()).await?;
        let rule = CutRule::new(&sink.repository.keys, &sink.repository.config);
        Ok(Self {
            number: sink.new_disk(),
            sink,
            virtual_size,
            base,
            tree,
            chunker: Some(Chunker::new(rule, 0)),
            broken: false,
            position: 0,
            leaf: None,
            partial: None,
            next_byte: 0,
            stats: DiskStats::default(),
        })
    }

    /// Hands in the content of the bytes at `offset`. Waits while too much is on its way.
    ///
    /// Calls come in ascending order and do not overlap; any alignment works, whole 4 KiB blocks are cheapest.
    /// If the call is dropped half way or fails, the disk can not be finished afterwards.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the order is broken or the disk's end passed; [`StoreError::Full`],
    /// [`StoreError::Backend`], [`StoreError::WriterFailed`]; [`StoreError::DiskRange`] if the base can not be read.
    pub async fn write(&mut self, offset: u64, data: Bytes) -> Result<(), StoreError> {
        let range = self.accept(offset, data.len() as u64)?;
        let (mut at, mut rest) = (range.start(), data);
        while !rest.is_empty() {
            let within = at % BLOCK;
            let whole = rest.len() as u64 / BLOCK * BLOCK;
            let length = if within != 0 || whole == 0 { (BLOCK - within).min(rest.len() as u64) } else { whole };
            let part = rest.split_to(usize::try_from(length).unwrap_or(usize::MAX).min(rest.len()));
            if within != 0 || whole == 0 {
                self.overlay(at, &part).await?;
            } else {
                self.settle_partial(None).await?;
                self.go_to(at / BLOCK, Then::Data).await?;
                self.cut(part).await?;
            }
            at += length;
        }
        self.broken = false;
        Ok(())
    }

    /// Declares that `range` is zero. As [`Self::write`] with zeros, at no cost for whole blocks.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn zero(&mut self, range: ByteRange) -> Result<(), StoreError> {
        let range = self.accept(range.start(), range.len())?;
        let whole_start = range.start().next_multiple_of(BLOCK).min(range.end());
        // Nothing lies behind the end of the disk, so its last block counts as whole.
        let whole_end = if range.end() == self.virtual_size { range.end() } else { range.end() / BLOCK * BLOCK };
        if whole_start >= whole_end {
            self.overlay_zeros(range).await?;
            self.broken = false;
            return Ok(());
        }
        if range.start() < whole_start {
            self.overlay_zeros(ByteRange::new(range.start(), whole_start).unwrap_or(range)).await?;
        }
        self.settle_partial(None).await?;
        let (first, end) = (whole_start / BLOCK, whole_end.div_ceil(BLOCK));
        self.go_to(first, Then::Zeros).await?;
        self.cut_zeros(end).await?;
        self.count_zeros(whole_end - whole_start);
        if whole_end < range.end() {
            self.overlay_zeros(ByteRange::new(whole_end, range.end()).unwrap_or(range)).await?;
        }
        self.broken = false;
        Ok(())
    }

    /// Completes the map. The content is durable only after [`crate::Writer::publish`].
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn finish(mut self) -> Result<DiskResult, StoreError> {
        self.accept(self.next_byte, 0)?;
        self.settle_partial(None).await?;
        self.go_to(self.virtual_size.div_ceil(BLOCK), Then::End).await?;
        let last = self.chunker_mut()?.cut();
        self.place(last).await?;
        self.close_leaf().await?;
        self.sink.check()?;
        let (map, new_pages) = self.tree.finish().await?;
        self.stats.new_pages = new_pages;
        Ok(DiskResult { map, stats: self.stats })
    }

    fn accept(&mut self, offset: u64, length: u64) -> Result<ByteRange, StoreError> {
        self.sink.check()?;
        let range = ByteRange::with_length(offset, length).ok();
        let Some(range) = range.filter(|range| range.end() <= self.virtual_size && offset >= self.next_byte) else {
            let (next, size) = (self.next_byte, self.virtual_size);
            let what = format!("{length} bytes at byte {offset} do not follow byte {next} of a disk of {size} bytes");
            return Err(StoreError::Misuse { what });
        };
        if self.broken {
            let what = "an earlier call on this disk was dropped or failed".to_owned();
            return Err(StoreError::Misuse { what });
        }
        self.broken = true;
        self.next_byte = range.end();
        self.stats.read_bytes += length;
        add(&self.sink.counters.read_bytes, length);
        Ok(range)
    }

    fn chunker_mut(&mut self) -> Result<&mut Chunker, StoreError> {
        let broken = || StoreError::WriterFailed { reason: "a worker thread died".to_owned() };
        self.chunker.as_mut().ok_or_else(broken)
    }

    /// Puts bytes into a part of one block.
    async fn overlay(&mut self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let number = offset / BLOCK;
        self.settle_partial(Some(number)).await?;
        let mut block = match self.partial.take() {
            Some(block) => block,
            None => PartialBlock { number, bytes: self.base_block(number).await? },
        };
        let at = usize::try_from(offset % BLOCK).unwrap_or_default();
        block.bytes.iter_mut().skip(at).zip(data).for_each(|(to, from)| *to = *from);
        self.partial = Some(block);
        Ok(())
    }

    async fn overlay_zeros(&mut self, range: ByteRange) -> Result<(), StoreError> {
        let zeros = [0; BLOCK_BYTES];
        let mut at = range.start();
        while at < range.end() {
            let length = (BLOCK - at % BLOCK).min(range.end() - at);
            let data = zeros.get(..usize::try_from(length).unwrap_or_default()).unwrap_or_default();
            self.overlay(at, data).await?;
            at += length;
        }
        Ok(())
    }

    /// Cuts the block that was handed in by parts, unless it is block `but`.
    async fn settle_partial(&mut self, but: Option<u64>) -> Result<(), StoreError> {
        match self.partial.take() {
            Some(block) if Some(block.number) != but => {
                self.go_to(block.number, Then::Data).await?;
                self.cut(block.bytes.into()).await
            }
            kept => {
                self.partial = kept;
                Ok(())
            }
        }
    }

    async fn base_block(&self, number: u64) -> Result<Vec<u8>, StoreError> {
        let mut bytes = vec![0; BLOCK_BYTES];
        if let Some(base) = &self.base {
            let size = base.map().virtual_size;
            let whole = ByteRange::with_length(number * BLOCK, BLOCK).unwrap_or(ByteRange::up_to(0));
            if let Some(range) = whole.intersect(ByteRange::up_to(size)) {
                let reader = DiskReader::new(Arc::clone(&base.repository), *base.map());
                let read = reader.read_at(range).await?;
                bytes.iter_mut().zip(read.iter()).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(bytes)
    }

    /// Goes over unchanged blocks up to `block`.
    async fn go_to(&mut self, block: u64, then: Then) -> Result<(), StoreError> {
        while self.position < block {
            if self.leaf.is_none() {
                let (leaf, target) = (self.position / LEAF_BLOCKS, block / LEAF_BLOCKS);
                if target > leaf {
                    // Between leaves no chunk is open; what is not opened stays the base's.
                    self.position = target * LEAF_BLOCKS;
                    continue;
                }
                // A disk may end within a leaf.
                if then == Then::End {
                    self.position = block;
                    return Ok(());
                }
            }
            let leaf_end = self.open_leaf().await?;
            let stop = block.min(leaf_end);
            // At the end of a leaf every cut stands, whatever comes next.
            self.keep(stop, if stop == leaf_end { Then::End } else { then }).await?;
            if self.position == leaf_end {
                self.close_leaf().await?;
            }
        }
        Ok(())
    }

    /// Opens the leaf at the position, if it is not open; returns the first block after it.
    async fn open_leaf(&mut self) -> Result<u64, StoreError> {
        let number = self.position / LEAF_BLOCKS;
        if self.leaf.is_none() {
            let base = match &self.base {
                Some(base) => base.leaf(number).await?,
                None => None,
            };
            let first = number * LEAF_BLOCKS;
            self.chunker_mut()?.jump(first);
            debug_assert_eq!(self.position, first);
            self.leaf = Some(OpenLeaf { number, base, decided: LeafPage::new() });
        }
        Ok((number + 1) * LEAF_BLOCKS)
    }

    async fn close_leaf(&mut self) -> Result<(), StoreError> {
        let Some(leaf) = self.leaf.take() else { return Ok(()) };
        let id = match leaf.decided.encode() {
            Some(bytes) => Some(self.tree.store_page(&bytes).await?),
            None => None,
        };
        self.tree.set_leaf(leaf.number, id).await
    }

    /// Keeps the base's blocks up to `stop`, which lies in the open leaf.
    async fn keep(&mut self, stop: u64, then: Then) -> Result<(), StoreError> {
        while self.position < stop {
            let Some(leaf) = self.leaf.as_mut() else { return Ok(()) };
            let (start, run) = leaf.base_run(self.position);
            let end = start + u64::from(run.blocks);
            let Some(id) = run.chunk else {
                let until = end.min(stop);
                self.pass_zeros(until).await?;
                continue;
            };
            // The cut at the run's end stands if something in the base stood after it; before a hole it may have been
            // the hole that cut, and data is about to fill that hole.
            let next_to_filled_hole = end == stop && then == Then::Data && leaf.base_run(end).1.chunk.is_none();
            let whole = start == self.position && end <= stop && !next_to_filled_hole;
            if whole && self.chunker.as_ref().is_some_and(Chunker::is_between_chunks) {
                leaf.decide(start, id, run.blocks.into())?;
                self.position = end;
                self.chunker_mut()?.jump(end);
                continue;
            }
            let bytes = self.base_chunk(start, &run, &id).await?;
            let until = end.min(stop);
            let (from, to) = ((self.position - start) * BLOCK, (until - start) * BLOCK);
            let part = bytes.slice(usize::try_from(from).unwrap_or_default()..usize::try_from(to).unwrap_or_default());
            self.stats.base_bytes += part.len() as u64;
            add(&self.sink.counters.base_bytes, part.len() as u64);
            self.cut_in_leaf(part).await?;
        }
        Ok(())
    }

    async fn base_chunk(&self, start: u64, run: &LeafEntry, id: &ChunkId) -> Result<Bytes, StoreError> {
        let began = Instant::now();
        let length = u64::from(run.blocks) * BLOCK;
        let read = self.sink.repository.chunk(id, ChunkKind::Data).await;
        add_time(&self.sink.counters.base_nanos, began.elapsed());
        let wrong = |length: usize| StoreError::Damaged {
            object: format!("chunk {id}"),
            source: format!("{length} bytes, its map says {}", u64::from(run.blocks) * BLOCK).into(),
        };
        let checked =
            read.and_then(|bytes| if bytes.len() as u64 == length { Ok(bytes) } else { Err(wrong(bytes.len())) });
        checked.map_err(|error| match ByteRange::with_length(start * BLOCK, length) {
            Ok(range) => StoreError::DiskRange { range, source: Box::new(error) },
            Err(_) => error,
        })
    }
}
