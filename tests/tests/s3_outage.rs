//! A service that stands still, dies and comes back in the middle of what a repository does.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test ends with a panic, and its helpers too"
)]

mod bucket;

use bucket::{back_up, bucket, must_hold, noise, options, passphrase, repository, sweep};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, block_in_place};
use xenvault_store::Repository;
use xenvault_store::backend::{Backend, Bucket, Patience};
use xenvault_tests::ceph::{Ceph, Medium};

/// Attempts that stand still are soon given up, so that what they carry arrives after the one that succeeds.
const HASTY: Patience = Patience { silence: Duration::from_secs(2), total: Duration::from_secs(240) };

/// How long the service is gone.
const OUTAGE: Duration = Duration::from_secs(5);

fn hasty(ceph: &Ceph) -> Arc<dyn Backend> {
    let mut options = options(ceph, "backups", "one");
    options.patience = HASTY;
    Arc::new(Bucket::s3(&options).unwrap())
}

/// Everything that can happen to it.
const TROUBLES: [fn(&mut Ceph); 4] = [
    |ceph| {
        ceph.stop_gateway().unwrap();
        std::thread::sleep(OUTAGE);
        ceph.start_gateway().unwrap();
    },
    |ceph| ceph.pause_gateway(OUTAGE).unwrap(),
    |ceph| ceph.pause_storage(OUTAGE).unwrap(),
    |ceph| {
        ceph.kill_storage().unwrap();
        std::thread::sleep(OUTAGE);
        ceph.start_storage().unwrap();
    },
];

/// Waits until there are so many more packs, or the work has ended.
async fn until_written<T>(ceph: &Ceph, more: usize, work: &JoinHandle<T>) {
    let watch = bucket(ceph, "one");
    let before = watch.list("packs").await.unwrap().len();
    while watch.list("packs").await.unwrap().len() < before + more && !work.is_finished() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_dies_or_stands_still_in_the_middle_of_a_backup_or_a_sweep_loses_nothing() {
    // What the storage daemon has acknowledged must outlive it.
    let mut ceph = Ceph::start_on(Medium::Disk).unwrap();
    ceph.make_bucket("backups", false).unwrap();
    let kept = repository(bucket(&ceph, "one")).await;
    let content = noise(1, 4 << 20);
    let (id, map) = back_up(&kept, &content).await.unwrap();
    let mut points = vec![(id, map, content)];
    let mut going = Vec::new();

    for (number, trouble) in TROUBLES.iter().enumerate() {
        let what = format!("trouble {number}");
        let writer = kept.reopen_on(hasty(&ceph)).unwrap();
        let content = noise(10 + number as u64, 12 << 20);
        let writing = {
            let content = content.clone();
            tokio::spawn(async move { back_up(&writer, &content).await })
        };
        until_written(&ceph, 4, &writing).await;
        assert!(!writing.is_finished(), "{what}: the backup was over before the trouble began");
        block_in_place(|| trouble(&mut ceph));
        let (id, map) = writing.await.unwrap().unwrap();
        let fresh = Repository::open_on(bucket(&ceph, "one"), &passphrase()).await.unwrap();
        points.push((id, map, content));
        must_hold(&fresh, &points, &what).await;
        going.push(id);
    }

    // The same while a sweep removes a point each time.
    for (number, trouble) in TROUBLES.iter().enumerate() {
        let what = format!("trouble {number} of a sweep");
        let sweeper = kept.reopen_on(hasty(&ceph)).unwrap();
        sweeper.forget(&[going[number]], "expired").await.unwrap();
        points.retain(|(id, ..)| *id != going[number]);
        // Announced now, removed by the next one.
        sweep(&sweeper).await.unwrap();
        let sweeping = tokio::spawn(async move { sweep(&sweeper).await });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(30) && !sweeping.is_finished() {
            tokio::task::yield_now().await;
        }
        block_in_place(|| trouble(&mut ceph));
        sweeping.await.unwrap().unwrap();
        sweep(&kept.reopen_on(bucket(&ceph, "one")).unwrap()).await.unwrap();
        let fresh = Repository::open_on(bucket(&ceph, "one"), &passphrase()).await.unwrap();
        must_hold(&fresh, &points, &what).await;
    }
}
