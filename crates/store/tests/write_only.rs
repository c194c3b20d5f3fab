//! A key that only writes: it backs up and keeps house, and reads no content; who has the full key reads everything.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::path::Path;

use bytes::Bytes;
use common::{BLOCK, manifest, noise, objects, passphrase, read_disk, write_disk, writer};
use proptest::prelude::*;
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store::{
    DiskMapRef, DiskOptions, DiskResult, InitOptions, KdfParams, KeyAccess, NewKey, PointManifest, Repository, Secret,
    StoreError, SweepOptions, VerifyMode, VerifyOptions,
};

/// What one page of the map covers.
const LEAF: usize = 16 << 20;
const WRITER: &str = "the writer's passphrase";

/// A repository of small packs, opened with everything and for writing only.
async fn both(path: &Path) -> (Repository, Repository) {
    let mut options = InitOptions::default();
    options.pack_target_bytes = 256 * 1024;
    let full = Repository::init(path, &passphrase(), options).await.unwrap();
    let key = NewKey::Passphrase(Secret::new(WRITER), KdfParams::default());
    full.add_key(&key, KeyAccess::WriteOnly, "datamover").await.unwrap();
    let writing = Repository::open(path, &Secret::new(WRITER)).await.unwrap();
    assert_eq!((full.access(), writing.access()), (KeyAccess::Full, KeyAccess::WriteOnly));
    (full, writing)
}

/// Writes `now` over a base, reading of it what has changed and what cutting needs, as a backup does.
async fn write_incremental(
    repository: &Repository,
    base: DiskMapRef,
    now: &[u8],
    changed: &ExtentSet,
) -> Result<DiskResult, StoreError> {
    let wanted = repository.ranges_to_cut(&base, now.len() as u64, changed).await?;
    let writer = writer(repository).await;
    let mut disk = writer.disk(DiskOptions { virtual_size: now.len() as u64, base: Some(base) }).await?;
    for run in wanted.runs() {
        let (from, to) = (usize::try_from(run.start()).unwrap(), usize::try_from(run.end()).unwrap());
        disk.write(run.start(), Bytes::copy_from_slice(&now[from..to])).await?;
    }
    let result = disk.finish().await?;
    let config = writer.put_blob(b"{}").await?;
    writer.publish(manifest(&[result.map], config)).await?;
    Ok(result)
}

fn extents(ranges: &[(usize, usize)]) -> ExtentSet {
    let mut set = ExtentSet::new();
    for &(from, to) in ranges {
        set.insert(ByteRange::new(from as u64, to as u64).unwrap());
    }
    set
}

