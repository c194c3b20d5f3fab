//! Key slots: several open one repository, none gets lost, and a wrong secret is told apart from damage.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::sync::Arc;

use common::world::{Counts, Dice, Then, World};
use common::{back_up, new_repository, noise, objects, passphrase, read_disk};
use xenvault_store::{
    KdfParams, KeyAccess, NewKey, RecoveryKey, RecoveryKeyError, Repository, Secret, SlotKind, StoreError,
};

fn new_passphrase(text: &str) -> NewKey {
    NewKey::Passphrase(Secret::new(text), KdfParams::default())
}

fn recovery(number: u8) -> NewKey {
    NewKey::Recovery(RecoveryKey::from_bytes([number; 32]))
}

/// What somebody types.
fn typed(number: u8) -> Secret {
    Secret::new(RecoveryKey::from_bytes([number; 32]).to_text().as_bytes())
}

async fn names(repository: &Repository) -> Vec<String> {
    repository.key_slots().await.unwrap().into_iter().map(|slot| slot.name).collect()
}

#[tokio::test]
async fn passphrases_and_recovery_keys_open_the_same_repository() {
    let folder = tempfile::tempdir().unwrap();
    let repository = new_repository(folder.path()).await;
    let content = noise(1, 100_000);
    let (_, map) = back_up(&repository, &content).await;
    let data_before = objects(folder.path(), "packs");

    let second = repository.add_key(&new_passphrase("second"), KeyAccess::Full, "anna").await.unwrap();
    let third = repository.add_key(&recovery(3), KeyAccess::Full, "safe").await.unwrap();
    for secret in [passphrase(), Secret::new("second"), typed(3)] {
        let opened = Repository::open(folder.path(), &secret).await.unwrap();
        assert_eq!((opened.id(), opened.access()), (repository.id(), KeyAccess::Full));
        assert!(read_disk(&opened, &map).await == content);
    }
    let listed = Repository::open(folder.path(), &typed(3)).await.unwrap().key_slots().await.unwrap();
    let mut expected = vec!["1".to_owned(), second.clone(), third.clone()];
    expected.sort();
    assert_eq!(listed.iter().map(|slot| slot.name.clone()).collect::<Vec<_>>(), expected);
    for slot in &listed {
        let summary = slot.slot.as_ref().unwrap();
        let is = |name: &String| slot.name == *name;
        assert_eq!((slot.in_use, summary.kind == SlotKind::Recovery), (is(&third), is(&third)));
        assert_eq!(
            summary.label,
            if is(&second) {
                "anna"
            } else if is(&third) {
                "safe"
            } else {
                ""
            }
        );
    }

    // The second one changes, the first one goes.
    let repository = Repository::open(folder.path(), &Secret::new("second")).await.unwrap();
    repository.change_key(&new_passphrase("changed")).await.unwrap();
    let repository = Repository::open(folder.path(), &Secret::new("changed")).await.unwrap();
    repository.remove_keys(&["1".to_owned()]).await.unwrap();
    for gone in [passphrase(), Secret::new("second")] {
        assert!(matches!(Repository::open(folder.path(), &gone).await, Err(StoreError::WrongPassphrase)));
    }
    assert_eq!(repository.key_slots().await.unwrap().len(), 2);
    let repository = Repository::open(folder.path(), &typed(3)).await.unwrap();
    assert!(read_disk(&repository, &map).await == content);
    assert_eq!(objects(folder.path(), "packs"), data_before, "no data is written again");
}

#[tokio::test]
async fn the_slot_in_use_is_never_removed_and_unknown_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let repository = new_repository(folder.path()).await;
    let other = repository.add_key(&recovery(1), KeyAccess::Full, "").await.unwrap();
    let error = repository.remove_keys(&[other.clone(), "1".to_owned()]).await.unwrap_err();
    assert!(matches!(&error, StoreError::KeySlotInUse { name } if name == "1"), "{error}");
    let error = repository.remove_keys(&[other.clone(), "nothing".to_owned()]).await.unwrap_err();
    assert!(matches!(&error, StoreError::UnknownKeySlot { name } if name == "nothing"), "{error}");
    assert_eq!(names(&repository).await.len(), 2, "nothing was removed");
    repository.remove_keys(&[other.clone(), other]).await.unwrap();
    assert_eq!(names(&repository).await, ["1"]);
}

#[tokio::test]
async fn secrets_that_could_be_mistaken_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let repository = new_repository(folder.path()).await;
    for text in ["", "XVRK-is my passphrase", "xvrk is my passphrase"] {
        let error = repository.add_key(&new_passphrase(text), KeyAccess::Full, "").await.unwrap_err();
        assert!(matches!(error, StoreError::Misuse { .. }), "{error}");
    }
    let error = repository.add_key(&recovery(1), KeyAccess::Full, &"x".repeat(65)).await.unwrap_err();
    assert!(matches!(error, StoreError::Misuse { .. }), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = Repository::init(empty.path(), &Secret::new("XVRK-1"), Default::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::Misuse { .. }), "{error}");
    assert_eq!(names(&repository).await, ["1"]);
}

