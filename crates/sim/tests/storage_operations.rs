//! What the storage manager does, case by case: sizes, space, change logs, errors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test that meets the unexpected has failed"
)]

use std::os::unix::fs::FileExt;

use uuid::Uuid;
use xenvault_block::{ByteRange, ReadAt, WriteAt};
use xenvault_sim::storage::{AttachMode, LostBits, SrError, SrKind, Storage};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

struct Fixture {
    storage: Storage,
    sr: Uuid,
}

impl Fixture {
    fn new(kind: SrKind, size: u64) -> Self {
        let storage = Storage::new().unwrap();
        let sr = Uuid::new_v4();
        storage.create_sr(sr, kind, size);
        Self { storage, sr }
    }

    fn disk(&self, size: u64) -> Uuid {
        let vdi = Uuid::new_v4();
        self.storage.create_vdi(self.sr, vdi, size).unwrap();
        vdi
    }

    fn snapshot(&self, vdi: Uuid) -> Uuid {
        let snapshot = Uuid::new_v4();
        let (_, message) = self.storage.snapshot(vdi, snapshot).unwrap();
        assert_eq!(message, None);
        snapshot
    }

    fn write(&self, vdi: Uuid, offset: u64, data: &[u8]) {
        self.storage.disk(vdi).unwrap().write_all_at(data, offset).unwrap();
    }

    fn changed(&self, from: Uuid, to: Uuid) -> Result<Vec<u64>, SrError> {
        let bits = self.storage.list_changed_blocks(from, to)?;
        Ok((0..bits.len() as u64 * 8).filter(|n| bits[(n / 8) as usize] & (0x80 >> (n % 8)) != 0).collect())
    }

    fn used(&self) -> u64 {
        self.storage.sr_usage(self.sr).unwrap().physical_utilisation
    }
}

fn backend(number: u16, text: &str) -> SrError {
    SrError { code: format!("SR_BACKEND_FAILURE_{number}"), params: vec![String::new(), text.into(), String::new()] }
}

#[test]
fn vhd_disks_end_at_2040_gib_with_the_real_error() {
    for kind in [SrKind::Ext, SrKind::Lvm, SrKind::LvmRaw] {
        let pool = Fixture::new(kind, 16 << 40);
        pool.disk(2040 * GIB);
        let error = pool.storage.create_vdi(pool.sr, Uuid::new_v4(), 2040 * GIB + 1).unwrap_err();
        assert_eq!(error, backend(79, "VDI Invalid size [opterr=VDI size must be between 1 MB and 2088960 MB]"));
    }
    let pool = Fixture::new(SrKind::Large, 16 << 40);
    let vdi = pool.disk(3 << 40);
    pool.write(vdi, (3 << 40) - 512, &[7; 512]);
    assert_eq!(pool.storage.disk(vdi).unwrap().read(ByteRange::new((3 << 40) - 1, 3 << 40).unwrap()).unwrap(), [7][..]);
}

#[test]
fn sizes_are_rounded_up_to_what_the_type_can_have() {
    for (kind, asked, got) in [
        (SrKind::Ext, 1, 2 * MIB),
        (SrKind::Ext, 8 * MIB + 1, 10 * MIB),
        (SrKind::LvmRaw, 1, 4 * MIB),
        (SrKind::Large, 1_000, 1_024),
    ] {
        let pool = Fixture::new(kind, GIB);
        assert_eq!(pool.storage.vdi(pool.disk(asked)).unwrap().virtual_size, got);
    }
}

#[test]
fn a_snapshot_on_thick_volumes_needs_room_for_a_whole_leaf() {
    let pool = Fixture::new(SrKind::Lvm, 150 * GIB);
    let vdi = pool.disk(100 * GIB);
    let before = pool.used();
    assert!(before > 100 * GIB);
    // An empty disk's base copy gives its space back, so the first snapshot fits.
    let first = pool.snapshot(vdi);
    assert!(pool.used() < before + 64 * MIB);
    pool.storage.destroy(first).unwrap();
    // A full one needs its size again.
    let pool = Fixture::new(SrKind::Lvm, 100 * GIB);
    let vdi = pool.disk(60 * GIB);
    for block in 0..60 * 512 {
        pool.write(vdi, block * 2 * MIB, &[1; 512]);
    }
    let error = pool.storage.snapshot(vdi, Uuid::new_v4()).unwrap_err();
    assert_eq!(error, backend(44, "There is insufficient space"));
    assert_eq!(pool.storage.vdis(pool.sr).unwrap().len(), 1);
}

