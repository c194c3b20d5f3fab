//! The bitmap that XenAPI hands out: one bit for 64 KiB, the highest bit of each byte first.
//!
//! The logs on the SR have the lowest bit first; they never come here.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use xenvault_block::{ByteRange, CBT_BLOCK_BYTES, ExtentSet};

/// A bitmap that is made here, not received, covers at most 1 PiB (2 GiB of bitmap): a limit against absurd sizes.
const MAX_VIRTUAL_SIZE: u64 = 1 << 50;

/// The blocks of 64 KiB of one disk that changed between two snapshots.
///
/// Invariant: the bitmap has exactly as many bytes as the virtual size needs; spare bits at its end are clear.
#[derive(Clone, PartialEq, Eq)]
pub struct ChangedBlocks {
    bitmap: Vec<u8>,
    virtual_size: u64,
}

/// Why a bitmap can not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CbtError {
    /// The bitmap is too long or too short for the disk.
    #[error("the changed-block bitmap has {found} bytes, a disk of {virtual_size} bytes needs {expected}")]
    WrongLength {
        /// Bytes that came.
        found: usize,
        /// Bytes that the virtual size asks for.
        expected: u64,
        /// Virtual size of the disk, in bytes.
        virtual_size: u64,
    },
    /// The text is not standard base64 with padding.
    #[error("the changed-block bitmap is not valid base64")]
    Base64 {
        /// What the decoder says.
        source: base64::DecodeError,
    },
    /// The newer bitmap is of a smaller disk.
    #[error("the disk shrank from {older} to {newer} bytes, so the two bitmaps can not be joined")]
    Shrunk {
        /// Virtual size of the older bitmap, in bytes.
        older: u64,
        /// Virtual size of the newer bitmap, in bytes.
        newer: u64,
    },
    /// A disk so large that its bitmap does not fit the memory of this machine.
    #[error("a disk of {virtual_size} bytes is too large for a changed-block bitmap on this machine")]
    TooLarge {
        /// Virtual size, in bytes.
        virtual_size: u64,
    },
}

impl ChangedBlocks {
    /// Takes a bitmap in XenAPI's order. Spare bits after the last block are ignored.
    ///
    /// # Errors
    /// [`CbtError::WrongLength`]: a bitmap is never padded or cut.
    pub fn parse(bitmap: &[u8], virtual_size: u64) -> Result<Self, CbtError> {
        check_length(bitmap.len(), virtual_size)?;
        Ok(Self::with_spare_bits_cleared(bitmap.to_vec(), virtual_size))
    }

    /// Takes the text that `VDI.list_changed_blocks` answers with: standard base64 with padding, without line breaks.
    ///
    /// # Errors
    /// [`CbtError::Base64`], and as [`ChangedBlocks::parse`].
    pub fn parse_base64(text: &str, virtual_size: u64) -> Result<Self, CbtError> {
        let bitmap = STANDARD.decode(text).map_err(|source| CbtError::Base64 { source })?;
        check_length(bitmap.len(), virtual_size)?;
        Ok(Self::with_spare_bits_cleared(bitmap, virtual_size))
    }

    /// Nothing changed.
    ///
    /// # Errors
    /// [`CbtError::TooLarge`] over 1 PiB.
    pub fn none(virtual_size: u64) -> Result<Self, CbtError> {
        Self::filled(0, virtual_size)
    }

    /// Everything changed.
    ///
    /// # Errors
    /// [`CbtError::TooLarge`] over 1 PiB.
    pub fn all(virtual_size: u64) -> Result<Self, CbtError> {
        Self::filled(0xFF, virtual_size)
    }

    fn filled(byte: u8, virtual_size: u64) -> Result<Self, CbtError> {
        let too_large = CbtError::TooLarge { virtual_size };
        match usize::try_from(bitmap_bytes(virtual_size)) {
            Ok(length) if virtual_size <= MAX_VIRTUAL_SIZE => {
                Ok(Self::with_spare_bits_cleared(vec![byte; length], virtual_size))
            }
            _ => Err(too_large),
        }
    }

