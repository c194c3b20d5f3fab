//! Where a disk is cut into chunks.
//!
//! Content-defined on blocks of 4 KiB: a chunk ends after a block whose own keyed hash has its low bits zero, before
//! and after all-zero blocks (which are never stored), at the cap, and at every 16 MiB of the disk. The rule looks at
//! one block and at the length so far, so two writers that have cut at the same place cut alike from there on.

use crate::{BLOCK_BYTES, Config, Keys, LEAF_BLOCKS};

static ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// The rule of one repository.
#[derive(Clone)]
pub struct CutRule {
    key: zeroize::Zeroizing<[u8; 32]>,
    mask: u16,
    max_blocks: usize,
}

impl std::fmt::Debug for CutRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CutRule").field("max_blocks", &self.max_blocks).finish_non_exhaustive()
    }
}

impl CutRule {
    /// The rule that `config` sets.
    pub fn new(keys: &Keys, config: &Config) -> Self {
        let mask = (1_u16 << config.cut_bits.min(15)) - 1;
        Self { key: zeroize::Zeroizing::new(*keys.cut_key()), mask, max_blocks: config.max_chunk_blocks.into() }
    }

    /// Whether a chunk ends after this block, whatever stands around it.
    fn cuts_after(&self, block: &[u8]) -> bool {
        let hash = blake3::keyed_hash(&self.key, block);
        let [low, high, ..] = *hash.as_bytes();
        u16::from_le_bytes([low, high]) & self.mask == 0
    }
}

/// A chunk that was cut: whole blocks, none of them all zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CutChunk {
    /// Number of its first block on the disk.
    pub first_block: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Cuts the blocks of a disk that it is given in ascending order.
#[derive(Debug)]
pub struct Chunker {
    rule: CutRule,
    /// Number of the next block.
    next: u64,
    open: Vec<u8>,
    zero_blocks: u64,
}

impl Chunker {
    /// A chunker that expects block `first` of the disk. A chunk must be able to start there.
    pub fn new(rule: CutRule, first: u64) -> Self {
        Self { rule, next: first, open: Vec::new(), zero_blocks: 0 }
    }

    /// The block that it expects next.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Whether no chunk is open: whatever comes next begins a chunk.
    pub fn is_between_chunks(&self) -> bool {
        self.open.is_empty()
    }

    /// All-zero blocks met so far by [`Self::push`].
    pub fn zero_blocks(&self) -> u64 {
        self.zero_blocks
    }

    /// Goes on at another block.
    ///
    /// Whoever leaves blocks out says so while no chunk is open; an open chunk would be dropped, so it is returned.
    pub fn jump(&mut self, block: u64) -> Option<CutChunk> {
        let open = self.cut();
        self.next = block;
        open
    }

    /// Takes blocks; hands the first block and the bytes of every chunk that they complete to `done`. A rest that is
    /// no whole block is ignored.
    pub fn push(&mut self, blocks: &[u8], done: &mut impl FnMut(u64, &[u8])) {
        // One buffer for all chunks: what is known already costs no allocation.
        self.open.reserve_exact((self.rule.max_blocks * BLOCK_BYTES).saturating_sub(self.open.len()));
        for block in blocks.chunks_exact(BLOCK_BYTES) {
            if block == ZERO_BLOCK {
                self.zero_blocks += 1;
                self.end_open(done);
                self.next += 1;
                continue;
            }
            self.open.extend_from_slice(block);
            self.next += 1;
            let full = self.open.len() >= self.rule.max_blocks * BLOCK_BYTES;
            if full || self.next.is_multiple_of(LEAF_BLOCKS) || self.rule.cuts_after(block) {
                self.end_open(done);
            }
        }
    }

    fn end_open(&mut self, done: &mut impl FnMut(u64, &[u8])) {
        if !self.open.is_empty() {
            done(self.next - (self.open.len() / BLOCK_BYTES) as u64, &self.open);
            self.open.clear();
        }
    }

