//! Requests and pools that can not be backed up: a clear text, nothing left in the pool, the repository intact.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use common::{Lab, MIB, data_disk, name};
use serde_json::json;
use xenvault_engine::{
    BackupRequest, ClearText, Engine, EngineError, EngineOptions, ErrorKind, FindingKind, VmSelector,
};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskSpec, Fault, FaultEffect, NbdAccess, SimOptions, SrSpec, VmSpec};

#[track_caller]
fn finding(error: &EngineError) -> FindingKind {
    match error {
        EngineError::Prerequisite { finding } => finding.kind,
        other => panic!("no finding: {other}"),
    }
}

async fn with_vm(vm: VmSpec) -> Lab {
    Lab::new(SimOptions { vms: vec![vm], ..Default::default() }).await
}

/// Nothing was touched, and there is no point.
async fn assert_untouched(lab: &Lab) {
    lab.assert_clean(0);
    assert_eq!(lab.points().await, 0);
    assert_eq!(lab.calls("VM.snapshot"), 0);
    assert_eq!(lab.calls("VDI.enable_cbt"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_vm() {
    let lab = Lab::small().await;
    for selector in [name("nobody"), VmSelector::UuidOrName("11111111-2222-4333-8444-555555555555".into())] {
        let error = lab.engine.backup(BackupRequest::incremental(selector)).await.unwrap_err();
        assert!(matches!(error, EngineError::UnknownVm { .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::Request);
    }
    assert_untouched(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x14_a_bitmap_that_is_none_means_reading_everything() {
    let lab = Lab::small().await;
    lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
    // A disk of 16 MiB has 256 blocks: 32 bytes, 44 characters.
    let good = "A".repeat(43) + "=";
    for text in ["".to_owned(), "not base64!".to_owned(), good[1..].to_owned(), "AAAA".to_owned(), "/".repeat(1 << 20)]
    {
        lab.sim.fault(Fault::once("VDI.list_changed_blocks", FaultEffect::TextAfter(text.clone())));
        let report = lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
        let said = text.chars().take(12).collect::<String>();
        assert_eq!(report.disks[0].reason, "bitmap-invalid", "{said}");
        let warning = report.warnings.iter().find(|warning| warning.code == "bitmap-invalid").unwrap();
        assert!(warning.text.len() < 500, "{said}: {} bytes of text", warning.text.len());
        lab.assert_equals_guest(&report, "vm-1").await;
    }
    let report = lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
    assert_eq!(report.disks[0].reason, "changed-blocks");
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_vms_of_one_name_are_listed_with_their_uuids() {
    let twin = || VmSpec::new("vm-1").disk(DiskSpec::new(4 * MIB));
    let lab = Lab::new(SimOptions { vms: vec![twin(), twin()], ..Default::default() }).await;
    let text = lab.fails().await.to_string();
    for vm in lab.sim.vms() {
        assert!(text.contains(&vm.uuid), "{text}");
    }
    assert_untouched(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_and_control_domains_are_no_vms() {
    let lab = Lab::small().await;
    let vm = lab.reference("VM", &lab.sim.vm("vm-1").unwrap().uuid).await;
    lab.call("VM.snapshot", &[vm, json!("by hand")]).await;
    for (_, record) in lab.sim.records("VM") {
        if record["is_a_snapshot"] == true || record["is_control_domain"] == true {
            let uuid = record["uuid"].as_str().unwrap().to_owned();
            let error = lab.engine.backup(BackupRequest::incremental(VmSelector::Uuid(uuid))).await.unwrap_err();
            assert!(matches!(error, EngineError::NotAVm { .. }), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_without_disks_and_one_with_a_cd_only() {
    let mut with_cd = VmSpec::new("vm-1");
    with_cd.cd = true;
    for (vm, hint) in [(VmSpec::new("vm-1"), "no block device"), (with_cd, "CD drive")] {
        let lab = with_vm(vm).await;
        let error = lab.fails().await;
        assert!(matches!(error, EngineError::NoDisks { .. }));
        assert!(error.to_string().contains(hint), "{error}");
        assert_untouched(&lab).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x22_nbd_that_is_not_enabled_names_the_command() {
    let options = SimOptions { nbd: NbdAccess::Off, ..Default::default() };
    let lab = Lab::new(options).await;
    let error = lab.fails().await;
    assert_eq!((finding(&error), error.kind()), (FindingKind::NbdNotEnabled, ErrorKind::Prerequisite));
    let text = error.to_string();
    assert!(text.contains("xe network-param-add param-name=purpose param-key=nbd uuid="), "{text}");
    assert_untouched(&lab).await;
    // The remedy helps.
    lab.sim.set_nbd(NbdAccess::Tls);
    lab.incremental().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x22_a_purpose_without_a_plugged_interface_is_told_apart() {
    let lab = Lab::small().await;
    let mut unplugged = 0;
    for (reference, record) in lab.sim.records("PIF") {
        if record["management"] == true || record["currently_attached"] == true {
            unplugged += usize::from(lab.sim.call("PIF.unplug", &[json!(reference)]).await.is_ok());
        }
    }
    if unplugged == 0 {
        // The simulator keeps its only interfaces plugged: then the answer is made empty.
        lab.sim.fault(Fault::always(
            "VDI.get_nbd_info",
            FaultEffect::Error { code: "SR_HAS_NO_PBDS".into(), params: vec![] },
        ));
        assert!(lab.fails().await.kind() == ErrorKind::Pool);
    } else {
        assert_eq!(finding(&lab.fails().await), FindingKind::NbdNoAddress);
    }
    assert_untouched(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x28_clear_text_needs_consent() {
    let lab = Lab::new(SimOptions {
        nbd: NbdAccess::Insecure,
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB))],
        ..Default::default()
    })
    .await;
    assert_eq!(finding(&lab.fails().await), FindingKind::NbdClearText);
    assert_untouched(&lab).await;
    let mut options = EngineOptions::new(lab.path("state"));
    options.clear_text = ClearText::Accept;
    let engine = Engine::open(lab.session.clone(), Some(lab.repository.clone()), options).unwrap();
    let report = engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sr_without_space_for_the_snapshot_is_refused_before() {
    let mut sr = SrSpec::new("thick", SrKind::Lvm);
    sr.size = 100 * MIB;
    let lab = Lab::new(SimOptions {
        srs: vec![sr],
        vms: vec![VmSpec::new("vm-1").disk(DiskSpec::new(64 * MIB))],
        ..Default::default()
    })
    .await;
    let error = lab.fails().await;
    assert_eq!(finding(&error), FindingKind::SrSpace);
    assert!(error.to_string().contains("thick"), "{error}");
    assert_untouched(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_volume_can_not_be_snapshotted() {
    let lab = Lab::new(SimOptions {
        srs: vec![SrSpec::new("raw", SrKind::LvmRaw)],
        vms: vec![VmSpec::new("vm-1").disk(DiskSpec::new(8 * MIB))],
        ..Default::default()
    })
    .await;
    let error = lab.fails().await;
    assert_eq!(finding(&error), FindingKind::SnapshotUnsupported, "{error}");
    assert_untouched(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sr_that_is_full_at_the_snapshot() {
    let lab = Lab::small().await;
    let params = vec![String::new(), "There is insufficient space".to_owned(), String::new()];
    lab.sim.fault(Fault::once("VM.snapshot", FaultEffect::Error { code: "SR_BACKEND_FAILURE_44".into(), params }));
    let error = lab.fails().await;
    assert!(matches!(error, EngineError::SrFull { .. }), "{error}");
    assert!(error.to_string().contains("free space"), "{error}");
    lab.assert_clean(0);
    assert_eq!(lab.points().await, 0);
    lab.incremental().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_snapshot_names_the_block() {
    let lab = Lab::small().await;
    let vm = lab.reference("VM", &lab.sim.vm("vm-1").unwrap().uuid).await;
    lab.call("VM.set_blocked_operations", &[vm, json!({"snapshot": "maintenance"})]).await;
    let error = lab.fails().await;
    assert_eq!(finding(&error), FindingKind::SnapshotNotAllowed);
    assert!(error.to_string().contains("maintenance"), "{error}");
    assert_untouched(&lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_without_a_repository() {
    let lab = Lab::small().await;
    let engine = Engine::open(lab.session.clone(), None, EngineOptions::new(lab.path("s2"))).unwrap();
    let error = engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap_err();
    assert!(matches!(error, EngineError::NoRepository));
    engine.sweep(Default::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_products_change_information_is_a_warning_and_stays() {
    let lab = Lab::small().await;
    let disk = lab.reference("VDI", &lab.disk()).await;
    lab.call("VDI.enable_cbt", std::slice::from_ref(&disk)).await;
    let foreign = lab.call("VDI.snapshot", &[disk]).await;
    lab.call("VDI.data_destroy", std::slice::from_ref(&foreign)).await;
    let report = lab.incremental().await;
    assert!(report.warnings.iter().any(|warning| warning.code == "foreign-cbt"), "{:?}", report.warnings);
    lab.incremental().await;
    let records = lab.sim.records("VDI");
    assert!(records.contains_key(foreign.as_str().unwrap()), "it is not ours");
}
