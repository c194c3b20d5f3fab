//! Whatever fails, and whenever: what was published is there and whole, and the next run goes on.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use common::{back_up, local, manifest, noise, read_disk, small_packs, write_changes, writer};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use xenvault_store::backend::{Backend, Upload};
use xenvault_store::{DiskMapRef, DiskOptions, PointId, Repository, Retry, StoreError, WriterOptions};

/// What happens at the operation with the ordered number, and ever after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Refused, nothing of it is done.
    Refuse,
    /// The medium is full.
    Full,
    /// A write is done by half; another operation is done, and its success is not reported.
    Torn,
}

/// A folder that fails from its n-th writing operation on, as if the machine had died or the disk had filled.
#[derive(Debug)]
struct Failing {
    folder: Arc<dyn Backend>,
    operations: Arc<AtomicU64>,
    first_failure: u64,
    fault: Fault,
}

impl Failing {
    fn new(path: &Path, first_failure: u64, fault: Fault) -> Arc<Self> {
        Arc::new(Self { folder: local(path), operations: Arc::default(), first_failure, fault })
    }
}

/// Whether the next operation fails: `None` if not, `Some(true)` if it is the first that does.
fn next(operations: &AtomicU64, first_failure: u64) -> Option<bool> {
    let number = operations.fetch_add(1, Ordering::SeqCst);
    (number >= first_failure).then_some(number == first_failure)
}

fn failure(fault: Fault) -> io::Error {
    match fault {
        Fault::Full => io::ErrorKind::StorageFull.into(),
        Fault::Refuse | Fault::Torn => io::Error::other("the medium is gone"),
    }
}

impl Backend for Failing {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        async move {
            if next(&self.operations, self.first_failure).is_some() {
                return Err(failure(self.fault));
            }
            let upload = self.folder.create(name).await?;
            let operations = Arc::clone(&self.operations);
            let failing = FailingUpload { upload, operations, first_failure: self.first_failure, fault: self.fault };
            Ok(Box::new(failing) as Box<dyn Upload>)
        }
        .boxed()
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
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

    fn local_path(&self, _name: &str) -> Option<PathBuf> {
        // As with a store that is no folder: the way over temporary files is tested too.
        None
    }

    fn location(&self) -> PathBuf {
        self.folder.location()
    }
}

struct FailingUpload {
    upload: Box<dyn Upload>,
    operations: Arc<AtomicU64>,
    first_failure: u64,
    fault: Fault,
}

impl Upload for FailingUpload {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        async move {
            match next(&self.operations, self.first_failure) {
                None => self.upload.write(data).await,
                Some(first) => {
                    if first && self.fault == Fault::Torn {
                        self.upload.write(data.slice(..data.len() / 2)).await?;
                    }
                    Err(failure(self.fault))
                }
            }
        }
        .boxed()
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        async move {
            match next(&self.operations, self.first_failure) {
                None => self.upload.finish().await,
                Some(first) => {
                    if first && self.fault == Fault::Torn {
                        self.upload.finish().await?;
                    }
                    Err(failure(self.fault))
                }
            }
        }
        .boxed()
    }
}

const SIZE: usize = 5 << 20;

fn changed(base: &[u8]) -> (Vec<(u64, Vec<u8>)>, Vec<u8>) {
    let changes = vec![(70_000, noise(91, 400_000)), (1 << 20, noise(92, 900_000)), (3 << 20, noise(93, 1_500_000))];
    let mut content = base.to_vec();
    for (at, bytes) in &changes {
        let at = usize::try_from(*at).unwrap();
        content[at..at + bytes.len()].copy_from_slice(bytes);
    }
    (changes, content)
}

/// A second backup; fails as the backend does.
async fn second(
    repository: &Repository,
    base: DiskMapRef,
    changes: &[(u64, Vec<u8>)],
) -> Result<(PointId, DiskMapRef), StoreError> {
    let writer = repository.writer(WriterOptions { threads: 2, ..Default::default() }).await?;
    let mut disk = writer.disk(DiskOptions { virtual_size: base.virtual_size, base: Some(base) }).await?;
    for (at, bytes) in changes {
        disk.write(*at, Bytes::copy_from_slice(bytes)).await?;
    }
    let map = disk.finish().await?.map;
    let config = writer.put_blob(b"second").await?;
    Ok((writer.publish(manifest(&[map], config)).await?, map))
}

