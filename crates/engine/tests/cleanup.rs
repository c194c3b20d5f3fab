//! Whatever goes wrong, and whenever: nothing is left in the pool, nothing that is not ours is touched, and the
//! repository stays whole.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::time::Duration;

use common::{Lab, MIB, config, data_disk, name, noise};
use serde_json::json;
use xenvault_engine::{BackupRequest, EngineError, SweepAction, SweepOptions};
use xenvault_sim::{Fault, FaultEffect, SimOptions, VmSpec};

fn failure() -> FaultEffect {
    FaultEffect::Error { code: "INTERNAL_ERROR".into(), params: vec!["ordered".into()] }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_call_before_the_point_cleans_up_at_once() {
    let lab = Lab::small().await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 100_000));
    for call in [
        "VM.snapshot",
        "VM.set_other_config",
        "VDI.set_other_config",
        "VDI.get_cbt_enabled",
        "VM.update_allowed_operations",
    ] {
        lab.sim.clear_faults();
        lab.sim.fault(Fault::once(call, failure()));
        let error = lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.expect_err(call);
        assert!(matches!(error, EngineError::Pool { .. }), "{call}: {error}");
        lab.assert_clean(1);
        assert_eq!(lab.points().await, 1);
    }
    lab.sim.clear_faults();
    lab.incremental().await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_gets_lost_leaves_nothing_either() {
    let lab = Lab::small().await;
    for call in ["VM.set_other_config", "VDI.set_other_config"] {
        lab.sim.clear_faults();
        let effect = FaultEffect::ErrorAfter { code: "INTERNAL_ERROR".into(), params: vec![] };
        lab.sim.fault(Fault::once(call, effect));
        assert!(lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.is_err(), "{call}");
        lab.assert_clean(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x30_a_snapshot_that_was_taken_but_never_marked_is_found_by_its_name() {
    let lab = Lab::small().await;
    // The snapshot is taken, the task says that it failed.
    let effect = FaultEffect::ErrorAfter { code: "INTERNAL_ERROR".into(), params: vec!["lost".into()] };
    lab.sim.fault(Fault::once("VM.snapshot", effect));
    assert!(lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.is_err());
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x30_a_snapshot_with_another_number_of_disks_is_not_used() {
    let lab = Lab::new(SimOptions {
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB)).disk(data_disk(8 * MIB, MIB))],
        task_delay: Duration::from_millis(500),
        ..Default::default()
    })
    .await;
    let (sim, disk) = (lab.sim.clone(), lab.sim.vm("vm-1").unwrap().disks[1].vdi.clone());
    // While tracking is being switched on, somebody takes a disk away.
    let backup = lab.engine.backup(BackupRequest::incremental(name("vm-1")));
    let meddle = async {
        while !sim.counters().calls.contains_key("VDI.enable_cbt") {
            tokio::task::yield_now().await;
        }
        let vbd = sim
            .records("VBD")
            .into_iter()
            .find(|(_, record)| {
                let vdi = record["VDI"].as_str().unwrap_or_default();
                sim.records("VDI").get(vdi).is_some_and(|vdi| vdi["uuid"] == disk.as_str())
            })
            .unwrap();
        sim.call("VBD.destroy", &[json!(vbd.0)]).await.unwrap();
    };
    let (result, ()) = tokio::join!(backup, meddle);
    assert!(matches!(result, Err(EngineError::DiskCount { vm: 2, snapshot: 1 })), "{result:?}");
    lab.sim.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x04_a_session_that_ended_is_renewed_and_the_export_opened_with_the_new_one() {
    let lab = Lab::small().await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 100_000));
    // The session in the export name is gone when the disk is opened.
    let sim = lab.sim.clone();
    let backup = lab.engine.backup(BackupRequest::incremental(name("vm-1")));
    let end_session = async {
        let before = sim.counters().calls.get("VDI.get_nbd_info").copied().unwrap_or(0);
        // The first question is the prerequisites', the second one the export's.
        while sim.counters().calls.get("VDI.get_nbd_info").copied().unwrap_or(0) < before + 1 {
            tokio::task::yield_now().await;
        }
        for (reference, _) in sim.records("session") {
            let _ = sim.call("session.destroy", &[json!(reference)]).await;
        }
    };
    let (report, ()) = tokio::join!(backup, end_session);
    lab.assert_equals_guest(&report.unwrap(), "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_backup_cleans_up_in_the_background() {
    let lab = Lab::small().await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 2_000_000));
    for calls in [2, 8, 16, 24, 30, 36, 42] {
        let before: u64 = lab.sim.counters().calls.values().sum();
        let points = lab.points().await;
        let finished = tokio::select! {
            report = lab.engine.backup(BackupRequest::incremental(name("vm-1"))) => report.is_ok(),
            () = calls_made(&lab, before + calls) => false,
        };
        lab.engine.settled().await;
        if !finished && lab.points().await == points {
            lab.assert_clean(1);
        }
    }
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

