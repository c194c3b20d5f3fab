//! The heads of VHDs of many producers, good and malformed, and what our encoder writes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test says what is wrong by failing"
)]

use std::io::Read as _;
use std::process::Command;

use proptest::prelude::*;
use serde::Deserialize;
use xenvault_block::{ByteRange, VHD_BLOCK_BYTES};
use xenvault_vhd::{AllocationMap, DynamicLayout, HeadParser, HeadProgress, LayoutOptions, VhdError};

#[path = "../../../tests/support/shared.rs"]
mod shared;

#[derive(Deserialize)]
struct Manifest {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    file: String,
    r#type: String,
    virtual_size: Option<u64>,
    expect: String,
}

fn cases() -> Vec<(Case, Vec<u8>)> {
    let Some(path) = shared::shared("vhd-corpus/manifest.json") else { return Vec::new() };
    let manifest: Manifest = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(manifest.cases.len() > 50);
    let unpack = |case: Case| {
        let packed = std::fs::File::open(path.with_file_name(&case.file)).unwrap();
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
        (case, bytes)
    };
    manifest.cases.into_iter().map(unpack).collect()
}

/// Pushes pieces of the given length and stops where the parser is content; says how many bytes it took.
fn parse(bytes: &[u8], piece: usize) -> (Result<AllocationMap, VhdError>, usize) {
    let mut parser = HeadParser::new();
    let mut taken = 0;
    for piece in bytes.chunks(piece) {
        taken += piece.len();
        match parser.push(piece) {
            Ok(HeadProgress::Needs(more)) => assert!(more > 0),
            Ok(HeadProgress::Complete) => break,
            Err(error) => return (Err(error), taken),
        }
    }
    (parser.finish(), taken)
}

/// The disk of a dynamic VHD, read the slow and plain way.
fn raw(vhd: &[u8], size: u64) -> Vec<u8> {
    let u32_at = |at: usize| u32::from_be_bytes(vhd[at..at + 4].try_into().unwrap()) as usize;
    let header = u32_at(20);
    let (table, entries, block) = (u32_at(header + 20), u32_at(header + 28), u32_at(header + 32));
    let bitmap = (block / 512).div_ceil(8).next_multiple_of(512);
    let mut disk = vec![0; size as usize];
    for index in 0..entries {
        let place = u32_at(table + index * 4);
        if place == u32::MAX as usize {
            continue;
        }
        for sector in 0..block / 512 {
            let to = index * block + sector * 512;
            if to < disk.len() && vhd[place * 512 + sector / 8] & (0x80 >> (sector % 8)) != 0 {
                let from = place * 512 + bitmap + sector * 512;
                disk[to..to + 512].copy_from_slice(&vhd[from..from + 512]);
            }
        }
    }
    disk
}

#[test]
fn x33_the_head_of_every_good_dynamic_disk_names_all_its_data() {
    for (case, bytes) in cases().into_iter().filter(|(case, _)| case.r#type == "dynamic" && case.expect == "ok") {
        let (result, taken) = parse(&bytes, 1000);
        if case.file == "bad-front-footer-checksum.vhd.gz" {
            // Only its tail could save it, and a stream's tail comes last.
            assert!(matches!(result, Err(VhdError::FooterChecksum { .. })), "{result:?}");
            continue;
        }
        let map = result.unwrap_or_else(|error| panic!("{}: {error}", case.file));
        if case.file == "bad-footers-differ.vhd.gz" {
            assert_ne!(Some(map.virtual_size), case.virtual_size, "the front copy is all that a stream shows");
            continue;
        }
        assert_eq!(Some(map.virtual_size), case.virtual_size, "{}", case.file);
        assert!(map.data_end <= bytes.len() as u64, "{}", case.file);
        assert!(taken < 5 << 20, "{}: no more than the head is wanted", case.file);
        if map.virtual_size > 1 << 30 {
            assert!(map.allocated.is_empty(), "{}", case.file);
            continue;
        }
        let disk = raw(&bytes, map.virtual_size);
        assert!(map.allocated.runs().iter().all(|run| run.end() <= map.virtual_size));
        for hole in map.allocated.complement(map.virtual_size).runs() {
            let hole = &disk[hole.start() as usize..hole.end() as usize];
            assert!(hole.iter().all(|&byte| byte == 0), "{}", case.file);
        }
    }
}

