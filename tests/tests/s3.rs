//! The repository on a real S3 service: Ceph's RADOS Gateway.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test ends with a panic, and its helpers too"
)]

mod bucket;

use bucket::{back_up, bucket, ceph, fault, noise, options, passphrase, read, repository};
use bytes::Bytes;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;
use xenvault_store::backend::{Backend, Bucket, BucketFault};
use xenvault_store::{PointFilter, Repository, Secret, StoreError};

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_in_a_bucket_is_written_and_read_by_several() {
    let ceph = ceph();
    let first = repository(bucket(&ceph, "one")).await;
    let content = noise(1, 20 << 20);
    let (point, map) = back_up(&first, &content).await.unwrap();
    // Somebody else, who has nothing but the passphrase.
    let second = Repository::open_on(bucket(&ceph, "one"), &passphrase()).await.unwrap();
    assert_eq!(second.points(&PointFilter::default()).await.unwrap().points[0].id, point);
    assert!(read(&second, &map).await == content);
    // What is there already is not stored again, and what is new is found by the first.
    let mut changed = content.clone();
    changed[5 << 20..(5 << 20) + 100_000].copy_from_slice(&noise(2, 100_000));
    let before = bucket(&ceph, "one").list("packs").await.unwrap().len();
    let (_, newer) = back_up(&second, &changed).await.unwrap();
    let added = bucket(&ceph, "one").list("packs").await.unwrap().len() - before;
    assert!(added <= 4, "{added} packs for a small change");
    assert!(read(&first, &newer).await == changed);
    assert!(read(&first, &map).await == content);
    // Another repository in the same bucket knows nothing of them, and neither does the bucket itself.
    let other = repository(bucket(&ceph, "two")).await;
    assert!(other.points(&PointFilter::default()).await.unwrap().points.is_empty());
    assert!(bucket(&ceph, "").list("packs").await.unwrap().is_empty());
    assert!(matches!(
        Repository::open_on(bucket(&ceph, ""), &passphrase()).await,
        Err(StoreError::NotARepository { .. })
    ));
    assert!(matches!(
        Repository::open_on(bucket(&ceph, "one"), &Secret::new("wrong")).await,
        Err(StoreError::WrongPassphrase)
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_keeps_what_the_repository_asks_of_a_place_for_objects() {
    let ceph = ceph();
    let place = bucket(&ceph, "a folder/with a strange näme");
    assert!(place.list("packs").await.unwrap().is_empty());
    assert_eq!(place.length("packs/none").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(place.read("packs/none", 0, 1).await.unwrap_err().kind(), ErrorKind::NotFound);
    let mut upload = place.create("packs/aa/object").await.unwrap();
    upload.write(Bytes::from_static(b"half")).await.unwrap();
    assert!(place.list("packs").await.unwrap().is_empty());
    upload.write(Bytes::from_static(b" and half")).await.unwrap();
    upload.finish().await.unwrap();
    drop(place.create("packs/aa/never").await.unwrap());
    assert_eq!(place.list("packs").await.unwrap(), ["packs/aa/object"]);
    assert_eq!(place.length("packs/aa/object").await.unwrap(), 13);
    assert_eq!(place.read("packs/aa/object", 5, 3).await.unwrap(), b"and");
    assert_eq!(place.read("packs/aa/object", 13, 0).await.unwrap(), b"");
    for (offset, length) in [(5, 9), (13, 1), (14, 0), (1 << 40, 1), (0, usize::MAX / 2)] {
        let error = place.read("packs/aa/object", offset, length).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{offset} {length}: {error}");
    }
    // Of many who make the same object one succeeds.
    let tries = (0..16_u8).map(|number| {
        let place = Arc::clone(&place);
        tokio::spawn(async move { place.put_new("sweeps/1", Bytes::from(vec![number; 100])).await })
    });
    let mut winners = 0;
    for attempt in tries {
        match attempt.await.unwrap() {
            Ok(()) => winners += 1,
            Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}"),
        }
    }
    assert_eq!(winners, 1);
    let (older, now) = (place.modified("packs/aa/object").await.unwrap(), place.now().await.unwrap());
    assert!(older <= now && now.duration_since(older).unwrap() < Duration::from_secs(3600));
    place.remove("packs/aa/object").await.unwrap();
    place.remove("packs/aa/object").await.unwrap();
    assert!(place.list("packs").await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_of_several_pages_is_complete() {
    let ceph = ceph();
    let place = bucket(&ceph, "many");
    let mut names: Vec<String> = (0..1100).map(|number| format!("points/{:04x}", number * 37 % 65536)).collect();
    for group in names.chunks(16) {
        let writes = group.iter().map(|name| place.put_new(name, Bytes::from_static(b"x")));
        for written in futures::future::join_all(writes).await {
            written.unwrap();
        }
    }
    names.sort_unstable();
    assert_eq!(place.list("points").await.unwrap(), names);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_do_not_fit_and_buckets_that_are_not_there_are_told_apart_from_damage() {
    let ceph = ceph();
    let mut wrong = options(&ceph, "backups", "one");
    wrong.secret_key = "not the secret".to_owned().into();
    let place = Bucket::s3(&wrong).unwrap();
    assert!(matches!(fault(&place).await, BucketFault::WrongSecret { .. }));
    for error in [place.list("points").await.unwrap_err(), place.read("config", 0, 1).await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    }
    let error = Repository::open_on(Arc::new(place), &passphrase()).await.unwrap_err();
    assert!(matches!(error, StoreError::Backend { .. }), "{error:?}");
    assert!(!format!("{error:?}").contains("not the secret"));
    wrong.access_key = "nobody".to_owned();
    assert!(matches!(fault(&Bucket::s3(&wrong).unwrap()).await, BucketFault::UnknownKey { .. }));
    let nowhere = Bucket::s3(&options(&ceph, "no-such-bucket", "")).unwrap();
    assert!(matches!(fault(&nowhere).await, BucketFault::NoBucket { .. }));
    // Nothing may be concluded from it about an object, whatever is asked.
    for error in [nowhere.length("config").await.unwrap_err(), nowhere.read("config", 0, 1).await.unwrap_err()] {
        assert!(error.get_ref().unwrap().is::<BucketFault>() && error.kind() == ErrorKind::Other, "{error}");
    }
    let error = Repository::open_on(Arc::new(nowhere), &passphrase()).await.unwrap_err();
    assert!(matches!(error, StoreError::Backend { .. }), "{error:?}");
}
