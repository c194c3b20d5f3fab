//! Base copies and how they go: coalesce step by step, the space that it takes, chains while it waits, thick volumes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

use uuid::Uuid;
use xenvault_block::{ByteRange, ReadAt, WriteAt};
use xenvault_sim::storage::{AttachMode, CoalesceStart, CoalesceSwitches, SrError, SrKind, Storage};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// A block of a VHD with its bitmap.
const BLOCK: u64 = 2 * MIB + 4096;

struct Fixture {
    storage: Storage,
    sr: Uuid,
}

impl Fixture {
    /// A repository whose collector only does what it is told.
    fn new(kind: SrKind, size: u64) -> Self {
        let storage = Storage::new().unwrap();
        let sr = Uuid::new_v4();
        storage.create_sr(sr, kind, size);
        storage.set_garbage_collection(sr, false).unwrap();
        Self { storage, sr }
    }

    fn disk(&self, size: u64) -> Uuid {
        let vdi = Uuid::new_v4();
        self.storage.create_vdi(self.sr, vdi, size).unwrap();
        vdi
    }

    fn snapshot(&self, vdi: Uuid) -> Uuid {
        let snapshot = Uuid::new_v4();
        self.storage.snapshot(vdi, snapshot).unwrap();
        snapshot
    }

    fn write(&self, vdi: Uuid, offset: u64, byte: u8) {
        self.storage.disk(vdi).unwrap().write_all_at(&[byte; 512], offset).unwrap();
    }

    fn bytes(&self, vdi: Uuid) -> Vec<u8> {
        let disk = self.storage.disk(vdi).unwrap();
        disk.read(ByteRange::up_to(disk.size())).unwrap().to_vec()
    }

    fn used(&self) -> u64 {
        self.storage.sr_usage(self.sr).unwrap().physical_utilisation
    }

    fn begin(&self) -> CoalesceStart {
        self.storage.begin_coalesce(self.sr, CoalesceSwitches::default()).unwrap()
    }

    fn bases(&self) -> Vec<Uuid> {
        self.storage.base_copies(self.sr).unwrap().into_iter().map(|info| info.vdi).collect()
    }

    /// Three base copies in a row below a disk, of four blocks each time, and nothing else.
    fn backlog(&self) -> Uuid {
        let vdi = self.disk(64 * MIB);
        for round in 0..3 {
            for block in 0..4 {
                self.write(vdi, (round * 4 + block) * 2 * MIB, 1 + u8::try_from(round).unwrap());
            }
            let snapshot = self.snapshot(vdi);
            self.storage.destroy(snapshot).unwrap();
        }
        vdi
    }
}

#[test]
fn base_copies_are_merged_one_by_one_and_take_space_meanwhile() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.backlog();
    let before = pool.bytes(vdi);
    assert_eq!(pool.storage.chain_length(vdi).unwrap(), 4);
    let [bottom, ..] = pool
        .storage
        .base_copies(pool.sr)
        .unwrap()
        .iter()
        .filter(|base| base.parent.is_none())
        .map(|base| base.vdi)
        .collect::<Vec<_>>()[..]
    else {
        panic!("no bottom")
    };
    for round in 0..2 {
        let used = pool.used();
        let work = pool.begin().work.unwrap();
        // The upper one's four blocks are there twice until the end.
        assert_eq!((work.leaf, work.extra_bytes), (false, 4 * BLOCK));
        assert_eq!(pool.used(), used + 4 * BLOCK);
        assert_eq!(pool.begin().work, Some(work), "one at a time");
        assert_eq!(pool.storage.chain_length(vdi).unwrap(), 4 - round);
        assert_eq!(pool.bytes(vdi), before);
        assert!(pool.storage.end_coalesce(pool.sr).unwrap());
        assert!(pool.bases().contains(&work.onto) && !pool.bases().contains(&work.vdi), "the lower name stays");
        assert_eq!(pool.storage.chain_length(vdi).unwrap(), 3 - round);
        assert!(pool.used() < used);
        assert_eq!(pool.bytes(vdi), before);
    }
    assert_eq!(pool.bases(), [bottom]);
    let work = pool.begin().work.unwrap();
    assert_eq!((work.vdi, work.onto, work.leaf), (vdi, bottom, true));
    assert!(pool.storage.end_coalesce(pool.sr).unwrap());
    assert_eq!((pool.bases(), pool.storage.chain_length(vdi).unwrap()), (vec![], 1));
    assert_eq!(pool.bytes(vdi), before);
    assert_eq!(pool.begin(), CoalesceStart::default());
    assert!(!pool.storage.end_coalesce(pool.sr).unwrap(), "nothing had begun");
}

