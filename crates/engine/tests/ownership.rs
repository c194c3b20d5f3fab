//! Whose is it, and whose base: shared disks, two repositories, clones of our snapshots, points that nobody is sure of.

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

use common::{Lab, MIB, data_disk, name, noise};
use serde_json::json;
use xenvault_engine::{BackupRequest, Engine, EngineOptions};
use xenvault_sim::{Fault, FaultEffect, SimOptions, VmSpec};
use xenvault_store::{Repository, Secret};

fn failure() -> FaultEffect {
    FaultEffect::Error { code: "INTERNAL_ERROR".into(), params: vec!["ordered".into()] }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_two_vms_share_has_a_base_for_each_of_them() {
    let vms = ["vm-1", "vm-2"].map(|vm| VmSpec::new(vm).disk(data_disk(8 * MIB, MIB))).to_vec();
    let lab = Lab::new(SimOptions { vms, ..Default::default() }).await;
    let vm = lab.reference("VM", &lab.sim.vm("vm-2").unwrap().uuid).await;
    let disk = lab.reference("VDI", &lab.disk()).await;
    let vbd = json!({
        "VM": vm, "VDI": disk, "userdevice": "5", "bootable": false, "mode": "RO", "type": "Disk",
        "unpluggable": true, "empty": false, "other_config": {}, "qos_algorithm_type": "", "qos_algorithm_params": {},
    });
    lab.call("VBD.create", &[vbd]).await;
    let backup = async |vm| lab.engine.backup(BackupRequest::incremental(name(vm))).await.unwrap();
    backup("vm-1").await;
    backup("vm-2").await;
    for vm in ["vm-1", "vm-2", "vm-1"] {
        lab.write(MIB, &noise(3, 100_000));
        let report = backup(vm).await;
        assert!(report.disks.iter().all(|disk| disk.reason == "changed-blocks"), "{vm}: {:?}", report.disks);
        lab.assert_equals_guest(&report, vm).await;
    }
    assert_eq!(lab.bases().len(), 3, "one of vm-1, two of vm-2");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_repositories_in_turn_count_each_from_its_own_base() {
    let lab = Lab::small().await;
    let secret = Secret::new("other");
    let repository = Repository::init(&lab.path("second"), &secret, Default::default()).await.unwrap();
    let options = EngineOptions::new(lab.path("state"));
    let second = Engine::open(lab.session.clone(), Some(repository.clone()), options).unwrap();
    lab.incremental().await;
    second.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
    for round in 0..3_u64 {
        lab.write(round * MIB, &noise(round, 100_000));
        if round != 1 {
            let report = lab.incremental().await;
            assert_eq!(report.reason, "changed-blocks");
            lab.assert_equals_guest(&report, "vm-1").await;
        }
        let report = second.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
        assert_eq!(report.reason, "changed-blocks");
        let point = repository.point(&report.point).await.unwrap();
        let range = xenvault_block::ByteRange::up_to(8 * MIB);
        let stored = repository.disk(&point.disks[0].map).read_at(range).await.unwrap();
        common::assert_same(&stored, &lab.sim.guest_read("vm-1", "0", 0, 8 * MIB).unwrap(), "second repository");
    }
    lab.assert_clean(2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_somebody_made_from_our_snapshot_under_its_name_is_not_ours() {
    let lab = Lab::small().await;
    // The record of the snapshot stays, and the journal with it.
    lab.sim.fault(Fault::once("VM.destroy", failure()));
    lab.incremental().await;
    let left = lab.new_of("VM").remove(0);
    let snapshot = lab.reference("VM", left["uuid"].as_str().unwrap()).await;
    let clone = lab.call("VM.clone", &[snapshot, left["name_label"].clone()]).await;
    let clone = lab.sim.records("VM")[clone.as_str().unwrap()].clone();
    let disks = lab.sim.vm(clone["uuid"].as_str().unwrap()).unwrap().disks;
    assert_eq!(disks.len(), 1);
    lab.engine.sweep(Default::default()).await.unwrap();
    assert!(lab.sim.record("VM", clone["uuid"].as_str().unwrap()).is_ok(), "somebody's VM was removed");
    assert!(lab.sim.record("VDI", &disks[0].vdi).is_ok(), "somebody's disk was removed");
    assert!(lab.sim.record("VM", left["uuid"].as_str().unwrap()).is_err(), "ours is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_without_the_repository_keeps_the_base_of_a_point_that_may_exist() {
    let lab = Lab::small().await;
    let options = || {
        let mut options = EngineOptions::new(lab.path("state"));
        options.resume_window = Duration::ZERO;
        options
    };
    let engine = Engine::open(lab.session.clone(), Some(lab.repository.clone()), options()).unwrap();
    lab.sim.fault(Fault::once("VM.destroy", failure()));
    // Marks of VM and disk, then the role of the base.
    lab.sim.fault(Fault::once("VDI.set_other_config", failure()).after(1));
    engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
    // As if the process had died right after the point was written.
    let journal = std::fs::read_dir(lab.path("state/runs")).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read_to_string(&journal).unwrap();
    let kept: Vec<&str> = text.lines().filter(|line| !line.contains(r#""published""#)).collect();
    assert!(kept.len() < text.lines().count());
    std::fs::write(&journal, kept.join("\n") + "\n").unwrap();

    let without = Engine::open(lab.session.clone(), None, options()).unwrap();
    for _ in 0..2 {
        without.sweep(Default::default()).await.unwrap();
        assert_eq!((lab.bases().len(), lab.new_of("VM").len()), (1, 0));
    }
    lab.write(MIB, &noise(1, 100_000));
    let report = lab.incremental().await;
    assert_eq!(report.reason, "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_whose_marks_could_not_be_completed_serves_all_the_same() {
    let lab = Lab::small().await;
    // The marks of the new disk, then its role as a base.
    lab.sim.fault(Fault::once("VDI.set_other_config", failure()).after(1));
    let report = lab.incremental().await;
    assert!(report.warnings.iter().any(|warning| warning.code == "not-cleaned-up"), "{:?}", report.warnings);
    // A run that fails after it has cleaned up must not cost the base.
    lab.sim.fault(Fault::once("VM.snapshot", failure()));
    lab.fails().await;
    lab.write(MIB, &noise(1, 100_000));
    let report = lab.incremental().await;
    assert_eq!(report.reason, "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_can_not_be_removed_does_not_make_a_good_point_a_failure() {
    let lab = Lab::small().await;
    let (sim, runs) = (lab.sim.clone(), lab.path("state/runs"));
    let backup = lab.engine.backup(BackupRequest::incremental(name("vm-1")));
    let take_away = async {
        // The first question is the prerequisites', the second one the export's.
        while sim.counters().calls.get("VDI.get_nbd_info").copied().unwrap_or(0) < 2 {
            tokio::task::yield_now().await;
        }
        for journal in std::fs::read_dir(&runs).unwrap() {
            let _ = std::fs::remove_file(journal.unwrap().path());
        }
    };
    let (report, ()) = tokio::join!(backup, take_away);
    assert_eq!(report.unwrap().warnings.iter().filter(|warning| warning.code == "journal").count(), 1);
    assert_eq!(lab.points().await, 1);
}