#[tokio::test]
async fn wrong_mistyped_and_damaged_are_three_things() {
    let folder = tempfile::tempdir().unwrap();
    let repository = new_repository(folder.path()).await;
    let slot = repository.add_key(&recovery(1), KeyAccess::Full, "").await.unwrap();
    let open = async |secret: &Secret| Repository::open(folder.path(), secret).await;

    // Right in form and of another slot.
    assert!(matches!(open(&typed(2)).await, Err(StoreError::WrongPassphrase)));
    let mut text = RecoveryKey::from_bytes([1; 32]).to_text().to_string().into_bytes();
    let at = 5 + 9 * 3;
    text[at] = if text[at] == b'7' { b'8' } else { b'7' };
    match open(&Secret::new(text)).await.unwrap_err() {
        StoreError::RecoveryKey { source } => assert_eq!(source, RecoveryKeyError::Group { group: 4 }),
        other => panic!("{other}"),
    }

    // One slot is damaged: the other one opens, and a secret that opens nothing may be that of the damaged one.
    let path = folder.path().join("keys").join(&slot);
    let intact = std::fs::read(&path).unwrap();
    let mut hurt = intact.clone();
    hurt[100] ^= 1;
    std::fs::write(&path, hurt).unwrap();
    let opened = open(&passphrase()).await.unwrap();
    let listed = opened.key_slots().await.unwrap();
    let damaged: Vec<&str> = listed.iter().filter(|slot| slot.slot.is_err()).map(|slot| slot.name.as_str()).collect();
    assert_eq!(damaged, [slot.as_str()]);
    match open(&typed(1)).await.unwrap_err() {
        error @ StoreError::NoSlotOpens { .. } => assert!(error.to_string().contains(&slot), "{error}"),
        other => panic!("{other}"),
    }
    // A slot of another repository is damage too, whatever opens it.
    let other = tempfile::tempdir().unwrap();
    let foreign = new_repository(other.path()).await.add_key(&recovery(1), KeyAccess::Full, "").await.unwrap();
    std::fs::copy(other.path().join("keys").join(foreign), &path).unwrap();
    assert!(matches!(open(&typed(1)).await.unwrap_err(), StoreError::NoSlotOpens { .. }));
    // What is damaged can be taken away.
    opened.remove_keys(&[slot]).await.unwrap();
    assert!(matches!(open(&typed(1)).await, Err(StoreError::WrongPassphrase)));
    // Without any intact slot it is damage, whatever is given.
    std::fs::write(folder.path().join("keys/1"), "half").unwrap();
    assert!(matches!(open(&passphrase()).await, Err(StoreError::Damaged { .. })));
}

/// A store in memory with a repository that the recovery key 1 opens.
async fn world() -> (Arc<World>, Repository) {
    let (folder, world) = (tempfile::tempdir().unwrap(), World::new(3));
    let repository = new_repository(folder.path()).await;
    repository.add_key(&recovery(1), KeyAccess::Full, "").await.unwrap();
    let repository = Repository::open(folder.path(), &typed(1)).await.unwrap();
    repository.remove_keys(&["1".to_owned()]).await.unwrap();
    world.fill(folder.path());
    (world, repository)
}

