//! What things cost: bytes stored, objects read, memory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{BLOCK, back_up, local, manifest, new_repository, noise, read_disk, write_changes, write_disk, writer};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store::backend::{Backend, Upload};
use xenvault_store::{DiskMapRef, DiskOptions, Repository, Stage, WriterOptions};

const TIB: u64 = 1 << 40;

/// A disk of 1 TiB with some data here and there.
async fn sparse_disk(repository: &Repository) -> DiskMapRef {
    let writer = writer(repository).await;
    let mut disk = writer.disk(DiskOptions { virtual_size: TIB, base: None }).await.unwrap();
    for number in 0..32_u64 {
        disk.write(number * (TIB / 32) + 8192, Bytes::from(noise(number, 1 << 20))).await.unwrap();
    }
    let map = disk.finish().await.unwrap().map;
    let config = writer.put_blob(b"{}").await.unwrap();
    writer.publish(manifest(&[map], config)).await.unwrap();
    map
}

#[tokio::test]
async fn an_unchanged_tebibyte_stores_next_to_nothing_and_reads_no_data() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let base = sparse_disk(&repository).await;

    let counting = Counting::new(folder.path().to_owned());
    let repository = repository.reopen_on(counting.clone()).unwrap();
    let writer = writer(&repository).await;
    let counters = writer.counters();
    let disk = writer.disk(DiskOptions { virtual_size: TIB, base: Some(base) }).await.unwrap();
    let before = counting.read_bytes.load(Ordering::SeqCst);
    let result = disk.finish().await.unwrap();
    assert_eq!(counting.read_bytes.load(Ordering::SeqCst), before);
    assert_eq!(result.map, base);
    // The bitmap of a disk of this size, with nothing set.
    let bitmap = writer.put_blob(&vec![0; (TIB / 65_536 / 8) as usize]).await.unwrap();
    writer.publish(manifest(&[result.map], bitmap)).await.unwrap();
    let progress = counters.progress();
    assert!(progress.stored_bytes < 100 * 1024, "{progress:?}");
    assert_eq!((progress.new_bytes, progress.base_bytes), (0, 0));
}

#[tokio::test]
async fn an_empty_disk_of_2040_gib_costs_nothing_to_write_or_to_walk() {
    let folder = common::tempdir();
    let counting = Counting::new(folder.path().to_owned());
    let repository = new_repository(folder.path()).await.reopen_on(counting.clone()).unwrap();
    let size = 2040 << 30;
    let writer = writer(&repository).await;
    let mut disk = writer.disk(DiskOptions { virtual_size: size, base: None }).await.unwrap();
    disk.zero(ByteRange::up_to(size)).await.unwrap();
    let map = disk.finish().await.unwrap().map;
    assert_eq!(map, DiskMapRef { root: None, virtual_size: size });
    let reader = repository.disk(&map);
    assert!(reader.extents(ByteRange::up_to(size)).await.unwrap().is_empty());
    assert_eq!(reader.read_at(ByteRange::new(size - 4096, size).unwrap()).await.unwrap(), vec![0; 4096]);
    assert_eq!(counting.operations(), 0);
}

#[tokio::test]
async fn a_page_write_costs_about_its_own_chunk_and_its_path() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let content = noise(1, 64 << 20);
    let (_, base) = back_up(&repository, &content).await;
    let writer = writer(&repository).await;
    let counters = writer.counters();
    let changes: Vec<_> = (0..16_u64).map(|n| (n * (4 << 20) + 40_960, noise(200 + n, BLOCK))).collect();
    let result = write_changes(&writer, 64 << 20, base, &changes).await;
    let config = writer.put_blob(b"{}").await.unwrap();
    writer.publish(manifest(&[result.map], config)).await.unwrap();
    let stored = counters.progress().stored_bytes;
    assert!(stored < 16 * 192 * 1024, "{stored} bytes for 16 pages");
    assert!(result.stats.base_bytes < 16 * 192 * 1024, "{:?}", result.stats);
    assert_eq!(result.stats.read_bytes, 16 * BLOCK as u64);
}

