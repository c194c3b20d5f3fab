//! Index segments: sorted by chunk id, of fixed width, searched where they lie.
//!
//! ```text
//! header | pages of packs | pages of gone packs | pages of filter lines | pages of entries | CRC-32
//! page: up to 4,080 bytes of items, then 16 bytes of keyed hash over header, number of the page and items
//! ```
//! Opening a segment reads its header and its lists of packs. A page is authenticated when it is used for the first time,
//! so the cost of a look-up does not depend on the size of the index. Nothing is encrypted: a segment holds keyed
//! hashes and places, nothing of the content.
//!
//! Segments belong to *runs*. A run is sorted as a whole: its part `p` of `n` holds the ids whose first 64 bits, as a
//! fraction of 2^64, are from p/n up to (p+1)/n. Only a run with all its parts says that it knows everything in the
//! packs that it lists. Packs that a sweep has removed are listed as gone until no other run names them.

mod encode;
mod filter;

use std::ops::Range;

use crate::wire::{Fields, PREAMBLE_BYTES, checked_body};
use crate::{ChunkId, ChunkKind, FormatError, Keys, PackId, Placement};

pub use encode::{SegmentContent, encode_index, parts_for};

use filter::{LINE_BYTES, filter_lines};

const WHAT: &str = "index segment";
const MAGIC: &[u8; 8] = b"XVLTINDX";
const MAC_BYTES: usize = 32;
const HEAD_BYTES: usize = PREAMBLE_BYTES + 16 + 16 + 4 + 4 + 4 + 4 + 4 + 4;
/// Length of a segment's header: enough to read first.
pub const INDEX_HEADER_BYTES: usize = HEAD_BYTES + MAC_BYTES;
const PACK_BYTES: usize = 16;
const ENTRY_BYTES: usize = 60;
const CHECK_BYTES: usize = 16;
const ITEM_BYTES_PER_PAGE: usize = 4_080;
const CRC_BYTES: usize = 4;

/// Most entries in one segment.
pub const MAX_SEGMENT_ENTRIES: usize = 1 << 18;
/// Most packs that one segment lists, and most that it lists as gone.
pub const MAX_SEGMENT_PACKS: usize = 1 << 18;
/// Most parts of one run.
pub const MAX_RUN_PARTS: u32 = 1 << 20;
/// Highest level of a run.
pub const MAX_RUN_LEVEL: u8 = 15;

/// Longest segment, in bytes.
pub const MAX_SEGMENT_BYTES: usize = INDEX_HEADER_BYTES
    + region_bytes(MAX_SEGMENT_PACKS, PACK_BYTES)
    + region_bytes(MAX_SEGMENT_PACKS, PACK_BYTES)
    + region_bytes(filter_lines(MAX_SEGMENT_ENTRIES), LINE_BYTES)
    + region_bytes(MAX_SEGMENT_ENTRIES, ENTRY_BYTES)
    + CRC_BYTES;

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IndexEntry {
    /// The chunk.
    pub id: ChunkId,
    /// Its pack.
    pub pack: PackId,
    /// Where it lies in the pack.
    pub placement: Placement,
    /// What it holds.
    pub kind: ChunkKind,
}

/// The place of a segment among those that were made together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RunPart {
    /// Random name of the run.
    pub run: [u8; 16],
    /// Number of the segment in the run.
    pub part: u32,
    /// Segments in the run, at least 1.
    pub parts: u32,
    /// How often its entries were put together from several runs; at most [`MAX_RUN_LEVEL`].
    pub level: u8,
}

impl RunPart {
    /// The only segment of a run of its own that was never merged.
    pub fn alone(run: [u8; 16]) -> Self {
        Self { run, part: 0, parts: 1, level: 0 }
    }

    /// The part of a run with so many parts in which this chunk has its place.
    pub fn of_chunk(id: &ChunkId, parts: u32) -> u32 {
        part_of(id.as_bytes(), parts)
    }

    /// The part in which this pack is listed.
    pub fn of_pack(id: &PackId, parts: u32) -> u32 {
        part_of(id.as_bytes(), parts)
    }
}

fn part_of<const N: usize>(id: &[u8; N], parts: u32) -> u32 {
    let scaled = (u128::from(prefix(id)) * u128::from(parts)) >> 64;
    u32::try_from(scaled).unwrap_or(0)
}

/// The header of a segment: what it is and where its pages lie. Give every method the bytes of that very segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLayout {
    place: RunPart,
    packs: usize,
    gone: usize,
    entries: usize,
    lines: usize,
    mac: [u8; MAC_BYTES],
}

