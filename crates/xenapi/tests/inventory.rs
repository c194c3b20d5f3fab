//! The inventory against the simulated pool: loading, following, outages, new logins, and nothing left behind.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

use std::time::Duration;
use xenvault_sim::{DiskSpec, Fault, FaultEffect, SimOptions, SimPool, VmSpec};
use xenvault_xenapi::inventory::{Change, Freshness, Inventory, InventoryOptions, Snapshot, Update};
use xenvault_xenapi::{ConnectOptions, Session, Trust, host, pool, vbd, vdi, vm};

const LIMIT: Duration = Duration::from_secs(120);

async fn start(vms: usize) -> SimPool {
    let vm = |index| VmSpec::new(&format!("vm-{index}")).disk(DiskSpec::new(8 << 20));
    SimPool::start(SimOptions { vms: (1..=vms).map(vm).collect(), ..SimOptions::default() }).await.unwrap()
}

async fn login(sim: &SimPool) -> Session {
    let trust = Trust::Fingerprint(sim.fingerprint().parse().unwrap());
    let mut options = ConnectOptions::new(&sim.url(), sim.user(), sim.password(), trust);
    options.originator = "inventory-test".to_owned();
    Session::login(options).await.unwrap()
}

fn quick() -> InventoryOptions {
    InventoryOptions {
        wait: Duration::from_secs(1),
        pace: Duration::ZERO,
        retry_pause: Duration::from_millis(20),
        ..InventoryOptions::default()
    }
}

async fn until<T>(inventory: &Inventory, look: impl FnMut(&Snapshot) -> Option<T>) -> T {
    let found = tokio::time::timeout(LIMIT, inventory.wait_until(look)).await;
    match found {
        Ok(found) => found.unwrap(),
        Err(_) => panic!("not seen: {:?}", inventory.status()),
    }
}

fn name_of(snapshot: &Snapshot, vm: &vm::Ref) -> String {
    snapshot.get(vm).map(|record| record.name_label.clone()).unwrap_or_default()
}

fn sessions(sim: &SimPool) -> usize {
    sim.records("session").values().filter(|record| record["originator"] == "inventory-test").count()
}

