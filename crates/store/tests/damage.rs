//! Damage is noticed, named, and hurts nothing else.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::path::Path;

use bytes::Bytes;
use common::{back_up, local, manifest, new_repository, noise, objects, read_disk, small_packs, write_disk, writer};
use futures::StreamExt as _;
use xenvault_block::ByteRange;
use xenvault_store::{DiskMapRef, DiskOptions, PointFilter, PointManifest, Repository, Secret, StoreError};

/// Calls `check` with some bits of the file flipped in turn, each at least once per `step` bytes; then heals it.
async fn with_flips(path: &Path, step: usize, mut check: impl AsyncFnMut(usize)) {
    let healthy = common::fs::read(path).unwrap();
    for (round, at) in (0..healthy.len()).step_by(step).enumerate() {
        let mut hurt = healthy.clone();
        hurt[at] ^= 1 << (round % 8);
        common::fs::write(path, &hurt).unwrap();
        check(at).await;
    }
    for length in [0, 7, healthy.len() / 2, healthy.len() - 1] {
        common::fs::write(path, &healthy[..length]).unwrap();
        check(length).await;
    }
    common::fs::write(path, &healthy).unwrap();
}

async fn open(path: &Path) -> Result<Repository, StoreError> {
    common::open(path).await
}

#[tokio::test]
async fn a_wrong_passphrase_is_not_called_damage() {
    let folder = common::tempdir();
    new_repository(folder.path()).await;
    let error = Repository::open_on(local(folder.path()), &Secret::new("wrong")).await.unwrap_err();
    assert!(matches!(error, StoreError::WrongPassphrase), "{error}");
    assert!(!error.to_string().contains("wrong\""));
    open(folder.path()).await.unwrap();
}

#[tokio::test]
async fn what_is_no_repository_is_told_so_and_left_alone() {
    let folder = common::tempdir();
    for path in [folder.path().to_owned(), folder.path().join("absent")] {
        let error = open(&path).await.unwrap_err();
        assert!(matches!(error, StoreError::NotARepository { .. }), "{error}");
    }
    // Other programs have a file of this name too.
    common::fs::write(folder.path().join("config"), "[core]\n\trepositoryformatversion = 0\n").unwrap();
    let error = open(folder.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::NotARepository { .. }), "{error}");
    let error = common::init(folder.path(), Default::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::NotEmpty { .. }), "{error}");
    assert_eq!(objects(folder.path(), "").len(), 1);
}

#[tokio::test]
async fn a_repository_is_made_once() {
    let folder = common::tempdir();
    // What an interrupted attempt leaves is no hindrance.
    common::fs::create_dir(folder.path().join("keys")).unwrap();
    common::fs::write(folder.path().join("keys/1"), "half").unwrap();
    new_repository(folder.path()).await;
    let error = common::init(folder.path(), Default::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::NotEmpty { .. }), "{error}");
}

#[tokio::test]
async fn a_newer_format_is_named_with_both_versions() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    back_up(&repository, &noise(1, 100_000)).await;
    for object in ["points", "config", "keys"] {
        let path = objects(folder.path(), object).remove(0);
        let healthy = common::fs::read(&path).unwrap();
        let mut newer = healthy.clone();
        newer[8] = 3;
        common::fs::write(&path, newer).unwrap();
        let error = match open(folder.path()).await {
            Ok(repository) => repository.points(&Default::default()).await.unwrap().damaged.remove(0).error,
            Err(error) => error,
        };
        assert!(matches!(error, StoreError::NewerFormat { found: 3, supported: 0, .. }), "{object}: {error}");
        assert!(error.to_string().contains("version 3"), "{error}");
        common::fs::write(&path, healthy).unwrap();
    }
}

#[tokio::test]
async fn damage_of_config_and_key_is_noticed_on_opening() {
    let folder = common::tempdir();
    new_repository(folder.path()).await;
    for object in ["config", "keys"] {
        let path = objects(folder.path(), object).remove(0);
        with_flips(&path, 1, async |at| {
            let error = open(folder.path()).await.unwrap_err();
            let named = match error {
                StoreError::Damaged { .. } => true,
                // The magic and the version decide first what it is at all.
                StoreError::NotARepository { .. } => at < 8,
                StoreError::NewerFormat { .. } => at < 10,
                _ => false,
            };
            assert!(named, "{object} at {at}: {error}");
        })
        .await;
    }
    open(folder.path()).await.unwrap();
}

