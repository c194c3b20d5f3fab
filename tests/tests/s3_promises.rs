//! What a service promises is tried before it is believed.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test ends with a panic, and its helpers too"
)]

mod bucket;

use bucket::{at, back_up, bucket, ceph, must_hold, noise, options, passphrase, repository, sweep};
use std::sync::Arc;
use xenvault_store::backend::{Backend, Bucket};
use xenvault_store::{InitOptions, Repository, StoreError};
use xenvault_tests::liar::{Liar, Lie};

async fn make_at(liar: &Liar) -> Result<Repository, StoreError> {
    let place = Bucket::s3(&at(&liar.endpoint(), "backups", "a/b")).unwrap();
    Repository::init_on(Arc::new(place), &passphrase(), InitOptions::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_ignores_conditions_is_seen_through() {
    for (lie, keeps) in [(Lie::None, true), (Lie::Conditions, false), (Lie::Races, false)] {
        let liar = Liar::start(lie).unwrap();
        let repository = make_at(&liar).await.unwrap();
        let place = repository.place();
        assert_eq!(place.conditional_put, keeps, "{lie:?}");
        assert_eq!((place.versioned, place.immutability.to_string().as_str()), (false, "none"), "{lie:?}");
        assert_eq!(place.service.as_deref(), Some("s3://backups/a/b"));
        // Nothing of the trial is left, and it is remembered.
        let left: Vec<String> = liar.names().into_iter().filter(|name| name.contains("probe")).collect();
        assert!(left.is_empty(), "{left:?}");
        let again = Bucket::s3(&at(&liar.endpoint(), "backups", "a/b")).unwrap();
        let again = Repository::open_on(Arc::new(again), &passphrase()).await.unwrap();
        assert_eq!(again.place(), place);
        // The repository itself needs none of it.
        let content = noise(5, 1 << 20);
        let (id, map) = back_up(&again, &content).await.unwrap();
        must_hold(&repository, &[(id, map, content)], &format!("{lie:?}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_does_not_keep_what_every_repository_needs_is_refused() {
    for lie in [Lie::Listings, Lie::Stale, Lie::Removals] {
        let liar = Liar::start(lie).unwrap();
        let error = make_at(&liar).await.unwrap_err();
        assert!(matches!(error, StoreError::Unfit { .. }), "{lie:?}: {error:?}");
        assert!(!liar.names().iter().any(|name| name.ends_with("/config")), "{lie:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_of_ceph_that_keeps_versions_ignores_conditions_and_is_used_all_the_same() {
    let ceph = ceph();
    let plain = repository(bucket(&ceph, "one")).await.place();
    assert!(plain.conditional_put && !plain.versioned, "{plain:?}");
    for (name, lock) in [("versions", false), ("locks", true)] {
        ceph.make_bucket(name, lock).unwrap();
        if !lock {
            ceph.keep_versions(name).unwrap();
        }
        let place: Arc<dyn Backend> = Arc::new(Bucket::s3(&options(&ceph, name, "one")).unwrap());
        let repository = repository(Arc::clone(&place)).await;
        let found = repository.place();
        assert!(found.versioned && !found.conditional_put, "{name}: {found:?}");
        let (first, second) = (noise(1, 1 << 20), noise(2, 1 << 20));
        let (going, _) = back_up(&repository, &first).await.unwrap();
        let (id, map) = back_up(&repository, &second).await.unwrap();
        repository.forget(&[going], "expired").await.unwrap();
        for _ in 0..3 {
            sweep(&repository).await.unwrap();
        }
        let fresh = Repository::open_on(place, &passphrase()).await.unwrap();
        must_hold(&fresh, &[(id, map, second)], name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_moves_to_another_bucket_finds_out_anew_what_that_one_does() {
    let ceph = ceph();
    let from = bucket(&ceph, "one");
    let (id, map, content) = {
        let content = noise(1, 1 << 20);
        let (id, map) = back_up(&repository(Arc::clone(&from)).await, &content).await.unwrap();
        (id, map, content)
    };
    ceph.make_bucket("versions", false).unwrap();
    ceph.keep_versions("versions").unwrap();
    let to: Arc<dyn Backend> = Arc::new(Bucket::s3(&options(&ceph, "versions", "two")).unwrap());
    for name in from.list("").await.unwrap() {
        let length = usize::try_from(from.length(&name).await.unwrap()).unwrap();
        let mut upload = to.create(&name).await.unwrap();
        upload.write(from.read(&name, 0, length).await.unwrap().into()).await.unwrap();
        upload.finish().await.unwrap();
    }
    for _ in 0..2 {
        let moved = Repository::open_on(Arc::clone(&to), &passphrase()).await.unwrap();
        let place = moved.place();
        assert_eq!(place.service.as_deref(), Some("s3://versions/two"));
        assert!(place.versioned && !place.conditional_put, "{place:?}");
        must_hold(&moved, &[(id, map, content.clone())], "moved").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_one_repository_and_none_lies_within_another() {
    let liar = Liar::start(Lie::None).unwrap();
    let at =
        |folder: &str| -> Arc<dyn Backend> { Arc::new(Bucket::s3(&at(&liar.endpoint(), "backups", folder)).unwrap()) };
    let init = async |folder: &str| Repository::init_on(at(folder), &passphrase(), InitOptions::default()).await;
    init("a/b").await.unwrap();
    assert!(matches!(init("a/b").await, Err(StoreError::NotEmpty { .. })));
    assert!(matches!(init("a").await, Err(StoreError::NotEmpty { .. })), "a repository is somewhere below");
    assert!(matches!(init("").await, Err(StoreError::NotEmpty { .. })));
    let error = init("a/b/packs/c").await.unwrap_err();
    let StoreError::Within { repository, .. } = &error else { panic!("{error:?}") };
    assert_eq!(repository.to_str(), Some("s3://backups/a/b"));
    // Beside each other they know nothing of one another, also where one's name begins with the other's.
    init("a/bc").await.unwrap();
    // Something of somebody else.
    let foreign = at("other");
    foreign.put_new("config", bytes::Bytes::from_static(b"[core]\n\trepositoryformatversion = 0\n")).await.unwrap();
    assert!(matches!(init("other").await, Err(StoreError::NotEmpty { .. })));
    assert!(matches!(Repository::open_on(foreign, &passphrase()).await, Err(StoreError::NotARepository { .. })));
    assert!(matches!(Repository::open_on(at("none"), &passphrase()).await, Err(StoreError::NotARepository { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_who_make_a_repository_in_a_bucket_at_once_at_most_one_succeeds() {
    for round in 0..5 {
        let liar = Liar::start(Lie::None).unwrap();
        let made = futures::future::join_all((0..4).map(|_| make_at(&liar))).await;
        let mine: Vec<_> = made.iter().filter_map(|made| made.as_ref().ok()).map(Repository::id).collect();
        let place = Bucket::s3(&at(&liar.endpoint(), "backups", "a/b")).unwrap();
        let opened = Repository::open_on(Arc::new(place), &passphrase()).await.unwrap();
        assert_eq!(mine, [opened.id()], "round {round}");
    }
}