async fn calls_made(lab: &Lab, total: u64) {
    while lab.sim.counters().calls.values().sum::<u64>() < total {
        tokio::task::yield_now().await;
    }
}

/// Leaves what a process leaves that is killed: the run's future is leaked, and only its lease ends.
async fn killed_after(lab: &Lab, call: &str, times: u64) {
    let before = lab.calls(call);
    // Its own runtime, so that nothing of it goes on afterwards.
    let (sim, engine) = (lab.sim.clone(), lab.second_engine());
    let call = call.to_owned();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.spawn(async move {
            let report = engine.backup(BackupRequest::incremental(name("vm-1"))).await;
            drop(report);
        });
        while sim.counters().calls.get(&call).copied().unwrap_or(0) < before + times {
            std::thread::yield_now();
        }
        runtime.shutdown_background();
    })
    .join()
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_run_cleans_up_after_a_killed_one() {
    for (call, times) in [("VM.snapshot", 1), ("VM.set_other_config", 1), ("VDI.get_nbd_info", 2), ("VM.destroy", 1)] {
        let lab = Lab::small().await;
        lab.incremental().await;
        lab.write(MIB, &noise(1, 2_000_000));
        killed_after(&lab, call, times).await;
        // The killed run's lease ends with its tasks, a moment later.
        let report = loop {
            match lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await {
                Err(EngineError::Busy { .. }) => tokio::task::yield_now().await,
                other => break other.unwrap(),
            }
        };
        lab.assert_equals_guest(&report, "vm-1").await;
        lab.engine.settled().await;
        let sweep = lab.engine.sweep(SweepOptions::default()).await.unwrap();
        assert!(sweep.warnings.is_empty(), "{call}: {:?}", sweep.warnings);
        let data: Vec<_> = lab.new_of("VDI").into_iter().filter(|vdi| vdi["type"] != "cbt_metadata").collect();
        assert!(data.is_empty() && lab.new_of("VM").is_empty(), "{call}: {data:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_shows_its_plan_first_and_keeps_the_current_base() {
    let lab = Lab::small().await;
    lab.incremental().await;
    let plan = lab.engine.sweep(SweepOptions::dry_run()).await.unwrap().plan;
    assert!(plan.remove.is_empty(), "{plan:?}");
    assert_eq!(plan.keep.len(), 1);
    assert!(plan.keep[0].reason.contains("base of the next incremental"), "{plan:?}");
    let done = lab.engine.sweep(SweepOptions::default()).await.unwrap();
    assert_eq!((done.removed, done.plan), (0, plan));
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_removes_what_a_dead_run_left_and_only_in_earnest() {
    let lab = Lab::small().await;
    lab.incremental().await;
    // A snapshot as a run of ours that died before it marked it would leave.
    let vm = lab.reference("VM", &lab.sim.vm("vm-1").unwrap().uuid).await;
    let run = "33333333-3333-4333-8333-333333333333";
    let left = format!("Xenvault backup [xenvault {} {run}]", lab.engine.instance());
    lab.call("VM.snapshot", &[vm, json!(left)]).await;
    let plan = lab.engine.sweep(SweepOptions::dry_run()).await.unwrap().plan;
    let actions: Vec<SweepAction> = plan.remove.iter().map(|item| item.action).collect();
    assert_eq!(actions, [SweepAction::Destroy, SweepAction::Destroy], "{plan:?}");
    assert_eq!(lab.new_of("VM").len(), 1, "a dry run touches nothing");
    let done = lab.engine.sweep(SweepOptions::default()).await.unwrap();
    assert_eq!((done.removed, done.plan), (2, plan));
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_waits_for_a_second_attempt_is_kept_by_the_sweep_and_removed_by_the_next_run() {
    let lab = Lab::small().await;
    let vm_uuid = lab.sim.vm("vm-1").unwrap().uuid;
    let vm = lab.reference("VM", &vm_uuid).await;
    let run = "33333333-3333-4333-8333-333333333333";
    let left = format!("Xenvault backup [xenvault {} {run}]", lab.engine.instance());
    let snapshot = lab.call("VM.snapshot", &[vm, json!(left)]).await;
    let uuid = lab.sim.records("VM")[snapshot.as_str().unwrap()]["uuid"].clone();
    let marks = json!({
        "xenvault:instance": lab.engine.instance(), "xenvault:run": run, "xenvault:role": "snapshot",
        "xenvault:self": uuid, "xenvault:vm": vm_uuid, "xenvault:resume-until": "99999999999",
    });
    lab.call("VM.set_other_config", &[snapshot, marks]).await;
    let sweep = lab.engine.sweep(SweepOptions::default()).await.unwrap();
    assert_eq!(sweep.removed, 0, "{sweep:?}");
    assert!(sweep.plan.keep.iter().all(|item| item.reason.contains("second attempt")), "{sweep:?}");
    lab.incremental().await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_production_disk_with_a_copy_of_our_marks_is_left_alone() {
    let lab = Lab::small().await;
    lab.sim.fault(Fault::once("VDI.data_destroy", failure()));
    lab.sim.fault(Fault::once("VM.destroy", failure()));
    // The run could not clean up: its snapshot still has its data, and an administrator reverts to it.
    lab.incremental().await;
    let snapshot = lab
        .sim
        .records("VM")
        .into_iter()
        .find(|(_, record)| record["is_a_snapshot"] == true)
        .expect("the snapshot was left");
    lab.call("VM.revert", &[json!(snapshot.0)]).await;
    let disk = lab.sim.record("VDI", &lab.disk()).unwrap();
    assert!(config(&disk).contains_key("xenvault:instance"), "the mark was copied: {disk:#}");
    assert_ne!(config(&disk)["xenvault:self"], disk["uuid"].as_str().unwrap());
    let sweep = lab.engine.sweep(SweepOptions::default()).await.unwrap();
    assert!(sweep.plan.remove.iter().all(|item| item.uuid != lab.disk()), "{sweep:?}");
    assert!(sweep.plan.keep.iter().any(|item| item.uuid == lab.disk()), "{sweep:?}");
    assert!(lab.sim.record("VDI", &lab.disk()).is_ok());
    lab.sim.guest_read("vm-1", "0", 0, MIB).unwrap();
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
    assert!(lab.sim.record("VDI", &lab.disk()).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_installations_objects_are_left_alone() {
    let lab = Lab::small().await;
    let stranger = lab.stranger();
    stranger.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
    let theirs = lab.bases().remove(0);
    let sweep = lab.engine.sweep(SweepOptions::default()).await.unwrap();
    assert!(sweep.plan.remove.is_empty(), "{sweep:?}");
    assert!(sweep.plan.keep.iter().any(|item| item.reason.contains("another installation")), "{sweep:?}");
    lab.incremental().await;
    lab.incremental().await;
    assert!(lab.sim.record("VDI", theirs["uuid"].as_str().unwrap()).is_ok());
    assert_eq!(lab.bases().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_that_fails_at_the_end_leaves_no_point_and_no_snapshot() {
    let lab = Lab::small().await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 300_000));
    let points = lab.path("repo/points");
    let away = lab.path("points-away");
    // The folder of the points turns into a file while the disks are read: the last write fails.
    let sim = lab.sim.clone();
    let before = sim.counters().calls.get("VDI.get_nbd_info").copied().unwrap_or(0);
    let backup = lab.engine.backup(BackupRequest::incremental(name("vm-1")));
    let break_it = async {
        while sim.counters().calls.get("VDI.get_nbd_info").copied().unwrap_or(0) < before + 2 {
            tokio::task::yield_now().await;
        }
        std::fs::rename(&points, &away).unwrap();
        std::fs::write(&points, "in the way").unwrap();
    };
    let (result, ()) = tokio::join!(backup, break_it);
    assert!(matches!(result, Err(EngineError::Repository { .. })), "{result:?}");
    lab.assert_clean(1);
    std::fs::remove_file(&points).unwrap();
    std::fs::rename(&away, &points).unwrap();
    assert_eq!(lab.points().await, 1);
    let report = lab.incremental().await;
    assert_eq!(report.reason, "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_stops_being_readable_is_a_failure_and_never_zeros() {
    let lab = Lab::small().await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 300_000));
    lab.sim.fault(Fault::always("nbd/read", FaultEffect::Drop));
    let error = lab.fails().await;
    assert!(matches!(error, EngineError::Read { .. }), "{error}");
    lab.sim.clear_faults();
    lab.assert_clean(1);
    assert_eq!(lab.points().await, 1);
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
}
