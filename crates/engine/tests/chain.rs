//! When the changes since a base may not be believed, the disk is read whole and the reason is recorded.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use common::{BLOCK, Lab, MIB, data_disk, noise};
use serde_json::json;
use xenvault_engine::{BackupReport, Level};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{Fault, FaultEffect, SimOptions, SrSpec, VmSpec};

fn error(code: &str, params: &[&str]) -> FaultEffect {
    FaultEffect::Error { code: code.to_owned(), params: params.iter().map(|&text| text.to_owned()).collect() }
}

/// Backs up, and asserts that the disk was read whole for this reason, and rightly.
async fn assert_whole(lab: &Lab, reason: &str) -> BackupReport {
    let report = lab.incremental().await;
    assert_eq!((report.level, report.disks[0].reason.as_str()), (Level::Full, reason));
    lab.assert_equals_guest(&report, "vm-1").await;
    report
}

async fn assert_changes(lab: &Lab) {
    let report = lab.incremental().await;
    assert_eq!(report.disks[0].reason, "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x09_a_licence_without_tracking_reads_whole_disks_and_leaves_nothing() {
    let options = SimOptions {
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB))],
        restrictions: vec!["restrict_cbt".to_owned()],
        ..Default::default()
    };
    let lab = Lab::new(options).await;
    assert_whole(&lab, "first-backup").await;
    lab.write(0, &noise(1, 5000));
    let report = assert_whole(&lab, "cbt-unsupported").await;
    assert!(report.warnings.iter().any(|warning| warning.code == "cbt-restricted"), "{:?}", report.warnings);
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x09_a_server_that_refuses_to_enable_is_no_failure() {
    let lab = Lab::small().await;
    lab.sim.fault(Fault::always("VDI.enable_cbt", error("LICENSE_RESTRICTION", &["CBT"])));
    assert_whole(&lab, "first-backup").await;
    assert_whole(&lab, "cbt-unsupported").await;
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x10_tracking_that_was_switched_off_is_switched_on_again_and_the_next_run_counts() {
    let lab = Lab::small().await;
    lab.incremental().await;
    let disk = lab.reference("VDI", &lab.disk()).await;
    lab.call("VDI.disable_cbt", &[disk]).await;
    lab.write(2 * MIB, &noise(1, 100_000));
    assert_whole(&lab, "chain-broken").await;
    lab.write(3 * MIB, &noise(2, 100_000));
    assert_changes(&lab).await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x10_a_host_that_crashed_makes_the_base_suspect() {
    let options =
        SimOptions { vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB)).running()], ..Default::default() };
    let lab = Lab::new(options).await;
    lab.incremental().await;
    lab.write(2 * MIB, &noise(1, 100_000));
    lab.sim.crash_host(0).await.unwrap();
    let report = lab.incremental().await;
    assert_eq!(report.level, Level::Full);
    assert!(report.reason.starts_with("suspect"), "{}", report.reason);
    lab.assert_equals_guest(&report, "vm-1").await;
}

/// A running VM whose host crashes and that is started again; something is written before and after.
async fn crash_and_start(lab: &Lab) {
    lab.write(2 * MIB, &noise(1, 100_000));
    lab.sim.crash_host(0).await.unwrap();
    // The pool's messages have whole seconds.
    lab.sim.start_vm("vm-1", 0).await.unwrap();
    lab.write(3 * MIB, &noise(2, 100_000));
}

