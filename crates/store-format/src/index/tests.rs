use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::testing::{each_flip, golden, keys};
use crate::wire::put_crc;

fn pack(seed: u32) -> PackId {
    PackId::from_bytes([u8::try_from(seed % 251).unwrap(); 16])
}

fn entry(seed: u32) -> IndexEntry {
    let id = keys().chunk_id(ChunkKind::Data, &seed.to_le_bytes());
    let placement = Placement { offset: seed, length: 100, frame: 3, part: 2 };
    IndexEntry { id, pack: pack(seed), placement, kind: ChunkKind::Data }
}

fn alone(entries: &[IndexEntry]) -> Vec<u8> {
    let packs: Vec<_> = entries.iter().map(|entry| entry.pack).collect();
    encode_index(
        &keys(),
        RunPart::alone([7; 16]),
        SegmentContent { packs, gone: vec![pack(250)], entries: entries.to_vec() },
    )
    .unwrap()
}

fn encode(place: RunPart, entries: &[IndexEntry]) -> Result<Vec<u8>, FormatError> {
    encode_index(&keys(), place, SegmentContent { entries: entries.to_vec(), ..SegmentContent::default() })
}

fn found(layout: &IndexLayout, bytes: &[u8], id: &ChunkId) -> Vec<IndexEntry> {
    let range = layout.find(bytes, id, |page| layout.check_page(bytes, page, &keys()));
    range.unwrap().filter_map(|number| layout.entry(bytes, number)).collect()
}

#[test]
fn the_bytes_of_a_segment_are_fixed() {
    let bytes = alone(&[entry(1), entry(2), entry(1)]);
    golden("index", &bytes);
    let layout = IndexLayout::check(&bytes, &keys()).unwrap();
    assert_eq!((layout.len(), layout.packs(&bytes).count(), layout.pages()), (2, 2, 3));
    assert_eq!(layout.gone(&bytes).collect::<Vec<_>>(), [pack(250)]);
    each_flip(&bytes, |hurt| assert!(IndexLayout::check(hurt, &keys()).is_err()));
}

#[test]
fn every_byte_before_the_checksum_is_authenticated() {
    let bytes = alone(&(0..1_500).map(entry).collect::<Vec<_>>());
    for at in (0..bytes.len() - CRC_BYTES).step_by(37) {
        let mut forged = bytes.clone();
        forged[at] ^= 1;
        forged.truncate(bytes.len() - CRC_BYTES);
        put_crc(&mut forged);
        assert!(IndexLayout::check(&forged, &keys()).is_err(), "byte {at}");
    }
}

#[test]
fn pages_of_another_segment_are_refused() {
    let entries: Vec<_> = (0..200).map(entry).collect();
    let bytes = alone(&entries);
    let layout = IndexLayout::open(&bytes, bytes.len() as u64, &keys()).unwrap();
    let other = encode(RunPart::alone([8; 16]), &entries).unwrap();
    let other_layout = IndexLayout::open(&other, other.len() as u64, &keys()).unwrap();
    let (to, from) = (layout.page_range(layout.entry_page(0)), other_layout.page_range(other_layout.entry_page(0)));
    let mut mixed = bytes.clone();
    mixed[to].copy_from_slice(&other[from]);
    let refused = layout.check_page(&mixed, layout.entry_page(0), &keys());
    assert!(matches!(refused, Err(FormatError::Authentication { .. })));
    assert!(layout.check_page(&bytes, layout.entry_page(0), &keys()).is_ok());
}

#[test]
fn a_segment_of_another_repository_is_refused() {
    let bytes = alone(&[]);
    let other = Keys::derive(crate::MasterKey::from_bytes([1; 32]), crate::RepositoryId::from_bytes([1; 16]));
    let error = IndexLayout::check(&bytes, &other.unwrap()).unwrap_err();
    assert!(matches!(error, FormatError::ForeignRepository { .. }));
}

#[test]
fn every_copy_of_a_chunk_is_found() {
    let copies: Vec<_> = (0..150).map(|at| IndexEntry { pack: pack(at), ..entry(9) }).collect();
    let mut entries: Vec<_> = (0..2_000).filter(|&seed| seed != 9).map(entry).collect();
    entries.extend(&copies);
    let bytes = alone(&entries);
    let layout = IndexLayout::check(&bytes, &keys()).unwrap();
    assert_eq!(found(&layout, &bytes, &entry(9).id), copies);
}