impl IndexLayout {
    /// Reads and authenticates the header of a segment of this length in bytes.
    ///
    /// # Errors
    /// Everything that is wrong with the header; a length that does not fit it.
    pub fn open(header: &[u8], length: u64, keys: &Keys) -> Result<Self, FormatError> {
        let mut fields = Fields::new(WHAT, header.get(..INDEX_HEADER_BYTES).unwrap_or(header));
        fields.preamble(MAGIC)?;
        if fields.array::<16>()? != *keys.repository().as_bytes() {
            return Err(FormatError::ForeignRepository { what: WHAT });
        }
        let run = fields.array()?;
        let (part, parts, level) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let packs = fields.limited("packs", MAX_SEGMENT_PACKS)?;
        let gone = fields.limited("gone packs", MAX_SEGMENT_PACKS)?;
        let entries = fields.limited("entries", MAX_SEGMENT_ENTRIES)?;
        let mac = fields.array::<MAC_BYTES>()?;
        fields.end()?;
        let head = header.get(..HEAD_BYTES).unwrap_or_default();
        if blake3::keyed_hash(keys.index_key(), head) != blake3::Hash::from_bytes(mac) {
            return Err(FormatError::Authentication { what: WHAT });
        }
        let wrong = |field, found: u32| FormatError::Field { what: WHAT, field, found: found.into() };
        if parts == 0 || parts > MAX_RUN_PARTS {
            return Err(wrong("parts", parts));
        }
        if part >= parts {
            return Err(wrong("part", part));
        }
        let known_level = u8::try_from(level).ok().filter(|&level| level <= MAX_RUN_LEVEL);
        let level = known_level.ok_or_else(|| wrong("level", level))?;
        let place = RunPart { run, part, parts, level };
        let layout = Self { place, packs, gone, entries, lines: filter_lines(entries), mac };
        let expected = layout.length() as u64;
        match length.cmp(&expected) {
            std::cmp::Ordering::Less => Err(FormatError::Truncated { what: WHAT, wanted: expected, found: length }),
            std::cmp::Ordering::Greater => Err(FormatError::TrailingBytes { what: WHAT, extra: length - expected }),
            std::cmp::Ordering::Equal => Ok(layout),
        }
    }

    /// Checks a whole segment: the CRC-32, every page, the order and the place of the entries, and the filter.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes.
    pub fn check(bytes: &[u8], keys: &Keys) -> Result<Self, FormatError> {
        checked_body(WHAT, MAGIC, bytes)?;
        let layout = Self::open(bytes, bytes.len() as u64, keys)?;
        for page in 0..layout.pages() {
            layout.check_page(bytes, page, keys)?;
        }
        let mut before = None;
        for number in 0..layout.entries {
            let wrong = |field| FormatError::Field { what: WHAT, field, found: number as u64 };
            let entry = layout.entry(bytes, number).ok_or_else(|| wrong("kind of an entry"))?;
            if before.is_some_and(|before| before >= entry) {
                return Err(wrong("order of entries"));
            }
            if RunPart::of_chunk(&entry.id, layout.place.parts) != layout.place.part {
                return Err(wrong("part of an entry"));
            }
            if !layout.may_hold(bytes, &entry.id) {
                return Err(wrong("filter of an entry"));
            }
            before = Some(entry);
        }
        Ok(layout)
    }

    /// Its place among the segments of its run.
    pub fn place(&self) -> RunPart {
        self.place
    }

    /// How many entries it has. A chunk has as many as copies of it are known.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether it has no entries.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Length of the whole segment in bytes.
    pub fn length(&self) -> usize {
        self.entries_at() + region_bytes(self.entries, ENTRY_BYTES) + CRC_BYTES
    }

    /// Pages of the segment.
    pub fn pages(&self) -> usize {
        self.first_entry_page() + pages_of(self.entries, ENTRY_BYTES)
    }

    /// Pages that hold the lists of packs; they are the first.
    pub fn pack_pages(&self) -> usize {
        pages_of(self.packs, PACK_BYTES) + pages_of(self.gone, PACK_BYTES)
    }

