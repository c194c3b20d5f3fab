//! A repository that an earlier release has written still opens and restores.
//!
//! `fixtures/v0` is such a repository. With `XENVAULT_BLESS=1` in the environment and the folder gone, it is written anew.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use std::path::Path;

use common::{back_up, new_repository, noise, read_disk, write_changes, writer};
use xenvault_block::ByteRange;
use xenvault_store::Level;

fn content() -> Vec<u8> {
    let mut content = vec![0; 40 << 20];
    content[8192..8192 + 12_000].copy_from_slice(&noise(1, 12_000));
    content[20 << 20..(20 << 20) + 300_000].fill(b'x');
    content.truncate((40 << 20) - 512);
    content
}

#[tokio::test]
async fn a_repository_of_format_version_0_opens_and_restores() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v0");
    if std::env::var_os("XENVAULT_BLESS").is_some() && !fixture.exists() {
        let repository = new_repository(&fixture).await;
        back_up(&repository, &content()).await;
        std::fs::remove_dir(fixture.join("tmp")).unwrap();
    }
    let repository = common::open(&fixture).await.unwrap();
    let listing = repository.points(&Default::default()).await.unwrap();
    assert!(listing.damaged.is_empty());
    let point = repository.point(&listing.points[0].id).await.unwrap();
    assert_eq!((point.vm_name.as_str(), point.level), ("vm", Level::Full));
    assert_eq!(repository.blob(&point.vm_config).await.unwrap(), b"{}");
    let map = point.disks[0].map;
    assert!(read_disk(&repository, &map).await == content());
    let reader = repository.disk(&map);
    let data = reader.extents(ByteRange::up_to(map.virtual_size)).await.unwrap();
    assert_eq!(data.total_bytes(), 12_288 + 303_104);
}

#[tokio::test]
async fn equal_disks_of_a_fixed_key_have_equal_maps_in_every_release() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v0");
    let folder = common::tempdir();
    common::fs::copy_all(&fixture, folder.path()).unwrap();
    let repository = common::open(folder.path()).await.unwrap();
    let id = repository.points(&Default::default()).await.unwrap().points[0].id;
    let map = repository.point(&id).await.unwrap().disks[0].map;
    let writer = writer(&repository).await;
    // A release that cut or hashed differently would store everything again.
    let again = common::write_disk(&writer, &content()).await;
    assert_eq!((again.map, again.stats.new_bytes, again.stats.new_pages), (map, 0, 0));
    let changed = write_changes(&writer, map.virtual_size, map, &[(0, vec![7])]).await;
    assert_ne!(changed.map, map);
}