#[test]
fn a_full_thin_repository_refuses_new_blocks_only() {
    let pool = Fixture::new(SrKind::Ext, 9 * MIB);
    let vdi = pool.disk(GIB);
    let disk = pool.storage.disk(vdi).unwrap();
    for block in 0..4 {
        disk.write_all_at(&[1; 4096], block * 2 * MIB).unwrap();
    }
    let error = disk.write_all_at(&[1; 4096], 8 * MIB).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    disk.write_all_at(&[2; 4096], 6 * MIB).unwrap();
    pool.storage.set_foreign_use(pool.sr, 9 * MIB).unwrap();
    assert_eq!(pool.storage.snapshot(vdi, Uuid::new_v4()).unwrap_err().code, "SR_BACKEND_FAILURE_44");
}

#[test]
fn raw_volumes_hold_garbage_and_refuse_snapshots_and_cbt() {
    let pool = Fixture::new(SrKind::LvmRaw, GIB);
    let vdi = pool.disk(4 * MIB);
    let disk = pool.storage.disk(vdi).unwrap();
    let bytes = disk.read(ByteRange::up_to(4 * MIB)).unwrap();
    assert!(bytes.iter().filter(|&&byte| byte != 0).count() > 4_000_000);
    let odd = disk.read(ByteRange::new(1_000_003, 1_000_100).unwrap()).unwrap();
    assert_eq!(odd, bytes[1_000_003..1_000_100]);
    disk.zero(ByteRange::new(100, 5_000).unwrap()).unwrap();
    let now = disk.read(ByteRange::up_to(8_192)).unwrap();
    assert_eq!(now[..100], bytes[..100]);
    assert!(now[100..5_000].iter().all(|&byte| byte == 0));
    assert_eq!(now[5_000..], bytes[5_000..8_192]);
    let text = "The requested method is not supported/implemented [opterr=Raw VDI, snapshot or clone not permitted]";
    assert_eq!(pool.storage.snapshot(vdi, Uuid::new_v4()).unwrap_err(), backend(38, text));
    let text = "Invalid VDI type [opterr=Raw VDI or snapshot not permitted]";
    assert_eq!(pool.storage.enable_cbt(vdi, false).unwrap_err(), backend(66, text));
    assert_eq!(disk.allocated_blocks().unwrap().total_bytes(), 4 * MIB);
}

#[test]
fn empty_disks_of_any_size_cost_nothing() {
    let pool = Fixture::new(SrKind::Ext, 64 << 40);
    let vdi = pool.disk(2040 * GIB);
    pool.storage.enable_cbt(vdi, false).unwrap();
    let first = pool.snapshot(vdi);
    let last = 2040 * GIB - 4096;
    pool.write(vdi, last, &[9; 4096]);
    let second = pool.snapshot(vdi);
    assert_eq!(pool.changed(first, second).unwrap(), [last / 65_536]);
    let disk = pool.storage.disk(second).unwrap();
    assert_eq!(disk.allocated_blocks().unwrap().total_bytes(), 2 * MIB);
    assert_eq!(disk.written_extents().unwrap().total_bytes(), 4096);
    assert_eq!(pool.storage.disk(first).unwrap().allocated_blocks().unwrap().total_bytes(), 0);
    assert_eq!(disk.difference_blocks(&pool.storage.disk(first).unwrap()).unwrap().total_bytes(), 2 * MIB);
}

fn sparse_file(length: u64) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(length).unwrap();
    file.write_all_at(&[5; 100_000], 5 * MIB).unwrap();
    (folder, path)
}

