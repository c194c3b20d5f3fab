//! Answers that get lost, hosts that are away for a moment, and snapshots that come late: what was made is found, and what
//! nobody needs goes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::time::{Duration, Instant};

use common::{Lab, MIB, data_disk, name, noise};
use serde_json::{Value, json};
use xenvault_engine::{BackupRequest, EngineError, RestoreRequest, SrSelector, SweepOptions};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{Fault, FaultEffect, SimOptions, SrSpec, VmSpec};

/// Generous: the machine may be slow.
const LONG: Duration = Duration::from_secs(120);

async fn lab() -> Lab {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 16 * MIB))];
    Lab::new(SimOptions { hosts: 3, vms, ..Default::default() }).await
}

async fn survives(method: &str, code: &str, reason: Option<&str>) {
    let lab = lab().await;
    if reason.is_some() {
        lab.incremental().await;
    }
    // In an asynchronous call the task says it, and nobody repeats that by itself.
    let effect = FaultEffect::Error { code: code.into(), params: vec!["OpaqueRef:host".into()] };
    lab.sim.fault(Fault::once(method, effect));
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
    if let Some(reason) = reason {
        assert_eq!(report.reason, reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x07_a_member_that_is_away_for_a_moment_is_asked_again_for_the_snapshot() {
    survives("VM.snapshot", "CANNOT_CONTACT_HOST", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x07_a_vm_that_is_busy_at_its_snapshot_is_waited_for() {
    survives("VM.snapshot", "OTHER_OPERATION_IN_PROGRESS", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x07_a_disk_that_is_busy_when_its_changes_are_listed_is_asked_again() {
    survives("VDI.list_changed_blocks", "VDI_IN_USE", Some("changed-blocks")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x07_a_member_that_is_away_when_changes_are_listed_is_asked_again() {
    survives("VDI.list_changed_blocks", "CANNOT_CONTACT_HOST", Some("changed-blocks")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x07_a_disk_that_is_busy_when_tracking_is_switched_on_is_asked_again() {
    let lab = lab().await;
    let effect = FaultEffect::Error { code: "VDI_IN_USE".into(), params: vec!["OpaqueRef:vdi".into()] };
    lab.sim.fault(Fault::once("VDI.enable_cbt", effect));
    let report = lab.incremental().await;
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    lab.assert_clean(1);
}

/// Waits for the first intent of that kind in the journal of a run, and gives the name.
async fn intent(lab: &Lab, what: &str) -> String {
    let deadline = Instant::now() + LONG;
    while Instant::now() < deadline {
        for entry in std::fs::read_dir(lab.path("state/runs")).unwrap().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let found = lines.find(|entry| entry["entry"] == "intend" && entry["what"] == what);
            if let Some(found) = found {
                return found["name"].as_str().unwrap().to_owned();
            }
        }
        tokio::task::yield_now().await;
    }
    panic!("no intent was seen");
}

/// The pool goes on making a disk whose client hung up: it appears after the failed restore has cleaned up.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_appears_after_its_answer_was_lost_is_removed_by_a_sweep() {
    let lab = Lab::new(SimOptions {
        srs: vec![SrSpec::new("first", SrKind::Ext), SrSpec::new("second", SrKind::Ext)],
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB))],
        ..Default::default()
    })
    .await;
    let report = lab.incremental().await;
    lab.sim.fault(Fault::once("VDI.create", FaultEffect::Drop));
    let restore = lab.engine.restore(RestoreRequest::new(report.point, SrSelector::Name("second".into())));
    let (result, name) = tokio::join!(restore, intent(&lab, "vdi"));
    result.unwrap_err();
    let sr = lab.sim.records("SR").into_iter().find(|(_, sr)| sr["name_label"] == "second").unwrap().0;
    let record = json!({
        "name_label": name, "name_description": "", "SR": sr, "virtual_size": 8 * MIB, "type": "user",
        "sharable": false, "read_only": false, "other_config": {}, "xenstore_data": {}, "sm_config": {}, "tags": []
    });
    // A sweep in between does not make us forget that there may be something.
    lab.engine.sweep(SweepOptions::default()).await.unwrap();
    let late = lab.call("VDI.create", &[record]).await;
    lab.engine.sweep(SweepOptions::default()).await.unwrap();
    assert!(!lab.sim.records("VDI").contains_key(late.as_str().unwrap()), "the disk is left for ever");
}

/// Takes one more snapshot under the name of the run's own, once the run reads.
async fn second_snapshot(lab: &Lab, sent_before: u64) {
    let deadline = Instant::now() + LONG;
    while lab.nbd_sent() < sent_before + MIB {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    let (_, ours) = lab.sim.records("VM").into_iter().find(|(_, vm)| vm["is_a_snapshot"] == true).unwrap();
    let vm = lab.sim.records("VM").into_iter().find(|(_, vm)| vm["name_label"] == "vm-1").unwrap().0;
    lab.call("VM.snapshot", &[json!(vm), ours["name_label"].clone()]).await;
}

/// A run whose first snapshot was asked for in vain, and comes while the second one is read.
async fn with_a_late_snapshot() -> Lab {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(64 * MIB, 64 * MIB)).running()];
    let lab = Lab::new(SimOptions { hosts: 2, vms, ..Default::default() }).await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 100_000));
    lab.sim.fault(Fault::once("VM.snapshot", FaultEffect::Drop));
    let sent = lab.nbd_sent();
    // Read whole, so that there is time.
    let (report, ()) = tokio::join!(lab.full(), second_snapshot(&lab, sent));
    assert!(report.warnings.iter().any(|warning| warning.code == "snapshot-left"), "{:?}", report.warnings);
    lab.assert_equals_guest(&report, "vm-1").await;
    lab
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_snapshot_that_comes_late_is_removed_and_the_base_stays() {
    let lab = with_a_late_snapshot().await;
    lab.engine.sweep(SweepOptions::default()).await.unwrap();
    lab.assert_clean(1);
    lab.write(2 * MIB, &noise(2, 100_000));
    let next = lab.incremental().await;
    assert_eq!(next.reason, "changed-blocks");
    lab.assert_equals_guest(&next, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_snapshots_disk_that_could_not_be_removed_at_first_does_not_stay() {
    let lab = with_a_late_snapshot().await;
    let params = vec![String::new(), "no".into(), String::new()];
    lab.sim.fault(Fault::once("VDI.destroy", FaultEffect::Error { code: "SR_BACKEND_FAILURE_64".into(), params }));
    for _ in 0..2 {
        lab.engine.sweep(SweepOptions::default()).await.unwrap();
    }
    lab.assert_clean(1);
    lab.write(2 * MIB, &noise(2, 100_000));
    assert_eq!(lab.incremental().await.reason, "changed-blocks");
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_under_a_running_vm() {
    for method in ["VM.snapshot", "VDI.list_changed_blocks", "VDI.data_destroy"] {
        let vms = vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 16 * MIB)).running()];
        let lab = Lab::new(SimOptions { hosts: 3, vms, ..Default::default() }).await;
        lab.sim.migrate_vm("vm-1", 1).await.unwrap();
        lab.incremental().await;
        for host in [2, 0] {
            lab.write(MIB, &noise(host as u64 + 1, 100_000));
            let (sim, before) = (lab.sim.clone(), lab.calls(method));
            let moved = async {
                while sim.counters().calls.get(method).copied().unwrap_or(0) <= before {
                    tokio::task::yield_now().await;
                }
                sim.move_coordinator(host).await.unwrap();
            };
            let (report, ()) = tokio::join!(lab.incremental(), moved);
            lab.assert_equals_guest(&report, "vm-1").await;
            assert_eq!(report.reason, "changed-blocks", "{method}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x06_a_vm_whose_own_host_dies_under_its_snapshot_is_an_error_that_names_the_host() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 16 * MIB)).running()];
    let options = SimOptions { hosts: 3, vms, task_delay: Duration::from_secs(15), ..Default::default() };
    let lab = Lab::new(options).await;
    lab.sim.migrate_vm("vm-1", 1).await.unwrap();
    let sim = lab.sim.clone();
    let stopped = async {
        while sim.records("task").into_iter().all(|(_, task)| task["name_label"] != "Async.VM.snapshot") {
            tokio::task::yield_now().await;
        }
        sim.stop_host(1).await.unwrap();
    };
    let request = BackupRequest::incremental(name("vm-1"));
    let (result, ()) = tokio::join!(lab.engine.backup(request), stopped);
    let error = result.unwrap_err();
    assert!(matches!(error, EngineError::HostDown { .. }), "{error:?}");
    assert!(error.to_string().contains(&lab.sim.hosts()[1].name) && error.to_string().contains("xe "), "{error}");
    lab.sim.start_host(1).await.unwrap();
    lab.engine.sweep(SweepOptions::default()).await.unwrap();
    lab.assert_clean(0);
}