#[tokio::test]
async fn the_same_file_at_another_place_of_another_disk_is_stored_once() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let file = noise(2, 24 << 20);
    let mut other = vec![0; 3 * BLOCK];
    other.extend_from_slice(&noise(3, BLOCK));
    other.extend_from_slice(&file);
    back_up(&repository, &file).await;
    let writer = writer(&repository).await;
    let result = write_disk(&writer, &other).await;
    assert!(result.stats.new_bytes < 2 << 20, "{:?}", result.stats);
    assert_eq!(result.stats.zero_bytes, 3 * BLOCK as u64);
    // And again within the run that has only just stored it.
    let again = write_disk(&writer, &[noise(3, BLOCK), file].concat()).await;
    assert!(again.stats.new_bytes < 1 << 20, "{:?}", again.stats);
}

#[tokio::test]
async fn zeros_are_never_stored_and_text_is_compressed() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let writer = writer(&repository).await;
    let mut content = vec![0; 16 << 20];
    let line = b"The quick brown fox jumps over the lazy dog, and over line ";
    let text: Vec<u8> = (0..60_000).flat_map(|n: u32| [&line[..], n.to_string().as_bytes(), b"\n"].concat()).collect();
    content[8 << 20..(8 << 20) + text.len()].copy_from_slice(&text);
    let result = write_disk(&writer, &content).await;
    writer.flush().await.unwrap();
    assert!(result.stats.zero_bytes >= (16 << 20) - text.len() as u64 - 2 * BLOCK as u64);
    let progress = writer.counters().progress();
    assert!(progress.stored_bytes < text.len() as u64 / 4, "{progress:?}");
    assert!(progress.busiest().is_some());
    assert!(progress.busy.iter().any(|&(stage, time)| stage == Stage::Compress && !time.is_zero()));
    let data = repository.disk(&result.map).extents(ByteRange::up_to(16 << 20)).await.unwrap();
    let expected = ByteRange::with_length(8 << 20, text.len().next_multiple_of(BLOCK) as u64).unwrap();
    assert_eq!(data, ExtentSet::from_range(expected));
}

#[tokio::test]
async fn random_reads_touch_their_path_only() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let map = sparse_disk(&repository).await;
    let counting = Counting::new(folder.path().to_owned());
    let repository = repository.reopen_on(counting.clone()).unwrap();
    let reader = repository.disk(&map);
    let at = 5 * (TIB / 32) + 8192;
    // Less than a block: what is read is kept only if a part of it was not wanted, and one chunk in sixteen is one block.
    let bytes = reader.read_at(ByteRange::with_length(at, 512).unwrap()).await.unwrap();
    assert_eq!(bytes, noise(5, 512));
    // Three nodes, a leaf and a chunk, and the headers of the two packs that these are in; the index is mapped.
    assert_eq!(counting.reads.load(Ordering::SeqCst), 7);
    reader.read_at(ByteRange::with_length(at + 512, 512).unwrap()).await.unwrap();
    assert_eq!(counting.reads.load(Ordering::SeqCst), 7, "a chunk that was just read is read again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_medium_holds_the_source_back() {
    let folder = common::tempdir();
    let counting = Counting::new(folder.path().to_owned());
    let repository = new_repository(folder.path()).await.reopen_on(counting.clone()).unwrap();
    let memory_bytes = 8 << 20;
    let writer = repository.writer(WriterOptions { threads: 2, memory_bytes, ..Default::default() }).await.unwrap();
    let counters = writer.counters();
    let mut disk = writer.disk(DiskOptions { virtual_size: 1 << 30, base: None }).await.unwrap();
    let stuck = counting.gate.clone().acquire_many_owned(1).await.unwrap();
    let mut offset = 0;
    // Until a call does not return: the medium does not take a byte.
    loop {
        let data = Bytes::from(noise(offset, 1 << 20));
        let mut write = std::pin::pin!(disk.write(offset, data));
        if tokio::time::timeout(Duration::from_secs(2), &mut write).await.is_err() {
            drop(stuck);
            write.await.unwrap();
            break;
        }
        offset += 1 << 20;
        assert!(offset < 64 << 20, "nothing held the source back");
    }
    // The budget, what waits for the medium, and one piece.
    assert!(offset <= memory_bytes + (8 << 20), "{offset}");
    disk.finish().await.unwrap();
    writer.flush().await.unwrap();
    assert!(counters.progress().throttled > Duration::from_secs(1));
}

