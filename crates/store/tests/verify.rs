//! Verification finds what is wrong, names whom it hurts, and marks it so that backups heal it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{
    back_up, local, manifest, noise, objects, read_disk, small_packs, times, write_changes, write_disk, writer,
};
use xenvault_block::ByteRange;
use xenvault_store::{
    DamageKind, DiskMapRef, DiskOptions, PointId, PointManifest, Repository, SweepOptions, VerifyMode, VerifyOptions,
    VerifyReport,
};

async fn verify_as(repository: &Repository, path: &Path, mode: VerifyMode, write: bool) -> VerifyReport {
    let mut options = VerifyOptions::default();
    (options.mode, options.write) = (mode, write);
    repository.reopen_on(local(path)).unwrap().verify(options).await.unwrap()
}

async fn full(repository: &Repository, path: &Path) -> VerifyReport {
    verify_as(repository, path, VerifyMode::Full, false).await
}

/// A repository with three points of two VMs, a sweep behind it, and something of every kind of object.
struct Stage {
    folder: common::Place,
    repository: Repository,
    points: Vec<(PointId, DiskMapRef, Vec<u8>)>,
}

impl Stage {
    async fn set() -> Self {
        let folder = common::tempdir();
        let repository = small_packs(folder.path()).await;
        let shared = noise(1, 400_000);
        let mut points = Vec::new();
        let (going, _) = back_up(&repository, &noise(99, 300_000)).await;
        for seed in 0..2 {
            let content = [shared.clone(), noise(10 + seed, 300_000)].concat();
            let (id, map) = back_up(&repository, &content).await;
            points.push((id, map, content));
        }
        repository.forget(&[going], "expired").await.unwrap();
        let mut options = SweepOptions::default();
        (options.grace, options.confirm_many) = (Duration::ZERO, true);
        repository.sweep(options.clone()).await.unwrap();
        repository.sweep(options).await.unwrap();
        let content = [noise(20, 500_000), shared].concat();
        let run = writer(&repository).await;
        let map = write_disk(&run, &content).await.map;
        let config = run.put_blob(b"another").await.unwrap();
        let other = PointManifest { vm_uuid: "other-vm".to_owned(), ..manifest(&[map], config) };
        points.push((run.publish(other).await.unwrap(), map, content));
        let stage = Self { folder, repository, points };
        let clean = full(&stage.repository, stage.folder.path()).await;
        assert!(clean.is_clean() && clean.unconfirmed.is_empty(), "{clean:?}");
        assert_eq!((clean.share, clean.points), (10_000, 3));
        stage
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Points that do not come back whole, by trying; every byte that comes is compared.
    async fn really_hurt(&self, what: &str) -> BTreeSet<PointId> {
        let mut hurt = BTreeSet::new();
        let repository = self.repository.reopen_on(local(self.path())).unwrap();
        for (id, map, content) in &self.points {
            let Ok(point) = repository.point(id).await else {
                hurt.insert(*id);
                continue;
            };
            assert_eq!(point.disks[0].map, *map, "{what}");
            if repository.blob(&point.vm_config).await.is_err() {
                hurt.insert(*id);
            }
            for range in ByteRange::up_to(map.virtual_size).pieces(64 * 1024) {
                let at = usize::try_from(range.start()).unwrap();
                match repository.disk(map).read_at(range).await {
                    Ok(bytes) => assert!(bytes[..] == content[at..at + bytes.len()], "wrong bytes: {what}"),
                    Err(_) => {
                        hurt.insert(*id);
                    }
                }
            }
        }
        hurt
    }
}

/// One thing that happens to a file.
enum Damage {
    Flip(u64),
    Truncate(u64),
    Delete,
}

struct Dice(u64);

impl Dice {
    fn next(&mut self, below: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % below.max(1)
    }
}

/// Objects whose loss nobody can notice from the rest of the repository, and that no restore depends on: the end of the
/// newest sweep (without it the sweep is only carried out once more), tombstones (without it a point is as before it was
/// forgotten), and what verifications left for people.
fn loss_is_silent(path: &Path, root: &Path) -> bool {
    let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
    let newest = objects(root, "sweeps").iter().filter(|path| path.ends_with("intent")).count();
    let silent = ["records/verifications/", "records/tombstones/"].iter().any(|folder| name.starts_with(folder));
    silent || name == format!("sweeps/{newest}/end")
}

fn choose(dice: &mut Dice, root: &Path) -> (PathBuf, Damage) {
    let files: Vec<PathBuf> =
        objects(root, "").into_iter().filter(|path| !path.starts_with(root.join("tmp"))).collect();
    loop {
        let at = usize::try_from(dice.next(files.len() as u64)).unwrap();
        let length = common::fs::length(&files[at]).unwrap();
        let damage = match dice.next(3) {
            0 => Damage::Flip(dice.next(length * 8)),
            1 => Damage::Truncate(dice.next(length)),
            _ if loss_is_silent(&files[at], root) => continue,
            _ => Damage::Delete,
        };
        return (files[at].clone(), damage);
    }
}

/// Damages a file, calls `check` with a description, and heals it.
async fn with_damage(path: &Path, damage: &Damage, check: impl AsyncFnOnce(String)) {
    let healthy = common::fs::read(path).unwrap();
    let what = match damage {
        Damage::Flip(bit) => {
            let mut hurt = healthy.clone();
            hurt[usize::try_from(bit / 8).unwrap()] ^= 1 << (bit % 8);
            common::fs::write(path, hurt).unwrap();
            format!("bit {bit} of {} flipped", path.display())
        }
        Damage::Truncate(length) => {
            common::fs::write(path, &healthy[..usize::try_from(*length).unwrap()]).unwrap();
            format!("{} cut at {length}", path.display())
        }
        Damage::Delete => {
            common::fs::remove_file(path).unwrap();
            format!("{} removed", path.display())
        }
    };
    check(what).await;
    common::fs::write(path, healthy).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_a_thousand_damages_is_found_and_names_exactly_the_points_that_it_hurts() {
    let stage = Stage::set().await;
    let seed = std::env::var("XENVAULT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(4);
    let mut dice = Dice(seed);
    let (mut hurting, mut by_kind) = (0, std::collections::BTreeMap::<String, u32>::new());
    let rounds = times(1000);
    for round in 0..rounds {
        let (path, damage) = choose(&mut dice, stage.path());
        with_damage(&path, &damage, async |what| {
            let what = format!("seed {seed}, round {round}: {what}");
            let report = full(&stage.repository, stage.path()).await;
            assert!(!report.is_clean() || !report.unconfirmed.is_empty(), "not found: {what}");
            let told: BTreeSet<PointId> = report.hurt.iter().filter_map(|point| point.id).collect();
            assert_eq!(told, stage.really_hurt(&what).await, "{what}: {report:?}");
            hurting += u32::from(!told.is_empty());
            for damage in &report.damage {
                *by_kind.entry(format!("{:?}", damage.kind)).or_default() += 1;
            }
        })
        .await;
    }
    assert!(full(&stage.repository, stage.path()).await.is_clean(), "the test has healed everything");
    assert!(u64::from(hurting) > rounds / 5, "{hurting}");
    let of_kind = |kind: &str| u64::from(by_kind[kind]);
    assert!(of_kind("Damaged") > rounds / 5 && of_kind("Missing") > rounds / 10, "{by_kind:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn swapped_and_duplicated_objects_are_found() {
    let stage = Stage::set().await;
    for folder in ["packs", "points", "records/receipts"] {
        let files = objects(stage.path(), folder);
        let (one, other) = (common::fs::read(&files[0]).unwrap(), common::fs::read(&files[1]).unwrap());
        common::fs::write(&files[0], &other).unwrap();
        common::fs::write(&files[1], &one).unwrap();
        let report = full(&stage.repository, stage.path()).await;
        assert!(report.damage.len() >= 2, "{folder}: {report:?}");
        if folder != "records/receipts" {
            let told: BTreeSet<PointId> = report.hurt.iter().filter_map(|point| point.id).collect();
            assert_eq!(told, stage.really_hurt(folder).await, "{folder}: {report:?}");
        }
        common::fs::write(&files[0], &one).unwrap();
        common::fs::write(&files[1], &other).unwrap();

        let copy = files[0].with_file_name("0f".repeat(16));
        common::fs::copy(&files[0], &copy).unwrap();
        let report = full(&stage.repository, stage.path()).await;
        assert_eq!(report.damage.len(), 1, "{folder}: {report:?}");
        assert!(copy.ends_with(Path::new(&report.damage[0].object).file_name().unwrap()), "{report:?}");
        assert!(report.hurt.iter().all(|point| folder == "points" && point.unreadable), "{report:?}");
        common::fs::remove_file(copy).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ranges_of_disks_that_are_hurt_are_told() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    // Two disks with the same data at other places, one of them far behind.
    let data = noise(2, 200_000);
    let run = writer(&repository).await;
    let map = write_disk(&run, &data).await.map;
    let far = 5 << 30;
    let mut disk = run.disk(DiskOptions { virtual_size: far + (1 << 20), base: None }).await.unwrap();
    disk.write(0, noise(3, 4096).into()).await.unwrap();
    disk.write(far, data.into()).await.unwrap();
    let second = disk.finish().await.unwrap().map;
    let config = run.put_blob(b"{}").await.unwrap();
    run.flush().await.unwrap();
    let id = run.publish(manifest(&[map, second], config)).await.unwrap();

    let pack = &objects(folder.path(), "packs")[0];
    let healthy = common::fs::read(pack).unwrap();
    let mut hurt = healthy.clone();
    let middle = hurt.len() / 2;
    hurt[middle] ^= 4;
    common::fs::write(pack, &hurt).unwrap();
    let report = full(&repository, folder.path()).await;
    assert_eq!((report.damage.len(), report.damage[0].kind), (1, DamageKind::Damaged));
    assert_eq!(report.hurt.len(), 1);
    let point = &report.hurt[0];
    assert_eq!((point.id, point.vm_name.as_str()), (Some(id), "vm"));
    let fresh = repository.reopen_on(local(folder.path())).unwrap();
    for disk in &point.disks {
        assert!(disk.bytes > 0 && disk.ranges.iter().map(|range| range.len()).sum::<u64>() == disk.bytes);
        let map = if disk.device == "0" { &map } else { &second };
        for range in &disk.ranges {
            let piece = ByteRange::with_length(range.start(), range.len().min(4096)).unwrap();
            assert!(fresh.disk(map).read_at(piece).await.is_err(), "{range}");
        }
        let before = ByteRange::new(0, disk.ranges[0].start()).unwrap();
        if before.len() < 1 << 20 {
            assert!(fresh.disk(map).read_at(before).await.is_ok());
        }
    }
    common::fs::write(pack, healthy).unwrap();
    // Nothing of this is seen by a look at the frames, and a sample sees what it happens to read.
    assert!(verify_as(&repository, folder.path(), VerifyMode::Quick, false).await.is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quick_look_finds_what_is_missing_and_a_sample_reads_its_share() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (id, _) = back_up(&repository, &noise(4, 6 << 20)).await;
    let packs = objects(folder.path(), "packs");
    let sample = |percent, seed| VerifyMode::Sample { percent, seed };
    let half = verify_as(&repository, folder.path(), sample(50, 1), false).await;
    assert!(half.packs > 3 && half.packs < packs.len() as u64 - 3, "{half:?}");
    assert_eq!(half.share, 5000);
    assert_eq!(verify_as(&repository, folder.path(), sample(100, 1), false).await.packs, packs.len() as u64);
    assert_eq!(verify_as(&repository, folder.path(), sample(0, 1), false).await.packs, 0);
    let bytes = common::fs::read(&packs[2]).unwrap();
    for hurt in [&bytes[..bytes.len() - 1], &bytes[..bytes.len() / 3], &[]] {
        common::fs::write(&packs[2], hurt).unwrap();
        let report = verify_as(&repository, folder.path(), VerifyMode::Quick, false).await;
        assert_eq!(report.damage.len(), 1, "{report:?}");
        // A pack whose end is hurt is looked into: what can still be read hurts nobody.
        assert_eq!(report.hurt.is_empty(), hurt.len() == bytes.len() - 1, "{report:?}");
    }
    common::fs::remove_file(&packs[2]).unwrap();
    let report = verify_as(&repository, folder.path(), VerifyMode::Quick, false).await;
    assert_eq!((report.damage[0].kind, report.hurt[0].id), (DamageKind::Missing, Some(id)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_marked_is_stored_again_and_old_points_are_whole_again() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(5, 2 << 20);
    let (id, map) = back_up(&repository, &content).await;
    // One of content: those are the larger ones.
    let packs = objects(folder.path(), "packs");
    let pack = packs.iter().max_by_key(|path| common::fs::length(path).unwrap()).unwrap();
    let mut bytes = common::fs::read(pack).unwrap();
    let end = bytes.len() / 2;
    bytes[200..end].iter_mut().for_each(|byte| *byte ^= 0x55);
    common::fs::write(pack, bytes).unwrap();
    let report = verify_as(&repository, folder.path(), VerifyMode::Full, true).await;
    assert_eq!(report.hurt[0].id, Some(id));
    assert!(report.marked_copies > 0);
    assert_eq!(objects(folder.path(), "records/damage").len(), 1);
    // What is known is not marked again.
    assert_eq!(verify_as(&repository, folder.path(), VerifyMode::Full, true).await.marked_copies, 0);
    assert_eq!(objects(folder.path(), "records/damage").len(), 1);

    // An incremental would take over what is hurt: it fails, and a full heals.
    let run = writer(&repository).await;
    let over = run.disk(DiskOptions { virtual_size: 2 << 20, base: Some(map) }).await;
    let failed = match over {
        Err(_) => true,
        Ok(disk) => disk.finish().await.is_err(),
    };
    assert!(failed);
    let (_, again) = back_up(&repository, &content).await;
    assert_eq!(again, map);
    assert!(read_disk(&repository.reopen_on(local(folder.path())).unwrap(), &map).await == content);
    let report = full(&repository, folder.path()).await;
    assert!(report.hurt.is_empty() && report.damage.len() == 1, "{report:?}");
    write_changes(&writer(&repository).await, 2 << 20, map, &[(0, noise(6, 100))]).await;

    // The next sweeps take the damaged copies away, and with the pack the mark.
    let mut options = SweepOptions::default();
    (options.grace, options.rewrite_below_percent) = (Duration::ZERO, 100);
    for _ in 0..3 {
        repository.sweep(options.clone()).await.unwrap();
    }
    assert!(!common::fs::exists(pack));
    assert!(objects(folder.path(), "records/damage").is_empty());
    assert!(full(&repository, folder.path()).await.is_clean());
    assert!(read_disk(&repository.reopen_on(local(folder.path())).unwrap(), &map).await == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_writes_lost_index_segments_and_receipts_again() {
    let stage = Stage::set().await;
    let segments = objects(stage.path(), "index");
    common::fs::remove_file(&segments[0]).unwrap();
    let mut bytes = common::fs::read(&segments[1]).unwrap();
    bytes[50] ^= 1;
    common::fs::write(&segments[1], bytes).unwrap();
    let receipt = stage.path().join(format!("records/receipts/{}", stage.points[0].0));
    common::fs::write(&receipt, "half").unwrap();
    let report = full(&stage.repository, stage.path()).await;
    assert!(!report.is_clean() && report.hurt.is_empty(), "{report:?}");
    let report = stage.repository.reopen_on(local(stage.path())).unwrap().repair().await.unwrap();
    assert!(report.index_bytes > 0 && report.removed_segments.len() == 1, "{report:?}");
    assert_eq!(report.confirmed, [stage.points[0].0]);
    let report = full(&stage.repository, stage.path()).await;
    assert!(report.is_clean() && report.unconfirmed.is_empty(), "{report:?}");
    assert!(stage.really_hurt("after the repair").await.is_empty());
    assert_eq!(stage.repository.reopen_on(local(stage.path())).unwrap().repair().await.unwrap(), Default::default());
}
