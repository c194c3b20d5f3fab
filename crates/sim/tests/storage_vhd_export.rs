//! The VHD stream against readers that do not know us: qemu-img, and a reader by the specification.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test that meets the unexpected has failed"
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use futures::TryStreamExt as _;
use uuid::Uuid;
use xenvault_block::{ByteRange, WriteAt};
use xenvault_sim::storage::{Disk, SrKind, Storage};
use xenvault_sim::vhd_export::{VhdBase, VhdExport, VhdExportError};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn new_disk(kind: SrKind, size: u64) -> (Storage, Uuid, Disk) {
    let storage = Storage::new().unwrap();
    let (sr, vdi) = (Uuid::new_v4(), Uuid::new_v4());
    storage.create_sr(sr, kind, 64 << 40);
    storage.create_vdi(sr, vdi, size).unwrap();
    let disk = storage.disk(vdi).unwrap();
    (storage, vdi, disk)
}

fn export(disk: Disk, base: Option<&VhdBase>) -> Vec<u8> {
    let mut export = VhdExport::new(disk, base).unwrap();
    let mut bytes = Vec::new();
    while let Some(piece) = export.next_piece().unwrap() {
        assert!(piece.len() <= (2 << 20) + 512);
        bytes.extend(piece);
    }
    assert_eq!(bytes.len() as u64, export.length());
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Reads a stream by the specification and by what is known of vhd-tool; gives the blocks and their data.
fn parse(bytes: &[u8], size: u64, disk_type: u32) -> BTreeMap<usize, Vec<u8>> {
    let sum = |part: &[u8], at: usize| {
        let total: u32 = part.iter().map(|&byte| u32::from(byte)).sum();
        let own: u32 = part[at..at + 4].iter().map(|&byte| u32::from(byte)).sum();
        !(total - own)
    };
    assert_eq!(bytes[..512], bytes[bytes.len() - 512..]);
    assert_eq!(u32_at(bytes, 64), sum(&bytes[..512], 64));
    assert_eq!((&bytes[..8], &bytes[28..32]), (&b"conectix"[..], &b"caml"[..]));
    assert_eq!(u64::from_be_bytes(bytes[48..56].try_into().unwrap()), size);
    assert_eq!(u32_at(bytes, 60), disk_type);
    assert_eq!(&bytes[512..520], b"cxsparse");
    assert_eq!(u32_at(bytes, 512 + 36), sum(&bytes[512..1536], 36));
    assert!(bytes[1536..2048].iter().all(|&byte| byte == 0));
    let entries = u32_at(bytes, 512 + 28) as usize;
    assert_eq!(entries as u64, size.div_ceil(2 * MIB));
    let mut next = 2048 + (entries * 4).next_multiple_of(512);
    assert!(bytes[2048 + entries * 4..next].iter().all(|&byte| byte == 0xff));
    let mut blocks = BTreeMap::new();
    for block in 0..entries {
        let sector = u32_at(bytes, 2048 + block * 4);
        if sector != u32::MAX {
            assert_eq!(sector as usize * 512, next, "blocks lie in order and without gaps");
            assert!(bytes[next..next + 512].iter().all(|&byte| byte == 0xff));
            blocks.insert(block, bytes[next + 512..next + 512 + (2 << 20)].to_vec());
            next += 512 + (2 << 20);
        }
    }
    assert_eq!(next + 512, bytes.len());
    blocks
}

fn qemu_reads(vhd: &Path, raw: &Path) -> bool {
    let source = format!("driver=vpc,force_size_calc=current_size,file.filename={}", vhd.display());
    let run = Command::new("qemu-img").args(["convert", "-O", "raw", "--image-opts", &source]).arg(raw).output();
    let Ok(run) = run else {
        println!("left out: qemu-img is not installed");
        return false;
    };
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    true
}

#[test]
fn qemu_img_reads_the_same_bytes() {
    // A size that the geometry can not express.
    let (storage, vdi, disk) = new_disk(SrKind::Ext, 130 * MIB);
    for (offset, length) in [(0, 100), (5 * MIB - 3, 6), (77 * MIB, 3_000_000), (130 * MIB - 512, 512)] {
        disk.write_all_at(&vec![0xa5; length], offset).unwrap();
    }
    storage.snapshot(vdi, Uuid::new_v4()).unwrap();
    disk.write_all_at(&[7; 4_096], 5 * MIB).unwrap();
    let bytes = export(disk.clone(), None);
    let blocks = parse(&bytes, 130 * MIB, 3);
    assert_eq!(blocks.keys().copied().collect::<Vec<_>>(), [0, 2, 38, 39, 64]);
    let folder = tempfile::tempdir().unwrap();
    let (vhd, raw) = (folder.path().join("disk.vhd"), folder.path().join("disk.raw"));
    std::fs::write(&vhd, bytes).unwrap();
    if qemu_reads(&vhd, &raw) {
        let expected = disk.read(ByteRange::up_to(130 * MIB)).unwrap();
        assert!(std::fs::read(raw).unwrap() == expected);
    }
}

#[test]
fn the_length_equals_that_of_a_recorded_export() {
    // 8 MiB with three blocks gave 6296064 bytes on a real server.
    let (_storage, _, disk) = new_disk(SrKind::Ext, 8 * MIB);
    for block in [0, 1, 3] {
        disk.write_all_at(&[1; 512], block * 2 * MIB).unwrap();
    }
    assert_eq!(VhdExport::new(disk, None).unwrap().length(), 6_296_064);
}

#[test]
fn the_largest_disk_costs_its_table() {
    let (_storage, _, disk) = new_disk(SrKind::Ext, 2040 * GIB);
    disk.write_all_at(&[1; 512], 2040 * GIB - 512).unwrap();
    let bytes = export(disk, None);
    let blocks = parse(&bytes, 2040 * GIB, 3);
    assert_eq!(blocks.keys().copied().collect::<Vec<_>>(), [1_044_479]);
}

#[test]
fn a_difference_holds_the_blocks_of_either_branch() {
    let (storage, vdi, disk) = new_disk(SrKind::Ext, 20 * MIB);
    disk.write_all_at(&[1; 512], 0).unwrap();
    let base = Uuid::new_v4();
    storage.snapshot(vdi, base).unwrap();
    // The base's own branch, then the disk's.
    storage.disk(base).unwrap().write_all_at(&[2; 512], 4 * MIB).unwrap();
    disk.write_all_at(&[3; 512], 8 * MIB).unwrap();
    let path = "/var/run/sr-mount/sr/base.vhd".to_owned();
    let base = VhdBase { disk: storage.disk(base).unwrap(), path, footer_uuid: Uuid::from_u128(7) };
    let bytes = export(disk, Some(&base));
    let blocks = parse(&bytes, 20 * MIB, 4);
    assert_eq!(blocks.keys().copied().collect::<Vec<_>>(), [2, 4]);
    // What only the base has comes with the disk's content.
    assert!(blocks[&2].iter().all(|&byte| byte == 0));
    assert_eq!(blocks[&4][..513], [&[3; 512][..], &[0]].concat());
    assert_eq!(bytes[512 + 40..512 + 56], Uuid::from_u128(7).as_bytes()[..]);
    assert_eq!(bytes[512 + 64..512 + 68], [0, b'/', 0, b'v']);
    assert_eq!(&bytes[512 + 576..512 + 580], b"MacX");
    assert_eq!(u32_at(&bytes, 512 + 584) as usize, "file:///var/run/sr-mount/sr/base.vhd".len());
}

#[test]
fn disks_that_are_no_vhd_are_scanned_for_zeros() {
    let (_storage, _, disk) = new_disk(SrKind::Large, 5 * MIB + 512);
    disk.write_all_at(&[1; 512], 5 * MIB).unwrap();
    disk.write_all_at(&[0; 512], 0).unwrap();
    let blocks = parse(&export(disk.clone(), None), 6 * MIB, 3);
    assert_eq!(blocks.keys().copied().collect::<Vec<_>>(), [2]);
    let base = VhdBase { disk: disk.clone(), path: String::new(), footer_uuid: Uuid::nil() };
    assert!(matches!(VhdExport::new(disk, Some(&base)), Err(VhdExportError::NotVhd)));
    let (_storage, _, raw) = new_disk(SrKind::LvmRaw, 4 * MIB);
    raw.zero(ByteRange::up_to(2 * MIB)).unwrap();
    assert_eq!(parse(&export(raw, None), 4 * MIB, 3).keys().copied().collect::<Vec<_>>(), [1]);
    let (_storage, _, large) = new_disk(SrKind::Large, 3 << 40);
    assert!(matches!(VhdExport::new(large, None), Err(VhdExportError::TooLarge { .. })));
}

#[tokio::test]
async fn the_stream_gives_the_same_pieces_and_ends_with_the_disk() {
    let (storage, vdi, disk) = new_disk(SrKind::Ext, 8 * MIB);
    disk.write_all_at(&[9; 512], 3 * MIB).unwrap();
    let export = VhdExport::new(disk.clone(), None).unwrap();
    let length = export.length();
    let pieces: Vec<bytes::Bytes> = export.into_stream().try_collect().await.unwrap();
    assert_eq!(pieces.iter().map(|piece| piece.len() as u64).sum::<u64>(), length);
    parse(&pieces.concat(), 8 * MIB, 3);
    // A disk that goes away in the middle is an error, not an end.
    let export = VhdExport::new(disk, None).unwrap();
    storage.destroy(vdi).unwrap();
    let pieces: Result<Vec<bytes::Bytes>, _> = export.into_stream().try_collect().await;
    assert_eq!(pieces.map(|pieces| pieces.len()).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}
