//! What the tests of the repository share.
#![allow(dead_code, reason = "every test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a helper of tests fails the test")]

pub mod place;
pub mod world;

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use uuid::Uuid;
use xenvault_block::ByteRange;
use xenvault_store::{
    BlobRef, DiskMapRef, DiskOptions, DiskResult, InitOptions, Level, PointDisk, PointId, PointManifest, Repository,
    Secret, StoreError, Writer, WriterOptions,
};

#[allow(unused_imports, reason = "every test file uses a part of it")]
pub use place::{Place, fs, in_bucket, local, tempdir, times};

pub const BLOCK: usize = 4096;
pub const PASSPHRASE: &str = "correct horse battery staple";

pub fn passphrase() -> Secret {
    Secret::new(PASSPHRASE)
}

pub async fn new_repository(path: &Path) -> Repository {
    init(path, Default::default()).await.unwrap()
}

pub async fn init(path: &Path, options: InitOptions) -> Result<Repository, StoreError> {
    if in_bucket() {
        Repository::init_on(local(path), &passphrase(), options).await
    } else {
        Repository::init(path, &passphrase(), options).await
    }
}

pub async fn open(path: &Path) -> Result<Repository, StoreError> {
    Repository::open_on(local(path), &passphrase()).await
}

pub async fn writer(repository: &Repository) -> Writer {
    repository.writer(WriterOptions::default()).await.unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Writes a whole disk from one array, in pieces of 1 MiB.
pub async fn write_disk(writer: &Writer, content: &[u8]) -> DiskResult {
    let mut disk = writer.disk(DiskOptions { virtual_size: content.len() as u64, base: None }).await.unwrap();
    for (at, piece) in content.chunks(1 << 20).enumerate() {
        disk.write((at as u64) << 20, Bytes::copy_from_slice(piece)).await.unwrap();
    }
    disk.finish().await.unwrap()
}

/// Writes changes over a base.
pub async fn write_changes(writer: &Writer, size: u64, base: DiskMapRef, changes: &[(u64, Vec<u8>)]) -> DiskResult {
    let mut disk = writer.disk(DiskOptions { virtual_size: size, base: Some(base) }).await.unwrap();
    for (offset, bytes) in changes {
        disk.write(*offset, Bytes::copy_from_slice(bytes)).await.unwrap();
    }
    disk.finish().await.unwrap()
}

pub async fn read_disk(repository: &Repository, map: &DiskMapRef) -> Vec<u8> {
    repository.disk(map).read_at(ByteRange::up_to(map.virtual_size)).await.unwrap().to_vec()
}

pub fn manifest(maps: &[DiskMapRef], vm_config: BlobRef) -> PointManifest {
    let disk = |(number, map): (usize, &DiskMapRef)| PointDisk {
        vdi_uuid: Uuid::from_u128(number as u128).to_string(),
        snapshot_vdi_uuid: Uuid::from_u128(1000 + number as u128).to_string(),
        name: format!("disk {number}"),
        device: number.to_string(),
        virtual_size: map.virtual_size,
        map: *map,
        level: Level::Full,
        reason: "first-backup".to_owned(),
        changed_bytes: map.virtual_size,
        bitmap: None,
        chain_nonce: None,
        attributes: BTreeMap::new(),
    };
    PointManifest {
        id: PointId::random(),
        run_id: Uuid::new_v4(),
        fencing: 1,
        instance: "test".to_owned(),
        pool_uuid: Uuid::from_u128(1).to_string(),
        vm_uuid: Uuid::from_u128(2).to_string(),
        vm_name: "vm".to_owned(),
        level: Level::Full,
        reason: "first-backup".to_owned(),
        created_unix_ms: 1_700_000_000_000,
        parent: None,
        newest_sweep_seen: 0,
        disks: maps.iter().enumerate().map(disk).collect(),
        vm_config,
        attributes: BTreeMap::new(),
    }
}

/// One run that writes one disk and publishes a point of it.
pub async fn back_up(repository: &Repository, content: &[u8]) -> (PointId, DiskMapRef) {
    let writer = writer(repository).await;
    let map = write_disk(&writer, content).await.map;
    let config = writer.put_blob(b"{}").await.unwrap();
    (writer.publish(manifest(&[map], config)).await.unwrap(), map)
}

/// A repository whose packs are small, so that little data makes many of them.
pub async fn small_packs(path: &Path) -> Repository {
    let mut options = InitOptions::default();
    options.pack_target_bytes = 256 * 1024;
    init(path, options).await.unwrap()
}

/// All objects of a repository with this first part of their names, ascending.
pub fn objects(root: &Path, folder: &str) -> Vec<std::path::PathBuf> {
    place::below(&root.join(folder))
}
