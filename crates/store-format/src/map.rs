//! Pages of disk maps: a tree by disk offset.
//!
//! A leaf covers 16 MiB and lists its chunks and holes; a node has 64 children. A part of the disk that is all zero has
//! no page at any level. Pages are written in one way only, so equal content has equal pages; readers insist on it.

use crate::wire::Fields;
use crate::{ChunkId, FormatError};

const WHAT: &str = "disk map page";
const LEAF_TAG: u8 = b'L';
const NODE_TAG: u8 = b'N';
const DATA_FLAG: u16 = 0x8000;

/// Blocks of 4 KiB that a leaf covers.
pub const LEAF_BLOCKS: u64 = 4096;
/// Bytes that a leaf covers.
pub const LEAF_BYTES: u64 = 16 * 1024 * 1024;
/// Children of a node.
pub const MAP_FANOUT: u64 = 64;
/// Highest level of a node: enough for every size of 63 bits.
pub const MAX_MAP_LEVEL: u8 = 7;

/// How many leaves cover a disk of this size.
pub fn leaves_of(virtual_size: u64) -> u64 {
    virtual_size.div_ceil(LEAF_BYTES)
}

/// How many leaves lie under a page of this level (a leaf has level 0).
pub fn leaves_under(level: u8) -> u64 {
    MAP_FANOUT.saturating_pow(level.into())
}

/// Level of the root of the map of a disk of this size.
pub fn level_of(virtual_size: u64) -> u8 {
    let leaves = leaves_of(virtual_size);
    (0..MAX_MAP_LEVEL).find(|&level| leaves_under(level) >= leaves).unwrap_or(MAX_MAP_LEVEL)
}

/// One run of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafEntry {
    /// Length in blocks of 4 KiB, at least 1.
    pub blocks: u16,
    /// The chunk with these blocks; `None` if they are zero.
    pub chunk: Option<ChunkId>,
}

/// The runs of 16 MiB of a disk. What the runs do not reach is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeafPage {
    entries: Vec<LeafEntry>,
    blocks: u64,
}

impl LeafPage {
    /// A page of zeros.
    pub fn new() -> Self {
        Self::default()
    }

    /// The runs in ascending order.
    pub fn entries(&self) -> &[LeafEntry] {
        &self.entries
    }

    /// The runs with the block at which each begins, counted from the start of the leaf.
    pub fn placed(&self) -> impl Iterator<Item = (u64, LeafEntry)> {
        self.entries.iter().scan(0, |next, entry| {
            let at = *next;
            *next += u64::from(entry.blocks);
            Some((at, *entry))
        })
    }

    /// Blocks that the runs cover.
    pub fn covered_blocks(&self) -> u64 {
        self.blocks
    }

    /// Whether there is no chunk in it.
    pub fn is_hole(&self) -> bool {
        self.entries.iter().all(|entry| entry.chunk.is_none())
    }

    /// Appends a chunk.
    ///
    /// # Errors
    /// [`FormatError::Limit`] if the leaf would pass its end.
    pub fn push_chunk(&mut self, id: ChunkId, blocks: u64) -> Result<(), FormatError> {
        self.push(blocks, Some(id))
    }

    /// Appends zeros, any number of blocks; none is fine.
    ///
    /// # Errors
    /// [`FormatError::Limit`] if the leaf would pass its end.
    pub fn push_hole(&mut self, blocks: u64) -> Result<(), FormatError> {
        if blocks == 0 {
            return Ok(());
        }
        let before = match self.entries.last() {
            Some(LeafEntry { blocks, chunk: None }) => u64::from(*blocks),
            _ => 0,
        };
        self.push(blocks, None)?;
        if before > 0 {
            self.entries.pop();
            if let (Some(last), Ok(blocks)) = (self.entries.last_mut(), u16::try_from(before + blocks)) {
                last.blocks = blocks;
            }
        }
        Ok(())
    }