fn is_write_only(error: &StoreError) -> bool {
    match error {
        StoreError::WriteOnly { .. } => true,
        StoreError::DiskRange { source, .. } => is_write_only(source),
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_backs_up_and_can_not_read_it_back_and_the_full_key_can() {
    let folder = tempfile::tempdir().unwrap();
    let (full, writing) = both(folder.path()).await;
    let before = objects(folder.path(), "packs");
    let mut content = noise(1, 1 << 20);
    let run = writer(&writing).await;
    let first = write_disk(&run, &content).await.map;
    // Longer than one piece, so that there is a list of pieces.
    let blob = run.put_blob(&noise(7, 3 << 20)).await.unwrap();
    let point = PointManifest { vm_config: blob, ..manifest(&[first], blob) };
    run.publish(point).await.unwrap();
    content[500_000..500_100].fill(9);
    let second = write_incremental(&writing, first, &content, &extents(&[(500_000, 500_100)])).await.unwrap();
    assert_eq!(second.stats.base_bytes, 0);
    assert!(second.stats.read_bytes < 300_000, "{:?}", second.stats);

    // Its packs of content are under keys of their own (the salt ends the header but for a checksum).
    let mut kinds = [0; 4];
    for path in objects(folder.path(), "packs").into_iter().filter(|path| !before.contains(path)) {
        kinds[usize::from(std::fs::read(path).unwrap()[59] >> 6)] += 1;
    }
    assert!(kinds[0] + kinds[1] > 3 && kinds[2] == 0 && kinds[3] > 0, "{kinds:?}");

    for map in [first, second.map] {
        let error = writing.disk(&map).read_at(ByteRange::up_to(4096)).await.unwrap_err();
        assert!(is_write_only(&error), "{error}");
        assert_eq!(writing.disk(&map).extents(ByteRange::up_to(1 << 20)).await.unwrap().total_bytes(), 1 << 20);
    }
    assert!(is_write_only(&writing.blob(&blob).await.unwrap_err()));
    for wrong in [
        writing.sweep(SweepOptions::default()).await.map(drop).unwrap_err(),
        writing.verify(of(VerifyMode::Full)).await.map(drop).unwrap_err(),
        writing.verify(of(VerifyMode::Sample { percent: 1, seed: 1 })).await.map(drop).unwrap_err(),
        writing.remove_keys(&["1".to_owned()]).await.map(drop).unwrap_err(),
        writing.change_key(&NewKey::Passphrase(Secret::new("x"), KdfParams::default())).await.map(drop).unwrap_err(),
    ] {
        assert!(is_write_only(&wrong), "{wrong}");
    }

    // It knows its way around all the same.
    let listed = writing.points(&Default::default()).await.unwrap();
    assert_eq!((listed.points.len(), listed.damaged.len()), (2, 0));
    assert!(writing.verify(of(VerifyMode::Quick)).await.unwrap().is_clean());
    assert!(writing.sweep(dry()).await.is_ok());
    std::fs::remove_dir_all(folder.path().join("index")).unwrap();
    assert!(writing.repair().await.unwrap().index_bytes > 0);
    let again = Repository::open(folder.path(), &Secret::new(WRITER)).await.unwrap();
    let same = write_disk(&writer(&again).await, &content).await;
    assert_eq!((same.map, same.stats.new_bytes), (second.map, 0));
    again.forget(&[listed.points[0].id], "expired").await.unwrap();

    // Who has everything reads what both have written.
    let full = full.reopen_on(common::local(folder.path())).unwrap();
    assert!(read_disk(&full, &second.map).await == content);
    assert!(full.blob(&blob).await.unwrap() == noise(7, 3 << 20));
    assert!(full.verify(of(VerifyMode::Full)).await.unwrap().is_clean());
}

fn of(mode: VerifyMode) -> VerifyOptions {
    let mut options = VerifyOptions::default();
    options.mode = mode;
    options
}

fn dry() -> SweepOptions {
    let mut options = SweepOptions::default();
    options.dry_run = true;
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_with_the_full_key_rewrites_what_a_writer_has_written() {
    let folder = tempfile::tempdir().unwrap();
    let (full, writing) = both(folder.path()).await;
    let content = noise(1, 1 << 20);
    let run = writer(&writing).await;
    let first = write_disk(&run, &content).await.map;
    let config = run.put_blob(b"{}").await.unwrap();
    let gone = run.publish(manifest(&[first], config)).await.unwrap();
    // Of each pack, some is still needed.
    let kept: Vec<u8> = content.chunks(64 * 1024).step_by(4).flatten().copied().collect();
    let run = writer(&writing).await;
    let second = write_disk(&run, &kept).await.map;
    let config = run.put_blob(b"{}").await.unwrap();
    run.publish(manifest(&[second], config)).await.unwrap();
    full.forget(&[gone], "expired").await.unwrap();
    let mut options = SweepOptions::default();
    options.grace = std::time::Duration::ZERO;
    options.confirm_many = true;
    options.rewrite_below_percent = 100;
    let (mut carried, mut removed) = (0, 0);
    for _ in 0..2 {
        if let Some(ended) = full.sweep(options.clone()).await.unwrap().ended {
            carried += ended.carried_bytes;
            removed += ended.removed_packs;
        }
    }
    assert!(carried > 0 && removed > 0, "{carried} {removed}");
    let fresh = full.reopen_on(common::local(folder.path())).unwrap();
    assert!(read_disk(&fresh, &second).await == kept);
    assert!(fresh.verify(of(VerifyMode::Full)).await.unwrap().is_clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_is_compared_by_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let (_, writing) = both(folder.path()).await;
    let mut content = noise(1, 700_000);
    content[200_000..400_000].fill(0);
    let run = writer(&writing).await;
    let map = write_disk(&run, &content).await.map;
    run.flush().await.unwrap();
    let reader = writing.disk(&map);
    for (from, to) in [(0, 4096), (190_000, 210_000), (300_000, 310_000), (690_000, 700_000), (0, 700_000)] {
        let range = reader.range_to_compare(ByteRange::new(from, to).unwrap()).await.unwrap();
        assert!(range.start() <= from && range.end() >= to);
        let (start, end) = (usize::try_from(range.start()).unwrap(), usize::try_from(range.end()).unwrap());
        let mut bytes = content[start..end].to_vec();
        assert!(reader.is_hash_of(range.start(), &bytes).await.unwrap(), "{range}");
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            bytes[at] ^= 1;
            assert!(!reader.is_hash_of(range.start(), &bytes).await.unwrap(), "{range} {at}");
            bytes[at] ^= 1;
        }
    }
}

/// One change of a disk: where, how many blocks, and what is there afterwards.
#[derive(Clone, Debug)]
struct Change {
    at: usize,
    length: usize,
    content: u8,
}

fn change(size: usize) -> impl Strategy<Value = Change> {
    // Positions near the border of the first leaf too; single bytes up to some chunks.
    let at = prop_oneof![0..size, LEAF - 300_000..LEAF + 300_000];
    let length = prop_oneof![1..5000_usize, 1..200_000_usize];
    (at, length, 0..4_u8).prop_map(|(at, length, content)| Change { at, length, content })
}

fn apply(disk: &mut [u8], change: &Change, seed: u64) -> (usize, usize) {
    // Whole blocks now and then, so that a change ends where a chunk does.
    let (from, to) = match change.content {
        0 | 1 => (change.at / BLOCK * BLOCK, (change.at + change.length).next_multiple_of(BLOCK)),
        _ => (change.at, change.at + change.length),
    };
    let (from, to) = (from.min(disk.len() - 1), to.min(disk.len()));
    match change.content {
        0 | 2 => disk[from..to].fill(0),
        _ => disk[from..to].copy_from_slice(&noise(seed, to - from)),
    }
    (from, to)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Whatever changes: an incremental by a writer needs no content of the base, and gives the map of a full.
    #[test]
    fn incrementals_by_a_writer_have_the_maps_of_fulls(
        data in proptest::collection::vec(change(18 << 20), 1..12),
        changes in proptest::collection::vec(change(18 << 20), 1..6),
        grown in prop_oneof![Just(0_usize), 1..400_000_usize],
        seed in 0..1000_u64,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let (full, writing) = both(folder.path()).await;
            let mut disk = vec![0; (18 << 20) - 512];
            for (number, one) in (seed * 100..).zip(&data) {
                apply(&mut disk, &Change { content: one.content | 1, ..one.clone() }, number);
            }
            let run = writer(&writing).await;
            let base = write_disk(&run, &disk).await.map;
            run.flush().await.unwrap();
            let old = disk.len();
            disk.resize(old + grown, 0);
            let mut ranges: Vec<(usize, usize)> = Vec::new();
            if grown > 0 {
                ranges.push((old, old + grown));
            }
            for (number, one) in (seed * 100 + 50..).zip(&changes) {
                ranges.push(apply(&mut disk, one, number));
            }
            let result = write_incremental(&writing, base, &disk, &extents(&ranges)).await.unwrap();
            assert_eq!(result.stats.base_bytes, 0);
            let other = tempfile::tempdir().unwrap();
            // Cut and hashed as a whole, elsewhere: nothing of the base plays a part.
            copy(folder.path(), other.path());
            let whole = Repository::open(other.path(), &Secret::new(WRITER)).await.unwrap();
            let expected = write_disk(&writer(&whole).await, &disk).await.map;
            assert_eq!(result.map, expected);
            let fresh = full.reopen_on(common::local(folder.path())).unwrap();
            assert!(read_disk(&fresh, &result.map).await == disk);
        });
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