async fn opens(world: &Arc<World>, number: u8) -> bool {
    match Repository::open_on(world.process(), &typed(number)).await {
        Ok(_) => true,
        Err(StoreError::WrongPassphrase) => false,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn of_many_who_add_keys_at_once_none_replaces_another() {
    let (world, _) = world().await;
    let adding = (10..20).map(|number| {
        let process = world.process();
        tokio::spawn(async move {
            let repository = Repository::open_on(process, &typed(1)).await.unwrap();
            repository.add_key(&recovery(number), KeyAccess::Full, "").await.unwrap()
        })
    });
    let mut added: Vec<String> = Vec::new();
    for one in adding.collect::<Vec<_>>() {
        added.push(one.await.unwrap());
    }
    added.sort();
    added.dedup();
    assert_eq!(added.len(), 10);
    for number in 10..20 {
        assert!(opens(&world, number).await, "{number}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Add,
    Change,
    Remove,
}

async fn act(act: Act, repository: &Repository, other: &str) -> Result<(), StoreError> {
    match act {
        Act::Add => repository.add_key(&recovery(2), KeyAccess::Full, "").await.map(drop),
        Act::Change => repository.change_key(&recovery(2)).await.map(drop),
        Act::Remove => repository.remove_keys(&[other.to_owned()]).await.map(drop),
    }
}

#[tokio::test]
async fn wherever_a_process_dies_a_key_is_left_that_opens() {
    let (full, repository) = world().await;
    let setup = repository.reopen_on(full.process()).unwrap();
    let other = setup.add_key(&recovery(9), KeyAccess::Full, "").await.unwrap();
    for what in [Act::Add, Act::Change, Act::Remove] {
        for then in [Then::DieBefore, Then::DieAfter, Then::DieInFlight, Then::FailAfter, Then::FailInFlight] {
            for operations in 0.. {
                let world = full.fork();
                let process = world.process();
                let repository = Repository::open_on(process.clone(), &typed(1)).await.unwrap();
                process.plan(operations, then);
                let result = act(what, &repository, &other).await;
                let told = format!("{what:?}, {then:?} at operation {operations}: {result:?}");
                for arrived in [false, true] {
                    if arrived {
                        while world.arrive() {}
                    }
                    let (old, new, second) = (opens(&world, 1).await, opens(&world, 2).await, opens(&world, 9).await);
                    match what {
                        Act::Add => assert!(old && second && (new || result.is_err()), "{told}"),
                        Act::Change => {
                            assert!(second && (old || new), "{told}");
                            assert!(result.is_err() || !old, "{told}");
                        }
                        Act::Remove => assert!(old && !new && (result.is_err() || !second), "{told}"),
                    }
                }
                if !process.has_failed() {
                    result.unwrap();
                    assert!(operations > 5, "only {operations} operations could fail");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn two_who_remove_each_others_slots_do_not_lock_everybody_out() {
    // Each stops before one of its operations, the other one goes through, then the first goes on.
    for operations in 0..12 {
        let (world, repository) = world().await;
        let setup = repository.reopen_on(world.process()).unwrap();
        let first = names(&setup).await.remove(0);
        let second = setup.add_key(&recovery(2), KeyAccess::Full, "").await.unwrap();
        let slow = world.process();
        let one = Repository::open_on(slow.clone(), &typed(1)).await.unwrap();
        let two = Repository::open_on(world.process(), &typed(2)).await.unwrap();
        slow.plan(operations, Then::Pause);
        let going = tokio::spawn(async move { one.remove_keys(&[second]).await });
        tokio::select! {
            () = slow.paused() => {
                // It may be told that its own slot is gone.
                let _ = two.remove_keys(&[first]).await;
                slow.plan(0, Then::Run);
            }
            () = async { while !going.is_finished() { tokio::task::yield_now().await; } } => {}
        }
        let _ = going.await.unwrap();
        let (first, second) = (opens(&world, 1).await, opens(&world, 2).await);
        assert!(first || second, "paused before operation {operations}");
    }
}

/// Random adding, changing and removing by people with several keys, with deaths, against a plain list of who may open.
#[tokio::test]
async fn a_random_life_of_keys_never_locks_out_who_holds_one() {
    let mut dice = Dice(std::env::var("XENVAULT_SEED").map_or(11, |seed| seed.parse().unwrap()));
    let (world, _) = world().await;
    // Keys that must open; those of calls that failed may.
    let (mut holders, mut unsure, mut next) = (vec![1_u8], Vec::new(), 2_u8);
    for step in 0..200 {
        let holder = holders[usize::try_from(dice.next(holders.len() as u64)).unwrap()];
        let process = world.process();
        let repository = Repository::open_on(process.clone(), &typed(holder)).await.unwrap();
        if dice.percent(30) {
            let then = [Then::DieBefore, Then::DieAfter, Then::FailAfter][usize::try_from(dice.next(3)).unwrap()];
            process.plan_counting(Counts::Changes, dice.next(2), then);
        }
        let choice = dice.next(10);
        let result = if choice < 5 && next < 250 && names(&repository).await.len() < 20 {
            let result = repository.add_key(&recovery(next), KeyAccess::Full, "").await.map(drop);
            if result.is_ok() {
                holders.push(next)
            } else {
                unsure.push(next)
            }
            next += 1;
            result
        } else if choice < 8 && next < 250 {
            let result = repository.change_key(&recovery(next)).await.map(drop);
            holders.retain(|one| *one != holder);
            if result.is_ok() {
                holders.push(next);
            } else {
                unsure.extend([holder, next]);
            }
            next += 1;
            result
        } else {
            let slots = names(&repository).await;
            let slot = slots[usize::try_from(dice.next(slots.len() as u64)).unwrap()].clone();
            match repository.remove_keys(&[slot]).await {
                Err(StoreError::KeySlotInUse { .. }) => Ok(()),
                other => other.map(drop),
            }
        };
        assert!(result.is_ok() || process.has_failed(), "step {step}: {result:?}");
        // Who is there now, among all who may be: removing takes one of them, whichever.
        let mut now = Vec::new();
        for number in holders.iter().chain(&unsure) {
            if opens(&world, *number).await {
                now.push(*number);
            }
        }
        let lost: Vec<_> = holders.iter().filter(|one| !now.contains(one)).collect();
        assert!(!now.is_empty() && lost.len() <= usize::from(choice >= 8), "step {step}: lost {lost:?}");
        (holders, unsure) = (now, Vec::new());
    }
    assert!(next > 50);
}