#[test]
fn a_run_in_parts_holds_each_chunk_in_one_of_them() {
    let entries: Vec<_> = (0..5_000).map(entry).collect();
    let parts = 7;
    let mut known = 0;
    for part in 0..parts {
        let here: Vec<_> =
            entries.iter().filter(|entry| RunPart::of_chunk(&entry.id, parts) == part).copied().collect();
        assert!(here.len() > 500, "{} entries in part {part}", here.len());
        let place = RunPart { run: [1; 16], part, parts, level: 3 };
        let bytes = encode(place, &here).unwrap();
        let layout = IndexLayout::check(&bytes, &keys()).unwrap();
        assert_eq!(layout.place(), place);
        known += entries.iter().filter(|entry| !found(&layout, &bytes, &entry.id).is_empty()).count();
        let wrong = encode(RunPart { part: (part + 1) % parts, ..place }, &here);
        assert!(matches!(wrong, Err(FormatError::Field { .. })));
    }
    assert_eq!(known, entries.len());
}

#[test]
fn the_filter_seldom_sends_anybody_in_vain() {
    let entries: Vec<_> = (0..10_000).map(entry).collect();
    let bytes = alone(&entries);
    let layout = IndexLayout::check(&bytes, &keys()).unwrap();
    let vain = (10_000..20_000).filter(|&seed| layout.may_hold(&bytes, &entry(seed).id)).count();
    assert!(vain < 150, "{vain} of 10,000");
}

#[test]
fn a_look_up_uses_few_pages() {
    let entries: Vec<_> = (0..100_000).map(entry).collect();
    let bytes = alone(&entries);
    let layout = IndexLayout::open(&bytes, bytes.len() as u64, &keys()).unwrap();
    let mut used = 0;
    for seed in (0..100_000).step_by(100) {
        let range = layout.find(&bytes, &entry(seed).id, |_| {
            used += 1;
            Ok::<_, Infallible>(())
        });
        assert_eq!(range.unwrap().len(), 1);
    }
    assert!(used < 5_000, "{used} pages for 1,000 look-ups");
}

#[test]
fn the_longest_segment_is_as_long_as_announced() {
    let layout = IndexLayout {
        place: RunPart::alone([0; 16]),
        packs: MAX_SEGMENT_PACKS,
        gone: MAX_SEGMENT_PACKS,
        entries: MAX_SEGMENT_ENTRIES,
        lines: filter_lines(MAX_SEGMENT_ENTRIES),
        mac: [0; MAC_BYTES],
    };
    assert_eq!(layout.length(), MAX_SEGMENT_BYTES);
    assert_eq!(layout.page_range(layout.pages() - 1).end + CRC_BYTES, MAX_SEGMENT_BYTES);
}

proptest! {
    #[test]
    fn every_entry_is_found_and_nothing_else(
        seeds in proptest::collection::btree_set(0_u32..100_000, 0..1_500),
        others in proptest::collection::vec(100_000_u32..200_000, 20),
    ) {
        let entries: Vec<_> = seeds.iter().map(|&seed| entry(seed)).collect();
        let bytes = alone(&entries);
        let layout = IndexLayout::check(&bytes, &keys()).unwrap();
        prop_assert_eq!(layout.len(), entries.len());
        for entry in &entries {
            prop_assert_eq!(found(&layout, &bytes, &entry.id), vec![*entry]);
        }
        for seed in others {
            prop_assert!(found(&layout, &bytes, &entry(seed).id).is_empty());
        }
    }

    #[test]
    fn crowded_ids_are_found_too(ends in proptest::collection::btree_set(any::<u16>(), 1..200), head in any::<u8>()) {
        let crowded: Vec<_> = ends.iter().map(|end| {
            let mut id = [head; 32];
            id[30..].copy_from_slice(&end.to_be_bytes());
            IndexEntry { id: ChunkId::from_bytes(id), ..entry(1) }
        }).collect();
        let bytes = alone(&crowded);
        let layout = IndexLayout::check(&bytes, &keys()).unwrap();
        for entry in &crowded {
            prop_assert_eq!(found(&layout, &bytes, &entry.id), vec![*entry]);
        }
    }

    #[test]
    fn foreign_bytes_do_not_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = IndexLayout::check(&bytes, &keys());
        bytes.splice(0..0, *b"XVLTINDX\0\0\0\0");
        put_crc(&mut bytes);
        let _ = IndexLayout::check(&bytes, &keys());
    }

    #[test]
    fn a_forged_header_does_not_panic(mut head in proptest::collection::vec(any::<u8>(), 24)) {
        // With its keyed hash right: what remains to be checked are the numbers.
        let mut bytes = alone(&[entry(1)]);
        bytes.splice(44..68, head.drain(..));
        let mac = blake3::keyed_hash(keys().index_key(), &bytes[..HEAD_BYTES]);
        bytes.splice(HEAD_BYTES..INDEX_HEADER_BYTES, *mac.as_bytes());
        if let Ok(layout) = IndexLayout::open(&bytes, bytes.len() as u64, &keys()) {
            let _ = layout.find(&bytes, &entry(1).id, |page| layout.check_page(&bytes, page, &keys()));
        }
    }
}
