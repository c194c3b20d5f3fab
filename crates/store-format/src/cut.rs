//! Where a disk is cut into chunks.
//!
//! Content-defined on blocks of 4 KiB: a chunk ends after a block whose own keyed hash has its low bits zero, before
//! and after all-zero blocks (which are never stored), at the cap, and at every 16 MiB of the disk. The rule looks at
//! one block and at the length so far, so two writers that have cut at the same place cut alike from there on.
//!
//! Every block that is read is hashed for this, so the hash is one of a few multiplications. It need not withstand
//! anybody: whoever foresees cuts can make chunks long or short, within limits that hold for everybody.

use crate::{BLOCK_BYTES, Config, Keys, LEAF_BLOCKS};

static ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// The rule of one repository.
#[derive(Clone)]
pub struct CutRule {
    key: zeroize::Zeroizing<[u64; 4]>,
    mask: u64,
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
        let mask = (1_u64 << config.cut_bits.min(15)) - 1;
        let (words, _) = keys.cut_key().as_chunks::<8>();
        let mut key = zeroize::Zeroizing::new([0; 4]);
        key.iter_mut().zip(words).for_each(|(to, from)| *to = u64::from_le_bytes(*from));
        Self { key, mask, max_blocks: config.max_chunk_blocks.into() }
    }

    /// Whether a chunk ends after this block, whatever stands around it.
    fn cuts_after(&self, block: &[u8]) -> bool {
        block_hash(&self.key, block) & self.mask == 0
    }
}

/// The product of two numbers, its upper half folded onto the lower one.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    // Both halves on purpose.
    #[expect(clippy::cast_possible_truncation, reason = "the upper half is the other operand")]
    let folded = product as u64 ^ (product >> 64) as u64;
    folded
}

/// The hash of a block that decides about cuts: four lanes, each over two of eight words in turn.
fn block_hash(key: &[u64; 4], block: &[u8]) -> u64 {
    let (words, _) = block.as_chunks::<8>();
    let (stripes, _) = words.as_chunks::<8>();
    let [mut a, mut b, mut c, mut d] = *key;
    for stripe in stripes {
        let [w0, w1, w2, w3, w4, w5, w6, w7] = stripe.map(u64::from_le_bytes);
        a = fold(w0 ^ key[0], w1 ^ a);
        b = fold(w2 ^ key[1], w3 ^ b);
        c = fold(w4 ^ key[2], w5 ^ c);
        d = fold(w6 ^ key[3], w7 ^ d);
    }
    fold(a ^ key[1], b ^ key[0]) ^ fold(c ^ key[3], d ^ key[2])
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
        // What lies within `blocks` is not copied; only a chunk that goes on in the next call is kept.
        let (mut rest, mut at) = (blocks, 0);
        while let Some(block) = rest.get(at..at + BLOCK_BYTES) {
            self.next += 1;
            let zero = block == ZERO_BLOCK;
            if !zero {
                at += BLOCK_BYTES;
                let full = self.open.len() + at >= self.rule.max_blocks * BLOCK_BYTES;
                if !(full || self.next.is_multiple_of(LEAF_BLOCKS) || self.rule.cuts_after(block)) {
                    continue;
                }
            }
            let (chunk, after) = rest.split_at(at);
            let end = if zero { self.next - 1 } else { self.next };
            self.end_open(chunk, end, done);
            self.zero_blocks += u64::from(zero);
            rest = if zero { after.get(BLOCK_BYTES..).unwrap_or_default() } else { after };
            at = 0;
        }
        self.open.extend_from_slice(rest.get(..at).unwrap_or_default());
    }

    /// Ends the chunk whose last bytes are `last`, before block `end`.
    fn end_open(&mut self, last: &[u8], end: u64, done: &mut impl FnMut(u64, &[u8])) {
        let first = |length: usize| end - (length / BLOCK_BYTES) as u64;
        if self.open.is_empty() {
            if !last.is_empty() {
                done(first(last.len()), last);
            }
        } else {
            self.open.extend_from_slice(last);
            done(first(self.open.len()), &self.open);
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
    fn chunks_average_near_32_kib_and_never_pass_the_cap() {
        let data = noise(1, 12 << 20);
        let chunks = cut_all(0, &data);
        assert!(chunks.iter().all(|chunk| chunk.bytes.len() <= 128 * 1024));
        let average = data.len() / chunks.len();
        assert!((27 * 1024..36 * 1024).contains(&average), "{average}");
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
