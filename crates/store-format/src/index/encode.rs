//! Making a segment.

use super::filter::{self, LINE_BYTES, filter_lines};
use super::{
    ENTRY_BYTES, HEAD_BYTES, INDEX_HEADER_BYTES, ITEM_BYTES_PER_PAGE, IndexEntry, IndexLayout, MAC_BYTES, MAGIC,
    MAX_RUN_LEVEL, MAX_RUN_PARTS, MAX_SEGMENT_ENTRIES, MAX_SEGMENT_PACKS, PACK_BYTES, RunPart, WHAT, page_check,
};
use crate::wire::{put_crc, put_preamble};
use crate::{FormatError, Keys, PackId};

/// Parts for a run of so many entries that none of them grows beyond [`MAX_SEGMENT_ENTRIES`]: ids are evenly spread, and
/// a quarter is left for chance and for chunks of which there are several copies.
pub fn parts_for(entries: u64) -> u32 {
    let target = MAX_SEGMENT_ENTRIES as u64 / 4 * 3;
    u32::try_from(entries.div_ceil(target)).unwrap_or(u32::MAX).clamp(1, MAX_RUN_PARTS)
}

/// What a segment says, in any order; what is there twice is written once.
#[derive(Clone, Debug, Default)]
pub struct SegmentContent {
    /// Packs of which the run knows everything, those that are listed in this part of it.
    pub packs: Vec<PackId>,
    /// Packs that were removed and that other runs may name, those that are listed in this part.
    pub gone: Vec<PackId>,
    /// Where chunks are.
    pub entries: Vec<IndexEntry>,
}

/// The bytes of a segment.
///
/// # Errors
/// [`FormatError::Limit`] if there is too much; [`FormatError::Field`] if an entry or a pack belongs into another part.
pub fn encode_index(keys: &Keys, place: RunPart, content: SegmentContent) -> Result<Vec<u8>, FormatError> {
    let SegmentContent { mut packs, mut gone, mut entries } = content;
    for list in [&mut packs, &mut gone] {
        list.sort_unstable();
        list.dedup();
    }
    entries.sort_unstable();
    entries.dedup();
    check_place(place, packs.iter().chain(&gone), &entries)?;

    let mut out = Vec::new();
    put_preamble(&mut out, MAGIC);
    out.extend_from_slice(keys.repository().as_bytes());
    out.extend_from_slice(&place.run);
    let packs_count = count("packs", packs.len(), MAX_SEGMENT_PACKS)?;
    let gone_count = count("gone packs", gone.len(), MAX_SEGMENT_PACKS)?;
    let entries_count = count("entries", entries.len(), MAX_SEGMENT_ENTRIES)?;
    for number in [place.part, place.parts, u32::from(place.level), packs_count, gone_count, entries_count] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    debug_assert_eq!(out.len(), HEAD_BYTES);
    let mac: [u8; MAC_BYTES] = *blake3::keyed_hash(keys.index_key(), &out).as_bytes();
    out.extend_from_slice(&mac);
    debug_assert_eq!(out.len(), INDEX_HEADER_BYTES);
    let lines = filter_lines(entries.len());
    let layout = IndexLayout { place, packs: packs.len(), gone: gone.len(), entries: entries.len(), lines, mac };
    out.reserve_exact(layout.length() - out.len());

    let mut page = 0;
    let mut put_pages = |items: &[u8], width: usize| {
        for items in items.chunks(ITEM_BYTES_PER_PAGE / width * width) {
            out.extend_from_slice(items);
            out.extend_from_slice(&page_check(keys, &mac, page, items));
            page += 1;
        }
    };
    for list in [packs, gone] {
        let listed: Vec<u8> = list.iter().flat_map(|pack| *pack.as_bytes()).collect();
        put_pages(&listed, PACK_BYTES);
    }
    put_pages(&filter_of(&entries, lines), LINE_BYTES);
    for some in entries.chunks(ITEM_BYTES_PER_PAGE / ENTRY_BYTES) {
        let mut items = Vec::with_capacity(ITEM_BYTES_PER_PAGE);
        some.iter().for_each(|entry| put_entry(&mut items, entry));
        put_pages(&items, ENTRY_BYTES);
    }
    put_crc(&mut out);
    Ok(out)
}

fn check_place<'a>(
    place: RunPart,
    mut packs: impl Iterator<Item = &'a PackId>,
    entries: &[IndexEntry],
) -> Result<(), FormatError> {
    let wrong = |field, found: u64| FormatError::Field { what: WHAT, field, found };
    if place.parts == 0 || place.parts > MAX_RUN_PARTS {
        return Err(wrong("parts", place.parts.into()));
    }
    if place.level > MAX_RUN_LEVEL {
        return Err(wrong("level", place.level.into()));
    }
    let strange_entry = entries.iter().position(|entry| RunPart::of_chunk(&entry.id, place.parts) != place.part);
    let strange_pack = packs.position(|pack| RunPart::of_pack(pack, place.parts) != place.part);
    match (strange_entry, strange_pack) {
        (Some(at), _) => Err(wrong("part of an entry", at as u64)),
        (None, Some(at)) => Err(wrong("part of a pack", at as u64)),
        (None, None) => Ok(()),
    }
}

fn count(field: &'static str, found: usize, limit: usize) -> Result<u32, FormatError> {
    let error = || FormatError::Limit { what: WHAT, field, found: found as u64, limit: limit as u64 };
    u32::try_from(found).ok().filter(|_| found <= limit).ok_or_else(error)
}

fn put_entry(out: &mut Vec<u8>, entry: &IndexEntry) {
    out.extend_from_slice(entry.id.as_bytes());
    out.extend_from_slice(entry.pack.as_bytes());
    out.extend_from_slice(&entry.placement.offset.to_le_bytes());
    out.extend_from_slice(&entry.placement.length.to_le_bytes());
    out.extend_from_slice(&entry.placement.frame.to_le_bytes());
    out.extend_from_slice(&[entry.placement.part, entry.kind.code()]);
}

fn filter_of(entries: &[IndexEntry], lines: usize) -> Vec<u8> {
    let mut filter = vec![0; lines * LINE_BYTES];
    if lines > 0 {
        for entry in entries {
            let at = filter::line_of(&entry.id, lines) * LINE_BYTES;
            if let Some(line) = filter.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
                filter::add(line, &entry.id);
            }
        }
    }
    filter
}
