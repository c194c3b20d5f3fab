//! Locks of objects on a real S3 service: promised, kept, proven, swept.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test ends with a panic, and its helpers too"
)]

mod lock_support;

use bytes::Bytes;
use lock_support::{
    KEEPER, OWNER, SWEEPER, WRITER, ask, back_up, init, locked_bucket, noise, open, place, read, restore,
};
use std::io::ErrorKind;
use std::time::{Duration, Instant};
use xenvault_store::{KeepOptions, PointFilter, StoreError, SweepOptions, VerifyMode, VerifyOptions};

/// Above everything that waits for a lock to end.
const PATIENCE: Duration = Duration::from_secs(240);

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_promised_only_where_one_is_kept() {
    let ceph = locked_bucket("promise");
    ceph.make_bucket("plain", false).unwrap();
    let refused = |error: StoreError| match error {
        StoreError::LockNotKept { source } => source.to_string(),
        other => panic!("{other:?}"),
    };
    let plain = place(OWNER, "plain").await;
    assert!(!plain.oldest_counts());
    refused(init(plain.clone(), "object-lock:compliance:1d").await.unwrap_err());
    assert!(plain.list("").await.unwrap().is_empty(), "nothing is left of a promise that was not given");
    // Who can remove nothing at all has proven nothing.
    let by_writer = place(WRITER, "promise").await;
    assert!(by_writer.oldest_counts());
    let reason = refused(init(by_writer, "object-lock:compliance:1d").await.unwrap_err());
    assert!(reason.contains("proves nothing"), "{reason}");
    let made = init(place(SWEEPER, "promise").await, "object-lock:governance:36h").await.unwrap();
    assert_eq!(made.immutability().to_string(), "object-lock:governance:36h");
    assert_eq!(open(WRITER, "promise").await.immutability(), made.immutability());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_each_name_the_oldest_version_counts() {
    let _ceph = locked_bucket("oldest");
    let place_ = place(OWNER, "oldest").await;
    place_.put_new("records/a", Bytes::from_static(b"first")).await.unwrap();
    assert_eq!(
        place_.put_new("records/a", Bytes::from_static(b"other")).await.unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
    place_.put_new("records/a", Bytes::from_static(b"first")).await.unwrap();
    let (status, _) = ask(OWNER, "DELETE", "oldest/site%20a/records/a", &[], b"");
    assert_eq!(status, 204);
    // Somebody who has seen nothing of this.
    let fresh = place(OWNER, "oldest").await;
    assert_eq!(fresh.list("records").await.unwrap(), ["records/a"]);
    assert_eq!(
        (fresh.length("records/a").await.unwrap(), fresh.read("records/a", 1, 3).await.unwrap()),
        (5, b"irs".to_vec())
    );
    assert_eq!(fresh.later_version("records/a", 1, 100).await.unwrap().unwrap(), b"other");
    assert_eq!(fresh.later_version("records/a", 1, 4).await.unwrap(), None);
    for (offset, length) in [(3, 3), (6, 0), (1 << 40, 1), (0, usize::MAX / 2)] {
        let error = fresh.read("records/a", offset, length).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset} {length}: {error}");
    }
    let disturbed = fresh.disturbed("").await.unwrap();
    assert_eq!((disturbed[0].object.as_str(), disturbed[0].younger, disturbed[0].deletions), ("records/a", 1, 1));
    // Of many who write at once one is the first.
    let tries = (0..8_u8).map(|number| {
        let place = fresh.clone();
        tokio::spawn(async move { place.put_new("sweeps/1/intent", Bytes::from(vec![number; 100])).await })
    });
    let mut winners = 0;
    for attempt in tries {
        winners += usize::from(attempt.await.unwrap().is_ok());
    }
    assert_eq!(winners, 1);
    fresh.remove("records/a").await.unwrap();
    fresh.remove("records/a").await.unwrap();
    assert_eq!(fresh.length("records/a").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(fresh.list("records").await.unwrap().is_empty());
    let (older, now) = (fresh.modified("sweeps/1/intent").await.unwrap(), fresh.now().await.unwrap());
    assert!(now + Duration::from_secs(1) >= older && now.duration_since(older).unwrap_or_default() < PATIENCE);
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_of_several_pages_are_listed_once_each() {
    let _ceph = locked_bucket("pages");
    let place = place(OWNER, "pages").await;
    let mut names: Vec<String> = (0..450).map(|number| format!("points/{:04x}", number * 37 % 65536)).collect();
    // Three versions of each, one name with hundreds, and a name that begins as another one ends.
    for _ in 0..3 {
        for group in names.chunks(16) {
            let writes = group.iter().map(|name| async {
                let mut upload = place.create(name).await?;
                upload.write(Bytes::from_static(b"x")).await?;
                upload.finish().await
            });
            for written in futures::future::join_all(writes).await {
                written.unwrap();
            }
        }
    }
    names.sort_unstable();
    assert_eq!(place.list("points").await.unwrap(), names);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_is_locked_and_the_store_says_so() {
    let _ceph = locked_bucket("proof");
    init(place(SWEEPER, "proof").await, "object-lock:compliance:2d").await.unwrap();
    let writer = open(WRITER, "proof").await;
    let content = noise(1, 2 << 20);
    let point = back_up(&writer, &content).await.unwrap();
    let proof = open(KEEPER, "proof").await.protection(&point).await.unwrap();
    assert!(proof.holds(), "{proof:?}");
    assert!(proof.packs > 4, "{proof:?}");
    // Packs, the point, its receipt, the config, a key slot.
    assert_eq!((proof.objects, proof.compliance, proof.governance), (proof.packs + 4, proof.packs + 4, 0));
    let day = Duration::from_secs(24 * 3600);
    let (_, earliest) = proof.earliest.clone().unwrap();
    assert!(earliest > proof.asked_at + 2 * day && earliest < proof.asked_at + 3 * day);
    // Nobody needs anything yet.
    let kept = open(KEEPER, "proof").await.keep(KeepOptions::default()).await.unwrap();
    assert_eq!((kept.extended, kept.points, kept.packs, kept.missing.len()), (0, 1, proof.packs, 0), "{kept:?}");
    assert!(read(&open(KEEPER, "proof").await, &point).await == content);
    // The same by the program.
    let id = point.to_string();
    let shown = restore(KEEPER, "proof", &["point", "show", &id, "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    let told = &shown["protection"];
    assert_eq!((told["kept"].as_bool(), told["compliance"].as_u64()), (Some(true), Some(proof.objects)), "{shown}");
    assert_eq!(told["immutability"], "object-lock:compliance:2d");
    let kept = restore(KEEPER, "proof", &["keep", "--dry-run"]);
    assert!(kept.code == Some(0) && kept.stdout.contains("0 would be locked for longer"), "{kept:?}");
    let swept = restore(SWEEPER, "proof", &["sweep", "--dry-run"]);
    assert!(swept.code == Some(0), "{swept:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_point_uses_again_is_kept_by_the_keeper_alone() {
    let _ceph = locked_bucket("keeper");
    init(place(SWEEPER, "keeper").await, "object-lock:governance:8s").await.unwrap();
    let content = noise(1, 1 << 20);
    back_up(&open(WRITER, "keeper").await, &content).await.unwrap();
    let old = open(KEEPER, "keeper").await.points(&PointFilter::default()).await.unwrap().points[0].id;
    let first = open(KEEPER, "keeper").await.protection(&old).await.unwrap();
    // A quarter of the period later the margin of the first locks is used up.
    let began = Instant::now();
    while open(KEEPER, "keeper").await.protection(&old).await.unwrap().asked_at
        < first.asked_at + Duration::from_secs(4)
    {
        assert!(began.elapsed() < PATIENCE);
    }
    let point = back_up(&open(WRITER, "keeper").await, &content).await.unwrap();
    let before = open(KEEPER, "keeper").await.protection(&point).await.unwrap();
    let mut options = KeepOptions::default();
    options.dry_run = true;
    let planned = open(KEEPER, "keeper").await.keep(options).await.unwrap();
    assert!(planned.extended >= before.packs - 1, "{planned:?}");
    assert_eq!(open(KEEPER, "keeper").await.protection(&point).await.unwrap().earliest, before.earliest);
    let kept = open(KEEPER, "keeper").await.keep(KeepOptions::default()).await.unwrap();
    assert!(kept.extended >= before.packs - 1 && kept.missing.is_empty(), "{kept:?}");
    let after = open(KEEPER, "keeper").await.protection(&point).await.unwrap();
    let (_, earliest) = after.earliest.clone().unwrap();
    assert!(earliest >= after.promised_until.unwrap(), "{after:?}");
    assert!(earliest > before.earliest.unwrap().1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_leaves_what_is_locked_for_a_later_one_and_removes_versions() {
    let _ceph = locked_bucket("sweeping");
    init(place(SWEEPER, "sweeping").await, "object-lock:governance:6s").await.unwrap();
    let writer = open(WRITER, "sweeping").await;
    let kept_content = noise(1, 1 << 20);
    let (kept, gone) =
        (back_up(&writer, &kept_content).await.unwrap(), back_up(&writer, &noise(2, 1 << 20)).await.unwrap());
    let sweeper = open(SWEEPER, "sweeping").await;
    sweeper.forget(&[gone], "test").await.unwrap();
    let listing = open(WRITER, "sweeping").await.points(&PointFilter::default()).await.unwrap();
    let ids: Vec<_> = listing.points.iter().map(|point| point.id).collect();
    let sweep = || {
        let mut options = SweepOptions::default();
        options.grace = Duration::ZERO;
        options.confirm_many = true;
        async move { open(SWEEPER, "sweeping").await.sweep(options).await.unwrap() }
    };
    // Unless the machine was so slow that the promise has ended, the point is listed and no sweep takes it.
    if listing.promised == [gone] {
        assert!(ids.contains(&gone) && ids.contains(&kept));
    }
    let began = Instant::now();
    let mut waited = 0;
    loop {
        let report = sweep().await;
        if report.ended.as_ref().is_some_and(|ended| ended.removed_points == [gone]) {
            break;
        }
        waited += u64::from(report.promised == [gone]);
        assert!(began.elapsed() < PATIENCE, "{report:?}");
    }
    assert!(waited > 0, "a promise of seconds had ended before the first sweep");
    // Packs of the point go when their own locks end, and nothing stays of them, not even a marker.
    let mut packs = u64::MAX;
    while packs > open(WRITER, "sweeping").await.protection(&kept).await.unwrap().packs + 2 {
        sweep().await;
        packs = place(SWEEPER, "sweeping").await.list("packs").await.unwrap().len() as u64;
        assert!(began.elapsed() < PATIENCE, "{packs}");
    }
    let (_, said) = ask(OWNER, "GET", "sweeping?versions=", &[], b"");
    assert!(!said.contains("<DeleteMarker>"), "{said}");
    let reader = open(WRITER, "sweeping").await;
    assert!(read(&reader, &kept).await == kept_content);
    let mut options = VerifyOptions::default();
    (options.mode, options.write) = (VerifyMode::Full, false);
    let report = reader.verify(options).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    // The writer's credential can not sweep.
    assert!(place(WRITER, "sweeping").await.remove("config").await.is_err());
}