    fn push(&mut self, blocks: u64, chunk: Option<ChunkId>) -> Result<(), FormatError> {
        let total = self.blocks.saturating_add(blocks);
        let limit = || FormatError::Limit { what: WHAT, field: "blocks", found: total, limit: LEAF_BLOCKS };
        if total > LEAF_BLOCKS || blocks == 0 {
            return Err(limit());
        }
        self.entries.push(LeafEntry { blocks: u16::try_from(blocks).map_err(|_| limit())?, chunk });
        self.blocks = total;
        Ok(())
    }

    /// The bytes of the page; `None` if it is all zero, since then there is no page.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let last = self.entries.iter().rposition(|entry| entry.chunk.is_some())?;
        let count = u16::try_from(last + 1).ok()?;
        let mut out = vec![LEAF_TAG, 0];
        out.extend_from_slice(&count.to_le_bytes());
        for entry in self.entries.iter().take(last + 1) {
            let flag = if entry.chunk.is_some() { DATA_FLAG } else { 0 };
            out.extend_from_slice(&(entry.blocks | flag).to_le_bytes());
            if let Some(id) = entry.chunk {
                out.extend_from_slice(id.as_bytes());
            }
        }
        Some(out)
    }

    /// Reads a page.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes, and every form that [`Self::encode`] would not have chosen.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(WHAT, bytes);
        check_head(&mut fields, LEAF_TAG, 0)?;
        let count = fields.u16()?;
        let mut page = Self::new();
        for _ in 0..count {
            let word = fields.u16()?;
            let blocks = u64::from(word & !DATA_FLAG);
            let chunk = if word & DATA_FLAG == 0 { None } else { Some(ChunkId::from_bytes(fields.array()?)) };
            let two_holes = chunk.is_none() && page.entries.last().is_some_and(|last| last.chunk.is_none());
            if two_holes {
                return Err(FormatError::Field { what: WHAT, field: "run after a hole", found: word.into() });
            }
            page.push(blocks, chunk)?;
        }
        fields.end()?;
        match page.entries.last() {
            Some(LeafEntry { chunk: Some(_), .. }) => Ok(page),
            _ => Err(FormatError::Field { what: WHAT, field: "number of runs", found: count.into() }),
        }
    }
}

/// A page of 64 children, each of them a leaf or a node of the level below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePage {
    level: u8,
    children: [Option<ChunkId>; 64],
}

impl NodePage {
    /// A page of zeros of this level, which is at least 1.
    pub fn new(level: u8) -> Self {
        Self { level, children: [None; 64] }
    }

    /// Its level; the children have the level below.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// The child with this number; `None` if it is all zero.
    pub fn child(&self, number: u64) -> Option<ChunkId> {
        usize::try_from(number).ok().and_then(|number| self.children.get(number).copied().flatten())
    }

    /// Replaces a child; a number from 64 on is ignored.
    pub fn set_child(&mut self, number: u64, id: Option<ChunkId>) {
        if let Some(child) = usize::try_from(number).ok().and_then(|number| self.children.get_mut(number)) {
            *child = id;
        }
    }

    /// The children that are not all zero, with their numbers.
    pub fn present(&self) -> impl Iterator<Item = (u64, ChunkId)> {
        (0_u64..).zip(self.children).filter_map(|(number, child)| child.map(|id| (number, id)))
    }

    /// The bytes of the page; `None` if it is all zero, since then there is no page.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let bitmap = self.present().fold(0_u64, |bitmap, (number, _)| bitmap | 1 << number);
        if bitmap == 0 {
            return None;
        }
        let mut out = vec![NODE_TAG, self.level];
        out.extend_from_slice(&bitmap.to_le_bytes());
        self.present().for_each(|(_, id)| out.extend_from_slice(id.as_bytes()));
        Some(out)
    }

    /// Reads a page that must have this level.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes, and every form that [`Self::encode`] would not have chosen.
    pub fn decode(bytes: &[u8], level: u8) -> Result<Self, FormatError> {
        let mut fields = Fields::new(WHAT, bytes);
        check_head(&mut fields, NODE_TAG, level)?;
        let bitmap = fields.u64()?;
        if bitmap == 0 || level == 0 || level > MAX_MAP_LEVEL {
            return Err(FormatError::Field { what: WHAT, field: "bitmap", found: bitmap });
        }
        let mut page = Self::new(level);
        for number in (0..MAP_FANOUT).filter(|number| bitmap & (1 << number) != 0) {
            page.set_child(number, Some(ChunkId::from_bytes(fields.array()?)));
        }
        fields.end()?;
        Ok(page)
    }
}

