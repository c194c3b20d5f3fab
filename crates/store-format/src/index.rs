//! Index segments: sorted by chunk id, of fixed width, searched where they lie.
//!
//! A segment is checked once as a whole (structure, order, CRC-32, keyed hash), then searched in the mapped bytes.
//! It is not encrypted: it holds keyed hashes and places, nothing of the content.

use crate::wire::{Fields, PREAMBLE_BYTES, checked_body, put_crc, put_preamble};
use crate::{ChunkId, ChunkKind, FormatError, Keys, PackSalt, Placement};

const WHAT: &str = "index segment";
const MAGIC: &[u8; 8] = b"XVLTINDX";
const HEADER_BYTES: usize = PREAMBLE_BYTES + 16 + 4 + 4 + 4;
const SALT_BYTES: usize = 32;
const ENTRY_BYTES: usize = 48;
const MAC_BYTES: usize = 32;
const CRC_BYTES: usize = 4;

/// Most entries in one segment.
pub const MAX_SEGMENT_ENTRIES: usize = 1 << 20;

/// Longest segment, in bytes: that with the most entries, each in a pack of its own.
pub const MAX_SEGMENT_BYTES: usize =
    HEADER_BYTES + MAX_SEGMENT_ENTRIES * (SALT_BYTES + ENTRY_BYTES) + MAC_BYTES + CRC_BYTES;

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The chunk.
    pub id: ChunkId,
    /// What it holds.
    pub kind: ChunkKind,
    /// Salt of its pack, which gives the pack's name and key.
    pub salt: PackSalt,
    /// Where it lies in the pack.
    pub placement: Placement,
}

/// The bytes of a segment with these entries, in any order. Of several entries of one chunk the first stays.
///
/// # Errors
/// [`FormatError::Limit`] if there are too many.
pub fn encode_index(keys: &Keys, entries: &[IndexEntry]) -> Result<Vec<u8>, FormatError> {
    let mut sorted: Vec<&IndexEntry> = entries.iter().collect();
    sorted.sort_by_key(|entry| entry.id);
    sorted.dedup_by_key(|entry| entry.id);
    let mut salts: Vec<PackSalt> = sorted.iter().map(|entry| entry.salt).collect();
    salts.sort_unstable_by_key(|salt| salt.0);
    salts.dedup();
    let limit = |found: usize| FormatError::Limit {
        what: WHAT,
        field: "entries",
        found: found as u64,
        limit: MAX_SEGMENT_ENTRIES as u64,
    };
    if sorted.len() > MAX_SEGMENT_ENTRIES {
        return Err(limit(sorted.len()));
    }
    let number = |count: usize| u32::try_from(count).map_err(|_| limit(count));
    let mut out = Vec::with_capacity(HEADER_BYTES + salts.len() * SALT_BYTES + sorted.len() * ENTRY_BYTES + 36);
    put_preamble(&mut out, MAGIC);
    out.extend_from_slice(keys.repository().as_bytes());
    out.extend_from_slice(&number(salts.len())?.to_le_bytes());
    out.extend_from_slice(&number(sorted.len())?.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    salts.iter().for_each(|salt| out.extend_from_slice(&salt.0));
    for entry in sorted {
        let pack = salts.binary_search_by_key(&entry.salt.0, |salt| salt.0).unwrap_or_default();
        out.extend_from_slice(entry.id.as_bytes());
        for field in [number(pack)?, entry.placement.offset, entry.placement.length] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&entry.placement.frame.to_le_bytes());
        out.extend_from_slice(&[entry.kind.code(), entry.placement.part]);
    }
    let mac = blake3::keyed_hash(keys.index_key(), &out);
    out.extend_from_slice(mac.as_bytes());
    put_crc(&mut out);
    Ok(out)
}

/// The layout of a segment that was checked. Give every method the very bytes that were checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLayout {
    packs: usize,
    entries: usize,
}

