//! Restores to a simulated pool: every byte and every setting that a client may set.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::collections::BTreeMap;

use common::{Lab, MIB, assert_same, config, data_disk, name, noise};
use serde_json::{Value, json};
use xenvault_block::ByteRange;
use xenvault_engine::{
    BackupReport, BackupRequest, EngineError, MacPolicy, RestoreReport, RestoreRequest, SrSelector, points,
};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{Fault, FaultEffect, SimOptions, SrSpec, VmSpec};

fn two_srs(target: SrKind) -> SimOptions {
    let mut vm = VmSpec::new("vm-1").disk(data_disk(16 * MIB, 3 * MIB)).disk(data_disk(8 * MIB, MIB));
    vm.cd = true;
    SimOptions {
        hosts: 2,
        srs: vec![SrSpec::new("first", SrKind::Ext), SrSpec::new("second", target)],
        vms: vec![vm],
        ..Default::default()
    }
}

async fn restored(lab: &Lab, report: &BackupReport) -> RestoreReport {
    lab.engine.restore(request(report)).await.unwrap()
}

fn request(report: &BackupReport) -> RestoreRequest {
    let mut request = RestoreRequest::new(report.point, SrSelector::Name("second".into()));
    request.name = Some("copy".into());
    request
}

/// Every byte of the restored disks against the repository.
async fn assert_disks(lab: &Lab, backup: &BackupReport, restore: &RestoreReport) {
    let point = lab.point(backup).await;
    assert_eq!(point.disks.len(), restore.disks.len());
    for (stored, new) in point.disks.iter().zip(&restore.disks) {
        assert_eq!(stored.device, new.device);
        let reader = lab.repository.disk(&stored.map);
        for piece in ByteRange::up_to(stored.virtual_size).pieces(4 * MIB) {
            let wanted = reader.read_at(piece).await.unwrap();
            let found = lab.sim.vdi_read(&new.vdi_uuid, piece.start(), piece.len()).unwrap();
            assert_same(&found, &wanted, &format!("disk {} {piece}", new.device));
        }
    }
}

/// What a restore leaves beside the backup's bases: the new VM with its devices, and nothing else.
fn assert_only_the_copy(lab: &Lab, restore: &RestoreReport) {
    let disks: Vec<&str> = restore.disks.iter().map(|disk| disk.vdi_uuid.as_str()).collect();
    for (class, _, record) in lab.sim.new_objects() {
        let expected = match class.as_str() {
            "VM" => record["uuid"] == restore.vm_uuid.as_str(),
            "VDI" => record["type"] == "cbt_metadata" || disks.iter().any(|uuid| record["uuid"] == *uuid),
            "VBD" | "VIF" => true,
            "session" => true,
            _ => false,
        };
        assert!(expected, "left in the pool: {class} {record:#}");
        let marked = config_keys(&record).iter().any(|key| key.starts_with("xenvault:"));
        assert!(!marked || record["type"] == "cbt_metadata", "still marked: {class} {record:#}");
    }
    assert_eq!(std::fs::read_dir(lab.path("state/runs")).unwrap().count(), 0);
}

