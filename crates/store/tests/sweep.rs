//! Forgetting and sweeping: what goes, what stays, and what is refused.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::world::World;
use common::{back_up, local, manifest, noise, objects, read_disk, small_packs, write_changes, write_disk, writer};
use xenvault_store::{DiskMapRef, PointId, Repository, StoreError, SweepOptions, SweepReport};

/// Everything that can go goes at once.
fn at_once() -> SweepOptions {
    let mut options = SweepOptions::default();
    options.grace = Duration::ZERO;
    options.confirm_many = true;
    options
}

async fn sweep(repository: &Repository) -> SweepReport {
    repository.sweep(at_once()).await.unwrap()
}

async fn listed(repository: &Repository) -> BTreeSet<PointId> {
    let listing = repository.points(&Default::default()).await.unwrap();
    assert!(listing.damaged.is_empty() && listing.quarantined.is_empty(), "{listing:?}");
    listing.points.iter().map(|point| point.id).collect()
}

async fn restores(repository: &Repository, map: &DiskMapRef, content: &[u8]) {
    assert!(read_disk(repository, map).await == content);
    // And for somebody who knows nothing of before.
    let fresh = repository.reopen_on(local(&repository_path(repository))).unwrap();
    assert!(read_disk(&fresh, map).await == content);
}