    /// The bytes in which a page lies.
    pub fn page_range(&self, page: usize) -> Range<usize> {
        let packs = pages_of(self.packs, PACK_BYTES);
        let (first_filter, first_entries) = (self.pack_pages(), self.first_entry_page());
        let (region, number, count, width) = if page < packs {
            (INDEX_HEADER_BYTES, page, self.packs, PACK_BYTES)
        } else if page < first_filter {
            (self.gone_at(), page - packs, self.gone, PACK_BYTES)
        } else if page < first_entries {
            (self.filter_at(), page - first_filter, self.lines, LINE_BYTES)
        } else {
            (self.entries_at(), page - first_entries, self.entries, ENTRY_BYTES)
        };
        let per_page = ITEM_BYTES_PER_PAGE / width;
        let items = count.saturating_sub(number * per_page).min(per_page);
        let start = region + number * (per_page * width + CHECK_BYTES);
        start..start + items * width + CHECK_BYTES
    }

    /// Authenticates a page.
    ///
    /// # Errors
    /// [`FormatError::Authentication`] if it is not what was written; [`FormatError::Truncated`].
    pub fn check_page(&self, bytes: &[u8], page: usize, keys: &Keys) -> Result<(), FormatError> {
        let range = self.page_range(page);
        let found = bytes.get(range.clone()).and_then(<[u8]>::split_last_chunk::<CHECK_BYTES>);
        let truncated = || FormatError::Truncated { what: WHAT, wanted: range.end as u64, found: bytes.len() as u64 };
        let (items, check) = found.ok_or_else(truncated)?;
        let expected = page_check(keys, &self.mac, page, items);
        // Whoever forges a page does not get to try in a loop: time tells nothing here.
        if expected == *check { Ok(()) } else { Err(FormatError::Authentication { what: WHAT }) }
    }

