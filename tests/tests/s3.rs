//! The repository on a real S3 service: Ceph's RADOS Gateway.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test ends with a panic, and its helpers too"
)]

use bytes::Bytes;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use xenvault_block::ByteRange;
use xenvault_store::backend::{Backend, Bucket, BucketFault, BucketOptions, Patience};
use xenvault_store::{
    DiskMapRef, DiskOptions, InitOptions, Level, PointDisk, PointFilter, PointId, PointManifest, Repository, Secret,
    StoreError, WriterOptions,
};
use xenvault_tests::ceph::{ACCESS_KEY, Ceph, SECRET_KEY};

fn options(ceph: &Ceph, bucket: &str, folder: &str) -> BucketOptions {
    BucketOptions {
        bucket: bucket.to_owned(),
        folder: folder.to_owned(),
        endpoint: Some(ceph.endpoint()),
        region: "us-east-1".to_owned(),
        access_key: ACCESS_KEY.to_owned(),
        secret_key: SECRET_KEY.to_owned().into(),
        session_token: None,
        authority: None,
        clear_text: true,
        patience: Patience { silence: Duration::from_secs(20), total: Duration::from_secs(30) },
    }
}

fn bucket(ceph: &Ceph, folder: &str) -> Arc<dyn Backend> {
    Arc::new(Bucket::s3(&options(ceph, "backups", folder)).unwrap())
}

fn ceph() -> Ceph {
    let ceph = Ceph::start().unwrap();
    ceph.make_bucket("backups", false).unwrap();
    ceph
}

/// What is wrong with a place.
async fn fault(place: &Bucket) -> BucketFault {
    let error = place.list("points").await.unwrap_err();
    *error.into_inner().unwrap().downcast().unwrap()
}

fn passphrase() -> Secret {
    Secret::new("correct horse battery staple")
}

/// Small packs, so that little data makes many objects.
async fn repository(place: Arc<dyn Backend>) -> Repository {
    let mut options = InitOptions::default();
    options.pack_target_bytes = 256 * 1024;
    Repository::init_on(place, &passphrase(), options).await.unwrap()
}

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn manifest(map: DiskMapRef, vm_config: xenvault_store::BlobRef) -> PointManifest {
    PointManifest {
        id: PointId::random(),
        run_id: uuid::Uuid::new_v4(),
        fencing: 1,
        instance: "test".to_owned(),
        pool_uuid: uuid::Uuid::from_u128(1).to_string(),
        vm_uuid: uuid::Uuid::from_u128(2).to_string(),
        vm_name: "vm".to_owned(),
        level: Level::Full,
        reason: "first-backup".to_owned(),
        created_unix_ms: 1_700_000_000_000,
        parent: None,
        newest_sweep_seen: 0,
        disks: vec![PointDisk {
            vdi_uuid: uuid::Uuid::from_u128(3).to_string(),
            snapshot_vdi_uuid: uuid::Uuid::from_u128(4).to_string(),
            name: "disk".to_owned(),
            device: "0".to_owned(),
            virtual_size: map.virtual_size,
            map,
            level: Level::Full,
            reason: "first-backup".to_owned(),
            changed_bytes: map.virtual_size,
            bitmap: None,
            chain_nonce: None,
            attributes: BTreeMap::new(),
        }],
        vm_config,
        attributes: BTreeMap::new(),
    }
}

async fn back_up(repository: &Repository, content: &[u8]) -> Result<(PointId, DiskMapRef), StoreError> {
    let writer = repository.writer(WriterOptions::default()).await?;
    let mut disk = writer.disk(DiskOptions { virtual_size: content.len() as u64, base: None }).await?;
    for (at, piece) in content.chunks(1 << 20).enumerate() {
        disk.write((at as u64) << 20, Bytes::copy_from_slice(piece)).await?;
    }
    let map = disk.finish().await?.map;
    let config = writer.put_blob(b"{}").await?;
    Ok((writer.publish(manifest(map, config)).await?, map))
}

