//! Any order of writes, snapshots, clones, grows and deletes gives what plain copies of the bytes give, and change
//! logs that name at least, and in whole 64 KiB blocks exactly, what was written.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test that meets the unexpected has failed"
)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use uuid::Uuid;
use xenvault_block::{ByteRange, CBT_BLOCK_BYTES, ReadAt, WriteAt};
use xenvault_sim::storage::{AttachMode, SrKind, Storage};

const SIZE: u64 = 8 << 20;

#[derive(Clone, Debug)]
enum Step {
    Write { disk: usize, offset: u64, length: u64, byte: u8 },
    Zero { disk: usize, offset: u64, length: u64 },
    Snapshot { disk: usize },
    Clone { disk: usize },
    Grow { disk: usize },
    Destroy { disk: usize },
    Collect { on: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let place = (0..SIZE, 1_u64..300_000);
    let near = (0..16_u64, 0..4_u64, 1_u64..2_000)
        .prop_map(|(block, sector, length)| (block * CBT_BLOCK_BYTES + sector * 512, length));
    let place = prop_oneof![place, near];
    prop_oneof![
        6 => (0..8_usize, place.clone(), any::<u8>())
            .prop_map(|(disk, (offset, length), byte)| Step::Write { disk, offset, length, byte }),
        2 => (0..8_usize, place).prop_map(|(disk, (offset, length))| Step::Zero { disk, offset, length }),
        3 => (0..8_usize).prop_map(|disk| Step::Snapshot { disk }),
        1 => (0..8_usize).prop_map(|disk| Step::Clone { disk }),
        1 => (0..8_usize).prop_map(|disk| Step::Grow { disk }),
        2 => (0..8_usize).prop_map(|disk| Step::Destroy { disk }),
        1 => any::<bool>().prop_map(|on| Step::Collect { on }),
    ]
}

/// A disk as plain bytes, with the blocks written since its last snapshot and the snapshots before, oldest first.
#[derive(Clone)]
struct Plain {
    bytes: Vec<u8>,
    changed: BTreeSet<u64>,
    history: Vec<(Uuid, BTreeSet<u64>)>,
    tracked: bool,
}

fn run(kind: SrKind, steps: &[Step]) {
    let storage = Storage::new().unwrap();
    let sr = Uuid::new_v4();
    storage.create_sr(sr, kind, 1 << 40);
    let first = Uuid::new_v4();
    storage.create_vdi(sr, first, SIZE).unwrap();
    storage.enable_cbt(first, false).unwrap();
    storage.attach(first, AttachMode::ReadWrite).unwrap();
    let plain = Plain { bytes: vec![0; SIZE as usize], changed: BTreeSet::new(), history: vec![], tracked: true };
    let mut disks: BTreeMap<Uuid, Plain> = BTreeMap::from([(first, plain)]);
    let mut order = vec![first];

    for step in steps {
        let pick = |disk: &usize| order[disk % order.len()];
        // Who writes to, grows or snapshots a snapshot changes the chain of logs that it stands in, on a real server
        // too. The logs are not compared from then on.
        if let Step::Write { disk, .. } | Step::Zero { disk, .. } | Step::Snapshot { disk } | Step::Grow { disk } = step
        {
            let live = disks.get_mut(&first).unwrap();
            if live.history.iter().any(|(snapshot, _)| *snapshot == pick(disk)) {
                live.tracked = false;
            }
        }
        match step {
            Step::Write { disk, offset, length, byte } => {
                let (vdi, data) = (pick(disk), vec![*byte; *length as usize]);
                write(&storage, vdi, disks.get_mut(&vdi).unwrap(), *offset, &data, false);
            }
            Step::Zero { disk, offset, length } => {
                let (vdi, data) = (pick(disk), vec![0; *length as usize]);
                write(&storage, vdi, disks.get_mut(&vdi).unwrap(), *offset, &data, true);
            }
            Step::Snapshot { disk } => {
                let (vdi, new) = (pick(disk), Uuid::new_v4());
                if storage.snapshot(vdi, new).is_err() {
                    continue;
                }
                let source = disks.get_mut(&vdi).unwrap();
                let changed = std::mem::take(&mut source.changed);
                let copy =
                    Plain { bytes: source.bytes.clone(), changed: BTreeSet::new(), history: vec![], tracked: false };
                if source.tracked {
                    source.history.push((new, changed));
                }
                disks.insert(new, copy);
                order.push(new);
            }
            Step::Clone { disk } => {
                let (vdi, new) = (pick(disk), Uuid::new_v4());
                if storage.clone_vdi(vdi, new).is_err() {
                    continue;
                }
                let copy = Plain { changed: BTreeSet::new(), history: vec![], tracked: false, ..disks[&vdi].clone() };
                disks.insert(new, copy);
                order.push(new);
            }
            Step::Grow { disk } => {
                // A snapshot that outgrew its successor keeps its log for ever when it is destroyed: not looked at here.
                let vdi = pick(disk);
                if vdi != first {
                    continue;
                }
                let plain = disks.get_mut(&vdi).unwrap();
                let (size, message) = storage.resize(vdi, plain.bytes.len() as u64 + (2 << 20)).unwrap();
                assert_eq!(message, None);
                plain.bytes.resize(size as usize, 0);
            }
            Step::Destroy { disk } => {
                let vdi = pick(disk);
                if vdi == first {
                    continue;
                }
                storage.destroy(vdi).unwrap();
                disks.remove(&vdi);
                order.retain(|other| *other != vdi);
                // The bits of a destroyed snapshot go to its successor.
                let plain = disks.get_mut(&first).unwrap();
                if let Some(at) = plain.history.iter().position(|(name, _)| *name == vdi) {
                    let (_, bits) = plain.history.remove(at);
                    match plain.history.get_mut(at) {
                        Some((_, next)) => next.extend(bits),
                        None => plain.changed.extend(bits),
                    }
                }
            }
            Step::Collect { on } => storage.set_garbage_collection(sr, *on).unwrap(),
        }
    }
    check(&storage, &disks, first);
    storage.set_garbage_collection(sr, true).unwrap();
    check(&storage, &disks, first);
    for vdi in order {
        storage.detach(vdi, AttachMode::ReadWrite).unwrap();
        storage.destroy(vdi).unwrap();
    }
    assert_eq!(storage.base_copies(sr).unwrap(), []);
    assert_eq!(storage.sr_usage(sr).unwrap().physical_utilisation, 0);
}

fn write(storage: &Storage, vdi: Uuid, plain: &mut Plain, offset: u64, data: &[u8], zero: bool) {
    let disk = storage.disk(vdi).unwrap();
    let end = offset + data.len() as u64;
    let done = if zero { disk.zero(ByteRange::new(offset, end).unwrap()) } else { disk.write_all_at(data, offset) };
    if end > plain.bytes.len() as u64 {
        assert_eq!(done.unwrap_err().kind(), std::io::ErrorKind::WriteZero);
        // What was done before the end was seen is not looked at: a write that fails may have happened in part.
        let now = disk.read(ByteRange::up_to(plain.bytes.len() as u64)).unwrap();
        plain.bytes.copy_from_slice(&now);
        let touched = plain.bytes.len() as u64;
        plain.changed.extend(offset / CBT_BLOCK_BYTES..touched.div_ceil(CBT_BLOCK_BYTES));
        plain.tracked = false;
        return;
    }
    done.unwrap();
    plain.bytes[offset as usize..end as usize].copy_from_slice(data);
    plain.changed.extend(offset / CBT_BLOCK_BYTES..=(end - 1) / CBT_BLOCK_BYTES);
}

fn check(storage: &Storage, disks: &BTreeMap<Uuid, Plain>, first: Uuid) {
    for (vdi, plain) in disks {
        let disk = storage.disk(*vdi).unwrap();
        assert_eq!(disk.size(), plain.bytes.len() as u64);
        let bytes = disk.read(ByteRange::up_to(disk.size())).unwrap();
        assert!(bytes == plain.bytes, "disk {vdi} differs");
        let written = disk.written_extents().unwrap();
        let allocated = disk.allocated_blocks().unwrap();
        assert_eq!(written.intersection(&allocated), written);
        for hole in written.complement(disk.size()).runs() {
            assert!(plain.bytes[hole.start() as usize..hole.end() as usize].iter().all(|&byte| byte == 0));
        }
    }
    let live = &disks[&first];
    if !live.tracked {
        return;
    }
    // From every snapshot to the live disk.
    let mut expected = live.changed.clone();
    for (snapshot, own) in live.history.iter().rev() {
        let bitmap = storage.list_changed_blocks(*snapshot, first).unwrap();
        let found: BTreeSet<u64> =
            (0..bitmap.len() as u64 * 8).filter(|n| bitmap[(n / 8) as usize] & (0x80 >> (n % 8)) != 0).collect();
        assert_eq!(found, expected);
        expected.extend(own);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_equal_plain_copies_on_vhd(steps in proptest::collection::vec(step(), 0..40)) {
        run(SrKind::Ext, &steps);
    }

    #[test]
    fn layers_equal_plain_copies_on_thick_volumes(steps in proptest::collection::vec(step(), 0..40)) {
        run(SrKind::Lvm, &steps);
    }
}