#[test]
fn a_snapshot_taken_meanwhile_ends_the_merge_of_the_leaf_without_loss() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(16 * MIB);
    pool.write(vdi, 0, 1);
    let snapshot = pool.snapshot(vdi);
    pool.storage.destroy(snapshot).unwrap();
    pool.write(vdi, 4 * MIB, 2);
    assert!(pool.begin().work.unwrap().leaf);
    let used = pool.used();
    let later = pool.snapshot(vdi);
    pool.write(vdi, 6 * MIB, 3);
    assert!(!pool.storage.end_coalesce(pool.sr).unwrap());
    assert!(pool.used() < used + 2 * BLOCK);
    assert_eq!(pool.bytes(later)[4 << 20], 2);
    assert_eq!(pool.bytes(later)[6 << 20], 0);
    assert_eq!(pool.bytes(vdi)[6 << 20], 3);
    // What can be merged now is what lies below both.
    let work = pool.begin().work.unwrap();
    assert!(!work.leaf);
    pool.storage.abort_coalesce(pool.sr).unwrap();
    assert!(!pool.storage.end_coalesce(pool.sr).unwrap());
    pool.storage.coalesce_all(pool.sr).unwrap();
    assert_eq!(pool.storage.chain_length(vdi).unwrap(), 2);
}

#[test]
fn a_repository_without_room_keeps_its_chains_until_there_is_some() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.backlog();
    // The disk's own layer: one without data could always be merged.
    for block in 12..17 {
        pool.write(vdi, block * 2 * MIB, 9);
    }
    let free = GIB - pool.used();
    pool.storage.set_foreign_use(pool.sr, free - 4 * BLOCK + 1).unwrap();
    let start = pool.begin();
    assert_eq!((start.work, start.no_space.len()), (None, 3));
    assert_eq!(pool.storage.chain_length(vdi).unwrap(), 4);
    pool.storage.set_foreign_use(pool.sr, free - 4 * BLOCK).unwrap();
    assert!(pool.begin().work.is_some());
    // The space is really taken: nothing else gets it.
    let error = pool.storage.create_vdi(pool.sr, Uuid::new_v4(), 2 * MIB).unwrap_err();
    assert_eq!(error.code, "SR_BACKEND_FAILURE_44");
}

#[test]
fn an_unwritten_disk_gets_no_deeper_by_snapshots() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    let first = pool.snapshot(vdi);
    let bases = pool.bases();
    for _ in 0..40 {
        let next = pool.snapshot(vdi);
        assert_eq!(pool.storage.vdi(next).unwrap().parent, Some(bases[0]));
    }
    assert_eq!((pool.bases(), pool.storage.chain_length(vdi).unwrap()), (bases, 2));
    pool.write(vdi, 0, 1);
    pool.snapshot(vdi);
    assert_eq!(pool.storage.chain_length(vdi).unwrap(), 3);
    assert_eq!(pool.bytes(first)[0], 0);
}

#[test]
fn base_copies_are_no_disks() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    let vdi = pool.disk(8 * MIB);
    pool.snapshot(vdi);
    let base = pool.bases()[0];
    let refused = |error: SrError| (error.code, error.params[1].clone());
    let hidden = "[opterr=hidden VDI]";
    let (code, text) = refused(pool.storage.snapshot(base, Uuid::new_v4()).unwrap_err());
    assert_eq!((code.as_str(), text), ("SR_BACKEND_FAILURE_82", format!("Failed to snapshot VDI {hidden}")));
    let (code, text) = refused(pool.storage.clone_vdi(base, Uuid::new_v4()).unwrap_err());
    assert_eq!((code.as_str(), text), ("SR_BACKEND_FAILURE_81", format!("Failed to clone VDI {hidden}")));
    assert_eq!(pool.storage.destroy(base).unwrap_err().code, "SR_BACKEND_FAILURE_80");
    assert_eq!(pool.bases(), [base]);
}

