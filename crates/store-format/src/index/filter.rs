//! A Bloom filter in lines of 64 bytes: one line of memory answers for a chunk. 12 bits per entry and 6 probes: about 1
//! look-up in 150 goes to the entries in vain.

use crate::ChunkId;

pub(super) const LINE_BYTES: usize = 64;
const BITS_PER_ENTRY: usize = 12;
const LINE_BITS: usize = LINE_BYTES * 8;
const PROBES: u32 = 6;
/// So few entries are looked at directly.
const WITHOUT_FILTER: usize = 1_000;

/// Lines of the filter of a segment with so many entries; 0 means that it has none.
pub(super) const fn filter_lines(entries: usize) -> usize {
    if entries <= WITHOUT_FILTER { 0 } else { (entries * BITS_PER_ENTRY).div_ceil(LINE_BITS) }
}

/// Ids are hashes already: bytes 8 to 15 choose the line, bytes 16 to 23 the bits in it. The first bytes choose the
/// segment and tell nothing more.
pub(super) fn line_of(id: &ChunkId, lines: usize) -> usize {
    let scaled = (u128::from(number_at(id, 8)) * lines as u128) >> 64;
    usize::try_from(scaled).unwrap_or(0)
}

/// Adds an id to its line.
pub(super) fn add(line: &mut [u8; LINE_BYTES], id: &ChunkId) {
    for (byte, mask) in probes(id) {
        if let Some(byte) = line.get_mut(byte) {
            *byte |= mask;
        }
    }
}

/// Whether the line may hold the id.
pub(super) fn holds(line: &[u8; LINE_BYTES], id: &ChunkId) -> bool {
    probes(id).all(|(byte, mask)| line.get(byte).is_some_and(|byte| byte & mask != 0))
}

/// Byte of the line and bit in it: six times nine bits of the number.
fn probes(id: &ChunkId) -> impl Iterator<Item = (usize, u8)> {
    let bits = number_at(id, 16);
    (0..PROBES).map(move |probe| {
        let bit = (bits >> (9 * probe)) & 0x1ff;
        (usize::try_from(bit / 8).unwrap_or(0), 1 << (bit % 8))
    })
}

fn number_at(id: &ChunkId, at: usize) -> u64 {
    id.as_bytes().get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