#[tokio::test]
async fn a_pool_is_loaded_once_and_followed() {
    let sim = start(20).await;
    let session = login(&sim).await;
    let inventory = Inventory::start(&session, quick());
    let snapshot = inventory.ready().await.unwrap();
    assert_eq!(snapshot.all::<vdi::Record>().len(), vdi::get_all(&session).await.unwrap().len());
    assert_eq!(snapshot.all::<vbd::Record>().len(), vbd::get_all(&session).await.unwrap().len());
    for (reference, record) in vm::get_all_records(&session).await.unwrap() {
        assert_eq!(**snapshot.get(&reference).unwrap(), record);
    }
    assert!(snapshot.status().complete);
    let mut changes = inventory.subscribe();
    let vm = vm::get_by_name_label(&session, "vm-3").await.unwrap().remove(0);
    vm::set_name_label(&session, &vm, "renamed").await.unwrap();
    until(&inventory, |now| (name_of(now, &vm) == "renamed").then_some(())).await;
    // What was held does not move.
    assert_eq!(name_of(&snapshot, &vm), "vm-3");
    let told = tokio::time::timeout(LIMIT, async {
        loop {
            if let Some(Update::Change(Change::Vm(delta))) = changes.next().await {
                return delta;
            }
        }
    });
    let delta = told.await.unwrap();
    assert_eq!((delta.before.unwrap().name_label.as_str(), delta.reference), ("vm-3", vm.clone()));
    let disk = snapshot.all::<vbd::Record>().iter().find(|(_, vbd)| vbd.vm == vm).unwrap().1.vdi.clone();
    vdi::destroy(&session, &disk).await.unwrap();
    until(&inventory, |now| now.get(&disk).is_none().then_some(())).await;
    assert_eq!(inventory.status().loads, 1);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x08_lost_events_and_tokens_list_everything_again() {
    for code in ["EVENTS_LOST", "EVENT_FROM_TOKEN_PARSE_FAILURE"] {
        let sim = start(5).await;
        let session = login(&sim).await;
        let inventory = Inventory::start(&session, quick());
        inventory.ready().await.unwrap();
        let mut changes = inventory.subscribe();
        let effect = FaultEffect::Error { code: code.to_owned(), params: Vec::new() };
        sim.fault(Fault::once("event.from", effect));
        until(&inventory, |now| (now.status().loads == 2).then_some(())).await;
        let vm = vm::get_by_name_label(&session, "vm-1").await.unwrap().remove(0);
        vm::set_name_label(&session, &vm, "after").await.unwrap();
        let snapshot = until(&inventory, |now| (name_of(now, &vm) == "after").then(|| now.clone())).await;
        assert_eq!(snapshot.all::<vm::Record>().len(), vm::get_all(&session).await.unwrap().len());
        drop(inventory);
        while let Some(update) = changes.next().await {
            let Update::Change(change) = update else { continue };
            if let Change::Vm(delta) = change {
                assert!(delta.after.is_some(), "{:?} was told to be gone", delta.reference);
            }
        }
        session.logout().await.unwrap();
    }
}

#[tokio::test]
async fn x08_no_vm_is_told_to_be_gone_by_listings_that_fail() {
    let sim = start(5).await;
    let session = login(&sim).await;
    let inventory = Inventory::start(&session, quick());
    let before = inventory.ready().await.unwrap();
    let mut changes = inventory.subscribe();
    // The token is lost, and then listings fail in several ways.
    let error = |code: &str| FaultEffect::Error { code: code.to_owned(), params: Vec::new() };
    for effect in [error("EVENTS_LOST"), error("INTERNAL_ERROR"), FaultEffect::Drop, FaultEffect::DropAfter] {
        sim.fault(Fault::once("event.from", effect));
    }
    sim.fault(Fault::always("event.from", error("DB_UNIQUENESS_CONSTRAINT_VIOLATION")));
    let stale = until(&inventory, |now| match &now.status().freshness {
        Freshness::Stale { since, trouble } => Some((*since, trouble.to_string(), now.clone())),
        _ => None,
    })
    .await;
    assert!(stale.1.contains("the pool says") || stale.1.contains("connection"), "{}", stale.1);
    assert_eq!(stale.2.all::<vm::Record>().len(), before.all::<vm::Record>().len());
    // It comes back by itself, with what happened meanwhile.
    let vm = vm::get_by_name_label(&session, "vm-1").await.unwrap().remove(0);
    let other = vm::get_by_name_label(&session, "vm-2").await.unwrap().remove(0);
    vm::destroy(&session, &other).await.unwrap();
    sim.clear_faults();
    let live = |now: &Snapshot| (now.status().freshness.is_live() && now.get(&other).is_none()).then(|| now.clone());
    let snapshot = until(&inventory, live).await;
    assert!(snapshot.get(&vm).is_some());
    drop(inventory);
    let mut gone = Vec::new();
    while let Some(update) = changes.next().await {
        if let Update::Change(Change::Vm(delta)) = update
            && delta.after.is_none()
        {
            gone.push(delta.reference);
        }
    }
    assert_eq!(gone, [other]);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x08_a_token_of_an_earlier_login_is_not_used_again() {
    let sim = start(3).await;
    let session = login(&sim).await;
    let inventory = Inventory::start(&session, quick());
    inventory.ready().await.unwrap();
    let logins = session.generation();
    sim.fault(Fault::once(
        "pool.get_all",
        FaultEffect::Error { code: "SESSION_INVALID".to_owned(), params: Vec::new() },
    ));
    pool::get_all(&session).await.unwrap();
    assert_eq!(session.generation(), logins + 1);
    until(&inventory, |now| (now.status().loads == 2).then_some(())).await;
    assert!(inventory.snapshot().all::<vm::Record>().len() >= 3);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_dropped_inventory_and_a_logout_leave_nothing() {
    let sim = start(2).await;
    let session = login(&sim).await;
    let inventory = Inventory::start(&session, quick());
    let mut changes = inventory.subscribe();
    inventory.ready().await.unwrap();
    assert!(!inventory.snapshot().all::<host::Record>().is_empty());
    session.logout().await.unwrap();
    let ended = async {
        let mut status = inventory.watch();
        let ended = status.wait_for(|status| matches!(status.freshness, Freshness::Ended)).await;
        ended.is_ok()
    };
    assert!(tokio::time::timeout(LIMIT, ended).await.unwrap());
    assert!(inventory.wait_until(|_| None::<()>).await.is_err());
    drop(inventory);
    while let Some(update) = tokio::time::timeout(LIMIT, changes.next()).await.unwrap() {
        assert!(matches!(update, Update::Change(_)));
    }
    assert_eq!(sessions(&sim), 0);
    // The last handle that was kept by an inventory ends the session.
    let session = login(&sim).await;
    let inventory = Inventory::start(&session, quick());
    drop(session);
    inventory.ready().await.unwrap();
    assert_eq!(sessions(&sim), 1);
    drop(inventory);
    let gone = async {
        while sessions(&sim) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, gone).await.is_ok());
}
