//! The leaf of a disk map that is being written, over the base's leaf of the same place.

use std::sync::Arc;

use xenvault_store_format::{ChunkId, LEAF_BLOCKS, LeafEntry, LeafPage};

use crate::StoreError;

/// A leaf as far as it is decided, over the base's.
#[derive(Debug)]
pub(crate) struct OpenLeaf {
    pub(crate) number: u64,
    pub(crate) base: Option<Arc<LeafPage>>,
    pub(crate) decided: LeafPage,
}

impl OpenLeaf {
    pub(crate) fn first_block(&self) -> u64 {
        self.number * LEAF_BLOCKS
    }

    /// The run of the base that holds the block, with the run's first block on the disk.
    pub(crate) fn base_run(&self, block: u64) -> (u64, LeafEntry) {
        let wanted = block - self.first_block();
        let runs = self.base.iter().flat_map(|page| page.placed());
        let mut covered = 0;
        for (at, entry) in runs {
            covered = at + u64::from(entry.blocks);
            if covered > wanted {
                return (self.first_block() + at, entry);
            }
        }
        let rest = u16::try_from(LEAF_BLOCKS - covered).unwrap_or(u16::MAX);
        (self.first_block() + covered, LeafEntry { blocks: rest, chunk: None })
    }

    /// Takes the next chunk over; what lies between it and the one before is zero.
    pub(crate) fn decide(&mut self, block: u64, id: ChunkId, blocks: u64) -> Result<(), StoreError> {
        let at = block.checked_sub(self.first_block());
        let Some(hole) = at.and_then(|at| at.checked_sub(self.decided.covered_blocks())) else {
            // Rather no backup than one whose blocks are at the wrong place.
            let what = format!("block {block} of the disk is decided already");
            return Err(StoreError::Misuse { what });
        };
        let placed = self.decided.push_hole(hole).and_then(|()| self.decided.push_chunk(id, blocks));
        placed.map_err(|error| StoreError::format("map page in the making", error))
    }
}
