//! Backups of a simulated pool: what is stored equals what the guest had, and only what is needed is read.

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

use common::{BLOCK, Lab, MIB, config, data_disk, name, noise};
use serde_json::json;
use xenvault_engine::{BackupRequest, Level, VmSelector};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskSpec, SimOptions, SrSpec, VmSpec};

#[tokio::test(flavor = "multi_thread")]
async fn a_full_and_incrementals_equal_the_guest_at_snapshot_time() {
    let lab = Lab::small().await;
    let first = lab.incremental().await;
    assert_eq!((first.level, first.reason.as_str()), (Level::Full, "first-backup"));
    lab.assert_equals_guest(&first, "vm-1").await;
    lab.assert_clean(1);

    for round in 0..3_u64 {
        lab.write(round * 3 * MIB + 5, &noise(round, 200_000));
        lab.write(12 * MIB + round * BLOCK, &[0; 5000]);
        let before = lab.nbd_sent();
        let next = lab.incremental().await;
        assert_eq!((next.level, next.reason.as_str()), (Level::Incremental, "changed-blocks"), "round {round}");
        let disk = &next.disks[0];
        assert!(disk.changed_bytes <= 7 * BLOCK, "{disk:?}");
        assert!(disk.sample_bytes <= 16 * BLOCK, "{disk:?}");
        assert_eq!(lab.nbd_sent() - before, disk.read_bytes + disk.sample_bytes);
        lab.assert_equals_guest(&next, "vm-1").await;
        let point = lab.point(&next).await;
        assert!(point.parent.is_some());
        assert!(point.disks[0].bitmap.is_some(), "the bitmap of the step is kept");
        lab.assert_clean(1);
    }
    assert_eq!(lab.points().await, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_read_of_a_vhd_disk_leaves_unallocated_blocks_out() {
    let lab = Lab::small().await;
    let report = lab.full().await;
    assert_eq!(report.reason, "requested");
    assert_eq!(report.disks[0].read_bytes, 4 * MIB, "{:?}", report.disks[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_after_a_full_stores_next_to_nothing_and_keeps_the_bitmap() {
    let lab = Lab::small().await;
    lab.full().await;
    lab.write(0, &noise(3, 1000));
    let again = lab.full().await;
    assert_eq!((again.level, again.reason.as_str()), (Level::Full, "requested"));
    assert!(again.totals.new_bytes < MIB, "{:?}", again.totals);
    assert!(lab.point(&again).await.disks[0].bitmap.is_some());
    lab.assert_equals_guest(&again, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_disk_of_a_tebibyte_reads_the_sample_and_nothing_else() {
    let disk = data_disk(1 << 40, 32 * MIB);
    let lab = Lab::new(SimOptions { vms: vec![VmSpec::new("vm-1").disk(disk)], ..Default::default() }).await;
    lab.incremental().await;
    let before = lab.nbd_sent();
    let second = lab.incremental().await;
    assert_eq!(second.level, Level::Incremental);
    let disk = &second.disks[0];
    assert_eq!((disk.changed_bytes, disk.read_bytes), (0, 0));
    assert!(lab.nbd_sent() - before <= 16 * BLOCK);
    assert!(second.totals.stored_bytes < 100 * 1024, "{:?}", second.totals);
    let own = second.elapsed.saturating_sub(second.attach_elapsed);
    assert!(own < Duration::from_secs(20), "{own:?}, a generous limit for a loaded machine");
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x16_scattered_small_writes_cost_little_more_than_their_blocks() {
    let disk = data_disk(256 * MIB, 0);
    let lab = Lab::new(SimOptions { vms: vec![VmSpec::new("vm-1").disk(disk)], ..Default::default() }).await;
    lab.incremental().await;
    let writes = 700_u64;
    for n in 0..writes {
        // Odd distances, so that gaps of all sizes occur.
        let block = (n * 5 + (n * n) % 4) % (256 * 16);
        lab.write(block * BLOCK + 4096, &noise(n, 4096));
    }
    let report = lab.incremental().await;
    let disk = &report.disks[0];
    assert!(disk.changed_bytes >= 500 * BLOCK, "{disk:?}");
    assert!(disk.read_bytes * 10 <= disk.changed_bytes * 12, "{disk:?}");
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_disks_each_have_their_own_reason() {
    let options = SimOptions {
        srs: vec![SrSpec::new("vhd", SrKind::Ext), SrSpec::new("large", SrKind::Large)],
        vms: vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, MIB)).disk(data_disk(8 * MIB, 2 * MIB).on("large"))],
        ..Default::default()
    };
    let lab = Lab::new(options).await;
    let first = lab.incremental().await;
    assert_eq!(first.disks[0].reason, "first-backup");
    assert_eq!(first.disks[1].reason, "first-backup, no-allocation-map");
    lab.assert_equals_guest(&first, "vm-1").await;
    let second = lab.incremental().await;
    assert!(second.disks.iter().all(|disk| disk.reason == "changed-blocks"), "{:?}", second.disks);
    lab.assert_clean(2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vm_is_found_by_uuid_and_by_name() {
    let lab = Lab::small().await;
    let uuid = lab.sim.vm("vm-1").unwrap().uuid;
    for selector in [VmSelector::Uuid(uuid.clone()), VmSelector::UuidOrName(uuid.to_uppercase()), name("vm-1")] {
        let report = lab.engine.backup(BackupRequest::incremental(selector)).await.unwrap();
        assert_eq!(report.vm_uuid, uuid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cd_is_left_out_and_recorded() {
    let mut vm = VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB));
    vm.cd = true;
    let lab = Lab::new(SimOptions { vms: vec![vm], ..Default::default() }).await;
    let report = lab.incremental().await;
    assert_eq!(report.skipped.len(), 1);
    assert_eq!(report.skipped[0].reason, "CD drive");
    let shown = xenvault_engine::points::show(&lab.repository, &report.point).await.unwrap();
    assert_eq!(shown.skipped.values().collect::<Vec<_>>(), ["CD drive"]);
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_vm_is_backed_up_with_evidence_about_its_run() {
    let vm = VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB)).running();
    let lab = Lab::new(SimOptions { vms: vec![vm], ..Default::default() }).await;
    let first = lab.incremental().await;
    let facts = &lab.point(&first).await.disks[0].attributes;
    for fact in ["sr-uuid", "resident-host", "resident-host-boot-time", "vm-start-time", "snapshot-time"] {
        assert!(facts.contains_key(fact), "{fact}: {facts:?}");
    }
    assert_eq!(facts["vm-power-state"], "running");
    lab.write(MIB, &noise(1, 100_000));
    let second = lab.incremental().await;
    assert_eq!(second.reason, "changed-blocks");
    lab.assert_equals_guest(&second, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_base_bears_marks_and_the_disk_only_a_nonce() {
    let lab = Lab::small().await;
    lab.incremental().await;
    let base = lab.bases().remove(0);
    let marks = config(&base);
    assert_eq!(marks["xenvault:instance"], lab.engine.instance());
    assert_eq!(marks["xenvault:role"], "base");
    assert!(!marks.contains_key("xenvault:resume-until"));
    let live = config(&lab.sim.record("VDI", &lab.disk()).unwrap());
    let ours: Vec<&String> = live.keys().filter(|key| key.starts_with("xenvault:")).collect();
    assert_eq!(ours, ["xenvault:chain"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_monitor_sees_stages_and_counters() {
    let lab = Lab::small().await;
    let report = lab.incremental().await;
    let stages = lab.monitor.stages.lock().unwrap().clone();
    for stage in
        ["checking prerequisites", "taking the snapshot", "writing the restore point", "cleaning up in the pool"]
    {
        assert!(stages.iter().any(|seen| seen == stage), "{stage}: {stages:?}");
    }
    let last = lab.monitor.last.lock().unwrap().clone().unwrap();
    assert_eq!(last.read_bytes, report.disks[0].read_bytes);
    assert_eq!(last.planned_bytes, last.done_bytes);
    assert!(last.stored_bytes > 0 && last.bottleneck.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn x13_changes_are_asked_for_as_a_task() {
    let lab = Lab::small().await;
    lab.incremental().await;
    lab.incremental().await;
    assert_eq!(lab.calls("Async.VDI.list_changed_blocks"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x15_a_grown_disk_is_read_beyond_its_old_end() {
    let lab = Lab::small().await;
    lab.incremental().await;
    let disk = lab.reference("VDI", &lab.disk()).await;
    lab.call("VDI.resize", &[disk, json!((20 * MIB).to_string())]).await;
    lab.write(19 * MIB, &noise(5, 5000));
    let report = lab.incremental().await;
    assert_eq!(report.reason, "changed-blocks");
    assert_eq!(report.disks[0].virtual_size, 20 * MIB);
    assert_eq!(report.disks[0].changed_bytes, 4 * MIB);
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_engines_do_not_work_on_one_vm_at_once() {
    let lab = Lab::new(SimOptions {
        vms: vec![VmSpec::new("vm-1").disk(DiskSpec::new(8 * MIB))],
        task_delay: Duration::from_millis(300),
        ..Default::default()
    })
    .await;
    let other = lab.second_engine();
    let (first, second) = tokio::join!(
        lab.engine.backup(BackupRequest::incremental(name("vm-1"))),
        other.backup(BackupRequest::incremental(name("vm-1"))),
    );
    let busy = [first, second].into_iter().filter_map(Result::err).collect::<Vec<_>>();
    assert_eq!(busy.len(), 1, "{busy:?}");
    assert!(busy[0].to_string().contains("another run"), "{}", busy[0]);
    lab.assert_clean(1);
}