#[test]
fn holes_of_an_imported_file_stay_unallocated() {
    let pool = Fixture::new(SrKind::Ext, 1 << 40);
    let (_folder, path) = sparse_file(100 * GIB + 5);
    let vdi = Uuid::new_v4();
    let info = pool.storage.create_vdi_from_file(pool.sr, vdi, &path).unwrap();
    assert_eq!(info.virtual_size, 100 * GIB + 2 * MIB);
    let disk = pool.storage.disk(vdi).unwrap();
    assert_eq!(disk.allocated_blocks().unwrap().runs(), [ByteRange::new(4 * MIB, 6 * MIB).unwrap()]);
    disk.write_all_at(&[6; 1_000], 5 * MIB + 50_000).unwrap();
    let mut expected = vec![5; 100_000];
    expected[50_000..51_000].fill(6);
    let range = ByteRange::with_length(5 * MIB, 100_000).unwrap();
    assert_eq!(disk.read(range).unwrap(), expected);
    // The file itself is never written, and merging keeps what it gave.
    let mut byte = [0];
    std::fs::File::open(&path).unwrap().read_exact_at(&mut byte, 5 * MIB + 50_000).unwrap();
    assert_eq!(byte, [5]);
    let snapshot = pool.snapshot(vdi);
    disk.write_all_at(&[7; 10], 5 * MIB).unwrap();
    pool.storage.destroy(snapshot).unwrap();
    expected[..10].fill(7);
    assert_eq!(disk.read(range).unwrap(), expected);
    assert_eq!(pool.storage.base_copies(pool.sr).unwrap(), []);
}

#[test]
fn a_copy_shares_nothing_and_has_no_change_log() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let raw = Uuid::new_v4();
    pool.storage.create_sr(raw, SrKind::LvmRaw, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.storage.enable_cbt(vdi, false).unwrap();
    pool.write(vdi, 3 * MIB, &[1; 5_000]);
    let original = pool.storage.disk(vdi).unwrap().read(ByteRange::up_to(8 * MIB)).unwrap();
    for sr in [pool.sr, raw] {
        let copy = Uuid::new_v4();
        assert!(!pool.storage.copy(vdi, sr, copy).unwrap().cbt_enabled);
        assert_eq!(pool.storage.disk(copy).unwrap().read(ByteRange::up_to(8 * MIB)).unwrap(), original);
        assert_eq!(pool.storage.vdi(copy).unwrap().parent, None);
    }
}

#[test]
fn the_change_log_is_marked_while_the_disk_is_written() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.storage.enable_cbt(vdi, false).unwrap();
    // A clean life.
    assert_eq!(pool.storage.attach(vdi, AttachMode::ReadWrite).unwrap(), None);
    pool.storage.detach(vdi, AttachMode::ReadWrite).unwrap();
    assert_eq!(pool.storage.attach(vdi, AttachMode::ReadWrite).unwrap(), None);
    let base = pool.snapshot(vdi);
    pool.write(vdi, 3 * 65_536 - 1, &[1; 2]);
    // The host dies, and with it the bits.
    pool.storage.crash(vdi, LostBits::SinceAttach).unwrap();
    // A read-only attach does not look at the log.
    assert_eq!(pool.storage.attach(vdi, AttachMode::ReadOnly).unwrap(), None);
    pool.storage.detach(vdi, AttachMode::ReadOnly).unwrap();
    assert_eq!(pool.changed(base, vdi).unwrap(), [0_u64; 0]);
    let message = pool.storage.attach(vdi, AttachMode::ReadWrite).unwrap().unwrap();
    assert_eq!((message.vdi, message.name), (vdi, "VDI_CBT_METADATA_INCONSISTENT"));
    assert_eq!(message.body, format!("Changed Block Tracking metadata is inconsistent for disk {vdi}."));
    assert!(!pool.storage.vdi(vdi).unwrap().cbt_enabled);
    assert!(pool.storage.vdi(base).unwrap().cbt_enabled);
    let unrelated = "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are unrelated]";
    assert_eq!(pool.changed(base, vdi), Err(backend(460, unrelated)));
}

#[test]
fn a_snapshot_after_a_crash_hides_the_loss() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.storage.enable_cbt(vdi, false).unwrap();
    pool.storage.attach(vdi, AttachMode::ReadWrite).unwrap();
    let base = pool.snapshot(vdi);
    pool.write(vdi, 0, &[1; 512]);
    pool.storage.crash(vdi, LostBits::SinceAttach).unwrap();
    let after = pool.snapshot(vdi);
    // The suspect log counts as good under its new name: this is why clients must look at crashes by themselves.
    assert_eq!(pool.changed(base, after).unwrap(), [0_u64; 0]);
    assert!(pool.storage.vdi(after).unwrap().cbt_enabled);
    // The new log of a disk that does not run starts as a good one: no message will ever tell of the crash.
    assert_eq!(pool.storage.attach(vdi, AttachMode::ReadWrite).unwrap(), None);
}

