//! What a bad day does: packs that vanish, look-ups that break off, copies that are hurt, two hands on one thing.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::{BLOCK, back_up, local, manifest, noise, objects, read_disk, small_packs, write_disk, writer};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::Notify;
use xenvault_block::ByteRange;
use xenvault_store::backend::{Backend, Upload};
use xenvault_store::{DiskMapRef, DiskOptions, PointManifest, Repository, StoreError};

#[tokio::test]
async fn a_look_up_that_fails_half_way_forgets_no_pack() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(1, 3 << 20);
    let (_, map) = back_up(&repository, &content).await;
    common::fs::remove_dir_all(folder.path().join("index")).unwrap();
    // Each directory takes three reads; the fourth pack can not be read once.
    for number in [1, 10, 12] {
        let probe = Probe::new(folder.path());
        let repository = repository.reopen_on(probe.clone()).unwrap();
        probe.fail_read.store(number, Ordering::SeqCst);
        let error = repository.writer(Default::default()).await.unwrap_err();
        assert!(matches!(error, StoreError::Backend { .. }), "{error}");
        assert!(read_disk(&repository, &map).await == content, "{number}");
    }
}

#[tokio::test]
async fn a_look_up_that_is_dropped_half_way_forgets_no_pack() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(2, 3 << 20);
    let (_, map) = back_up(&repository, &content).await;
    common::fs::remove_dir_all(folder.path().join("index")).unwrap();
    for number in [1, 10, 12] {
        let probe = Probe::new(folder.path());
        let repository = repository.reopen_on(probe.clone()).unwrap();
        probe.stall_read.store(number, Ordering::SeqCst);
        tokio::select! {
            begun = repository.writer(Default::default()) => assert!(begun.is_err(), "it did not wait"),
            () = probe.stalled.notified() => {}
        }
        assert!(read_disk(&repository, &map).await == content, "{number}");
    }
}

#[tokio::test]
async fn an_index_segment_that_can_not_be_read_costs_nothing_but_time() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(3, 1 << 20);
    let (_, map) = back_up(&repository, &content).await;
    let probe = Probe::new(folder.path());
    probe.no_index.store(1, Ordering::SeqCst);
    let repository = repository.reopen_on(probe).unwrap();
    assert!(read_disk(&repository, &map).await == content);
}

#[tokio::test]
async fn an_index_segment_of_no_sane_length_is_not_loaded() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(3, 1 << 20);
    let (_, map) = back_up(&repository, &content).await;
    common::fs::write_monster(&folder.path().join("index/monster")).unwrap();
    for backend in [local(folder.path()), Probe::new(folder.path()) as Arc<dyn Backend>] {
        assert!(read_disk(&repository.reopen_on(backend).unwrap(), &map).await == content);
    }
}

#[tokio::test]
async fn what_a_lost_pack_held_is_stored_again() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(4, 3 << 20);
    let (_, first) = back_up(&repository, &content).await;
    let packs = objects(folder.path(), "packs");
    // For a process that has known the packs, and for one that begins after the loss.
    for (lost, process) in
        [(&packs[1], repository.clone()), (&packs[2], repository.reopen_on(local(folder.path())).unwrap())]
    {
        common::fs::remove_file(lost).unwrap();
        let (id, map) = back_up(&process, &content).await;
        assert_eq!(map, first);
        let reader = repository.reopen_on(local(folder.path())).unwrap();
        assert!(reader.point(&id).await.is_ok());
        assert!(read_disk(&reader, &map).await == content);
    }
}

#[tokio::test]
async fn an_incremental_over_a_base_that_lost_a_pack_fails_and_a_full_heals_it() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(8, 3 << 20);
    let (_, base) = back_up(&repository, &content).await;
    common::fs::remove_file(&objects(folder.path(), "packs")[3]).unwrap();
    let repository = repository.reopen_on(local(folder.path())).unwrap();
    let error = match writer(&repository).await.disk(DiskOptions { virtual_size: 3 << 20, base: Some(base) }).await {
        Err(error) => error,
        // Nothing is written where the loss is, so that only a look at the whole base can tell.
        Ok(disk) => disk.finish().await.unwrap_err(),
    };
    assert!(matches!(error, StoreError::DiskRange { .. } | StoreError::Damaged { .. }), "{error}");
    back_up(&repository, &content).await;
    let result = common::write_changes(&writer(&repository).await, 3 << 20, base, &[(5000, noise(9, 5000))]).await;
    assert_ne!(result.map, base);
}