async fn read(repository: &Repository, map: &DiskMapRef) -> Vec<u8> {
    repository.disk(map).read_at(ByteRange::up_to(map.virtual_size)).await.unwrap().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_in_a_bucket_is_written_and_read_by_several() {
    let ceph = ceph();
    let first = repository(bucket(&ceph, "one")).await;
    let content = noise(1, 20 << 20);
    let (point, map) = back_up(&first, &content).await.unwrap();
    // Somebody else, who has nothing but the passphrase.
    let second = Repository::open_on(bucket(&ceph, "one"), &passphrase()).await.unwrap();
    assert_eq!(second.points(&PointFilter::default()).await.unwrap().points[0].id, point);
    assert!(read(&second, &map).await == content);
    // What is there already is not stored again, and what is new is found by the first.
    let mut changed = content.clone();
    changed[5 << 20..(5 << 20) + 100_000].copy_from_slice(&noise(2, 100_000));
    let before = bucket(&ceph, "one").list("packs").await.unwrap().len();
    let (_, newer) = back_up(&second, &changed).await.unwrap();
    let added = bucket(&ceph, "one").list("packs").await.unwrap().len() - before;
    assert!(added <= 4, "{added} packs for a small change");
    assert!(read(&first, &newer).await == changed);
    assert!(read(&first, &map).await == content);
    // Another repository in the same bucket knows nothing of them, and neither does the bucket itself.
    let other = repository(bucket(&ceph, "two")).await;
    assert!(other.points(&PointFilter::default()).await.unwrap().points.is_empty());
    assert!(bucket(&ceph, "").list("packs").await.unwrap().is_empty());
    assert!(matches!(
        Repository::open_on(bucket(&ceph, ""), &passphrase()).await,
        Err(StoreError::NotARepository { .. })
    ));
    assert!(matches!(
        Repository::open_on(bucket(&ceph, "one"), &Secret::new("wrong")).await,
        Err(StoreError::WrongPassphrase)
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_keeps_what_the_repository_asks_of_a_place_for_objects() {
    let ceph = ceph();
    let place = bucket(&ceph, "a folder/with a strange näme");
    assert!(place.list("packs").await.unwrap().is_empty());
    assert_eq!(place.length("packs/none").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(place.read("packs/none", 0, 1).await.unwrap_err().kind(), ErrorKind::NotFound);
    let mut upload = place.create("packs/aa/object").await.unwrap();
    upload.write(Bytes::from_static(b"half")).await.unwrap();
    assert!(place.list("packs").await.unwrap().is_empty());
    upload.write(Bytes::from_static(b" and half")).await.unwrap();
    upload.finish().await.unwrap();
    drop(place.create("packs/aa/never").await.unwrap());
    assert_eq!(place.list("packs").await.unwrap(), ["packs/aa/object"]);
    assert_eq!(place.length("packs/aa/object").await.unwrap(), 13);
    assert_eq!(place.read("packs/aa/object", 5, 3).await.unwrap(), b"and");
    assert_eq!(place.read("packs/aa/object", 13, 0).await.unwrap(), b"");
    for (offset, length) in [(5, 9), (13, 1), (14, 0), (1 << 40, 1), (0, usize::MAX / 2)] {
        let error = place.read("packs/aa/object", offset, length).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset} {length}: {error}");
    }
    // Of many who make the same object one succeeds.
    let tries = (0..16_u8).map(|number| {
        let place = Arc::clone(&place);
        tokio::spawn(async move { place.put_new("sweeps/1", Bytes::from(vec![number; 100])).await })
    });
    let mut winners = 0;
    for attempt in tries {
        match attempt.await.unwrap() {
            Ok(()) => winners += 1,
            Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}"),
        }
    }
    assert_eq!(winners, 1);
    let (older, now) = (place.modified("packs/aa/object").await.unwrap(), place.now().await.unwrap());
    assert!(older <= now && now.duration_since(older).unwrap() < Duration::from_secs(3600));
    place.remove("packs/aa/object").await.unwrap();
    place.remove("packs/aa/object").await.unwrap();
    assert!(place.list("packs").await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_of_several_pages_is_complete() {
    let ceph = ceph();
    let place = bucket(&ceph, "many");
    let mut names: Vec<String> = (0..1100).map(|number| format!("points/{:04x}", number * 37 % 65536)).collect();
    for group in names.chunks(16) {
        let writes = group.iter().map(|name| place.put_new(name, Bytes::from_static(b"x")));
        for written in futures::future::join_all(writes).await {
            written.unwrap();
        }
    }
    names.sort_unstable();
    assert_eq!(place.list("points").await.unwrap(), names);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_do_not_fit_and_buckets_that_are_not_there_are_told_apart_from_damage() {
    let ceph = ceph();
    let mut wrong = options(&ceph, "backups", "one");
    wrong.secret_key = "not the secret".to_owned().into();
    let place = Bucket::s3(&wrong).unwrap();
    assert!(matches!(fault(&place).await, BucketFault::WrongSecret { .. }));
    for error in [place.list("points").await.unwrap_err(), place.read("config", 0, 1).await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    }
    let error = Repository::open_on(Arc::new(place), &passphrase()).await.unwrap_err();
    assert!(matches!(error, StoreError::Backend { .. }), "{error:?}");
    assert!(!format!("{error:?}").contains("not the secret"));
    wrong.access_key = "nobody".to_owned();
    assert!(matches!(fault(&Bucket::s3(&wrong).unwrap()).await, BucketFault::UnknownKey { .. }));
    let nowhere = Bucket::s3(&options(&ceph, "no-such-bucket", "")).unwrap();
    assert!(matches!(fault(&nowhere).await, BucketFault::NoBucket { .. }));
    // Nothing may be concluded from it about an object, whatever is asked.
    for error in [nowhere.length("config").await.unwrap_err(), nowhere.read("config", 0, 1).await.unwrap_err()] {
        assert!(error.get_ref().unwrap().is::<BucketFault>() && error.kind() == ErrorKind::Other, "{error}");
    }
    let error = Repository::open_on(Arc::new(nowhere), &passphrase()).await.unwrap_err();
    assert!(matches!(error, StoreError::Backend { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_killed_and_comes_back_in_the_middle_of_writes_loses_nothing() {
    let mut ceph = ceph();
    let repository = repository(bucket(&ceph, "one")).await;
    let (kept, kept_map) = back_up(&repository, &noise(1, 4 << 20)).await.unwrap();
    let content = noise(2, 48 << 20);
    let writing = {
        let (repository, content) = (repository.clone(), content.clone());
        tokio::spawn(async move { back_up(&repository, &content).await })
    };
    for _ in 0..2 {
        let watch = bucket(&ceph, "one");
        let before = watch.list("packs").await.unwrap().len();
        while watch.list("packs").await.unwrap().len() < before + 8 && !writing.is_finished() {
            tokio::task::yield_now().await;
        }
        tokio::task::block_in_place(|| {
            ceph.stop_gateway().unwrap();
            std::thread::sleep(Duration::from_secs(2));
            ceph.start_gateway().unwrap();
        });
    }
    let (point, map) = writing.await.unwrap().unwrap();
    let fresh = Repository::open_on(bucket(&ceph, "one"), &passphrase()).await.unwrap();
    let listing = fresh.points(&PointFilter::default()).await.unwrap();
    assert!(listing.damaged.is_empty());
    assert_eq!(listing.points.len(), 2);
    assert!(
        listing.points.iter().any(|found| found.id == point) && listing.points.iter().any(|found| found.id == kept)
    );
    assert!(read(&fresh, &map).await == content);
    assert!(read(&fresh, &kept_map).await == noise(1, 4 << 20));
}
