//! Backups and restores by accounts with roles, and by sessions that expire under them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::sync::Arc;

use common::{Lab, MIB, data_disk, name, noise};
use xenvault_engine::{BackupRequest, Engine, EngineOptions, RestoreRequest, SrSelector};
use xenvault_sim::{AccountSpec, Role, SimOptions, VmSpec};
use xenvault_xenapi::{ConnectOptions, Session, Trust};

const PASSWORD: &str = "their password";

fn options() -> SimOptions {
    SimOptions {
        hosts: 2,
        vms: vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 4 * MIB))],
        accounts: Role::ALL.iter().map(|role| AccountSpec::new(role.name(), PASSWORD, *role)).collect(),
        ..Default::default()
    }
}

/// A lab whose engine has the session of an account.
async fn lab(role: Role) -> Lab {
    let mut lab = Lab::new(options()).await;
    let trust = Trust::Fingerprint(lab.sim.fingerprint().parse().unwrap());
    let login = ConnectOptions::new(&lab.sim.url(), role.name(), PASSWORD.to_owned(), trust);
    lab.session = Session::login(login).await.unwrap();
    let options = EngineOptions::new(lab.path("state")).with_monitor(Arc::clone(&lab.monitor) as _);
    lab.engine = Engine::open(lab.session.clone(), Some(lab.repository.clone()), options).unwrap();
    lab
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_may_take_snapshots_is_enough_for_backups_and_restores() {
    let lab = lab(Role::VmPowerAdmin).await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 100_000));
    let report = lab.incremental().await;
    assert_eq!(report.disks[0].reason.as_str(), "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
    let mut request = RestoreRequest::new(report.point, SrSelector::Name(lab.sim.srs()[0].name.clone()));
    request.name = Some("copy".into());
    let restored = lab.engine.restore(request).await.unwrap();
    let stored = lab.sim.vdi_read(&restored.disks[0].vdi_uuid, 0, 16 * MIB).unwrap();
    assert!(stored == lab.sim.guest_read("vm-1", "0", 0, 16 * MIB).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_may_only_look_leaves_the_pool_as_it_was_and_says_what_it_lacks() {
    for role in [Role::ReadOnly, Role::VmOperator, Role::VmAdmin] {
        let lab = lab(role).await;
        let error = lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap_err();
        let mut texts = vec![error.to_string()];
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            texts.push(inner.to_string());
            cause = inner.source();
        }
        assert!(texts.iter().any(|text| text.contains("RBAC_PERMISSION_DENIED")), "{}: {texts:?}", role.name());
        assert_eq!(lab.points().await, 0);
        let left: Vec<_> =
            lab.sim.new_objects().into_iter().filter(|(class, ..)| class != "session" && class != "task").collect();
        assert!(left.is_empty(), "{}: {left:?}", role.name());
    }
}

/// Ends all sessions when a call of that name has been made, for the first time since the backup began.
async fn expire_at(method: &str) {
    let lab = Lab::new(options()).await;
    lab.incremental().await;
    lab.write(2 * MIB, &noise(3, 300_000));
    let before = lab.sim.counters().calls.get(method).copied().unwrap_or(0);
    let sim = lab.sim.clone();
    let expired = async {
        while sim.counters().calls.get(method).copied().unwrap_or(0) == before {
            tokio::task::yield_now().await;
        }
        sim.expire_sessions();
    };
    let (report, ()) = tokio::join!(lab.incremental(), expired);
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_whose_session_expires_ends_well_though_it_may_not_remove_tasks_of_the_old_session() {
    let lab = lab(Role::VmPowerAdmin).await;
    let sim = lab.sim.clone();
    let expired = async {
        while sim.counters().calls.get("VM.snapshot").copied().unwrap_or(0) == 0 {
            tokio::task::yield_now().await;
        }
        sim.expire_sessions();
    };
    let (report, ()) = tokio::join!(lab.incremental(), expired);
    lab.assert_equals_guest(&report, "vm-1").await;
    // Finished tasks of the session that has ended are the pool's to collect, after about an hour.
    let left: Vec<_> = lab.sim.new_objects().into_iter().filter(|(class, ..)| class != "session").collect();
    let tasks = left.iter().filter(|(class, ..)| class == "task").count();
    assert!(tasks <= 1 && left.len() == tasks + 1, "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_expires_before_the_snapshot_is_renewed() {
    expire_at("VDI.get_nbd_info").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_expires_at_the_snapshot_is_renewed() {
    expire_at("VM.snapshot").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_expires_when_changes_are_asked_for_is_renewed() {
    expire_at("VDI.list_changed_blocks").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_expires_at_the_clean_up_is_renewed() {
    expire_at("VDI.data_destroy").await;
}