#[test]
fn enabling_on_a_running_disk_starts_marked() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.storage.attach(vdi, AttachMode::ReadWrite).unwrap();
    pool.storage.enable_cbt(vdi, false).unwrap();
    pool.storage.crash(vdi, LostBits::None).unwrap();
    assert!(pool.storage.attach(vdi, AttachMode::ReadWrite).unwrap().is_some());
}

#[test]
fn disable_and_enable_breaks_the_chain_of_the_live_disk_only() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.storage.enable_cbt(vdi, false).unwrap();
    let one = pool.snapshot(vdi);
    pool.write(vdi, 0, &[1; 512]);
    let two = pool.snapshot(vdi);
    pool.storage.disable_cbt(vdi, false).unwrap();
    pool.storage.disable_cbt(vdi, false).unwrap();
    pool.storage.enable_cbt(vdi, false).unwrap();
    pool.storage.enable_cbt(vdi, false).unwrap();
    let three = pool.snapshot(vdi);
    assert_eq!(pool.changed(one, two).unwrap(), [0]);
    assert_eq!(pool.changed(two, three).unwrap_err().code, "SR_BACKEND_FAILURE_460");
    let same = "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are same]";
    assert_eq!(pool.changed(two, two), Err(backend(460, same)));
    assert_eq!(pool.changed(two, one).unwrap_err().code, "SR_BACKEND_FAILURE_460");
}

#[test]
fn data_destroy_keeps_the_log_and_frees_the_data() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(64 * MIB);
    pool.storage.enable_cbt(vdi, false).unwrap();
    pool.write(vdi, 0, &[1; 512]);
    let one = pool.snapshot(vdi);
    pool.write(vdi, 2 * MIB, &[1; 512]);
    let two = pool.snapshot(vdi);
    let used = pool.used();
    pool.storage.data_destroy(one).unwrap();
    pool.storage.data_destroy(one).unwrap();
    assert!(pool.used() < used);
    assert!(pool.storage.vdi(one).unwrap().metadata_only);
    assert_eq!(pool.changed(one, two).unwrap(), [32]);
    assert!(pool.storage.disk(one).is_err());
    let error = pool.storage.snapshot(one, Uuid::new_v4()).unwrap_err();
    assert_eq!(error, SrError::api("VDI_INCOMPATIBLE_TYPE", &[&one.to_string(), "cbt_metadata"]));
    // Without a log it is refused.
    let plain = pool.disk(8 * MIB);
    let snapshot = pool.snapshot(plain);
    let error = pool.storage.data_destroy(snapshot).unwrap_err();
    assert_eq!(error, SrError::api("VDI_NO_CBT_METADATA", &[&snapshot.to_string()]));
    // The bits of a destroyed snapshot go to the next one.
    let three = pool.snapshot(vdi);
    pool.storage.destroy(two).unwrap();
    assert_eq!(pool.changed(one, three).unwrap(), [32]);
    let disk = pool.storage.disk(three).unwrap();
    assert_eq!(disk.read(ByteRange::with_length(2 * MIB, 1).unwrap()).unwrap(), [1][..]);
}

#[test]
fn a_chain_of_thirty_is_the_end_while_nobody_collects() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.storage.set_garbage_collection(pool.sr, false).unwrap();
    for block in 0..29 {
        pool.write(vdi, block % 4 * 2 * MIB, &[1; 512]);
        let snapshot = pool.snapshot(vdi);
        pool.storage.destroy(snapshot).unwrap();
    }
    assert_eq!(pool.storage.chain_length(vdi).unwrap(), 30);
    let error = pool.storage.snapshot(vdi, Uuid::new_v4()).unwrap_err();
    assert_eq!(error, backend(109, "The snapshot chain is too long"));
    pool.storage.set_garbage_collection(pool.sr, true).unwrap();
    assert_eq!(pool.storage.base_copies(pool.sr).unwrap(), []);
    pool.snapshot(vdi);
}