#[tokio::test]
async fn a_damaged_point_is_reported_and_hides_no_other() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let (first, _) = back_up(&repository, &noise(1, 100_000)).await;
    let (second, _) = back_up(&repository, &noise(2, 100_000)).await;
    let path = objects(folder.path(), "points").into_iter().find(|path| path.ends_with(first.to_string())).unwrap();
    with_flips(&path, 1, async |at| {
        let listing = repository.points(&Default::default()).await.unwrap();
        assert_eq!(listing.points.iter().map(|point| point.id).collect::<Vec<_>>(), [second], "{at}");
        assert_eq!(listing.damaged.len(), 1, "{at}");
        assert!(listing.damaged[0].object.contains(&first.to_string()));
        assert!(repository.point(&first).await.is_err());
        let other_vm = PointFilter { vm_uuid: Some("other".to_owned()), ..PointFilter::default() };
        assert!(repository.points(&other_vm).await.unwrap().damaged.is_empty());
    })
    .await;
    // A point under the name of another.
    common::fs::copy(&path, path.with_file_name(xenvault_store::PointId::random().to_string())).unwrap();
    let listing = repository.points(&Default::default()).await.unwrap();
    assert_eq!((listing.points.len(), listing.damaged.len()), (2, 1));
}

/// Reads a disk to its end; every byte that comes is compared, every error must name an object.
async fn read_what_can_be_read(repository: &Repository, map: &DiskMapRef, content: &[u8]) -> usize {
    let mut errors = 0;
    for range in ByteRange::up_to(map.virtual_size).pieces(64 * 1024) {
        match repository.disk(map).read_at(range).await {
            Ok(bytes) => {
                let at = usize::try_from(range.start()).unwrap();
                assert!(bytes[..] == content[at..at + bytes.len()], "wrong bytes at {range}");
            }
            Err(StoreError::DiskRange { range: hurt, source }) => {
                errors += 1;
                assert!(hurt.intersect(range).is_some() || hurt.start() <= range.start());
                assert!(matches!(*source, StoreError::Damaged { .. } | StoreError::ChunkMissing { .. }), "{source}");
            }
            Err(error) => panic!("{error}"),
        }
    }
    errors
}

#[tokio::test(flavor = "multi_thread")]
async fn no_damage_of_a_pack_ever_gives_wrong_bytes() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let mut content = noise(3, 600_000);
    content[100_000..300_000].fill(7);
    let (_, map) = back_up(&repository, &content).await;
    let mut hurt = 0;
    for path in objects(folder.path(), "packs") {
        with_flips(&path, 997, async |_| {
            let repository = repository.reopen_on(local(folder.path())).unwrap();
            hurt += read_what_can_be_read(&repository, &map, &content).await;
        })
        .await;
        let healthy = common::fs::read(&path).unwrap();
        common::fs::remove_file(&path).unwrap();
        let repository = repository.reopen_on(local(folder.path())).unwrap();
        assert!(read_what_can_be_read(&repository, &map, &content).await > 0);
        common::fs::write(&path, healthy).unwrap();
    }
    assert!(hurt > 500, "{hurt}");
    assert_eq!(read_what_can_be_read(&repository, &map, &content).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_one_pack_gone_every_disk_without_its_chunks_restores() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let (kept, lost) = (noise(4, 300_000), noise(5, 300_000));
    let (_, kept_map) = back_up(&repository, &kept).await;
    let before = objects(folder.path(), "packs");
    let (_, lost_map) = back_up(&repository, &lost).await;
    let pack = objects(folder.path(), "packs").into_iter().find(|path| !before.contains(path)).unwrap();
    common::fs::remove_file(&pack).unwrap();
    let repository = repository.reopen_on(local(folder.path())).unwrap();
    assert_eq!(read_what_can_be_read(&repository, &kept_map, &kept).await, 0);
    let mut stream = repository.disk(&lost_map).stream(ByteRange::up_to(300_000), Default::default());
    let error = stream.next().await.unwrap().unwrap_err();
    assert!(stream.next().await.is_none(), "a stream ends with its first error");
    let StoreError::DiskRange { range, source } = error else { panic!("{error}") };
    assert!(range.end() <= 300_000);
    let name = pack.file_name().unwrap().to_str().unwrap();
    assert!(source.to_string().contains(name), "{source}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_or_lost_index_costs_nothing_but_time() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(6, 900_000);
    let (_, map) = back_up(&repository, &content).await;
    for path in objects(folder.path(), "index") {
        with_flips(&path, 101, async |_| {
            let repository = repository.reopen_on(local(folder.path())).unwrap();
            assert_eq!(read_what_can_be_read(&repository, &map, &content).await, 0);
        })
        .await;
        common::fs::remove_file(&path).unwrap();
    }
    let repository = repository.reopen_on(local(folder.path())).unwrap();
    assert_eq!(read_what_can_be_read(&repository, &map, &content).await, 0);
}

#[tokio::test]
async fn a_base_that_can_not_be_read_fails_the_incremental_and_names_the_range() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (_, map) = back_up(&repository, &noise(7, 2 << 20)).await;
    for path in objects(folder.path(), "packs") {
        let mut bytes = common::fs::read(&path).unwrap();
        let end = bytes.len() / 2;
        bytes[64..end].iter_mut().for_each(|byte| *byte ^= 0x55);
        common::fs::write(path, bytes).unwrap();
    }
    let repository = repository.reopen_on(local(folder.path())).unwrap();
    let writer = writer(&repository).await;
    let mut failed = 0;
    for at in (0..2_u64 << 20).step_by(128 << 10) {
        let Ok(mut disk) = writer.disk(DiskOptions { virtual_size: 2 << 20, base: Some(map) }).await else { continue };
        let written = disk.write(at + 5000, Bytes::from_static(b"changed")).await;
        let error = match written {
            Ok(()) => disk.finish().await.err(),
            Err(error) => {
                assert!(matches!(disk.finish().await, Err(StoreError::Misuse { .. })), "it must not be finished");
                Some(error)
            }
        };
        if let Some(error) = error {
            failed += 1;
            assert!(matches!(error, StoreError::DiskRange { .. } | StoreError::Damaged { .. }), "{error}");
        }
    }
    assert!(failed > 0);
}

