//! Hosts that die under a backup.

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

use common::{Lab, MIB, data_disk, noise};
use serde_json::json;
use xenvault_engine::{Engine, EngineOptions, Retry, SweepOptions};
use xenvault_sim::{Fault, FaultEffect, SimOptions, SimPool, SrSpec, VmSpec, storage::SrKind};

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_dies_in_the_middle_of_a_read_is_replaced_by_another_one_that_sees_the_sr() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(256 * MIB, 256 * MIB))];
    let lab = Lab::new(SimOptions { hosts: 3, vms, ..Default::default() }).await;
    let sim = lab.sim.clone();
    // Members only: the coordinator stays.
    let die = async {
        for (host, bytes) in [(1, 16 * MIB), (2, 64 * MIB)] {
            sent(&sim, 0, bytes).await;
            sim.crash_host(host).await.unwrap();
        }
    };
    let (report, ()) = tokio::join!(lab.incremental(), die);
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

/// Waits until so many bytes of disks have been sent since `from`.
async fn sent(sim: &SimPool, from: u64, bytes: u64) {
    while sim.counters().nbd_sent_bytes() < from + bytes {
        tokio::task::yield_now().await;
    }
}

/// Waits until a method has been called once more than `before`.
async fn called(sim: &SimPool, method: &str, before: u64) {
    while sim.counters().calls.get(method).copied().unwrap_or(0) <= before {
        tokio::task::yield_now().await;
    }
}

/// Three hosts, and a VM that runs on the first one.
async fn three_hosts(size: u64) -> Lab {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(size, size)).running()];
    Lab::new(SimOptions { hosts: 3, vms, ..Default::default() }).await
}

/// Finished tasks whose references were lost in a lost answer: a pool collects them by itself after an hour (X05).
async fn collect_tasks(lab: &Lab) {
    for (reference, record) in lab.sim.records("task") {
        assert_ne!(record["status"], "pending", "{record:#}");
        assert!(record["name_label"].as_str().unwrap().starts_with("Async."), "{record:#}");
        lab.call("task.destroy", &[json!(reference)]).await;
    }
}

/// Moves the coordinator when a call of that name has been made: in one moment in the first backup, and with a while in
/// which the new one still boots in the second one, which counts changes.
async fn move_at(method: &str) {
    let lab = three_hosts(16 * MIB).await;
    for host in [1, 2] {
        let before = lab.calls(method);
        let sim = lab.sim.clone();
        let moved = async {
            called(&sim, method, before).await;
            match host {
                1 => sim.move_coordinator(host).await.unwrap(),
                _ => sim.fail_over(host, Duration::from_secs(3)).await.unwrap(),
            }
        };
        let (report, ()) = tokio::join!(lab.incremental(), moved);
        lab.assert_equals_guest(&report, "vm-1").await;
        collect_tasks(&lab).await;
        lab.assert_clean(1);
        lab.write(MIB, &noise(host as u64, 100_000));
    }
}

macro_rules! moves {
    ($($test:ident: $method:literal;)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                move_at($method).await;
            }
        )*
    };
}