impl IndexLayout {
    /// Checks a whole segment: afterwards every look-up is safe.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes.
    pub fn check(bytes: &[u8], keys: &Keys) -> Result<Self, FormatError> {
        let body = checked_body(WHAT, MAGIC, bytes)?;
        let mut fields = Fields::new(WHAT, body);
        fields.preamble(MAGIC)?;
        if fields.array::<16>()? != *keys.repository().as_bytes() {
            return Err(FormatError::ForeignRepository { what: WHAT });
        }
        let packs = fields.limited("packs", MAX_SEGMENT_ENTRIES)?;
        let entries = fields.limited("entries", MAX_SEGMENT_ENTRIES)?;
        fields.take(4)?;
        fields.take(packs * SALT_BYTES)?;
        let table = fields.take(entries * ENTRY_BYTES)?;
        let mac = fields.array::<MAC_BYTES>()?;
        fields.end()?;
        let authenticated = body.get(..body.len() - MAC_BYTES).unwrap_or_default();
        if blake3::keyed_hash(keys.index_key(), authenticated) != blake3::Hash::from_bytes(mac) {
            return Err(FormatError::Authentication { what: WHAT });
        }
        let ids = || table.chunks_exact(ENTRY_BYTES).filter_map(<[u8]>::first_chunk::<32>);
        if let Some(at) = ids().zip(ids().skip(1)).position(|(before, after)| before >= after) {
            return Err(FormatError::Field { what: WHAT, field: "order of entries", found: at as u64 });
        }
        Ok(Self { packs, entries })
    }

    /// How many chunks it knows.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether it knows no chunk.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Finds a chunk.
    pub fn find(&self, bytes: &[u8], id: &ChunkId) -> Option<IndexEntry> {
        self.position(bytes, id).and_then(|number| self.entry(bytes, number))
    }

    /// The number of a chunk's entry, in the order of ids. Ids are evenly spread, so a few steps of interpolation find
    /// it in a segment of any size.
    pub fn position(&self, bytes: &[u8], id: &ChunkId) -> Option<usize> {
        let wanted = prefix(id.as_bytes());
        let (mut low, mut high) = (0, self.entries);
        let (mut low_key, mut high_key) = (0_u64, u64::MAX);
        let mut steps = 0;
        while low < high {
            let width = u128::from(high_key.saturating_sub(low_key)) + 1;
            let part = u128::from(wanted.saturating_sub(low_key)) * (high - low) as u128 / width;
            // After some steps plain halving: it always ends, whatever the ids look like.
            let middle = if steps < 8 { low + usize::try_from(part).unwrap_or(0) } else { low + (high - low) / 2 };
            let middle = middle.clamp(low, high - 1);
            let found = self.id_at(bytes, middle)?;
            match found.cmp(id.as_bytes()) {
                std::cmp::Ordering::Equal => return Some(middle),
                std::cmp::Ordering::Less => (low, low_key) = (middle + 1, prefix(found)),
                std::cmp::Ordering::Greater => (high, high_key) = (middle, prefix(found)),
            }
            steps += 1;
        }
        None
    }

    /// The entry with this number, in the order of ids.
    pub fn entry(&self, bytes: &[u8], number: usize) -> Option<IndexEntry> {
        if number >= self.entries {
            return None;
        }
        let at = self.entry_offset(number);
        let mut fields = Fields::new(WHAT, bytes.get(at..at + ENTRY_BYTES)?);
        let id = ChunkId::from_bytes(fields.array().ok()?);
        let pack = usize::try_from(fields.u32().ok()?).ok().filter(|&pack| pack < self.packs)?;
        let (offset, length) = (fields.u32().ok()?, fields.u32().ok()?);
        let frame = fields.u16().ok()?;
        let kind = ChunkKind::from_code(fields.u8().ok()?)?;
        let placement = Placement { offset, length, frame, part: fields.u8().ok()? };
        Some(IndexEntry { id, kind, salt: self.salt(bytes, pack)?, placement })
    }