    /// The packs that it lists. Their pages have to be checked before.
    pub fn packs<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = PackId> + use<'a> {
        pack_ids(bytes, INDEX_HEADER_BYTES, self.packs)
    }

    /// The packs that were removed and that runs may name. Their pages have to be checked before.
    pub fn gone<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = PackId> + use<'a> {
        pack_ids(bytes, self.gone_at(), self.gone)
    }

    /// The numbers of a chunk's entries: empty if it is not known. `use_page` is asked before a page is used for the
    /// first time in this call, and ends the search with an error if the page can not be used.
    ///
    /// # Errors
    /// Those of `use_page`.
    pub fn find<E>(
        &self,
        bytes: &[u8],
        id: &ChunkId,
        mut use_page: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<Range<usize>, E> {
        const NOTHING: Range<usize> = 0..0;
        if self.entries == 0 || RunPart::of_chunk(id, self.place.parts) != self.place.part {
            return Ok(NOTHING);
        }
        if self.lines > 0 {
            let line = filter::line_of(id, self.lines);
            use_page(self.pack_pages() + line / (ITEM_BYTES_PER_PAGE / LINE_BYTES))?;
            if !self.may_hold(bytes, id) {
                return Ok(NOTHING);
            }
        }
        let mut used = usize::MAX;
        let mut id_of = |number: usize| {
            let page = self.entry_page(number);
            if page != used {
                use_page(page)?;
                used = page;
            }
            Ok(self.id_at(bytes, number).copied().unwrap_or([0xff; 32]))
        };
        let Some(first) = self.first_of(id, &mut id_of)? else { return Ok(NOTHING) };
        let mut end = first + 1;
        while end < self.entries && id_of(end)? == *id.as_bytes() {
            end += 1;
        }
        Ok(first..end)
    }

    /// The number of the first entry of a chunk. Ids are evenly spread, so a few steps of interpolation come close to
    /// it in a segment of any size.
    fn first_of<E>(
        &self,
        id: &ChunkId,
        id_of: &mut impl FnMut(usize) -> Result<[u8; 32], E>,
    ) -> Result<Option<usize>, E> {
        let wanted = prefix(id.as_bytes());
        let (mut low, mut high) = (0, self.entries);
        let (mut low_key, mut high_key) = self.keys_of_part();
        let mut found = None;
        let mut steps = 0;
        while low < high {
            let width = u128::from(high_key.saturating_sub(low_key)) + 1;
            let part = u128::from(wanted.saturating_sub(low_key)) * (high - low) as u128 / width;
            // After some steps plain halving: it always ends, whatever the ids look like.
            let middle = if steps < 8 { low + usize::try_from(part).unwrap_or(0) } else { low + (high - low) / 2 };
            let middle = middle.clamp(low, high - 1);
            let there = id_of(middle)?;
            match there.cmp(id.as_bytes()) {
                std::cmp::Ordering::Less => (low, low_key) = (middle + 1, prefix(&there)),
                order => {
                    if order == std::cmp::Ordering::Equal {
                        found = Some(middle);
                        // What is left is before the first copy, or is copies: nearly always nothing or one.
                        if middle == 0 || id_of(middle - 1)? < *id.as_bytes() {
                            return Ok(found);
                        }
                    }
                    (high, high_key) = (middle, prefix(&there));
                }
            }
            steps += 1;
        }
        Ok(found)
    }

    /// The entry with this number, in the order of ids; `None` beyond the end. Its page has to be checked before.
    pub fn entry(&self, bytes: &[u8], number: usize) -> Option<IndexEntry> {
        if number >= self.entries {
            return None;
        }
        let at = item_at(self.entries_at(), number, ENTRY_BYTES);
        let mut fields = Fields::new(WHAT, bytes.get(at..at + ENTRY_BYTES)?);
        let id = ChunkId::from_bytes(fields.array().ok()?);
        let pack = PackId::from_bytes(fields.array().ok()?);
        let (offset, length) = (fields.u32().ok()?, fields.u32().ok()?);
        let (frame, part) = (fields.u16().ok()?, fields.u8().ok()?);
        let kind = ChunkKind::from_code(fields.u8().ok()?)?;
        Some(IndexEntry { id, pack, placement: Placement { offset, length, frame, part }, kind })
    }

    /// The page in which this entry lies.
    pub fn entry_page(&self, number: usize) -> usize {
        self.first_entry_page() + number / (ITEM_BYTES_PER_PAGE / ENTRY_BYTES)
    }

    fn may_hold(&self, bytes: &[u8], id: &ChunkId) -> bool {
        if self.lines == 0 {
            return true;
        }
        let at = item_at(self.filter_at(), filter::line_of(id, self.lines), LINE_BYTES);
        bytes.get(at..).and_then(<[u8]>::first_chunk).is_some_and(|line| filter::holds(line, id))
    }

    fn keys_of_part(&self) -> (u64, u64) {
        let key = |part: u32| ((u128::from(part) << 64) / u128::from(self.place.parts)).min(u64::MAX.into());
        let key = |part| u64::try_from(key(part)).unwrap_or(u64::MAX);
        (key(self.place.part), key(self.place.part + 1))
    }

    fn id_at<'a>(&self, bytes: &'a [u8], number: usize) -> Option<&'a [u8; 32]> {
        bytes.get(item_at(self.entries_at(), number, ENTRY_BYTES)..)?.first_chunk()
    }

    fn gone_at(&self) -> usize {
        INDEX_HEADER_BYTES + region_bytes(self.packs, PACK_BYTES)
    }

    fn filter_at(&self) -> usize {
        self.gone_at() + region_bytes(self.gone, PACK_BYTES)
    }

    fn entries_at(&self) -> usize {
        self.filter_at() + region_bytes(self.lines, LINE_BYTES)
    }

    fn first_entry_page(&self) -> usize {
        self.pack_pages() + pages_of(self.lines, LINE_BYTES)
    }
}

fn pack_ids<'a>(bytes: &'a [u8], region: usize, count: usize) -> impl Iterator<Item = PackId> + use<'a> {
    (0..count).filter_map(move |number| {
        let at = item_at(region, number, PACK_BYTES);
        bytes.get(at..)?.first_chunk().map(|id| PackId::from_bytes(*id))
    })
}

fn page_check(keys: &Keys, mac: &[u8; MAC_BYTES], page: usize, items: &[u8]) -> [u8; CHECK_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(keys.index_key());
    hasher.update(mac).update(&(page as u64).to_le_bytes()).update(items);
    let mut check = [0; CHECK_BYTES];
    check.iter_mut().zip(hasher.finalize().as_bytes()).for_each(|(to, from)| *to = *from);
    check
}

const fn pages_of(items: usize, width: usize) -> usize {
    items.div_ceil(ITEM_BYTES_PER_PAGE / width)
}

const fn region_bytes(items: usize, width: usize) -> usize {
    items * width + pages_of(items, width) * CHECK_BYTES
}

fn item_at(region: usize, number: usize, width: usize) -> usize {
    region + number * width + number / (ITEM_BYTES_PER_PAGE / width) * CHECK_BYTES
}

fn prefix<const N: usize>(id: &[u8; N]) -> u64 {
    id.first_chunk().map_or(0, |head| u64::from_be_bytes(*head))
}

#[cfg(test)]
mod tests;