moves! {
    the_coordinator_moves_at_vm_update_allowed_operations: "VM.update_allowed_operations";
    the_coordinator_moves_at_message_get_since: "message.get_since";
    the_coordinator_moves_at_vm_snapshot: "VM.snapshot";
    the_coordinator_moves_at_vm_set_other_config: "VM.set_other_config";
    the_coordinator_moves_at_vdi_set_other_config: "VDI.set_other_config";
    the_coordinator_moves_at_vdi_get_nbd_info: "VDI.get_nbd_info";
    the_coordinator_moves_at_vm_destroy: "VM.destroy";
    the_coordinator_moves_at_vdi_data_destroy: "VDI.data_destroy";
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_while_tracking_is_switched_on() {
    let lab = three_hosts(16 * MIB).await;
    let sim = lab.sim.clone();
    let moved = async {
        called(&sim, "VDI.enable_cbt", 0).await;
        sim.move_coordinator(1).await.unwrap();
    };
    let (report, ()) = tokio::join!(lab.incremental(), moved);
    lab.assert_equals_guest(&report, "vm-1").await;
    collect_tasks(&lab).await;
    lab.assert_clean(1);
    // It is on, and its chain can be counted.
    lab.write(MIB, &noise(1, 100_000));
    let second = lab.incremental().await;
    assert_eq!(second.reason, "changed-blocks");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_while_changes_are_listed() {
    let lab = three_hosts(16 * MIB).await;
    lab.incremental().await;
    lab.write(MIB, &noise(1, 100_000));
    let sim = lab.sim.clone();
    let moved = async {
        called(&sim, "VDI.list_changed_blocks", 0).await;
        sim.move_coordinator(1).await.unwrap();
    };
    let (report, ()) = tokio::join!(lab.incremental(), moved);
    assert_eq!(report.reason, "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
    collect_tasks(&lab).await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_in_the_middle_of_a_read_which_goes_on() {
    let lab = three_hosts(128 * MIB).await;
    let sim = lab.sim.clone();
    let moved = async {
        sent(&sim, 0, 16 * MIB).await;
        sim.move_coordinator(1).await.unwrap();
        sent(&sim, 0, 64 * MIB).await;
        sim.move_coordinator(2).await.unwrap();
    };
    let (report, ()) = tokio::join!(lab.incremental(), moved);
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
    // The data path did not notice: what was read once was not read again but for the check sample.
    let disk = &report.disks[0];
    assert!(lab.nbd_sent() <= 128 * MIB + disk.sample_bytes + 4 * MIB, "{} bytes", lab.nbd_sent());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_dies_in_the_middle_of_a_read_is_replaced() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(128 * MIB, 128 * MIB))];
    let lab = impatient(SimOptions { hosts: 3, vms, ..Default::default() }).await;
    let sim = lab.sim.clone();
    let failed_over = async {
        sent(&sim, 0, 16 * MIB).await;
        sim.stop_host(0).await.unwrap();
        sim.move_coordinator(1).await.unwrap();
    };
    let (report, ()) = tokio::join!(lab.incremental(), failed_over);
    lab.assert_equals_guest(&report, "vm-1").await;
    // What the dead host had attached stays so by the pool's records until it boots.
    lab.sim.start_host(0).await.unwrap();
    lab.engine.sweep(SweepOptions::default()).await.unwrap();
    lab.assert_clean(1);
}

/// The answer to a call is lost, before and after the call was done.
async fn loses(method: &str) {
    for effect in [FaultEffect::Drop, FaultEffect::DropAfter] {
        let lab = three_hosts(16 * MIB).await;
        for round in 0..2 {
            let before = lab.calls(method);
            lab.sim.fault(Fault::once(method, effect.clone()));
            let report = lab.incremental().await;
            lab.sim.clear_faults();
            assert!(round == 0 || report.reason == "changed-blocks", "{method} {effect:?}: {}", report.reason);
            assert!(round == 0 || lab.calls(method) > before || method.ends_with("enable_cbt"), "{method}");
            lab.assert_equals_guest(&report, "vm-1").await;
            collect_tasks(&lab).await;
            lab.assert_clean(1);
            lab.write(MIB, &noise(round, 100_000));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x05_lost_answers_to_work_are_made_good_by_looking_at_the_object() {
    for method in ["VM.snapshot", "VDI.enable_cbt", "VDI.data_destroy", "VDI.list_changed_blocks", "VM.destroy"] {
        loses(method).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_toolstack_that_restarts_is_waited_for() {
    for method in ["VM.snapshot", "VDI.get_nbd_info", "VDI.data_destroy"] {
        let lab = three_hosts(16 * MIB).await;
        let sim = lab.sim.clone();
        let restarted = async {
            called(&sim, method, 0).await;
            sim.restart_toolstack(0, Duration::from_secs(3)).await.unwrap();
        };
        let (report, ()) = tokio::join!(lab.incremental(), restarted);
        lab.assert_equals_guest(&report, "vm-1").await;
        collect_tasks(&lab).await;
        lab.assert_clean(1);
    }
}

/// A lab whose engine does not wait long for a dead host to detach what it had attached.
async fn impatient(options: SimOptions) -> Lab {
    let mut lab = Lab::new(options).await;
    let mut options = EngineOptions::new(lab.path("state")).with_monitor(lab.monitor.clone() as _);
    options.detach_timeout = Duration::from_secs(3);
    lab.engine = Engine::open(lab.session.clone(), Some(lab.repository.clone()), options).unwrap();
    lab
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_stops_in_the_middle_of_a_read_is_replaced_and_cleaned_up_when_it_is_back() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(128 * MIB, 128 * MIB))];
    let lab = impatient(SimOptions { hosts: 3, vms, ..Default::default() }).await;
    let sim = lab.sim.clone();
    // Members only: without its coordinator a pool answers nothing.
    let stop = async {
        for (host, bytes) in [(1, 8 * MIB), (2, 32 * MIB)] {
            sent(&sim, 0, bytes).await;
            sim.stop_host(host).await.unwrap();
        }
    };
    let (report, ()) = tokio::join!(lab.incremental(), stop);
    lab.assert_equals_guest(&report, "vm-1").await;
    // The dead hosts hold the disk by the pool's records: said, and left to the sweep.
    assert!(report.warnings.iter().any(|warning| warning.code == "still-attached"), "{:?}", report.warnings);
    for host in [1, 2] {
        lab.sim.start_host(host).await.unwrap();
    }
    lab.engine.sweep(SweepOptions::default()).await.unwrap();
    lab.assert_clean(1);
    lab.write(MIB, &noise(3, 100_000));
    let next = lab.incremental().await;
    assert_eq!(next.reason, "changed-blocks");
    lab.assert_equals_guest(&next, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_host_with_the_sr_dies_and_the_run_fails_with_the_reason() {
    let mut sr = SrSpec::new("local", SrKind::Ext);
    sr.local_to = Some(1);
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(128 * MIB, 128 * MIB).on("local"))];
    let lab = impatient(SimOptions { hosts: 2, srs: vec![sr], vms, ..Default::default() }).await;
    let sim = lab.sim.clone();
    let stop = async {
        sent(&sim, 0, 16 * MIB).await;
        sim.stop_host(1).await.unwrap();
    };
    let (error, ()) = tokio::join!(lab.fails(), stop);
    assert_eq!(error.retry(), Retry::Later, "{error:?}");
    assert_eq!(lab.points().await, 0);
    lab.sim.start_host(1).await.unwrap();
    // The snapshot waits for the next attempt, which finds the disk free again and removes it.
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x02_a_disk_that_one_host_sees_is_read_from_that_host() {
    let mut sr = SrSpec::new("local", SrKind::Ext);
    sr.local_to = Some(2);
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(32 * MIB, 8 * MIB).on("local"))];
    let lab = Lab::new(SimOptions { hosts: 3, srs: vec![sr], vms, ..Default::default() }).await;
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
    // The allocation map came over HTTP from the right host.
    assert_eq!(report.reason, "first-backup");
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x24_addresses_that_nobody_serves_do_no_harm() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 16 * MIB))];
    let lab = Lab::new(SimOptions { hosts: 2, ipv6: true, vms, ..Default::default() }).await;
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_migrates_during_its_backup_is_backed_up() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(128 * MIB, 128 * MIB)).running()];
    let lab = Lab::new(SimOptions { hosts: 3, vms, ..Default::default() }).await;
    for (round, host) in [1, 2, 0].into_iter().enumerate() {
        let (sim, before) = (lab.sim.clone(), lab.calls("VDI.get_nbd_info"));
        let migrated = async {
            called(&sim, "VDI.get_nbd_info", before).await;
            sim.migrate_vm("vm-1", host).await.unwrap();
        };
        let (report, ()) = tokio::join!(lab.incremental(), migrated);
        lab.assert_equals_guest(&report, "vm-1").await;
        lab.assert_clean(1);
        lab.write(MIB * 3, &noise(round as u64, 100_000));
    }
}