    /// `bitmap` has the right length already.
    fn with_spare_bits_cleared(mut bitmap: Vec<u8>, virtual_size: u64) -> Self {
        let used = block_count(virtual_size) % 8;
        if used != 0
            && let Some(last) = bitmap.last_mut()
        {
            *last &= !(0xFF_u8 >> used);
        }
        Self { bitmap, virtual_size }
    }

    /// The changed bytes, neighbours merged, cut at the virtual size.
    ///
    /// Cost: linear in the bitmap; memory follows the number of runs.
    pub fn extents(&self) -> ExtentSet {
        let mut set = ExtentSet::new();
        // First block of the run that is open.
        let mut open: Option<u64> = None;
        let mut close = |open: &mut Option<u64>, end: u64| {
            if let Some(first) = open.take() {
                let end = end.saturating_mul(CBT_BLOCK_BYTES).min(self.virtual_size);
                set.extend_run(first.saturating_mul(CBT_BLOCK_BYTES), end);
            }
        };
        let mut block = 0_u64;
        for &byte in &self.bitmap {
            match byte {
                0x00 => close(&mut open, block),
                0xFF => {
                    open.get_or_insert(block);
                }
                _ => {
                    for bit in 0..8 {
                        if byte & (0x80 >> bit) == 0 {
                            close(&mut open, block + bit);
                        } else {
                            open.get_or_insert(block + bit);
                        }
                    }
                }
            }
            block += 8;
        }
        close(&mut open, block);
        set
    }

    /// What changed in this step or in the `newer` one.
    ///
    /// A disk that grew in between: everything beyond the old size counts as changed.
    ///
    /// # Errors
    /// [`CbtError::Shrunk`] if `newer` is of a smaller disk.
    pub fn union(&self, newer: &Self) -> Result<Self, CbtError> {
        let mut result = newer.grown_from(self.virtual_size)?;
        for (to, from) in result.bitmap.iter_mut().zip(&self.bitmap) {
            *to |= from;
        }
        Ok(result)
    }

    /// These changes, of a step that began when the disk had `old_virtual_size` bytes.
    ///
    /// The storage manager extends the bitmaps of a disk that grew by clear bits; here everything beyond the old size
    /// counts as changed (X15). A block that the old size ends in counts as well.
    ///
    /// # Errors
    /// [`CbtError::Shrunk`] if the disk was larger then.
    pub fn grown_from(&self, old_virtual_size: u64) -> Result<Self, CbtError> {
        if self.virtual_size < old_virtual_size {
            return Err(CbtError::Shrunk { older: old_virtual_size, newer: self.virtual_size });
        }
        let mut bitmap = self.bitmap.clone();
        if self.virtual_size > old_virtual_size {
            let first = old_virtual_size / CBT_BLOCK_BYTES;
            // A bitmap that is in memory has indexes that fit.
            let byte = usize::try_from(first / 8).unwrap_or(usize::MAX);
            for (index, value) in bitmap.iter_mut().enumerate().skip(byte) {
                *value |= if index == byte { 0xFF >> (first % 8) } else { 0xFF };
            }
        }
        Ok(Self::with_spare_bits_cleared(bitmap, self.virtual_size))
    }

    /// How many bytes changed, cut at the virtual size.
    pub fn changed_bytes(&self) -> u64 {
        let blocks: u64 = self.bitmap.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let tail = self.virtual_size % CBT_BLOCK_BYTES;
        let missing = if tail != 0 && self.last_block_changed() { CBT_BLOCK_BYTES - tail } else { 0 };
        blocks.saturating_mul(CBT_BLOCK_BYTES).saturating_sub(missing)
    }

    fn last_block_changed(&self) -> bool {
        let last = block_count(self.virtual_size).saturating_sub(1);
        self.bitmap.last().is_some_and(|byte| byte & (0x80 >> (last % 8)) != 0)
    }

