//! Copies of index segments on this machine: fetched once, checked, and never a reason to fail.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{back_up, local, noise, read_disk, small_packs};
use futures::future::BoxFuture;
use xenvault_store::backend::{Backend, Upload};
use xenvault_store::{IndexCacheOptions, Repository};

/// A place without files to map, that counts the bytes of segments that are fetched.
#[derive(Debug)]
struct Far {
    place: Arc<dyn Backend>,
    fetched: AtomicU64,
}

impl Backend for Far {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        self.place.create(name)
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        if name.starts_with("index/") {
            self.fetched.fetch_add(length as u64, Ordering::SeqCst);
        }
        self.place.read(name, offset, length)
    }

    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>> {
        self.place.length(name)
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>> {
        self.place.list(folder)
    }

    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>> {
        self.place.clean()
    }

    fn local_path(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    fn location(&self) -> PathBuf {
        self.place.location()
    }
}

/// Opens the repository as if it were far away; says how many bytes of segments a read of everything has fetched.
async fn fetched(
    keys: &Repository,
    cache: &Path,
    limit_bytes: u64,
    map: &xenvault_store::DiskMapRef,
    content: &[u8],
) -> u64 {
    let far = Arc::new(Far { place: local(&keys.location()), fetched: AtomicU64::new(0) });
    let repository = keys.reopen_on(far.clone()).unwrap();
    repository.cache_index(IndexCacheOptions { folder: cache.to_owned(), limit_bytes });
    assert!(read_disk(&repository, map).await == content);
    far.fetched.load(Ordering::SeqCst)
}

fn copies(cache: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![cache.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn segments_are_fetched_once_and_again_where_their_copy_is_hurt() {
    let (folder, cache) = (common::tempdir(), tempfile::tempdir().unwrap());
    let keys = small_packs(folder.path()).await;
    back_up(&keys, &noise(1, 2 << 20)).await;
    let content = noise(2, 2 << 20);
    let (_, map) = back_up(&keys, &content).await;
    let ample = 1 << 30;

    let all = fetched(&keys, cache.path(), ample, &map, &content).await;
    assert!(all > 0);
    let kept = copies(cache.path());
    assert_eq!(kept.len(), common::objects(folder.path(), "index").len());
    assert_eq!(fetched(&keys, cache.path(), ample, &map, &content).await, 0);

    // Flipped, cut short, longer, and gone.
    for hurt in 0..4 {
        let healthy = std::fs::read(&kept[0]).unwrap();
        let mut bytes = healthy.clone();
        match hurt {
            // In its last page, which holds the entries.
            0 => bytes[healthy.len() - 30] ^= 1,
            1 => bytes.truncate(healthy.len() - 1),
            2 => bytes.push(0),
            _ => {}
        }
        std::fs::remove_file(&kept[0]).unwrap();
        if hurt < 3 {
            std::fs::write(&kept[0], bytes).unwrap();
        }
        let mut again = fetched(&keys, cache.path(), ample, &map, &content).await;
        if hurt == 0 && again == 0 {
            // What was wanted was known from another segment, so this one was only let go of.
            again = fetched(&keys, cache.path(), ample, &map, &content).await;
        }
        assert_eq!(again, healthy.len() as u64, "{hurt}");
        assert_eq!(std::fs::read(&kept[0]).unwrap(), healthy, "{hurt}");
    }
    assert_eq!(fetched(&keys, cache.path(), ample, &map, &content).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_never_more_copies_than_the_limit_and_none_is_no_failure() {
    let (folder, cache) = (common::tempdir(), tempfile::tempdir().unwrap());
    let keys = small_packs(folder.path()).await;
    back_up(&keys, &noise(1, 2 << 20)).await;
    let content = noise(2, 2 << 20);
    let (_, map) = back_up(&keys, &content).await;
    let lengths: Vec<u64> =
        common::objects(folder.path(), "index").iter().map(|path| common::fs::length(path).unwrap()).collect();
    let all: u64 = lengths.iter().sum();
    let limit = all - 1;
    assert_eq!(fetched(&keys, cache.path(), limit, &map, &content).await, all);
    let kept: u64 = copies(cache.path()).iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    assert!(kept > 0 && kept <= limit, "{kept} of {limit}");
    // Where a file stands in the place of the folder nothing can be kept.
    let file = cache.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for _ in 0..2 {
        assert_eq!(fetched(&keys, &file, 1 << 30, &map, &content).await, all);
    }
}