    /// The ids in ascending order.
    pub fn ids<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = ChunkId> + use<'a> {
        let this = *self;
        (0..this.entries).filter_map(move |number| this.id_at(bytes, number).map(|id| ChunkId::from_bytes(*id)))
    }

    /// The salts of the packs that it refers to.
    pub fn salts<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = PackSalt> + use<'a> {
        let this = *self;
        (0..this.packs).filter_map(move |number| this.salt(bytes, number))
    }

    fn salt(&self, bytes: &[u8], number: usize) -> Option<PackSalt> {
        bytes.get(HEADER_BYTES + number * SALT_BYTES..)?.first_chunk().map(|salt| PackSalt(*salt))
    }

    fn id_at<'a>(&self, bytes: &'a [u8], number: usize) -> Option<&'a [u8; 32]> {
        bytes.get(self.entry_offset(number)..)?.first_chunk()
    }

    fn entry_offset(&self, number: usize) -> usize {
        HEADER_BYTES + self.packs * SALT_BYTES + number * ENTRY_BYTES
    }
}

fn prefix(id: &[u8; 32]) -> u64 {
    id.first_chunk().map_or(0, |head| u64::from_be_bytes(*head))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{each_flip, golden, keys};

    fn entry(seed: u32) -> IndexEntry {
        let id = keys().chunk_id(ChunkKind::Data, &seed.to_le_bytes());
        let salt = PackSalt([u8::try_from(seed % 5).unwrap(); 32]);
        let placement = Placement { offset: seed, length: 100, frame: 3, part: 2 };
        IndexEntry { id, kind: ChunkKind::Data, salt, placement }
    }

    #[test]
    fn the_bytes_of_a_segment_are_fixed() {
        let bytes = encode_index(&keys(), &[entry(1), entry(2), entry(1)]).unwrap();
        golden("index", &bytes);
        assert_eq!(IndexLayout::check(&bytes, &keys()).unwrap().len(), 2);
        each_flip(&bytes, |hurt| assert!(IndexLayout::check(hurt, &keys()).is_err()));
    }

    #[test]
    fn a_segment_of_another_repository_is_refused() {
        let bytes = encode_index(&keys(), &[]).unwrap();
        let other = Keys::derive(crate::MasterKey::from_bytes([1; 32]), crate::RepositoryId::from_bytes([1; 16]));
        let error = IndexLayout::check(&bytes, &other.unwrap()).unwrap_err();
        assert!(matches!(error, FormatError::ForeignRepository { .. }));
    }

    proptest! {
        #[test]
        fn every_entry_is_found_and_nothing_else(
            seeds in proptest::collection::btree_set(0_u32..100_000, 0..300),
            others in proptest::collection::vec(100_000_u32..200_000, 20),
        ) {
            let entries: Vec<_> = seeds.iter().map(|&seed| entry(seed)).collect();
            let bytes = encode_index(&keys(), &entries).unwrap();
            let layout = IndexLayout::check(&bytes, &keys()).unwrap();
            for entry in &entries {
                prop_assert_eq!(layout.find(&bytes, &entry.id), Some(*entry));
            }
            for seed in others {
                prop_assert_eq!(layout.find(&bytes, &entry(seed).id), None);
            }
        }

        #[test]
        fn crowded_ids_are_found_too(ends in proptest::collection::btree_set(any::<u16>(), 1..200)) {
            let crowded: Vec<_> = ends.iter().map(|end| {
                let mut id = [0xff; 32];
                id[30..].copy_from_slice(&end.to_be_bytes());
                IndexEntry { id: ChunkId::from_bytes(id), ..entry(1) }
            }).collect();
            let bytes = encode_index(&keys(), &crowded).unwrap();
            let layout = IndexLayout::check(&bytes, &keys()).unwrap();
            for entry in &crowded {
                prop_assert_eq!(layout.find(&bytes, &entry.id), Some(*entry));
            }
        }

        #[test]
        fn foreign_bytes_do_not_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = IndexLayout::check(&bytes, &keys());
            bytes.splice(0..0, *b"XVLTINDX\0\0\0\0");
            put_crc(&mut bytes);
            let _ = IndexLayout::check(&bytes, &keys());
        }
    }
}