#[test]
fn x33_every_head_that_is_malformed_is_refused() {
    // What is wrong with these lies behind the head: the length of the file would tell.
    let behind_the_head = ["bad-bat-past-eof.vhd.gz", "bad-truncated-in-block.vhd.gz"];
    for (case, bytes) in cases().into_iter().filter(|(case, _)| case.r#type != "dynamic" || case.expect == "error") {
        let (result, taken) = parse(&bytes, 4096);
        assert!(taken < 5 << 20, "{}", case.file);
        match result {
            Ok(map) if behind_the_head.contains(&case.file.as_str()) => {
                assert!(map.data_end > bytes.len() as u64, "{}", case.file);
            }
            Ok(map) => panic!("{} was accepted: {map:?}", case.file),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

#[test]
fn x33_differencing_disks_are_refused_by_name() {
    for (case, bytes) in cases().into_iter().filter(|(case, _)| case.r#type == "differencing") {
        assert_eq!(parse(&bytes, 512).0, Err(VhdError::Differencing), "{}", case.file);
    }
}

fn options() -> LayoutOptions {
    LayoutOptions { uuid: uuid::Uuid::from_bytes([9; 16]), timestamp: 800_000_000, creator: *b"tap\0" }
}

fn encode(layout: &DynamicLayout, mut block_data: impl FnMut(u32) -> Vec<u8>) -> Vec<u8> {
    let mut vhd = layout.head();
    for &block in layout.blocks() {
        vhd.extend_from_slice(&layout.block_bitmap());
        vhd.extend_from_slice(&block_data(block));
    }
    vhd.extend_from_slice(&layout.footer());
    vhd
}

#[test]
fn x33_what_the_encoder_writes_is_read_by_us_and_by_qemu_img() {
    let size = 5 * VHD_BLOCK_BYTES + 1536;
    let layout = DynamicLayout::new(size, vec![0, 3, 5], &options()).unwrap();
    let vhd = encode(&layout, |block| {
        (0..VHD_BLOCK_BYTES)
            .map(|at| if block == 5 && at >= 1536 { 0 } else { (at / 512 + u64::from(block)) as u8 | 1 })
            .collect()
    });
    assert_eq!(vhd.len() as u64, layout.stream_bytes());
    let map = parse(&vhd, 700).0.unwrap();
    assert_eq!(map.virtual_size, size);
    assert_eq!(map.data_end + 512, layout.stream_bytes());
    let block = |n: u64| ByteRange::new(n * VHD_BLOCK_BYTES, ((n + 1) * VHD_BLOCK_BYTES).min(size)).unwrap();
    assert_eq!(map.allocated.runs(), [block(0), block(3), block(5)]);

    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("disk.vhd"), folder.path().join("disk.raw"));
    std::fs::write(&source, &vhd).unwrap();
    // Of this creator every version of qemu believes the size, and not the geometry.
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "vpc", "-O", "raw"])
        .arg(&source)
        .arg(&target)
        .output()
        .expect("qemu-img is needed: install the package qemu-utils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(std::fs::read(&target).unwrap() == raw(&vhd, size), "qemu-img reads another disk");
}

#[test]
fn impossible_layouts_are_refused() {
    let new = |size, blocks: &[u32]| DynamicLayout::new(size, blocks.to_vec(), &options()).map(|_| ());
    assert_eq!(new(0, &[]), Err(VhdError::VirtualSize { found: 0 }));
    assert_eq!(new(1000, &[]), Err(VhdError::VirtualSize { found: 1000 }));
    assert!(matches!(new((2040 << 30) + 512, &[]), Err(VhdError::TooLarge { .. })));
    assert_eq!(new(8 << 20, &[4]), Err(VhdError::BlockOrder { block: 4 }));
    assert_eq!(new(8 << 20, &[1, 1]), Err(VhdError::BlockOrder { block: 1 }));
}

#[test]
fn x33_the_largest_disk_keeps_its_head_small_and_its_table_in_32_bits() {
    let layout = DynamicLayout::new(2040 << 30, (0..1_044_480).collect(), &options()).unwrap();
    let head = layout.head();
    let map = parse(&head, 1 << 16).0.unwrap();
    assert_eq!(map.allocated.runs(), [ByteRange::up_to(2040 << 30)]);
    assert_eq!(map.data_end + 512, layout.stream_bytes());
    assert!(head.len() < 5 << 20);
}

proptest! {
    #[test]
    fn any_damage_to_a_head_is_an_error_or_a_map_inside_the_disk(
        at in 0_usize..2100, value in any::<u8>(), cut in 0_usize..2200, piece in 1_usize..700,
    ) {
        let layout = DynamicLayout::new(9 << 20, vec![1, 2], &options()).unwrap();
        let mut head = layout.head();
        head[at] = value;
        head.truncate(cut);
        if let (Ok(map), _) = parse(&head, piece) {
            prop_assert_eq!(map.virtual_size, 9 << 20);
            prop_assert!(map.allocated.runs().iter().all(|run| run.end() <= 9 << 20));
        }
    }

    #[test]
    fn what_was_encoded_comes_back(blocks in proptest::collection::btree_set(0_u32..40, 0..30), tail in 1_u64..4096) {
        let size = 39 * VHD_BLOCK_BYTES + tail * 512;
        let layout = DynamicLayout::new(size, blocks.iter().copied().collect(), &options()).unwrap();
        let map = parse(&layout.head(), 333).0.unwrap();
        let found: Vec<u32> = (0..40).filter(|&block| map.allocated.contains(u64::from(block) * VHD_BLOCK_BYTES)).collect();
        prop_assert_eq!(found, blocks.iter().copied().collect::<Vec<_>>());
        prop_assert!(map.allocated.runs().iter().all(|run| run.end() <= size));
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000), cookie in any::<bool>()) {
        let mut bytes = bytes;
        if cookie && bytes.len() > 8 {
            bytes[..8].copy_from_slice(b"conectix");
        }
        let _ = parse(&bytes, 100);
    }
}