fn config_keys(record: &Value) -> Vec<String> {
    record["other_config"].as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_vm_has_the_bytes_and_devices_of_the_original() {
    let lab = Lab::new(two_srs(SrKind::Ext)).await;
    lab.write(9 * MIB + 77, &noise(3, 300_000));
    let backup = lab.incremental().await;
    let restore = restored(&lab, &backup).await;
    assert_disks(&lab, &backup, &restore).await;
    assert_only_the_copy(&lab, &restore);
    let sent: u64 = restore.disks.iter().map(|disk| disk.sent_bytes).sum();
    assert!(sent < 6 * MIB, "zeros are not sent to disks that read as zeros: {sent}");

    let vm = lab.sim.record("VM", &restore.vm_uuid).unwrap();
    assert_eq!(vm["name_label"], "copy");
    assert_eq!(vm["blocked_operations"], json!({}));
    let vbds: Vec<Value> = lab.new_of("VBD");
    let kinds: BTreeMap<&str, &str> =
        vbds.iter().map(|vbd| (vbd["userdevice"].as_str().unwrap(), vbd["type"].as_str().unwrap())).collect();
    assert_eq!(kinds.len(), 3, "{vbds:?}");
    assert_eq!((kinds["0"], kinds["1"]), ("Disk", "Disk"));
    assert!(vbds.iter().any(|vbd| vbd["type"] == "CD" && vbd["empty"] == true));
    for vdi in restore.disks.iter().map(|disk| lab.sim.record("VDI", &disk.vdi_uuid).unwrap()) {
        let sr = lab.sim.srs().into_iter().find(|sr| sr.name == "second").unwrap();
        let reference = lab.reference("SR", &sr.uuid).await;
        assert_eq!(vdi["SR"], reference);
        assert!(!vdi["name_label"].as_str().unwrap().contains("xenvault"), "{vdi:#}");
    }
    lab.sim.start_vm(&restore.vm_uuid, 0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_sr_gets_its_zeros_since_new_disks_hold_garbage() {
    let lab = Lab::new(two_srs(SrKind::LvmRaw)).await;
    let backup = lab.incremental().await;
    let restore = restored(&lab, &backup).await;
    assert_disks(&lab, &backup, &restore).await;
    let sent: u64 = restore.disks.iter().map(|disk| disk.sent_bytes).sum();
    assert_eq!(sent, 24 * MIB, "{:#}", lab.sim.record("VDI", &restore.disks[0].vdi_uuid).unwrap());
    assert_only_the_copy(&lab, &restore);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_disk_sr_reads_as_zeros_too() {
    let lab = Lab::new(two_srs(SrKind::Large)).await;
    let backup = lab.incremental().await;
    let restore = restored(&lab, &backup).await;
    assert_disks(&lab, &backup, &restore).await;
    assert!(restore.disks.iter().map(|disk| disk.sent_bytes).sum::<u64>() < 6 * MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_that_a_client_may_set_is_restored() {
    let lab = Lab::new(two_srs(SrKind::Ext)).await;
    let uuid = lab.sim.vm("vm-1").unwrap().uuid;
    let vm = lab.reference("VM", &uuid).await;
    let set = |field: &str, value: Value| {
        let (method, vm, sim) = (format!("VM.set_{field}"), vm.clone(), lab.sim.clone());
        async move { sim.call(&method, &[vm, value]).await.map(|_| ()) }
    };
    // Setters that the simulator does not have are not this test's business.
    let mut changed = 0;
    for (field, value) in [
        ("name_description", json!("a description")),
        ("VCPUs_max", json!("4")),
        ("VCPUs_at_startup", json!("3")),
        ("VCPUs_params", json!({"weight": "512"})),
        ("HVM_boot_params", json!({"order": "dc", "firmware": "uefi"})),
        ("platform", json!({"acpi": "1", "secureboot": "auto", "viridian": "true"})),
        ("NVRAM", json!({"EFI-variables": "AAAA"})),
        ("tags", json!(["gold", "prod"])),
        ("actions_after_crash", json!("preserve")),
        ("order", json!("7")),
        ("start_delay", json!("11")),
        ("shutdown_delay", json!("12")),
        ("user_version", json!("2")),
        ("recommendations", json!("<restrictions/>")),
        ("xenstore_data", json!({"vm-data/key": "value"})),
    ] {
        changed += usize::from(set(field, value).await.is_ok());
    }
    lab.call("VM.add_to_other_config", &[vm.clone(), json!("folder"), json!("/databases")]).await;
    assert!(changed > 0);
    let backup = lab.incremental().await;
    let restore = restored(&lab, &backup).await;
    let (old, new) = (lab.sim.record("VM", &uuid).unwrap(), lab.sim.record("VM", &restore.vm_uuid).unwrap());
    for field in [
        "name_description",
        "user_version",
        "is_a_template",
        "memory_static_max",
        "memory_dynamic_max",
        "memory_dynamic_min",
        "memory_static_min",
        "VCPUs_params",
        "VCPUs_max",
        "VCPUs_at_startup",
        "actions_after_shutdown",
        "actions_after_reboot",
        "actions_after_crash",
        "PV_bootloader",
        "PV_kernel",
        "PV_ramdisk",
        "PV_args",
        "PV_bootloader_args",
        "PV_legacy_args",
        "HVM_boot_policy",
        "HVM_boot_params",
        "HVM_shadow_multiplier",
        "platform",
        "PCI_bus",
        "recommendations",
        "xenstore_data",
        "tags",
        "start_delay",
        "shutdown_delay",
        "order",
        "version",
        "hardware_platform_version",
        "has_vendor_device",
        "reference_label",
        "domain_type",
        "NVRAM",
        "blocked_operations",
        "bios_strings",
    ] {
        assert_eq!(new[field], old[field], "{field}");
    }
    assert_eq!(config(&new).get("folder").map(String::as_str), Some("/databases"));
    assert_ne!(config(&new).get("mac_seed"), config(&old).get("mac_seed").or(Some(&String::new())));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_in_use_is_not_doubled() {
    let lab = Lab::new(two_srs(SrKind::Ext)).await;
    let backup = lab.incremental().await;
    let copy = restored(&lab, &backup).await;
    let original = lab.sim.records("VIF").into_iter().map(|(_, vif)| vif).collect::<Vec<_>>();
    let macs: std::collections::BTreeSet<&str> = original.iter().map(|vif| vif["MAC"].as_str().unwrap()).collect();
    assert_eq!(macs.len(), original.len(), "{original:?}");
    assert!(copy.vifs[0].mapped_to.is_some() && copy.vifs[0].mac.is_some());
    let mut request = request(&backup);
    request.mac = MacPolicy::Keep;
    let twin = lab.engine.restore(request).await.unwrap();
    assert_ne!(twin.vifs[0].mac, copy.vifs[0].mac);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmapped_network_leaves_the_interface_out() {
    let lab = Lab::new(two_srs(SrKind::Ext)).await;
    let backup = lab.incremental().await;
    // The networks of the pool get other names, and the configuration names one that does not exist: as in another pool.
    let other = Lab::new(two_srs(SrKind::Ext)).await;
    for (reference, _) in other.sim.records("network") {
        other.call("network.set_name_label", &[json!(reference), json!("elsewhere")]).await;
    }
    let options = xenvault_engine::EngineOptions::new(other.path("state"));
    let engine = xenvault_engine::Engine::open(other.session.clone(), Some(lab.repository.clone()), options).unwrap();
    let report = engine.restore(request(&backup)).await.unwrap();
    assert_eq!(report.vifs[0].mapped_to, None);
    assert!(report.warnings.iter().any(|warning| warning.code == "network-not-mapped"), "{:?}", report.warnings);
    assert!(other.new_of("VIF").is_empty());

    let mut unknown = request(&backup);
    unknown.network_map.insert(report.vifs[0].network.clone(), "nowhere".into());
    assert!(matches!(engine.restore(unknown).await, Err(EngineError::UnknownNetwork { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_restore_leaves_nothing() {
    let lab = Lab::new(two_srs(SrKind::Ext)).await;
    let backup = lab.incremental().await;
    let failure = || FaultEffect::Error { code: "INTERNAL_ERROR".into(), params: vec!["ordered".into()] };
    for call in ["VM.create", "VDI.create", "VBD.create", "VIF.create", "VM.set_memory_limits", "VM.set_name_label"] {
        lab.sim.clear_faults();
        lab.sim.fault(Fault::once(call, failure()));
        let error = lab.engine.restore(request(&backup)).await.expect_err(call);
        assert!(matches!(error, EngineError::Pool { .. }), "{call}: {error}");
        lab.assert_clean(2);
    }
    lab.sim.clear_faults();
    lab.sim.fault(Fault::once("http/import_raw_vdi", FaultEffect::Truncate(MIB)));
    assert!(lab.engine.restore(request(&backup)).await.is_err());
    lab.assert_clean(2);
    lab.sim.clear_faults();
    let restore = restored(&lab, &backup).await;
    assert_disks(&lab, &backup, &restore).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_restore_leaves_nothing() {
    let lab = Lab::new(two_srs(SrKind::Ext)).await;
    let backup = lab.incremental().await;
    for calls in [1, 3, 6, 10] {
        let engine = lab.engine.clone();
        let before: u64 = lab.sim.counters().calls.values().sum();
        tokio::select! {
            _ = engine.restore(request(&backup)) => {}
            () = calls_made(&lab, before + 12 + calls) => {}
        }
        lab.engine.settled().await;
    }
    for record in lab.new_of("VM") {
        assert_eq!(record["name_label"], "copy", "half a VM: {record:#}");
    }
    // A journal stays only where nobody knows what came of a call: the object may still appear, and is ours then.
    for journal in std::fs::read_dir(lab.path("state/runs")).unwrap() {
        let text = std::fs::read_to_string(journal.unwrap().path()).unwrap();
        let count = |entry: &str| {
            let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.filter(|line| line["entry"] == entry && line["what"] != "task").count()
        };
        assert!(count("intend") > count("created"), "{text}");
    }
    let left: Vec<_> = lab.new_of("VDI").into_iter().filter(|vdi| vdi["type"] != "cbt_metadata").collect();
    assert!(left.iter().all(|vdi| !vdi["name_label"].as_str().unwrap().contains("[xenvault")), "{left:#?}");
}

/// Ends when the pool has been called so many times.
async fn calls_made(lab: &Lab, total: u64) {
    while lab.sim.counters().calls.values().sum::<u64>() < total {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_can_not_be_met_are_refused_before_anything_is_made() {
    let lab = Lab::new(two_srs(SrKind::Ext)).await;
    let backup = lab.incremental().await;
    let nowhere = RestoreRequest::new(backup.point, SrSelector::Name("nowhere".into()));
    let error = lab.engine.restore(nowhere).await.unwrap_err();
    assert!(matches!(error, EngineError::UnknownSr { .. }), "{error}");
    let mut small = two_srs(SrKind::Lvm);
    small.srs[1].size = 10 * MIB;
    let other = Lab::new(small).await;
    let options = xenvault_engine::EngineOptions::new(other.path("state"));
    let engine = xenvault_engine::Engine::open(other.session.clone(), Some(lab.repository.clone()), options).unwrap();
    let error = engine.restore(request(&backup)).await.unwrap_err();
    assert!(matches!(error, EngineError::TargetSpace { needed, .. } if needed == 24 * MIB), "{error}");
    other.assert_clean(0);
    let unknown = RestoreRequest::new("11111111-2222-4333-8444-555555555555".parse().unwrap(), SrSelector::Default);
    assert!(matches!(lab.engine.restore(unknown).await, Err(EngineError::Repository { .. })));
    lab.assert_clean(2);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_disk_is_written_to_a_sparse_file() {
    let lab = Lab::small().await;
    let backup = lab.engine.backup(BackupRequest::full(name("vm-1"))).await.unwrap();
    let path = lab.path("disk.raw");
    let report =
        points::restore_disk(&lab.repository, &backup.point, "0", &path, lab.monitor.clone() as _).await.unwrap();
    assert_eq!((report.virtual_size, report.written_bytes), (16 * MIB, 4 * MIB));
    let guest = lab.sim.guest_read("vm-1", "0", 0, 16 * MIB).unwrap();
    assert_same(&std::fs::read(&path).unwrap(), &guest, "the file");
    let again = points::restore_disk(&lab.repository, &backup.point, "0", &path, lab.monitor.clone() as _).await;
    assert!(matches!(again, Err(EngineError::LocalFile { .. })), "an existing file is never overwritten");
    let other =
        points::restore_disk(&lab.repository, &backup.point, "9", &lab.path("x"), lab.monitor.clone() as _).await;
    assert!(matches!(other, Err(EngineError::UnknownDisk { .. })));
    assert!(!lab.path("x").exists());
}