#[tokio::test]
async fn any_copy_of_a_chunk_will_do() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(5, 2 << 20);
    let (one, other) =
        (repository.reopen_on(local(folder.path())).unwrap(), repository.reopen_on(local(folder.path())).unwrap());
    // Neither knows of the other when it begins.
    let (one_writer, other_writer) = (writer(&one).await, writer(&other).await);
    let map = write_disk(&one_writer, &content).await.map;
    let config = one_writer.put_blob(b"{}").await.unwrap();
    one_writer.publish(manifest(&[map], config)).await.unwrap();
    let of_one = objects(folder.path(), "packs");
    assert_eq!(write_disk(&other_writer, &content).await.map, map);
    let config = other_writer.put_blob(b"{}").await.unwrap();
    other_writer.publish(manifest(&[map], config)).await.unwrap();
    let (first, second): (Vec<_>, Vec<_>) =
        objects(folder.path(), "packs").into_iter().partition(|path| of_one.contains(path));
    assert!(second.len() > 3, "the test needs copies");
    for half in [first, second] {
        let healthy: Vec<_> = half.iter().map(|path| common::fs::read(path).unwrap()).collect();
        for (path, bytes) in half.iter().zip(&healthy) {
            let mut hurt = bytes.clone();
            hurt[64..].iter_mut().for_each(|byte| *byte ^= 0x55);
            common::fs::write(path, hurt).unwrap();
        }
        let reader = repository.reopen_on(local(folder.path())).unwrap();
        assert!(read_disk(&reader, &map).await == content);
        half.iter().zip(healthy).for_each(|(path, bytes)| common::fs::write(path, bytes).unwrap());
    }
}

#[tokio::test]
async fn a_point_is_never_replaced() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (id, map) = back_up(&repository, &noise(6, 100_000)).await;
    let before = repository.point(&id).await.unwrap();
    let writer = writer(&repository).await;
    let config = writer.put_blob(b"other").await.unwrap();
    let again = PointManifest { id, vm_name: "another".to_owned(), ..manifest(&[map], config) };
    let error = writer.publish(again).await.unwrap_err();
    assert!(matches!(error, StoreError::Misuse { .. }), "{error}");
    assert_eq!(repository.point(&id).await.unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_who_make_a_repository_at_once_one_succeeds() {
    let folder = common::tempdir();
    let path = folder.path().join("repository");
    let makers = (0..3).map(|_| {
        let path = path.clone();
        tokio::spawn(async move { common::init(&path, Default::default()).await })
    });
    let mut made = Vec::new();
    for result in futures::future::join_all(makers).await {
        match result.unwrap() {
            Ok(repository) => made.push(repository.id()),
            Err(error) => assert!(matches!(error, StoreError::NotEmpty { .. }), "{error}"),
        }
    }
    assert_eq!(made.len(), 1);
    assert_eq!(common::open(&path).await.unwrap().id(), made[0]);
}

#[tokio::test]
async fn packs_of_others_are_made_durable_before_a_point_leans_on_them() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(7, 2 << 20);
    {
        let abandoned = writer(&repository).await;
        write_disk(&abandoned, &content).await;
        abandoned.flush().await.unwrap();
    }
    let probe = Probe::new(folder.path());
    back_up(&repository.reopen_on(probe.clone()).unwrap(), &content).await;
    let log = probe.log.lock().unwrap().clone();
    let settled = log.iter().position(|line| line.starts_with("settle")).expect("nothing was settled");
    let point = log.iter().position(|line| line.starts_with("create points/")).unwrap();
    assert!(settled < point, "{log:?}");
    for pack in objects(folder.path(), "packs") {
        let name = pack.strip_prefix(folder.path()).unwrap().parent().unwrap().to_str().unwrap().to_owned();
        let ours = log.iter().any(|line| line.starts_with(&format!("create {name}/")));
        assert!(ours || log[settled].contains(&name), "{name} is not in {}", log[settled]);
    }
}

const LEAF: u64 = 16 << 20;

/// First byte, byte after the last, and whether it becomes zero.
type Change = (u64, u64, bool);