    /// The bitmap in XenAPI's order.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bitmap
    }

    /// Size of the disk, in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }
}

impl fmt::Debug for ChangedBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let changed_bytes = self.changed_bytes();
        f.debug_struct("ChangedBlocks")
            .field("virtual_size", &self.virtual_size)
            .field("changed_bytes", &changed_bytes)
            .finish_non_exhaustive()
    }
}

fn block_count(virtual_size: u64) -> u64 {
    virtual_size.div_ceil(CBT_BLOCK_BYTES)
}

fn bitmap_bytes(virtual_size: u64) -> u64 {
    block_count(virtual_size).div_ceil(8)
}

fn check_length(found: usize, virtual_size: u64) -> Result<(), CbtError> {
    let expected = bitmap_bytes(virtual_size);
    if u64::try_from(found) == Ok(expected) {
        Ok(())
    } else {
        Err(CbtError::WrongLength { found, expected, virtual_size })
    }
}

/// Appends a run that starts after all others.
trait ExtendRun {
    fn extend_run(&mut self, start: u64, end: u64);
}

impl ExtendRun for ExtentSet {
    fn extend_run(&mut self, start: u64, end: u64) {
        if let Ok(range) = ByteRange::new(start, end) {
            self.insert(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = CBT_BLOCK_BYTES;

    fn runs(changes: &ChangedBlocks) -> Vec<(u64, u64)> {
        changes.extents().runs().iter().map(|run| (run.start(), run.len())).collect()
    }

    #[test]
    fn x14_the_first_block_is_the_highest_bit_of_the_first_byte() {
        let changes = ChangedBlocks::parse_base64("gAAAAQ==", 32 * BLOCK).unwrap();
        assert_eq!(changes.as_bytes(), [0x80, 0, 0, 0x01]);
        assert_eq!(runs(&changes), [(0, BLOCK), (31 * BLOCK, BLOCK)]);
    }

    #[test]
    fn x14_blocks_of_a_recorded_answer_are_found() {
        // Blocks 3, 4 and 100 of 128 were written between two snapshots.
        let mut bitmap = [0_u8; 16];
        (bitmap[0], bitmap[12]) = (0x18, 0x08);
        let changes = ChangedBlocks::parse(&bitmap, 128 * BLOCK).unwrap();
        assert_eq!(runs(&changes), [(3 * BLOCK, 2 * BLOCK), (100 * BLOCK, BLOCK)]);
    }

    #[test]
    fn x14_the_length_is_rounded_up_to_a_byte_and_nothing_else_is_taken() {
        for (size, length) in [(0, 0), (1, 1), (8 * BLOCK, 1), (8 * BLOCK + 1, 2), (9 * BLOCK, 2), (2 << 40, 4 << 20)] {
            assert_eq!(ChangedBlocks::none(size).unwrap().as_bytes().len(), length, "{size}");
            for wrong in [length.wrapping_sub(1), length + 1, length.next_multiple_of(4) + 4] {
                if wrong == usize::MAX {
                    continue;
                }
                let error = ChangedBlocks::parse(&vec![0; wrong], size).unwrap_err();
                assert!(matches!(error, CbtError::WrongLength { found, .. } if found == wrong), "{error}");
            }
        }
    }

    #[test]
    fn x14_spare_bits_are_ignored_and_the_tail_is_cut() {
        let changes = ChangedBlocks::parse(&[0xFF], 2 * BLOCK + 512).unwrap();
        assert_eq!(runs(&changes), [(0, 2 * BLOCK + 512)]);
        assert_eq!(changes.changed_bytes(), 2 * BLOCK + 512);
        assert_eq!(changes.as_bytes(), [0xE0]);
    }

    #[test]
    fn text_that_is_no_base64_is_refused() {
        for text in ["AAA", "AA==\n", "A A=", "_-==", "AAAA===="] {
            assert!(matches!(ChangedBlocks::parse_base64(text, BLOCK), Err(CbtError::Base64 { .. })), "{text:?}");
        }
    }

    #[test]
    fn x15_everything_beyond_the_old_size_counts_as_changed() {
        let older = ChangedBlocks::parse(&[0x40], 3 * BLOCK + 100).unwrap();
        let newer = ChangedBlocks::parse(&[0x80, 0], 10 * BLOCK).unwrap();
        assert_eq!(runs(&older.union(&newer).unwrap()), [(0, 2 * BLOCK), (3 * BLOCK, 7 * BLOCK)]);
        assert_eq!(runs(&newer.grown_from(8 * BLOCK).unwrap()), [(0, BLOCK), (8 * BLOCK, 2 * BLOCK)]);
        assert_eq!(newer.grown_from(10 * BLOCK).unwrap(), newer);
    }

    #[test]
    fn x15_a_disk_that_shrank_is_an_error() {
        let (small, large) = (ChangedBlocks::none(BLOCK).unwrap(), ChangedBlocks::none(2 * BLOCK).unwrap());
        assert!(matches!(large.union(&small), Err(CbtError::Shrunk { older, newer }) if older == 2 * newer));
    }

    #[test]
    fn an_absurd_size_takes_no_memory() {
        assert!(matches!(ChangedBlocks::all(u64::MAX), Err(CbtError::TooLarge { .. })));
        assert!(matches!(ChangedBlocks::parse(&[], u64::MAX), Err(CbtError::WrongLength { .. })));
    }

    /// The plain meaning of a bitmap.
    fn model(bitmap: &[u8], virtual_size: u64) -> BTreeSet<u64> {
        (0..virtual_size.div_ceil(BLOCK))
            .filter(|block| bitmap[(block / 8) as usize] & (0x80 >> (block % 8)) != 0)
            .collect()
    }

    fn bytes_of(blocks: &BTreeSet<u64>, virtual_size: u64) -> ExtentSet {
        blocks
            .iter()
            .map(|block| ByteRange::new(block * BLOCK, ((block + 1) * BLOCK).min(virtual_size)).unwrap())
            .collect()
    }

    fn sized() -> impl Strategy<Value = (Vec<u8>, u64)> {
        (1_u64..60 * BLOCK).prop_flat_map(|size| {
            let byte = prop_oneof![Just(0_u8), Just(0xFF), any::<u8>()];
            (proptest::collection::vec(byte, usize::try_from(bitmap_bytes(size)).unwrap()), Just(size))
        })
    }

    proptest! {
        #[test]
        fn extents_and_counts_equal_those_of_a_naive_model((bitmap, size) in sized()) {
            let changes = ChangedBlocks::parse(&bitmap, size).unwrap();
            let expected = bytes_of(&model(&bitmap, size), size);
            prop_assert_eq!(changes.extents(), expected.clone());
            prop_assert_eq!(changes.changed_bytes(), expected.total_bytes());
        }

        #[test]
        fn x15_union_equals_that_of_a_naive_model((a, a_size) in sized(), (b, b_size) in sized()) {
            let ((a, a_size), (b, b_size)) = if a_size <= b_size { ((a, a_size), (b, b_size)) } else { ((b, b_size), (a, a_size)) };
            let (older, newer) = (ChangedBlocks::parse(&a, a_size).unwrap(), ChangedBlocks::parse(&b, b_size).unwrap());
            let mut expected = &model(&a, a_size) | &model(&b, b_size);
            if b_size > a_size {
                expected.extend(a_size / BLOCK..b_size.div_ceil(BLOCK));
            }
            prop_assert_eq!(older.union(&newer).unwrap().extents(), bytes_of(&expected, b_size));
            prop_assert_eq!(older.union(&newer).is_ok(), true);
            prop_assert_eq!(newer.union(&older).is_ok(), a_size == b_size);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,40}", size in any::<u64>()) {
            let _ = ChangedBlocks::parse_base64(&text, size);
        }
    }
}