#[tokio::test]
async fn content_is_not_to_be_found_in_the_repository() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let secret = b"a line that must not be readable by whoever holds the folder";
    let mut content = vec![0; 1 << 20];
    content[5000..5000 + secret.len()].copy_from_slice(secret);
    let (_, map) = back_up(&repository, &content).await;
    writer(&repository).await.put_blob(secret).await.unwrap();
    for path in common::objects(folder.path(), "") {
        let bytes = common::fs::read(&path).unwrap();
        assert!(!bytes.windows(16).any(|window| window == &secret[..16]), "{}", path.display());
        assert!(!bytes.windows(8).any(|window| window == b"0000-000" || window == b"first-ba"), "{}", path.display());
    }
    assert!(read_disk(&repository.reopen_on(local(folder.path())).unwrap(), &map).await == content);
}

#[tokio::test]
async fn long_blobs_come_back() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let writer = writer(&repository).await;
    for length in [0, 1, 1 << 20, (1 << 20) + 1, 5_000_000] {
        let bytes = noise(length as u64, length);
        let blob = writer.put_blob(&bytes).await.unwrap();
        writer.flush().await.unwrap();
        assert!(repository.blob(&blob).await.unwrap() == bytes, "{length}");
    }
}

/// A folder that counts what is read of it, and whose writes can be held up.
#[derive(Debug)]
struct Counting {
    folder: Arc<dyn Backend>,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    others: AtomicU64,
    gate: Arc<tokio::sync::Semaphore>,
}

impl Counting {
    fn new(path: PathBuf) -> Arc<Self> {
        let gate = Arc::new(tokio::sync::Semaphore::new(1));
        let (reads, read_bytes, others) = Default::default();
        Arc::new(Self { folder: local(&path), reads, read_bytes, others, gate })
    }

    /// Reads and writes; opening a writer lists and is not counted.
    fn operations(&self) -> u64 {
        self.reads.load(Ordering::SeqCst) + self.others.load(Ordering::SeqCst)
    }
}

impl Backend for Counting {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        async move {
            self.others.fetch_add(1, Ordering::SeqCst);
            let upload = self.folder.create(name).await?;
            Ok(Box::new(Gated { upload, gate: self.gate.clone() }) as Box<dyn Upload>)
        }
        .boxed()
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        // Segments of the index are mapped where there are files, and fetched as a whole on opening where there are none.
        if !name.starts_with("index/") {
            self.reads.fetch_add(1, Ordering::SeqCst);
            self.read_bytes.fetch_add(length as u64, Ordering::SeqCst);
        }
        self.folder.read(name, offset, length)
    }

    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>> {
        self.folder.length(name)
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>> {
        self.folder.list(folder)
    }

    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>> {
        self.folder.clean()
    }

    fn local_path(&self, name: &str) -> Option<PathBuf> {
        self.folder.local_path(name)
    }

    fn location(&self) -> PathBuf {
        self.folder.location()
    }
}

struct Gated {
    upload: Box<dyn Upload>,
    gate: Arc<tokio::sync::Semaphore>,
}

impl Upload for Gated {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        async move {
            let _open = self.gate.clone().acquire_owned().await.map_err(io::Error::other)?;
            self.upload.write(data).await
        }
        .boxed()
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        self.upload.finish()
    }
}
