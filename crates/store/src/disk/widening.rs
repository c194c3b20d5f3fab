//! Which bytes have to be read so that a changed disk can be cut again without its unchanged content.
//!
//! A change breaks the chunk that it lies in, and cutting goes on from there to the next cut that stands in the base too.
//! Whoever can not read the repository takes these unchanged bytes from where the changed ones come from. Where the cuts
//! of the base are, its map says; that a cut stands can be told without content, except where a chunk has the largest
//! size and may have ended for that.

use std::sync::Arc;

use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store_format::{BLOCK_BYTES, DiskMapRef, LEAF_BLOCKS, LeafPage};

use crate::leaf::OpenLeaf;
use crate::map::MapReader;
use crate::{Repository, StoreError};

const BLOCK: u64 = BLOCK_BYTES as u64;

impl Repository {
    /// The ranges of a disk of `virtual_size` bytes that have to be handed to a [`crate::DiskWriter`] over `base`, where
    /// `changed` is different and all else is as in the base, so that it reads no content of the base. They hold
    /// `changed`, and whole blocks of 4 KiB but at the end of the disk. Reads pages of the map only.
    ///
    /// # Errors
    /// What reading the map may return.
    pub async fn ranges_to_cut(
        &self,
        base: &DiskMapRef,
        virtual_size: u64,
        changed: &ExtentSet,
    ) -> Result<ExtentSet, StoreError> {
        let map = MapReader::new(Arc::clone(&self.inner), *base);
        let mut widening = Widening {
            blocks: virtual_size.div_ceil(BLOCK),
            largest: self.inner.config.max_chunk_blocks.into(),
            leaf: None,
            map,
        };
        let mut wanted = ExtentSet::new();
        for run in changed.clipped(virtual_size).runs() {
            let first = widening.first(run.start() / BLOCK).await?;
            let end = widening.end(run.end().div_ceil(BLOCK)).await?;
            let range = ByteRange::new(first * BLOCK, end.saturating_mul(BLOCK).min(virtual_size));
            range.into_iter().for_each(|range| wanted.insert(range));
        }
        Ok(wanted)
    }
}

struct Widening {
    map: MapReader,
    /// Length of the disk.
    blocks: u64,
    /// Length of the largest chunk.
    largest: u64,
    /// The leaf that was looked at last.
    leaf: Option<OpenLeaf>,
}

impl Widening {
    /// The run of the base that holds a block: its first block, its length, and whether it is a chunk.
    async fn run(&mut self, block: u64) -> Result<(u64, u64, bool), StoreError> {
        let number = block / LEAF_BLOCKS;
        let leaf = match self.leaf.take() {
            Some(leaf) if leaf.number == number => leaf,
            _ => OpenLeaf { number, base: self.map.leaf(number).await?, decided: LeafPage::new() },
        };
        let (start, run) = self.leaf.insert(leaf).base_run(block);
        Ok((start, run.blocks.into(), run.chunk.is_some()))
    }

    /// Where the chunk begins that a change at `block` breaks.
    async fn first(&mut self, block: u64) -> Result<u64, StoreError> {
        let (start, _, is_chunk) = self.run(block).await?;
        if is_chunk {
            return Ok(start);
        }
        // It may have been the hole that ended the chunk before it, and data is about to fill the hole.
        if block == start && !block.is_multiple_of(LEAF_BLOCKS) {
            let (before, _, is_chunk) = self.run(block - 1).await?;
            if is_chunk {
                return Ok(before);
            }
        }
        Ok(block)
    }

    /// Where the first cut is at or behind `block`, the end of a change, that stands whatever has changed before it.
    async fn end(&mut self, block: u64) -> Result<u64, StoreError> {
        let (mut at, mut stands) = (block, false);
        while at < self.blocks && !at.is_multiple_of(LEAF_BLOCKS) {
            let (start, length, is_chunk) = self.run(at).await?;
            if !is_chunk || (stands && start == at) {
                break;
            }
            at = start + length;
            // Its last block is unchanged, and it is that block that ends it, unless it is as long as a chunk can be.
            stands = length < self.largest;
        }
        Ok(at.min(self.blocks))
    }
}
