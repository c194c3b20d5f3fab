//! Every kind of request to the object store fails in every way, between the repository and a real service.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test ends with a panic, and its helpers too"
)]

mod bucket;

use bucket::{at, back_up, ceph, must_hold, noise, read, repository, sweep};
use std::sync::Arc;
use std::time::{Duration, Instant};
use xenvault_store::backend::{Backend, Bucket, BucketFault, Patience};
use xenvault_store::{Repository, Retry, StoreError};
use xenvault_tests::proxy::{Fault, KINDS, Kind, Proxy};

/// What a second attempt mends.
const PASSING: [Fault; 10] = [
    Fault::Answer(409, "OperationAborted"),
    Fault::Answer(429, "SlowDown"),
    Fault::Answer(500, "InternalError"),
    Fault::Answer(503, "ServiceUnavailable"),
    Fault::NoAnswer,
    Fault::HalfOfRequest,
    Fault::LostAnswer,
    Fault::HalfOfAnswer,
    Fault::Silence,
    Fault::Late,
];

fn through(proxy: &Proxy, folder: &str, silence: u64, total: u64) -> Arc<dyn Backend> {
    let mut options = at(&proxy.endpoint(), "backups", folder);
    options.patience = Patience { silence: Duration::from_secs(silence), total: Duration::from_secs(total) };
    Arc::new(Bucket::s3(&options).unwrap())
}

fn folder_of(kind: Kind) -> String {
    format!("{kind:?}").to_lowercase()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_passes_is_repeated_and_nothing_of_it_is_left() {
    let ceph = Arc::new(ceph());
    let tasks = KINDS.map(|kind| {
        let ceph = Arc::clone(&ceph);
        tokio::spawn(async move {
            let folder = folder_of(kind);
            let direct: Arc<dyn Backend> = Arc::new(Bucket::s3(&at(&ceph.endpoint(), "backups", &folder)).unwrap());
            let keys = repository(Arc::clone(&direct)).await;
            let proxy = Proxy::start(ceph.address()).unwrap();
            let content = noise(1, 600_000);
            let (id, map) = back_up(&keys, &content).await.unwrap();
            let mut last = (id, map, content);
            for (number, fault) in PASSING.into_iter().enumerate() {
                let what = format!("{kind:?} {fault:?}");
                let repository = keys.reopen_on(through(&proxy, &folder, 4, 120)).unwrap();
                let times = if matches!(fault, Fault::Silence | Fault::Late) { 1 } else { 2 };
                proxy.plan(kind, fault, times);
                let content = noise(100 + number as u64, 600_000);
                let (id, map) =
                    back_up(&repository, &content).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
                assert!(read(&repository, &map).await == content, "{what}");
                repository.forget(&[last.0], "expired").await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
                for _ in 0..2 {
                    sweep(&repository).await.unwrap_or_else(|error| panic!("{what}: {error:?}"));
                }
                assert_eq!(proxy.relent(), 0, "{what} did not happen");
                last = (id, map, content);
                must_hold(&keys.reopen_on(Arc::clone(&direct)).unwrap(), std::slice::from_ref(&last), &what).await;
            }
        })
    });
    for task in tasks {
        task.await.unwrap();
    }
}

/// A backup, a read and a sweep; the first thing that fails.
async fn everything(repository: &Repository, seed: u64) -> Result<(), StoreError> {
    let content = noise(seed, 300_000);
    let (id, map) = back_up(repository, &content).await?;
    repository.disk(&map).read_at(xenvault_block::ByteRange::up_to(map.virtual_size)).await?;
    repository.forget(&[id], "expired").await?;
    sweep(repository).await?;
    sweep(repository).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lasts_is_told_soon_and_in_plain_words_and_hurts_nothing() {
    let ceph = ceph();
    let proxy = Proxy::start(ceph.address()).unwrap();
    for kind in KINDS {
        let folder = folder_of(kind);
        let direct: Arc<dyn Backend> = Arc::new(Bucket::s3(&at(&ceph.endpoint(), "backups", &folder)).unwrap());
        let keys = repository(Arc::clone(&direct)).await;
        let content = noise(1, 600_000);
        let (id, map) = back_up(&keys, &content).await.unwrap();
        let kept = (id, map, content);
        let mut seed = 10;
        for fault in [
            Fault::Answer(403, "AccessDenied"),
            Fault::Answer(404, "NoSuchBucket"),
            Fault::Answer(500, "InternalError"),
            Fault::Answer(503, "SlowDown"),
            Fault::NoAnswer,
        ] {
            let what = format!("{kind:?} {fault:?}");
            seed += 1;
            let repository = keys.reopen_on(through(&proxy, &folder, 20, 1)).unwrap();
            proxy.plan(kind, fault, u64::MAX);
            let begun = Instant::now();
            let ended = everything(&repository, seed).await;
            assert!(begun.elapsed() < Duration::from_secs(60), "{what} took {:?}", begun.elapsed());
            proxy.relent();
            // A bucket is not given up for gone by an answer that can not say so; the one after it tells.
            let is_doubted = kind == Kind::Head && fault == Fault::Answer(404, "NoSuchBucket");
            match ended {
                Ok(()) => assert!(is_doubted, "{what} went unnoticed"),
                Err(error) => {
                    assert!(!is_doubted, "{what}: {error:?}");
                    let fault_told = error.bucket_fault().unwrap_or_else(|| panic!("{what}: {error:?}"));
                    let (fits, retry) = match fault {
                        Fault::Answer(403, _) => (matches!(fault_told, BucketFault::Denied { .. }), Retry::Never),
                        Fault::Answer(404, _) => (matches!(fault_told, BucketFault::NoBucket { .. }), Retry::Never),
                        Fault::Answer(..) => (matches!(fault_told, BucketFault::Busy { .. }), Retry::Later),
                        _ => (matches!(fault_told, BucketFault::Broken { .. }), Retry::Later),
                    };
                    assert!(fits && error.retry() == retry, "{what}: {error:?}");
                }
            }
            // What was there is there, and the next run goes on.
            let fresh = keys.reopen_on(Arc::clone(&direct)).unwrap();
            everything(&fresh, seed).await.unwrap_or_else(|error| panic!("after {what}: {error:?}"));
            assert!(read(&fresh, &kept.1).await == kept.2, "{what}");
        }
    }
}