async fn check_fault_everywhere(fault: Fault) {
    let original = common::tempdir();
    let first = small_packs(original.path()).await;
    let base_content = noise(90, SIZE);
    let (first_id, base) = back_up(&first, &base_content).await;
    let (changes, content) = changed(&base_content);

    let (mut number, mut failures) = (0, 0);
    loop {
        let folder = common::tempdir();
        common::fs::copy_all(original.path(), folder.path()).unwrap();
        let failing = first.reopen_on(Failing::new(folder.path(), number, fault)).unwrap();
        let outcome = second(&failing, base, &changes).await;
        drop(failing);

        let repository = first.reopen_on(local(folder.path())).unwrap();
        let listing = repository.points(&Default::default()).await.unwrap();
        assert!(listing.damaged.is_empty(), "{number}: {:?}", listing.damaged);
        assert!(listing.points.iter().any(|point| point.id == first_id), "{number}");
        for point in &listing.points {
            let point = repository.point(&point.id).await.unwrap();
            let expected = if point.id == first_id { &base_content } else { &content };
            assert!(read_disk(&repository, &point.disks[0].map).await == *expected, "{number}");
            repository.blob(&point.vm_config).await.unwrap();
        }
        match outcome {
            Ok((id, _)) => {
                assert!(listing.points.iter().any(|point| point.id == id));
                break;
            }
            Err(error) => {
                failures += 1;
                assert_eq!(error.retry(), Retry::Later, "{number}: {error}");
                assert_eq!(matches!(error, StoreError::Full { .. }), fault == Fault::Full, "{number}: {error}");
                let (_, map) = second(&repository, base, &changes).await.unwrap();
                assert!(read_disk(&repository, &map).await == content, "{number}");
                let left = common::objects(folder.path(), "tmp").len();
                let before = common::objects(original.path(), "tmp").len();
                assert_eq!(left, before, "{number}: temporary files are left");
            }
        }
        number += 1;
    }
    assert!(failures > 15, "only {failures} operations could fail");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_medium_that_fails_at_any_operation_leaves_every_point_whole() {
    check_fault_everywhere(Fault::Refuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_operation_leaves_every_point_whole() {
    check_fault_everywhere(Fault::Torn).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_medium_is_named_as_such_and_leaves_every_point_whole() {
    check_fault_everywhere(Fault::Full).await;
}

#[tokio::test]
async fn packs_of_a_run_that_was_never_published_are_used_by_the_next() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(5, 8 << 20);
    {
        let writer = writer(&repository).await;
        common::write_disk(&writer, &content).await;
        writer.flush().await.unwrap();
    }
    // Neither does it matter that the index of these packs is lost.
    common::fs::remove_dir_all(folder.path().join("index")).unwrap();
    let next = repository.reopen_on(local(folder.path())).unwrap();
    let writer = writer(&next).await;
    let result = common::write_disk(&writer, &content).await;
    assert_eq!(result.stats.new_bytes, 0);
    assert_eq!(result.stats.new_pages, 0);
    let config = writer.put_blob(b"{}").await.unwrap();
    writer.publish(manifest(&[result.map], config)).await.unwrap();
    assert!(read_disk(&next, &result.map).await == content);
    assert!(!common::objects(folder.path(), "index").is_empty(), "the lost index was not written again");
}

#[tokio::test]
async fn a_disk_that_is_abandoned_half_way_takes_nothing_from_the_others() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(6, 6 << 20);
    let writer = writer(&repository).await;
    let mut abandoned = writer.disk(DiskOptions { virtual_size: SIZE as u64 * 2, base: None }).await.unwrap();
    // Polled once and dropped, again and again, with the content that the other disk needs.
    for at in 0..6 {
        let piece = Bytes::copy_from_slice(&content[at << 20..(at + 1) << 20]);
        let _ = abandoned.write((at as u64) << 20, piece).now_or_never();
    }
    assert!(matches!(abandoned.finish().await, Err(StoreError::Misuse { .. })));
    let result = common::write_disk(&writer, &content).await;
    let config = writer.put_blob(b"{}").await.unwrap();
    writer.publish(manifest(&[result.map], config)).await.unwrap();
    assert!(read_disk(&repository.reopen_on(local(folder.path())).unwrap(), &result.map).await == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_share_a_repository_without_knowing_of_each_other() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let runs = (0..4_u64).map(|number| {
        let repository = repository.reopen_on(local(folder.path())).unwrap();
        tokio::spawn(async move {
            // Half of the content is shared, so that the same chunks are stored at the same time.
            let content = [noise(7, 2 << 20), noise(100 + number, 2 << 20)].concat();
            let (id, map) = back_up(&repository, &content).await;
            (id, map, content)
        })
    });
    let done = futures::future::join_all(runs).await;
    let repository = repository.reopen_on(local(folder.path())).unwrap();
    assert_eq!(repository.points(&Default::default()).await.unwrap().points.len(), 4);
    for run in done {
        let (id, map, content) = run.unwrap();
        assert_eq!(repository.point(&id).await.unwrap().disks[0].map, map);
        assert!(read_disk(&repository, &map).await == content);
    }
}

#[tokio::test]
async fn a_reader_finds_what_others_publish_after_it_was_opened() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let reader = repository.reopen_on(local(folder.path())).unwrap();
    for seed in 0..3 {
        let content = noise(seed, 1 << 20);
        let (_, map) = back_up(&repository, &content).await;
        assert!(read_disk(&reader, &map).await == content);
        write_changes(&writer(&reader).await, 1 << 20, map, &[(0, noise(50, 100))]).await;
    }
}