#[test]
fn a_disk_that_is_attached_is_not_destroyed_nor_one_that_grows_shrunk() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.storage.attach(vdi, AttachMode::ReadOnly).unwrap();
    assert_eq!(pool.storage.destroy(vdi), Err(backend(24, "The VDI is currently in use")));
    pool.storage.detach(vdi, AttachMode::ReadOnly).unwrap();
    let error = pool.storage.resize(vdi, 4 * MIB).unwrap_err();
    assert_eq!(error, backend(79, "VDI Invalid size [opterr=shrinking not allowed]"));
    assert_eq!(pool.storage.resize(vdi, 9 * MIB).unwrap(), (10 * MIB, None));
    let disk = pool.storage.disk(vdi).unwrap();
    assert_eq!(disk.size(), 10 * MIB);
    pool.storage.destroy(vdi).unwrap();
    pool.storage.destroy(vdi).unwrap();
    assert_eq!(disk.read(ByteRange::up_to(1)).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    assert_eq!(pool.used(), 0);
}

#[test]
fn ten_thousand_scattered_writes_mark_their_blocks_and_no_others() {
    let pool = Fixture::new(SrKind::Ext, 16 << 40);
    let vdi = pool.disk(1 << 40);
    pool.storage.enable_cbt(vdi, false).unwrap();
    let base = pool.snapshot(vdi);
    let disk = pool.storage.disk(vdi).unwrap();
    let mut blocks = std::collections::BTreeSet::new();
    for n in 0..10_000_u64 {
        let page = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % ((1 << 40) / 4096);
        disk.write_all_at(&[n as u8; 4096], page * 4096).unwrap();
        blocks.insert(page / 16);
    }
    let after = pool.snapshot(vdi);
    assert_eq!(pool.changed(base, after).unwrap(), blocks.into_iter().collect::<Vec<_>>());
    // Its data goes into the base copy below and comes back out of it.
    pool.storage.destroy(after).unwrap();
    let page = 9_999_u64.wrapping_mul(0x9e37_79b9_7f4a_7c15) % ((1 << 40) / 4096);
    let range = ByteRange::with_length(page * 4096, 4096).unwrap();
    assert_eq!(disk.read(range).unwrap(), [9_999_u64 as u8; 4096][..]);
}

#[test]
fn noise_costs_nothing_is_the_same_for_a_seed_and_can_be_read_anywhere() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let make = |seed: u64| {
        let vdi = Uuid::new_v4();
        pool.storage.create_vdi_with_noise(pool.sr, vdi, 16 * MIB, seed, 3 * MIB + 100).unwrap();
        pool.storage.disk(vdi).unwrap()
    };
    let (one, same, other) = (make(7), make(7), make(8));
    let bytes = one.read(ByteRange::up_to(16 * MIB)).unwrap();
    assert_eq!(same.read(ByteRange::up_to(16 * MIB)).unwrap(), bytes);
    assert_ne!(other.read(ByteRange::up_to(16 * MIB)).unwrap(), bytes);
    let end = (3 * MIB + 512) as usize;
    assert!(bytes[end..].iter().all(|byte| *byte == 0));
    for byte in 0..=255 {
        let count = bytes[..end].iter().filter(|known| **known == byte).count();
        assert!((11_000..14_000).contains(&count), "{byte}: {count}");
    }
    for (start, length) in [(1, 1), (65_535, 3), (1_000_003, 100_001), (end as u64 - 5, 600)] {
        let range = ByteRange::with_length(start, length).unwrap();
        assert_eq!(one.read(range).unwrap(), bytes[start as usize..(start + length) as usize]);
    }
    assert_eq!(one.allocated_blocks().unwrap().total_bytes(), 4 * MIB);
    one.write_all_at(&[1; 700], 5_000).unwrap();
    let mut expected = bytes.to_vec();
    expected[5_000..5_700].fill(1);
    assert_eq!(one.read(ByteRange::up_to(16 * MIB)).unwrap(), expected);
    assert_eq!(same.read(ByteRange::up_to(16 * MIB)).unwrap(), bytes);
}