async fn running() -> Lab {
    let vm = VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB)).running();
    Lab::new(SimOptions { vms: vec![vm], ..Default::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn x10_after_a_crash_one_full_read_is_enough() {
    let lab = running().await;
    lab.incremental().await;
    crash_and_start(&lab).await;
    let report = lab.incremental().await;
    assert_eq!(report.level, Level::Full, "{}", report.reason);
    lab.assert_equals_guest(&report, "vm-1").await;
    for round in 3..6 {
        lab.write(round * MIB, &noise(round, 100_000));
        let report = lab.incremental().await;
        assert_eq!((report.level, report.reason.as_str()), (Level::Incremental, "changed-blocks"), "round {round}");
        lab.assert_equals_guest(&report, "vm-1").await;
    }
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x11_a_chain_that_others_broke_for_good_is_given_up_and_begun_anew() {
    let lab = running().await;
    let vm = lab.reference("VM", &lab.sim.vms()[0].uuid).await;
    // Tracking is on, and somebody takes a snapshot that is removed only after the crash.
    lab.incremental().await;
    let snapshot = lab.call("VM.snapshot", &[vm, "of an administrator".into()]).await;
    crash_and_start(&lab).await;
    lab.incremental().await;
    for vbd in lab.call("VM.get_VBDs", std::slice::from_ref(&snapshot)).await.as_array().unwrap() {
        let disk = lab.call("VBD.get_VDI", std::slice::from_ref(vbd)).await;
        lab.call("VM.destroy", std::slice::from_ref(&snapshot)).await;
        lab.call("VDI.destroy", &[disk]).await;
    }
    let mut seen = Vec::new();
    for round in 3..10 {
        lab.write(round * MIB / 2, &noise(round, 100_000));
        let report = lab.incremental().await;
        lab.assert_equals_guest(&report, "vm-1").await;
        seen.push((report.level, report.reason.clone()));
    }
    let full: Vec<_> =
        seen.iter().filter(|(level, _)| *level == Level::Full).map(|(_, reason)| reason.as_str()).collect();
    assert!(full.len() <= 3, "{seen:?}");
    assert_eq!(full, ["unrelated", "unrelated", "chain-broken"], "{seen:?}");
    assert_eq!(seen.last().unwrap().0, Level::Incremental, "{seen:?}");
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x11_a_chain_that_was_broken_and_mended_by_others_is_never_counted_across() {
    let lab = Lab::small().await;
    lab.incremental().await;
    let disk = lab.reference("VDI", &lab.disk()).await;
    lab.call("VDI.disable_cbt", std::slice::from_ref(&disk)).await;
    lab.write(2 * MIB, &noise(1, 100_000));
    // Somebody switches it on again: the nonce is still ours, and the pool itself says that the two are unrelated.
    lab.call("VDI.enable_cbt", &[disk]).await;
    assert_whole(&lab, "unrelated").await;
    assert_changes(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x12_a_listing_that_fails_means_reading_everything() {
    let lab = Lab::small().await;
    lab.incremental().await;
    for (code, reason) in [
        ("SR_BACKEND_FAILURE_460", "unrelated"),
        ("SR_BACKEND_FAILURE_459", "bitmap-invalid"),
        ("INTERNAL_ERROR", "listing-failed"),
    ] {
        lab.write(2 * MIB, &noise(1, 100_000));
        lab.sim.fault(Fault::once("VDI.list_changed_blocks", error(code, &["", "text", ""])));
        let report = assert_whole(&lab, reason).await;
        assert!(report.warnings.iter().any(|warning| warning.code == "changes-not-listed"));
    }
    assert_changes(&lab).await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x18_a_purge_without_metadata_removes_the_snapshot_and_the_base_is_gone() {
    let lab = Lab::small().await;
    lab.sim.fault(Fault::once("VDI.data_destroy", error("VDI_NO_CBT_METADATA", &["OpaqueRef:1"])));
    let report = lab.incremental().await;
    assert!(report.warnings.iter().any(|warning| warning.code == "base-lost"), "{:?}", report.warnings);
    lab.assert_clean(0);
    assert_whole(&lab, "base-gone").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x19_a_base_that_somebody_removed_is_gone_and_never_read() {
    let lab = Lab::small().await;
    lab.incremental().await;
    let base = lab.bases().remove(0);
    let reference = lab.reference("VDI", base["uuid"].as_str().unwrap()).await;
    lab.call("VDI.destroy", &[reference]).await;
    lab.write(MIB, &noise(9, 70_000));
    assert_whole(&lab, "base-gone").await;
    // A base without data serves for counting: nobody ever opened it.
    let base = lab.bases().remove(0)["uuid"].as_str().unwrap().to_owned();
    let opened = lab.sim.counters().nbd.get(&base).map_or(0, |disk| disk.opens);
    assert_changes(&lab).await;
    assert_eq!(lab.sim.counters().nbd.get(&base).map_or(0, |disk| disk.opens), opened);
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x17_a_purge_is_tried_again_while_the_disk_is_in_use_after_the_record_went() {
    let lab = Lab::small().await;
    lab.sim
        .fault(Fault { count: 2, ..Fault::once("VDI.data_destroy", error("VDI_IN_USE", &["OpaqueRef:1", "destroy"])) });
    let report = lab.incremental().await;
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    assert_eq!(lab.calls("VDI.data_destroy"), 3);
    assert_eq!(lab.calls("VM.destroy"), 1);
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x17_a_failed_clean_up_is_a_warning_on_a_good_point_and_the_sweep_finishes_it() {
    let lab = Lab::small().await;
    lab.sim.fault(Fault::once("VDI.data_destroy", error("INTERNAL_ERROR", &["no"])));
    let report = lab.incremental().await;
    assert!(report.warnings.iter().any(|warning| warning.code == "not-cleaned-up"), "{:?}", report.warnings);
    assert_eq!(lab.points().await, 1);
    assert_eq!(lab.bases().len(), 0);
    let sweep = lab.engine.sweep(Default::default()).await.unwrap();
    assert!(sweep.warnings.is_empty(), "{:?}", sweep.warnings);
    lab.assert_clean(1);
    lab.write(MIB, &noise(9, 70_000));
    assert_changes(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x20_another_disk_at_the_same_place_is_told_apart() {
    let lab = Lab::small().await;
    lab.incremental().await;
    let vm = lab.sim.vm("vm-1").unwrap().uuid;
    let vm = lab.reference("VM", &vm).await;
    let snapshot = lab.call("VM.snapshot", &[vm, json!("by hand")]).await;
    lab.write(MIB, &noise(4, 200_000));
    lab.call("VM.revert", &[snapshot]).await;
    let report = lab.incremental().await;
    assert_eq!((report.level, report.reason.as_str()), (Level::Full, "disk-replaced"));
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_tracking_beside_one_with_it() {
    let options = SimOptions {
        srs: vec![SrSpec::new("vhd", SrKind::Ext)],
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB)).disk(data_disk(8 * MIB, MIB))],
        ..Default::default()
    };
    let lab = Lab::new(options).await;
    let second = lab.sim.vm("vm-1").unwrap().disks[1].vdi.clone();
    // The first disk's SR tracks changes, the second one's says that it does not.
    let refusal = error("SR_OPERATION_NOT_SUPPORTED", &["OpaqueRef:1"]);
    lab.sim.fault(Fault::always("VDI.enable_cbt", refusal).after(1));
    lab.incremental().await;
    lab.write(0, &noise(1, 5000));
    let report = lab.incremental().await;
    assert_eq!(report.disks[0].reason, "changed-blocks");
    assert_eq!(report.disks[1].reason, "cbt-unsupported");
    assert!(report.disks[1].read_bytes >= MIB, "{:?}", report.disks[1]);
    assert!(report.disks[0].read_bytes <= BLOCK, "{:?}", report.disks[0]);
    lab.assert_equals_guest(&report, "vm-1").await;
    assert_eq!(lab.sim.record("VDI", &second).unwrap()["cbt_enabled"], false);
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x20_a_disk_that_moved_to_another_sr_is_read_whole_and_the_others_are_not() {
    let options = SimOptions {
        srs: vec![SrSpec::new("here", SrKind::Ext), SrSpec::new("there", SrKind::Ext)],
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB)).disk(data_disk(4 * MIB, MIB))],
        ..Default::default()
    };
    let lab = Lab::new(options).await;
    lab.incremental().await;
    // A storage migration refuses a tracked disk. It leaves another VDI on another SR at the same place, without the
    // settings of the old one.
    let disk = lab.reference("VDI", &lab.disk()).await;
    lab.call("VDI.disable_cbt", std::slice::from_ref(&disk)).await;
    let there = lab.reference("SR", &lab.sim.srs()[1].uuid).await;
    lab.call("VDI.pool_migrate", &[disk, there, json!({})]).await;
    lab.write(2 * MIB, &noise(1, 100_000));

    let report = lab.incremental().await;
    let reasons: Vec<&str> = report.disks.iter().map(|disk| disk.reason.as_str()).collect();
    assert_eq!(reasons, ["migrated", "changed-blocks"]);
    lab.assert_equals_guest(&report, "vm-1").await;
    assert_eq!(lab.point(&report).await.vm_uuid, lab.sim.vm("vm-1").unwrap().uuid);
    lab.write(3 * MIB, &noise(2, 100_000));
    let report = lab.incremental().await;
    assert!(report.disks.iter().all(|disk| disk.reason == "changed-blocks"), "{:?}", report.disks);
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x21_change_information_of_another_product_is_never_touched_and_warned_about() {
    let lab = Lab::small().await;
    let vm = lab.reference("VM", &lab.sim.vm("vm-1").unwrap().uuid).await;
    let disk = lab.reference("VDI", &lab.disk()).await;
    lab.call("VDI.enable_cbt", std::slice::from_ref(&disk)).await;
    let snapshot = lab.call("VM.snapshot", &[vm, json!("other product"), json!([])]).await;
    let vbds = lab.sim.records("VBD");
    let theirs = vbds.values().find(|vbd| vbd["VM"] == snapshot && vbd["type"] == "Disk").unwrap()["VDI"].clone();
    lab.call("VM.destroy", &[snapshot]).await;
    lab.call("VDI.data_destroy", std::slice::from_ref(&theirs)).await;
    let theirs = theirs.as_str().unwrap();
    let record = || lab.sim.records("VDI")[theirs].clone();
    let before = record();
    assert_eq!(before["type"], "cbt_metadata");

    for round in 0..2_u64 {
        lab.write(round * MIB, &noise(round, 100_000));
        let report = lab.incremental().await;
        assert!(report.warnings.iter().any(|warning| warning.code == "foreign-cbt"), "{:?}", report.warnings);
        lab.assert_equals_guest(&report, "vm-1").await;
    }
    // A run that fails, and a sweep, do not touch it either.
    lab.sim.fault(Fault::once("VM.snapshot", error("INTERNAL_ERROR", &["ordered"])));
    lab.fails().await;
    lab.engine.sweep(Default::default()).await.unwrap();
    assert_eq!(record(), before);
    assert_eq!(lab.calls("VDI.disable_cbt"), 0);
    assert!(lab.sim.record("VDI", &lab.disk()).unwrap()["cbt_enabled"] == true);
    // Its own incremental still works.
    let now = lab
        .reference(
            "VDI",
            lab.bases().iter().find(|base| base["uuid"] != before["uuid"]).unwrap()["uuid"].as_str().unwrap(),
        )
        .await;
    lab.call("VDI.list_changed_blocks", &[json!(theirs), now]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x10_a_crash_right_after_the_snapshot_happened_after_the_base() {
    let options =
        SimOptions { vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB)).running()], ..Default::default() };
    let lab = Lab::new(options).await;
    let sim = lab.sim.clone();
    let crash = async {
        // The snapshot is there, and its marks are being put on it.
        while sim.counters().calls.get("VM.set_other_config").copied().unwrap_or(0) == 0 {
            tokio::task::yield_now().await;
        }
        sim.guest_write("vm-1", "0", 2 * MIB, &noise(1, 200_000)).unwrap();
        sim.crash_host(0).await.unwrap();
    };
    let (first, ()) = tokio::join!(lab.incremental(), crash);
    assert_eq!(first.reason, "first-backup");
    let second = lab.incremental().await;
    assert!(second.reason.starts_with("suspect"), "{}", second.reason);
    lab.assert_equals_guest(&second, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x32_a_blocked_snapshot_is_a_finding_and_the_block_stays_as_it_was() {
    let lab = Lab::small().await;
    let uuid = lab.sim.vm("vm-1").unwrap().uuid;
    let vm = lab.reference("VM", &uuid).await;
    lab.call("VM.set_blocked_operations", &[vm, json!({ "snapshot": "by the administrator" })]).await;
    let refused = lab.fails().await;
    assert!(refused.to_string().contains("by the administrator"), "{refused}");
    let record = lab.sim.record("VM", &uuid).unwrap();
    assert_eq!(record["blocked_operations"], json!({ "snapshot": "by the administrator" }));
    assert_eq!(lab.calls("VM.snapshot"), 0);
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x21_a_broken_chain_is_given_up_only_where_nobody_else_tracks_the_disk() {
    for shared in [true, false] {
        let lab = Lab::small().await;
        lab.incremental().await;
        if shared {
            let disk = lab.reference("VDI", &lab.disk()).await;
            let theirs = lab.call("VDI.snapshot", &[disk, json!({})]).await;
            lab.call("VDI.data_destroy", &[theirs]).await;
        }
        let unrelated = error("SR_BACKEND_FAILURE_460", &["", "ordered", ""]);
        lab.sim.fault(Fault::always("VDI.list_changed_blocks", unrelated));
        let mut report = lab.incremental().await;
        for round in 0..2 {
            lab.write(MIB * round, &noise(round, 100_000));
            report = lab.incremental().await;
            lab.assert_equals_guest(&report, "vm-1").await;
        }
        let warned = |code: &str| report.warnings.iter().any(|warning| warning.code == code);
        let tracked = lab.sim.record("VDI", &lab.disk()).unwrap()["cbt_enabled"] == true;
        if shared {
            assert_eq!((tracked, lab.calls("VDI.disable_cbt")), (true, 0));
            assert!(warned("chain-unrelated"), "{:?}", report.warnings);
        } else {
            assert!(lab.calls("VDI.disable_cbt") >= 1);
        }
    }
}
