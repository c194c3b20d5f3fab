//! A process dies, or gets no answer, before and after every single operation of backups, forgetting, sweeps and repairs:
//! what was promised is there and whole, and the next process brings to an end what was begun.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::world::{Then, World};
use common::{manifest, noise, write_disk};
use xenvault_block::ByteRange;
use xenvault_store::{
    DiskMapRef, DiskOptions, InitOptions, PointFilter, PointId, PointManifest, Repository, StoreError, SweepOptions,
    VerifyMode, VerifyOptions, WriterOptions,
};

const GRACE_SECONDS: u64 = 3600;
const SIZE: usize = 400_000;

fn at_once(sweeps: bool) -> SweepOptions {
    let mut options = SweepOptions::default();
    options.grace = Duration::from_secs(GRACE_SECONDS);
    (options.confirm_many, options.dry_run) = (true, !sweeps);
    options.rewrite_below_percent = 100;
    options.writer = WriterOptions { threads: 1, ..WriterOptions::default() };
    options
}

/// A repository with two points that stay, and one that was forgotten.
struct Stage {
    world: Arc<World>,
    keys: Repository,
    staying: Vec<(PointId, DiskMapRef, Vec<u8>)>,
    forgotten: PointId,
}

async fn stage() -> Stage {
    let (folder, world) = (tempfile::tempdir().unwrap(), World::new(7));
    let mut options = InitOptions::default();
    options.pack_target_bytes = 64 * 1024;
    let keys = Repository::init(folder.path(), &common::passphrase(), options).await.unwrap();
    world.fill(folder.path());
    let repository = keys.reopen_on(world.process()).unwrap();
    let shared = noise(1, SIZE / 2);
    let mut points = Vec::new();
    for seed in 2..5 {
        let content = [shared.clone(), noise(seed, SIZE / 2)].concat();
        let writer = repository.writer(WriterOptions::default()).await.unwrap();
        let map = write_disk(&writer, &content).await.map;
        let config = writer.put_blob(b"{}").await.unwrap();
        let point = PointManifest { vm_uuid: format!("vm-{seed}"), ..manifest(&[map], config) };
        points.push((writer.publish(point).await.unwrap(), map, content));
    }
    let (forgotten, _, _) = points.remove(0);
    repository.forget(&[forgotten], "expired").await.unwrap();
    world.pass(2 * GRACE_SECONDS);
    Stage { world, keys, staying: points, forgotten }
}

/// What a process does until it dies.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// An incremental over the first point that stays.
    Backup,
    Forget,
    Undo,
    /// The first half of a sweep, a moment later the second.
    Sweep,
    Repair,
}

async fn act(act: Act, stage: &Stage, world: &World, repository: &Repository) -> Result<(), StoreError> {
    let (first, base, _) = &stage.staying[0];
    match act {
        Act::Backup => {
            let writer = repository.writer(WriterOptions { threads: 1, ..WriterOptions::default() }).await?;
            let mut disk = writer.disk(DiskOptions { virtual_size: SIZE as u64, base: Some(*base) }).await?;
            disk.write(100_000, Bytes::from(noise(9, 90_000))).await?;
            let map = disk.finish().await?.map;
            let config = writer.put_blob(b"second").await?;
            let point = PointManifest { vm_uuid: "vm-3".to_owned(), parent: Some(*first), ..manifest(&[map], config) };
            writer.publish(point).await.map(|_| ())
        }
        Act::Forget => repository.forget(&[*first], "expired").await.map(|_| ()),
        Act::Undo => repository.undo_forget(&[stage.forgotten]).await.map(|_| ()),
        Act::Sweep => {
            repository.sweep(at_once(true)).await?;
            world.pass(GRACE_SECONDS + 1);
            repository.sweep(at_once(true)).await.map(|_| ())
        }
        Act::Repair => repository.repair().await.map(|_| ()),
    }
}

async fn check(stage: &Stage, act: Act, repository: &Repository, what: &str) {
    let listing = repository.points(&PointFilter::default()).await.unwrap();
    assert!(listing.damaged.is_empty() && listing.quarantined.is_empty(), "{what}: {listing:?}");
    let listed: BTreeSet<PointId> = listing.points.iter().map(|point| point.id).collect();
    for (number, (id, map, content)) in stage.staying.iter().enumerate() {
        if number == 0 && matches!(act, Act::Forget) && !listed.contains(id) {
            continue;
        }
        assert!(listed.contains(id), "{what}");
        let read = repository.disk(map).read_at(ByteRange::up_to(map.virtual_size)).await;
        assert!(read.unwrap()[..] == content[..], "{what}");
    }
    // Whatever else is listed is whole too.
    for point in &listing.points {
        let point = repository.point(&point.id).await.unwrap();
        let map = point.disks[0].map;
        repository.disk(&map).read_at(ByteRange::up_to(map.virtual_size)).await.unwrap();
        repository.blob(&point.vm_config).await.unwrap();
    }
}

async fn everywhere(act_of: Act) {
    let stage = stage().await;
    for then in [Then::DieBefore, Then::DieAfter, Then::DieInFlight, Then::FailAfter, Then::FailInFlight] {
        let mut operations = 0;
        loop {
            let what = format!("{act_of:?}, {then:?} at operation {operations}");
            let world = stage.world.fork();
            let process = world.process();
            process.plan(operations, then);
            let repository = stage.keys.reopen_on(process.clone()).unwrap();
            let result = act(act_of, &stage, &world, &repository).await;
            let met = process.has_failed();
            drop(repository);
            let fresh = stage.keys.reopen_on(world.process()).unwrap();
            check(&stage, act_of, &fresh, &what).await;
            // What was under way arrives, before or after the next process has begun its work.
            if operations % 2 == 0 {
                world.arrive();
            }
            match (act_of, act(act_of, &stage, &world, &fresh).await) {
                (_, Ok(())) => {}
                // It was swept, or taken up, by what went before.
                (Act::Undo, Err(StoreError::TooLate { .. } | StoreError::UnknownPoint { .. })) => {}
                (_, Err(error)) => panic!("{what}: {error} ({error:?})"),
            }
            world.arrive();
            for _ in 0..5 {
                world.pass(GRACE_SECONDS + 1);
                fresh.sweep(at_once(true)).await.unwrap();
            }
            let last = stage.keys.reopen_on(world.process()).unwrap();
            check(&stage, act_of, &last, &what).await;
            let mut options = VerifyOptions::default();
            (options.mode, options.write) = (VerifyMode::Full, false);
            let report = last.verify(options).await.unwrap();
            assert!(report.is_clean() && report.unconfirmed.is_empty(), "{what}: {report:?}");
            assert!(last.sweep(at_once(false)).await.unwrap().begun.is_none(), "{what}: something is left");
            if !met {
                assert!(result.is_ok(), "{what}: {result:?}");
                assert!(operations > 3, "only {operations} operations could fail");
                break;
            }
            operations += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_backup_may_die_at_any_operation() {
    everywhere(Act::Backup).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn forgetting_and_taking_back_may_die_at_any_operation() {
    everywhere(Act::Forget).await;
    everywhere(Act::Undo).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_sweep_may_die_at_any_operation() {
    everywhere(Act::Sweep).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_repair_may_die_at_any_operation() {
    everywhere(Act::Repair).await;
}
