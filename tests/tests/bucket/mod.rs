//! A repository in a bucket, and what the tests of it share.
#![allow(dead_code, reason = "every test file uses a part of it")]

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use xenvault_block::ByteRange;
use xenvault_store::backend::{Backend, Bucket, BucketFault, BucketOptions, Patience};
use xenvault_store::{
    DiskMapRef, DiskOptions, InitOptions, Level, PointDisk, PointFilter, PointId, PointManifest, Repository, Secret,
    StoreError, SweepOptions, SweepReport, VerifyMode, VerifyOptions, WriterOptions,
};
use xenvault_tests::ceph::{ACCESS_KEY, Ceph, SECRET_KEY};

/// A folder of a bucket at some address.
pub fn at(endpoint: &str, bucket: &str, folder: &str) -> BucketOptions {
    BucketOptions {
        bucket: bucket.to_owned(),
        folder: folder.to_owned(),
        endpoint: Some(endpoint.to_owned()),
        region: "us-east-1".to_owned(),
        access_key: ACCESS_KEY.to_owned(),
        secret_key: SECRET_KEY.to_owned().into(),
        session_token: None,
        authority: None,
        clear_text: true,
        patience: Patience::default(),
    }
}

pub fn options(ceph: &Ceph, bucket: &str, folder: &str) -> BucketOptions {
    at(&ceph.endpoint(), bucket, folder)
}

pub fn bucket(ceph: &Ceph, folder: &str) -> Arc<dyn Backend> {
    Arc::new(Bucket::s3(&options(ceph, "backups", folder)).unwrap())
}

pub fn ceph() -> Ceph {
    let ceph = Ceph::start().unwrap();
    ceph.make_bucket("backups", false).unwrap();
    ceph
}

/// What is wrong with a place.
pub async fn fault(place: &Bucket) -> BucketFault {
    let error = place.list("points").await.unwrap_err();
    *error.into_inner().unwrap().downcast().unwrap()
}

pub fn passphrase() -> Secret {
    Secret::new("correct horse battery staple")
}

/// Small packs, so that little data makes many objects.
pub async fn repository(place: Arc<dyn Backend>) -> Repository {
    let mut options = InitOptions::default();
    options.pack_target_bytes = 256 * 1024;
    Repository::init_on(place, &passphrase(), options).await.unwrap()
}

/// Bytes that do not compress.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
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

pub fn manifest(map: DiskMapRef, vm_config: xenvault_store::BlobRef) -> PointManifest {
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

pub async fn back_up(repository: &Repository, content: &[u8]) -> Result<(PointId, DiskMapRef), StoreError> {
    let writer = repository.writer(WriterOptions::default()).await?;
    let mut disk = writer.disk(DiskOptions { virtual_size: content.len() as u64, base: None }).await?;
    for (at, piece) in content.chunks(1 << 20).enumerate() {
        disk.write((at as u64) << 20, Bytes::copy_from_slice(piece)).await?;
    }
    let map = disk.finish().await?.map;
    let config = writer.put_blob(b"{}").await?;
    Ok((writer.publish(manifest(map, config)).await?, map))
}

pub async fn read(repository: &Repository, map: &DiskMapRef) -> Vec<u8> {
    repository.disk(map).read_at(ByteRange::up_to(map.virtual_size)).await.unwrap().to_vec()
}

/// Whatever can go goes at once.
pub async fn sweep(repository: &Repository) -> Result<SweepReport, StoreError> {
    let mut options = SweepOptions::default();
    options.grace = Duration::ZERO;
    options.confirm_many = true;
    repository.sweep(options).await
}

/// Whoever opens the repository now finds exactly these points, whole, and nothing hurt.
pub async fn must_hold(repository: &Repository, points: &[(PointId, DiskMapRef, Vec<u8>)], what: &str) {
    let listing = repository.points(&PointFilter::default()).await.unwrap();
    assert!(listing.damaged.is_empty() && listing.quarantined.is_empty(), "{what}: {listing:?}");
    let mut found: Vec<PointId> = listing.points.iter().map(|point| point.id).collect();
    let mut expected: Vec<PointId> = points.iter().map(|(id, ..)| *id).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected, "{what}");
    for (id, map, content) in points {
        assert!(read(repository, map).await == *content, "{what}: point {id}");
    }
    let mut options = VerifyOptions::default();
    options.mode = VerifyMode::Full;
    options.write = false;
    let report = repository.verify(options).await.unwrap();
    assert!(report.damage.is_empty() && report.hurt.is_empty(), "{what}: {report:?}");
}