#[test]
fn chains_that_move_are_told_once() {
    let pool = Fixture::new(SrKind::Ext, GIB);
    pool.snapshot(pool.disk(8 * MIB));
    assert_eq!(pool.storage.take_chain_changes(), [], "nobody watched");
    pool.storage.watch_chains();
    let vdi = pool.backlog();
    pool.storage.take_chain_changes();
    let work = pool.begin().work.unwrap();
    pool.storage.end_coalesce(pool.sr).unwrap();
    let changes = pool.storage.take_chain_changes();
    let of = |name: Uuid| changes.iter().find(|change| change.vdi == name).expect("is told");
    assert_eq!(of(work.vdi).now, None);
    assert!(of(work.onto).hidden);
    for change in changes.iter().filter(|change| change.vdi != work.onto && change.vdi != work.vdi) {
        assert_eq!(change.now.unwrap().parent, Some(work.onto));
    }
    assert_eq!(pool.storage.take_chain_changes(), []);
    pool.storage.coalesce_all(pool.sr).unwrap();
    let changes = pool.storage.take_chain_changes();
    let disk = changes.iter().find(|change| change.vdi == vdi).unwrap();
    assert_eq!((disk.now.unwrap().parent, disk.hidden), (None, false));
}

#[test]
fn a_merge_on_thick_volumes_needs_room_for_what_the_lower_one_will_hold() {
    let pool = Fixture::new(SrKind::Lvm, 100 * GIB);
    let vdi = pool.disk(GIB);
    for block in 0..64 {
        pool.write(vdi, block * 2 * MIB, 1);
    }
    let snapshot = pool.snapshot(vdi);
    for block in 0..64 {
        pool.write(vdi, GIB / 2 + block * 2 * MIB, 2);
    }
    pool.storage.destroy(snapshot).unwrap();
    let used = pool.used();
    let work = pool.begin().work.unwrap();
    // Over 20 MiB: the disk is frozen first, so its data is there three times, and the leaf stays full all the while.
    assert!(work.leaf && work.extra_bytes > 2 * 64 * BLOCK && work.extra_bytes < 2 * 64 * BLOCK + 16 * MIB, "{work:?}");
    assert_eq!(pool.used(), used + work.extra_bytes);
    pool.storage.end_coalesce(pool.sr).unwrap();
    let full = pool.storage.vdi(vdi).unwrap().physical_utilisation;
    assert_eq!(pool.used(), full);
    assert!(full > GIB && full < GIB + 16 * MIB);
}

#[test]
fn a_snapshot_of_thick_volumes_is_inflated_while_it_is_written_to() {
    let pool = Fixture::new(SrKind::Lvm, 4 * GIB);
    let vdi = pool.disk(GIB);
    let snapshot = pool.snapshot(vdi);
    let used = pool.used();
    let small = pool.storage.vdi(snapshot).unwrap().physical_utilisation;
    assert!(small < 16 * MIB);
    pool.storage.attach(snapshot, AttachMode::ReadOnly).unwrap();
    assert_eq!(pool.used(), used);
    pool.storage.detach(snapshot, AttachMode::ReadOnly).unwrap();
    pool.storage.attach(snapshot, AttachMode::ReadWrite).unwrap();
    assert!(pool.used() > used + GIB - small);
    pool.storage.detach(snapshot, AttachMode::ReadWrite).unwrap();
    assert_eq!(pool.used(), used);
    pool.storage.set_foreign_use(pool.sr, 4 * GIB - used - 512 * MIB).unwrap();
    let error = pool.storage.attach(snapshot, AttachMode::ReadWrite).unwrap_err();
    assert_eq!(error.code, "SR_BACKEND_FAILURE_180");
    assert!(error.params[1].starts_with("Volume Group out of space. The SR is over-provisioned"));
    assert_eq!(pool.storage.detach(snapshot, AttachMode::ReadWrite), Ok(()));
}