fn repository_path(repository: &Repository) -> std::path::PathBuf {
    repository.location()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_point_goes_with_what_only_it_needs() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let shared = noise(1, 1 << 20);
    let (first, second) = ([shared.clone(), noise(2, 2 << 20)].concat(), [shared, noise(3, 2 << 20)].concat());
    let (going, _) = back_up(&repository, &first).await;
    let (staying, map) = back_up(&repository, &second).await;
    let packs = objects(folder.path(), "packs").len();

    let report = repository.forget(&[going, going], "expired").await.unwrap();
    assert_eq!(report.changed, [going]);
    assert_eq!(listed(&repository).await, BTreeSet::from([staying]));
    let listing = repository.points(&Default::default()).await.unwrap();
    assert_eq!(listing.forgotten[0].id, going);
    assert_eq!(objects(folder.path(), "packs").len(), packs, "forgetting removes nothing");

    let report = sweep(&repository).await;
    let ended = report.ended.unwrap();
    assert_eq!(ended.removed_points, [going]);
    assert!(ended.removed_packs >= 5 && ended.removed_bytes > 1_500_000, "{ended:?}");
    assert!(objects(folder.path(), "packs").len() <= packs - 4);
    assert!(matches!(repository.point(&going).await, Err(StoreError::UnknownPoint { .. })));
    restores(&repository, &map, &second).await;
    // What has become pointless goes with the following sweeps, and then there is nothing to do any more.
    sweep(&repository).await;
    sweep(&repository).await;
    let report = sweep(&repository).await;
    assert!(report.begun.is_none() && report.ended.is_none(), "{report:?}");
    assert_eq!(objects(folder.path(), "records").len(), 1, "one receipt");
    restores(&repository, &map, &second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_forgotten_comes_back_until_a_sweep_takes_it() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(4, 1 << 20);
    let (id, map) = back_up(&repository, &content).await;
    back_up(&repository, &noise(5, 1 << 20)).await;
    repository.forget(&[id], "a mistake").await.unwrap();
    assert_eq!(repository.undo_forget(&[id]).await.unwrap().changed, [id]);
    assert_eq!(repository.undo_forget(&[id]).await.unwrap().unchanged, [id]);
    assert!(listed(&repository).await.contains(&id));
    sweep(&repository).await;
    sweep(&repository).await;
    sweep(&repository).await;
    assert!(listed(&repository).await.contains(&id));
    restores(&repository, &map, &content).await;
    assert_eq!(objects(folder.path(), "records").len(), 2, "two receipts");

    // Again, and for good; it is too late from the announcement on.
    repository.forget(&[id], "expired").await.unwrap();
    let mut slow = at_once();
    slow.grace = Duration::from_secs(3600);
    let report = repository.sweep(slow.clone()).await.unwrap();
    assert_eq!(report.begun.unwrap().points, [id]);
    let (number, left) = report.waiting.unwrap();
    assert!(number > 1 && left <= Duration::from_secs(3600) && left > Duration::from_secs(3000));
    assert!(matches!(repository.undo_forget(&[id]).await, Err(StoreError::TooLate { .. })));
    // Nothing is removed before the time has come, whatever the next call asks for.
    assert_eq!(repository.sweep(at_once()).await.unwrap().waiting.unwrap().0, number);
    restores(&repository, &map, &content).await;
    let unknown = PointId::random();
    assert!(matches!(repository.forget(&[unknown], "").await, Err(StoreError::UnknownPoint { .. })));
    assert!(matches!(repository.undo_forget(&[unknown]).await, Err(StoreError::UnknownPoint { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_what_would_go_and_changes_nothing() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (id, _) = back_up(&repository, &noise(6, 1 << 20)).await;
    back_up(&repository, &noise(7, 1 << 20)).await;
    repository.forget(&[id], "expired").await.unwrap();
    let before = objects(folder.path(), "");
    let mut options = at_once();
    options.dry_run = true;
    let report = repository.sweep(options).await.unwrap();
    let begun = report.begun.unwrap();
    assert!(report.dry_run && report.ended.is_none());
    assert_eq!((begun.points, begun.packs >= 3, begun.carry_bytes < 100), (vec![id], true, true));
    assert_eq!(objects(folder.path(), ""), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_that_are_mostly_dead_are_rewritten_within_the_budget() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    // Each second chunk of the first disk is in the second one too, so that each pack is needed in part.
    let piece = 16 * common::BLOCK;
    let first = noise(8, 48 * piece);
    let second: Vec<u8> = first.chunks(piece).step_by(4).flatten().copied().collect();
    let (going, _) = back_up(&repository, &first).await;
    let (_, map) = back_up(&repository, &second).await;
    repository.forget(&[going], "expired").await.unwrap();

    let mut frugal = at_once();
    frugal.rewrite_budget_bytes = 0;
    let ended = repository.sweep(frugal).await.unwrap().ended.unwrap();
    assert_eq!(ended.carried_bytes, 0);
    let packs = objects(folder.path(), "packs").len();
    let report = sweep(&repository).await;
    let ended = report.ended.unwrap();
    assert!(ended.carried_bytes > 0 && ended.carried_bytes < second.len() as u64 + 100_000, "{ended:?}");
    assert!(ended.removed_bytes > 2 * ended.carried_bytes, "{ended:?}");
    assert!(objects(folder.path(), "packs").len() < packs);
    restores(&repository, &map, &second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_points_at_once_need_a_confirmation() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let mut ids = Vec::new();
    for seed in 0..10 {
        ids.push(back_up(&repository, &noise(100 + seed, 50_000)).await.0);
    }
    repository.forget(&ids[..3], "expired").await.unwrap();
    let mut careful = at_once();
    careful.confirm_many = false;
    let error = repository.sweep(careful.clone()).await.unwrap_err();
    assert!(matches!(error, StoreError::TooManyPoints { going: 3, total: 10 }), "{error}");
    repository.undo_forget(&ids[2..3]).await.unwrap();
    assert_eq!(repository.sweep(careful).await.unwrap().ended.unwrap().removed_points.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_is_gone_and_that_nobody_forgot_ends_the_sweep() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (gone, _) = back_up(&repository, &noise(9, 100_000)).await;
    let (kept, map) = back_up(&repository, &noise(10, 100_000)).await;
    let object = objects(folder.path(), "points").into_iter().find(|path| path.ends_with(gone.to_string())).unwrap();
    common::fs::remove_file(object).unwrap();
    let error = repository.sweep(at_once()).await.unwrap_err();
    assert!(matches!(error, StoreError::PointGone { .. }) && error.to_string().contains(&gone.to_string()), "{error}");
    // It is accepted as lost, or it is forgotten.
    repository.forget(&[gone], "it was removed by hand").await.unwrap();
    sweep(&repository).await;
    sweep(&repository).await;
    assert_eq!(listed(&repository).await, BTreeSet::from([kept]));
    restores(&repository, &map, &noise(10, 100_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_can_not_be_read_ends_the_sweep_until_it_is_forgotten() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (hurt, _) = back_up(&repository, &noise(11, 100_000)).await;
    let (_, map) = back_up(&repository, &noise(12, 100_000)).await;
    let object = objects(folder.path(), "points").into_iter().find(|path| path.ends_with(hurt.to_string())).unwrap();
    let mut bytes = common::fs::read(&object).unwrap();
    bytes[100] ^= 1;
    common::fs::write(&object, bytes).unwrap();
    let error = repository.sweep(at_once()).await.unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }) && error.to_string().contains(&hurt.to_string()), "{error}");
    repository.forget(&[hurt], "damaged").await.unwrap();
    assert_eq!(sweep(&repository).await.ended.unwrap().removed_points, [hurt]);
    restores(&repository, &map, &noise(12, 100_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_of_killed_runs_go_when_they_are_old_enough() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (_, map) = back_up(&repository, &noise(13, 100_000)).await;
    let packs = objects(folder.path(), "packs");
    {
        let abandoned = writer(&repository).await;
        write_disk(&abandoned, &noise(14, 2 << 20)).await;
        abandoned.flush().await.unwrap();
    }
    let mut patient = at_once();
    patient.grace = Duration::from_secs(3600);
    let report = repository.sweep(patient).await.unwrap();
    assert!(report.begun.is_none(), "the writer of young packs may be at work: {report:?}");
    let abandoned = objects(folder.path(), "packs").len() - packs.len();
    assert!(abandoned > 3, "{abandoned}");
    assert_eq!(sweep(&repository).await.ended.unwrap().removed_packs, abandoned as u64);
    assert_eq!(objects(folder.path(), "packs"), packs);
    restores(&repository, &map, &noise(13, 100_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_swept_under_heals_what_is_condemned() {
    let (folder, world) = (common::tempdir(), World::new(1));
    let keys = small_packs(folder.path()).await;
    let repository = keys.reopen_on(world.process()).unwrap();
    let content = noise(15, 2 << 20);
    let (old, base) = back_up(&repository, &content).await;
    back_up(&repository, &noise(16, 100_000)).await;
    let other = keys.reopen_on(world.process()).unwrap();
    // A full that finds all its chunks known, and an incremental over the point that goes.
    let (full, incremental) = (writer(&other).await, writer(&other).await);
    let map = write_disk(&full, &content).await.map;
    let changes = [(70_000, noise(17, 100_000))];
    let changed = write_changes(&incremental, 2 << 20, base, &changes).await.map;
    repository.forget(&[old], "expired").await.unwrap();
    let mut options = at_once();
    options.grace = Duration::from_secs(3600);
    let packs = world.names("packs");
    world.pass(2 * 3600);
    let report = repository.sweep(options.clone()).await.unwrap();
    assert!(report.begun.unwrap().packs >= 5 && report.ended.is_none());
    for (writer, map) in [(full, map), (incremental, changed)] {
        let config = writer.put_blob(b"{}").await.unwrap();
        let point = manifest(&[map], config);
        writer.publish(xenvault_store::PointManifest { parent: Some(old), ..point }).await.unwrap();
    }
    world.pass(3600);
    let ended = repository.sweep(options).await.unwrap().ended.unwrap();
    assert_eq!(ended.removed_points, [old]);
    assert!(ended.carried_bytes < 1000, "the writers have seen to it themselves: {ended:?}");
    assert!(world.names("packs").iter().filter(|pack| packs.contains(*pack)).count() < packs.len() / 2);
    let mut expected = content.clone();
    expected[70_000..170_000].copy_from_slice(&changes[0].1);
    let fresh = keys.reopen_on(world.process()).unwrap();
    for repository in [&repository, &other, &fresh] {
        assert!(read_disk(repository, &map).await == content);
        assert!(read_disk(repository, &changed).await == expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_comes_too_late_has_failed_and_leaves_no_point() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(18, 1 << 20);
    let (old, _) = back_up(&repository, &content).await;
    let (kept, _) = back_up(&repository, &noise(19, 100_000)).await;
    let other = repository.reopen_on(local(folder.path())).unwrap();
    let late = writer(&other).await;
    let map = write_disk(&late, &content).await.map;
    let config = late.put_blob(b"late").await.unwrap();
    repository.forget(&[old], "expired").await.unwrap();
    sweep(&repository).await;
    let error = late.publish(manifest(&[map], config)).await.unwrap_err();
    assert!(matches!(error, StoreError::Overtaken { .. }), "{error}");
    assert_eq!(error.retry(), xenvault_store::Retry::Later);
    assert_eq!(listed(&repository).await, BTreeSet::from([kept]));
    // And the same job again succeeds.
    let (_, map) = back_up(&other, &content).await;
    restores(&repository, &map, &content).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_whose_put_came_after_the_sweep_is_in_quarantine() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let content = noise(20, 1 << 20);
    let (late, _) = back_up(&repository, &content).await;
    let (kept, map) = back_up(&repository, &noise(21, 200_000)).await;
    // As if the answer to the PUT had been lost, and the PUT with it, until now.
    let object = objects(folder.path(), "points").into_iter().find(|path| path.ends_with(late.to_string())).unwrap();
    let bytes = common::fs::read(&object).unwrap();
    common::fs::remove_file(&object).unwrap();
    common::fs::remove_file(folder.path().join(format!("records/receipts/{late}"))).unwrap();
    let fine = objects(folder.path(), "points").remove(0);
    let fine_receipt = folder.path().join(format!("records/receipts/{kept}"));
    let receipt = common::fs::read(&fine_receipt).unwrap();
    sweep(&repository).await;
    common::fs::write(&object, bytes).unwrap();
    let listing = repository.points(&Default::default()).await.unwrap();
    assert_eq!(listing.quarantined.iter().map(|point| point.id).collect::<Vec<_>>(), [late]);
    assert_eq!(listing.points.iter().map(|point| point.id).collect::<Vec<_>>(), [kept]);
    let report = sweep(&repository).await;
    assert_eq!((report.quarantined, report.released), (vec![late], vec![]));
    // One that lost nothing but its receipt is let out again.
    common::fs::remove_file(&fine_receipt).unwrap();
    assert_eq!(repository.points(&Default::default()).await.unwrap().quarantined.len(), 2);
    let report = sweep(&repository).await;
    assert_eq!((report.quarantined, report.released), (vec![late], vec![kept]));
    assert!(common::fs::exists(&fine) && common::fs::exists(&fine_receipt) && !receipt.is_empty());
    restores(&repository, &map, &noise(21, 200_000)).await;
    repository.forget(&[late], "incomplete").await.unwrap();
    sweep(&repository).await;
    assert_eq!(listed(&repository).await, BTreeSet::from([kept]));
}

#[tokio::test(flavor = "multi_thread")]
async fn index_segments_of_many_runs_become_few() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let mut points = Vec::new();
    for seed in 0..20 {
        let content = noise(200 + seed, 70_000);
        points.push((back_up(&repository, &content).await.1, content));
    }
    assert_eq!(objects(folder.path(), "index").len(), 20);
    let reader = repository.reopen_on(local(folder.path())).unwrap();
    assert!(read_disk(&reader, &points[0].0).await == points[0].1);
    assert_eq!(sweep(&repository).await.replaced_segments, 20);
    assert_eq!(objects(folder.path(), "index").len(), 1);
    for (map, content) in &points {
        restores(&repository, map, content).await;
        assert!(read_disk(&reader, map).await == *content, "somebody who has the old ones open reads on");
    }
    let (_, map) = back_up(&reader, &noise(300, 70_000)).await;
    restores(&repository, &map, &noise(300, 70_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_sweeps_at_once_one_is_refused() {
    let folder = common::tempdir();
    let repository = small_packs(folder.path()).await;
    let (going, _) = back_up(&repository, &noise(22, 1 << 20)).await;
    let (_, map) = back_up(&repository, &noise(23, 1 << 20)).await;
    repository.forget(&[going], "expired").await.unwrap();
    let sweeps = (0..3).map(|_| {
        let repository = repository.reopen_on(local(folder.path())).unwrap();
        tokio::spawn(async move { repository.sweep(at_once()).await })
    });
    let mut removed = 0;
    for result in futures::future::join_all(sweeps).await {
        match result.unwrap() {
            Ok(report) => removed += usize::from(report.ended.is_some()),
            Err(StoreError::SweepTaken { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(removed >= 1);
    restores(&repository, &map, &noise(23, 1 << 20)).await;
    sweep(&repository).await;
    restores(&repository, &map, &noise(23, 1 << 20)).await;
}