fn check_head(fields: &mut Fields<'_>, tag: u8, level: u8) -> Result<(), FormatError> {
    for (field, expected) in [("tag", tag), ("level", level)] {
        let found = fields.u8()?;
        if found != expected {
            return Err(FormatError::Field { what: WHAT, field, found: found.into() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::golden;

    fn id(n: u8) -> ChunkId {
        ChunkId::from_bytes([n; 32])
    }

    #[test]
    fn the_bytes_of_pages_are_fixed() {
        let mut leaf = LeafPage::new();
        leaf.push_hole(3).unwrap();
        leaf.push_hole(2).unwrap();
        leaf.push_chunk(id(1), 16).unwrap();
        leaf.push_hole(100).unwrap();
        let bytes = leaf.encode().unwrap();
        golden("map-leaf", &bytes);
        let read = LeafPage::decode(&bytes).unwrap();
        assert_eq!(read.placed().map(|(at, entry)| (at, entry.blocks)).collect::<Vec<_>>(), [(0, 5), (5, 16)]);

        let mut node = NodePage::new(2);
        node.set_child(0, Some(id(3)));
        node.set_child(63, Some(id(4)));
        let bytes = node.encode().unwrap();
        golden("map-node", &bytes);
        assert_eq!(NodePage::decode(&bytes, 2).unwrap(), node);
        assert!(NodePage::decode(&bytes, 1).is_err());
    }

    #[test]
    fn zeros_have_no_page() {
        let mut leaf = LeafPage::new();
        leaf.push_hole(LEAF_BLOCKS).unwrap();
        assert_eq!(leaf.encode(), None);
        assert_eq!(NodePage::new(1).encode(), None);
    }

    #[test]
    fn levels_follow_the_size() {
        for (size, level) in
            [(0, 0), (1, 0), (LEAF_BYTES, 0), (LEAF_BYTES + 1, 1), (1 << 30, 1), (1 << 36, 2), (1 << 40, 3)]
        {
            assert_eq!(level_of(size), level, "{size}");
        }
        assert!(leaves_under(level_of(u64::MAX)) >= leaves_of(u64::MAX));
    }

    proptest! {
        #[test]
        fn leaves_survive(runs in proptest::collection::vec((1_u64..40, any::<bool>()), 0..100)) {
            let mut leaf = LeafPage::new();
            for (n, &(blocks, data)) in (0_u8..).zip(&runs) {
                if data { leaf.push_chunk(id(n), blocks).unwrap() } else { leaf.push_hole(blocks).unwrap() }
            }
            match leaf.encode() {
                None => prop_assert!(leaf.is_hole()),
                Some(bytes) => {
                    let read = LeafPage::decode(&bytes).unwrap();
                    prop_assert_eq!(read.entries(), &leaf.entries()[..read.entries().len()]);
                    prop_assert_eq!(read.encode().unwrap(), bytes);
                }
            }
        }

        #[test]
        fn foreign_bytes_decode_to_what_encodes_alike_or_not_at_all(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            level in 0_u8..9,
        ) {
            for head in [[LEAF_TAG, 0], [NODE_TAG, level]] {
                bytes.splice(0..2.min(bytes.len()), head);
                if let Ok(page) = LeafPage::decode(&bytes) { prop_assert_eq!(page.encode().unwrap(), bytes.clone()); }
                if let Ok(page) = NodePage::decode(&bytes, level) { prop_assert_eq!(page.encode().unwrap(), bytes.clone()); }
            }
        }
    }
}