#[tokio::test]
async fn calls_that_break_the_rules_are_refused_with_numbers() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let writer = writer(&repository).await;
    let mut disk = writer.disk(DiskOptions { virtual_size: 10_000, base: None }).await.unwrap();
    disk.write(4096, Bytes::from(vec![1; 100])).await.unwrap();
    for (offset, length) in [(0, 10), (4100, 1), (9_999, 2), (u64::MAX, 1)] {
        let error = disk.write(offset, Bytes::from(vec![1; length])).await.unwrap_err();
        assert!(matches!(error, StoreError::Misuse { .. }), "{error}");
    }
    let map = disk.finish().await.unwrap().map;
    let error = writer.disk(DiskOptions { virtual_size: 9_999, base: Some(map) }).await.unwrap_err();
    assert!(matches!(error, StoreError::Misuse { .. }), "{error}");
    let config = writer.put_blob(b"{}").await.unwrap();
    let bad = PointManifest { vm_uuid: "../escape".to_owned(), ..manifest(&[map], config) };
    let error = writer.publish(bad).await.unwrap_err();
    assert!(matches!(error, StoreError::Misuse { .. }), "{error}");
    let past = repository.disk(&map).read_at(ByteRange::new(9_000, 10_001).unwrap()).await.unwrap_err();
    assert!(matches!(past, StoreError::Misuse { .. }), "{past}");
    let unknown = xenvault_store::PointId::random();
    assert!(matches!(repository.point(&unknown).await, Err(StoreError::UnknownPoint { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_index_is_made_anew_with_every_copy_of_a_chunk() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(5, 600_000);
    // Two who do not know of each other store the same.
    let second = repository.reopen_on(local(folder.path())).unwrap();
    let (one, other) = (writer(&repository).await, writer(&second).await);
    let map = write_disk(&one, &content).await.map;
    assert_eq!(write_disk(&other, &content).await.map, map);
    for writer in [one, other] {
        let config = writer.put_blob(b"{}").await.unwrap();
        writer.publish(manifest(&[map], config)).await.unwrap();
    }
    let packs = objects(folder.path(), "packs");
    assert!(packs.len() >= 4, "{}", packs.len());
    common::fs::remove_dir_all(folder.path().join("index")).unwrap();
    // Whichever pack is hurt, the other writer's copies are found.
    for pack in packs {
        let whole = common::fs::read(&pack).unwrap();
        let mut hurt = whole.clone();
        let middle = hurt.len() / 3;
        hurt[middle] ^= 1;
        common::fs::write(&pack, &hurt).unwrap();
        let fresh = repository.reopen_on(local(folder.path())).unwrap();
        assert!(read_disk(&fresh, &map).await == content, "{}", pack.display());
        common::fs::write(&pack, &whole).unwrap();
    }
}
