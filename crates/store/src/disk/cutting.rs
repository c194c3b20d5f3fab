//! What a disk writer does with the blocks that it cuts: the work for the threads, and what comes back from it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use xenvault_store_format::{ChunkId, ChunkKind, CutChunk, LEAF_BLOCKS, leaves_of};

use super::{BLOCK, DiskWriter};
use crate::StoreError;
use crate::counters::{add, add_time};
use crate::packs::Sink;

/// Bytes that are cut in one piece of work.
const PIECE_BYTES: u64 = 1024 * 1024;

impl DiskWriter {
    /// Cuts whole blocks at the position, over as many leaves as they reach. A block that is not whole is the last
    /// one of the disk, and is filled with zeros.
    pub(super) async fn cut(&mut self, data: Bytes) -> Result<(), StoreError> {
        let mut rest = data;
        while !rest.is_empty() {
            let leaf_end = self.open_leaf().await?;
            let most = ((leaf_end - self.position) * BLOCK).min(PIECE_BYTES);
            let part = rest.split_to(usize::try_from(most).unwrap_or(usize::MAX).min(rest.len()));
            self.cut_in_leaf(part).await?;
            if self.position == leaf_end {
                self.close_leaf().await?;
            }
        }
        Ok(())
    }

    /// Cuts whole blocks that lie in the open leaf: the piece of work that goes to the worker threads.
    pub(super) async fn cut_in_leaf(&mut self, part: Bytes) -> Result<(), StoreError> {
        let blocks = part.len() as u64 / BLOCK;
        let mut room = self.sink.room(part.len()).await?;
        self.chunker_mut()?;
        let Some(mut chunker) = self.chunker.take() else { return Ok(()) };
        let (sink, disk) = (Arc::clone(&self.sink), self.number);
        let queued = Instant::now();
        let work = move || {
            let began = Instant::now();
            add_time(&sink.counters.throttled_nanos, began - queued);
            let zeros_before = chunker.zero_blocks();
            let mut chunks = Vec::new();
            chunker.push(&part, &mut |first, bytes| chunks.push(Hashed::offer(&sink, disk, first, bytes, &mut room)));
            add_time(&sink.counters.cut_nanos, began.elapsed());
            let zeros = chunker.zero_blocks() - zeros_before;
            (chunker, chunks, zeros)
        };
        let gone = |_| StoreError::WriterFailed { reason: "a worker thread died".to_owned() };
        let (chunker, chunks, zeros) = self.sink.pool.run(work).await.map_err(gone)?;
        self.chunker = Some(chunker);
        self.position += blocks;
        self.count_zeros(zeros * BLOCK);
        chunks.into_iter().try_for_each(|chunk| self.settle(chunk))
    }

    /// Goes over blocks that were declared zero, up to block `end`.
    pub(super) async fn cut_zeros(&mut self, end: u64) -> Result<(), StoreError> {
        while self.position < end {
            if self.leaf.is_none() && self.position.is_multiple_of(LEAF_BLOCKS) {
                let (leaf, last) = (self.position / LEAF_BLOCKS, end / LEAF_BLOCKS);
                let whole_disk = end == self.virtual_size.div_ceil(BLOCK);
                let last = if whole_disk { leaves_of(self.virtual_size) } else { last };
                if last > leaf {
                    self.drop_leaves(leaf, last).await?;
                    self.position = (last * LEAF_BLOCKS).min(end);
                    continue;
                }
            }
            let leaf_end = self.open_leaf().await?;
            self.pass_zeros(end.min(leaf_end)).await?;
            if self.position == leaf_end {
                self.close_leaf().await?;
            }
        }
        Ok(())
    }

    /// Goes over zeros in the open leaf, which end the chunk before them.
    pub(super) async fn pass_zeros(&mut self, until: u64) -> Result<(), StoreError> {
        let count = until - self.position;
        let ended = self.chunker_mut()?.push_zeros(count);
        self.place(ended).await?;
        self.position = until;
        Ok(())
    }

    /// Makes whole leaves zero. Costs only for those that are not zero in the base.
    pub(super) async fn drop_leaves(&mut self, first: u64, end: u64) -> Result<(), StoreError> {
        let Some(base) = self.base.clone() else { return Ok(()) };
        let mut from = first;
        while let Some((number, _)) = base.next_leaf(from, end).await? {
            self.tree.set_leaf(number, None).await?;
            from = number + 1;
        }
        Ok(())
    }

    /// Places a chunk that was cut outside of a worker.
    pub(super) async fn place(&mut self, chunk: Option<CutChunk>) -> Result<(), StoreError> {
        let Some(chunk) = chunk else { return Ok(()) };
        let mut room = self.sink.room(chunk.bytes.len()).await?;
        let (sink, disk) = (Arc::clone(&self.sink), self.number);
        let gone = |_| StoreError::WriterFailed { reason: "a worker thread died".to_owned() };
        let work = move || Hashed::offer(&sink, disk, chunk.first_block, &chunk.bytes, &mut room);
        let hashed = self.sink.pool.run(work).await.map_err(gone)?;
        self.settle(hashed)
    }

    fn settle(&mut self, chunk: Hashed) -> Result<(), StoreError> {
        let Hashed { first_block, length, id, new } = chunk;
        let counters = &self.sink.counters;
        add(&counters.chunks, 1);
        if new {
            self.stats.new_bytes += length;
            add(&counters.new_bytes, length);
            add(&counters.new_chunks, 1);
        } else {
            self.stats.dedup_bytes += length;
            add(&counters.dedup_bytes, length);
        }
        match self.leaf.as_mut() {
            Some(leaf) => leaf.decide(first_block, id, length / BLOCK),
            None => Ok(()),
        }
    }

    pub(super) fn count_zeros(&mut self, bytes: u64) {
        self.stats.zero_bytes += bytes;
        add(&self.sink.counters.zero_bytes, bytes);
    }
}

/// A chunk that was cut and, if it was new, is on its way to a pack.
struct Hashed {
    first_block: u64,
    length: u64,
    id: ChunkId,
    new: bool,
}

impl Hashed {
    fn offer(sink: &Arc<Sink>, disk: u64, first_block: u64, bytes: &[u8], room: &mut OwnedSemaphorePermit) -> Self {
        let id = sink.repository.keys.chunk_id(ChunkKind::Data, bytes);
        let new = sink.offer(id, ChunkKind::Data, bytes, Some(disk), room);
        Self { first_block, length: bytes.len() as u64, id, new }
    }
}