    /// Takes `count` blocks of zeros without looking at any; returns the chunk that they end.
    pub fn push_zeros(&mut self, count: u64) -> Option<CutChunk> {
        let open = if count == 0 { None } else { self.cut() };
        self.next += count;
        open
    }

    /// Ends the open chunk. Only the end of the disk may do that from outside.
    pub fn cut(&mut self) -> Option<CutChunk> {
        if self.open.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.open);
        let blocks = (bytes.len() / BLOCK_BYTES) as u64;
        Some(CutChunk { first_block: self.next - blocks, bytes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{keys, noise};

    fn rule() -> CutRule {
        CutRule::new(&keys(), &Config::new(keys().repository(), 0))
    }

    fn collect(chunks: &mut Vec<CutChunk>) -> impl FnMut(u64, &[u8]) {
        |first_block, bytes| chunks.push(CutChunk { first_block, bytes: bytes.to_vec() })
    }

    fn cut_all(first: u64, data: &[u8]) -> Vec<CutChunk> {
        let mut chunks = Vec::new();
        let mut chunker = Chunker::new(rule(), first);
        chunker.push(data, &mut collect(&mut chunks));
        chunks.extend(chunker.cut());
        chunks
    }

    #[test]
    fn chunks_average_near_64_kib_and_never_pass_the_cap() {
        let data = noise(1, 12 << 20);
        let chunks = cut_all(0, &data);
        assert!(chunks.iter().all(|chunk| chunk.bytes.len() <= 256 * 1024));
        let average = data.len() / chunks.len();
        assert!((48 * 1024..80 * 1024).contains(&average), "{average}");
        assert_eq!(chunks.iter().flat_map(|chunk| chunk.bytes.iter().copied()).collect::<Vec<_>>(), data);
    }

    #[test]
    fn a_shift_by_one_block_keeps_all_but_the_first_chunks() {
        let data = noise(2, 4 << 20);
        let mut shifted = noise(3, BLOCK_BYTES);
        shifted.extend_from_slice(&data);
        let known: std::collections::HashSet<_> = cut_all(0, &data).into_iter().map(|chunk| chunk.bytes).collect();
        let fresh = cut_all(0, &shifted).into_iter().filter(|chunk| !known.contains(&chunk.bytes)).count();
        assert!(fresh <= 3, "{fresh}");
    }

    #[test]
    fn leaves_are_borders_and_zero_blocks_are_in_no_chunk() {
        let mut data = noise(4, 8 * BLOCK_BYTES);
        data[3 * BLOCK_BYTES..5 * BLOCK_BYTES].fill(0);
        let chunks = cut_all(LEAF_BLOCKS - 2, &data);
        assert!(chunks.iter().any(|chunk| chunk.first_block == LEAF_BLOCKS));
        assert!(chunks.iter().all(|chunk| !chunk.bytes.chunks(BLOCK_BYTES).any(|block| block == ZERO_BLOCK)));
        let blocks: usize = chunks.iter().map(|chunk| chunk.bytes.len() / BLOCK_BYTES).sum();
        assert_eq!(blocks, 6);
    }

    proptest! {
        #[test]
        fn how_the_bytes_arrive_does_not_change_the_cuts(
            blocks in proptest::collection::vec(0_u8..6, 1..200),
            parts in proptest::collection::vec(1_usize..9, 1..40),
        ) {
            let data: Vec<u8> = blocks.iter().flat_map(|&n| {
                if n == 0 { vec![0; BLOCK_BYTES] } else { noise(u64::from(n), BLOCK_BYTES) }
            }).collect();
            let mut chunks = Vec::new();
            let mut chunker = Chunker::new(rule(), 0);
            let mut rest = &data[..];
            for &part in parts.iter().cycle() {
                let (now, later) = rest.split_at((part * BLOCK_BYTES).min(rest.len()));
                chunker.push(now, &mut collect(&mut chunks));
                rest = later;
                if rest.is_empty() { break; }
            }
            chunks.extend(chunker.cut());
            prop_assert_eq!(chunks, cut_all(0, &data));
        }
    }
}