/// Data around the borders of leaves, zeros elsewhere.
fn bordered(size: u64) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(size).unwrap()];
    for border in [0, LEAF, 2 * LEAF, size] {
        let start = usize::try_from(border.saturating_sub(300_000)).unwrap() / BLOCK * BLOCK;
        let end = usize::try_from((border + 300_000).min(size)).unwrap();
        let bytes = noise(border + 1, end - start);
        content[start..end].copy_from_slice(&bytes);
    }
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_at_every_kind_of_border_cut_as_a_full_does() {
    let folder = common::tempdir();
    let repository = common::new_repository(folder.path()).await;
    let size = 2 * LEAF + 500_000 + 513;
    let content = bordered(size);
    let (_, base) = back_up(&repository, &content).await;
    let block = BLOCK as u64;
    let mut cases: Vec<(u64, Vec<Change>)> = Vec::new();
    for border in [LEAF, 2 * LEAF] {
        for zero in [false, true] {
            for (before, after) in [(block, 0), (0, block), (block, block), (1, 0), (0, 1), (1, 1), (3 * block, 0)] {
                cases.push((size, vec![(border - before, border + after, zero)]));
            }
            // Adjacent, on both sides of a border, and one after a gap of one block.
            cases.push((
                size,
                vec![
                    (border - 2 * block, border - block, zero),
                    (border - block, border, !zero),
                    (border, border + block, zero),
                    (border + 2 * block, border + 3 * block, !zero),
                ],
            ));
            // Whole leaves and what reaches into them.
            cases.push((size, vec![(border - LEAF, border, zero)]));
            cases.push((size, vec![(border - LEAF - (border - LEAF).min(5), border + 5, zero)]));
        }
    }
    for grown in [0, 1, 3583, block, 70 * LEAF] {
        let end = size + grown;
        for zero in [false, true] {
            cases.push((end, vec![(size - 1, size, zero)]));
            cases.push((end, vec![(size - 600, size, zero)]));
            cases.push((end, vec![(size / block * block, size, zero)]));
            cases.push((end, vec![(end - 1, end, zero)]));
            cases.push((end, vec![(size.min(end - 1), end.min(size + 2 * LEAF), zero)]));
            cases.push((end, vec![]));
        }
    }
    for (size, changes) in cases {
        check_case(&repository, base, &content, size, &changes).await;
    }
}

async fn check_case(repository: &Repository, base: DiskMapRef, content: &[u8], size: u64, changes: &[Change]) {
    let writer = writer(repository).await;
    let mut disk = writer.disk(DiskOptions { virtual_size: size, base: Some(base) }).await.unwrap();
    // The whole is written with its zeros declared, since some of these disks are large.
    let mut model = content.to_vec();
    let written = changes.iter().map(|change| change.1).max().unwrap_or(0).max(content.len() as u64);
    model.resize(usize::try_from(written).unwrap(), 0);
    for &(start, end, zero) in changes {
        let range = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
        if zero {
            model[range].fill(0);
            disk.zero(ByteRange::new(start, end).unwrap()).await.unwrap();
        } else {
            let bytes = noise(start ^ end, range.len());
            model[range].copy_from_slice(&bytes);
            disk.write(start, Bytes::from(bytes)).await.unwrap();
        }
    }
    let map = disk.finish().await.unwrap().map;
    let mut whole = writer.disk(DiskOptions { virtual_size: size, base: None }).await.unwrap();
    whole.write(0, Bytes::from(model.clone())).await.unwrap();
    let full = whole.finish().await.unwrap().map;
    assert_eq!(map, full, "size {size}, changes {changes:?}");
    writer.flush().await.unwrap();
    for &(start, end, _) in changes {
        let from = start.saturating_sub(100_000);
        let range = ByteRange::new(from, (end + 100_000).min(written)).unwrap();
        let read = repository.disk(&map).read_at(range).await.unwrap();
        let at = usize::try_from(from).unwrap();
        assert!(read[..] == model[at..at + read.len()], "size {size}, changes {changes:?}");
    }
}

/// A folder that is no folder to its user, notes what is asked of it, and fails or stalls where it is told to.
#[derive(Debug)]
struct Probe {
    folder: Arc<dyn Backend>,
    reads: AtomicU64,
    /// Number of the read, from 1, that fails; 0 for none.
    fail_read: AtomicU64,
    /// Number of the read that does not return.
    stall_read: AtomicU64,
    stalled: Notify,
    /// Whether index segments can not be read.
    no_index: AtomicU64,
    log: Mutex<Vec<String>>,
}

impl Probe {
    fn new(path: &Path) -> Arc<Self> {
        let (reads, fail_read, stall_read, no_index, log, stalled) = Default::default();
        Arc::new(Self { folder: local(path), reads, fail_read, stall_read, stalled, no_index, log })
    }
}

impl Backend for Probe {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        self.log.lock().unwrap().push(format!("create {name}"));
        self.folder.create(name)
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        async move {
            let number = self.reads.fetch_add(1, Ordering::SeqCst) + 1;
            if number == self.fail_read.load(Ordering::SeqCst) {
                return Err(io::Error::other("a moment of weakness"));
            }
            if number == self.stall_read.load(Ordering::SeqCst) {
                self.stalled.notify_one();
                std::future::pending::<()>().await;
            }
            if self.no_index.load(Ordering::SeqCst) != 0 && name.starts_with("index/") {
                return Err(io::Error::from_raw_os_error(5));
            }
            self.folder.read(name, offset, length).await
        }
        .boxed()
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

    fn settle<'a>(&'a self, folders: &'a [String]) -> BoxFuture<'a, io::Result<()>> {
        self.log.lock().unwrap().push(format!("settle {}", folders.join(" ")));
        self.folder.settle(folders)
    }

    fn local_path(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    fn location(&self) -> PathBuf {
        self.folder.location()
    }
}
