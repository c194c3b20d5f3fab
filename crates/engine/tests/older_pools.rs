//! Pools that can do less: from before changed block tracking and NBD, or with a licence that leaves tracking out. Every
//! VM of them is backed up as a whole, and the report says the true reason.

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
use xenvault_block::WriteAt as _;
use xenvault_engine::{
    BackupReport, BackupRequest, CheckRequest, Engine, EngineError, EngineOptions, ErrorKind, JobMonitor, Level,
    Severity, Stage,
};
use xenvault_sim::{Fault, FaultEffect, NbdAccess, SimOptions, SimPool, VmSpec};
use xenvault_xenapi::Retry;

fn error(code: &str, params: &[&str]) -> FaultEffect {
    FaultEffect::Error { code: code.to_owned(), params: params.iter().map(|param| (*param).to_owned()).collect() }
}

async fn older() -> Lab {
    Lab::new(SimOptions {
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, 3 * MIB)).disk(data_disk(4 * MIB, MIB))],
        older_server: true,
        nbd: NbdAccess::Off,
        ..Default::default()
    })
    .await
}

/// All disks were read whole for this reason, and the point equals the guest.
async fn assert_whole(lab: &Lab, reason: &str) -> BackupReport {
    let report = lab.incremental().await;
    assert_eq!(report.level, Level::Full);
    for disk in &report.disks {
        assert_eq!((disk.level, disk.reason.as_str()), (Level::Full, reason));
    }
    lab.assert_equals_guest(&report, "vm-1").await;
    report
}

fn warning(report: &BackupReport, code: &str) -> String {
    let found = report.warnings.iter().find(|warning| warning.code == code);
    found.unwrap_or_else(|| panic!("no {code} in {:?}", report.warnings)).text.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn x09_a_server_from_before_tracking_and_nbd_is_backed_up_over_http() {
    let lab = older().await;
    assert_whole(&lab, "first-backup").await;
    lab.write(MIB, &noise(1, 70_000));
    let report = assert_whole(&lab, "cbt-unsupported").await;
    let said = warning(&report, "cbt-not-enabled");
    assert!(said.contains("it does not have the method VDI.enable_cbt"), "{said}");
    let server = lab.session.server();
    assert!(!server.version.is_empty() && said.contains(&server.to_string()), "{said}");
    assert!(warning(&report, "nbd-unsupported").contains("VDI.get_nbd_info"));
    assert_eq!(report.disks.iter().map(|disk| disk.read_bytes).sum::<u64>(), 12 * MIB);
    assert_eq!(lab.points().await, 2);
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x34_an_export_over_http_that_breaks_makes_no_point() {
    let lab = older().await;
    lab.sim.fault(Fault::always("http/export_raw_vdi", FaultEffect::Truncate(2 * MIB)));
    let failure = lab.fails().await;
    assert_eq!((failure.kind(), failure.retry()), (ErrorKind::Pool, Retry::Later), "{failure:?}");
    assert_eq!(lab.points().await, 0);
    lab.sim.clear_faults();
    assert_whole(&lab, "first-backup").await;
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x22_a_server_that_has_nbd_and_does_not_offer_it_is_still_a_finding() {
    let lab = Lab::new(SimOptions { nbd: NbdAccess::Off, ..Default::default() }).await;
    assert!(matches!(lab.fails().await, EngineError::Prerequisite { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn x09_a_restricted_licence_is_the_reason_and_is_named() {
    let options = SimOptions {
        vms: vec![VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB))],
        restrictions: vec!["restrict_cbt".to_owned()],
        ..Default::default()
    };
    let lab = Lab::new(options).await;
    assert_whole(&lab, "first-backup").await;
    let report = assert_whole(&lab, "cbt-unsupported").await;
    assert!(warning(&report, "cbt-restricted").contains("licence"));
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x09_every_code_that_means_not_here_leads_to_a_whole_read() {
    for (code, params, said) in [
        ("LICENSE_RESTRICTION", vec!["CBT"], "its licence does not include CBT"),
        ("FEATURE_RESTRICTED", vec!["CBT"], "its licence does not include CBT"),
        ("MESSAGE_METHOD_UNKNOWN", vec!["VDI.enable_cbt"], "does not have the method VDI.enable_cbt"),
        ("MESSAGE_REMOVED", vec![], "does not have the method VDI.enable_cbt"),
        ("SR_OPERATION_NOT_SUPPORTED", vec!["OpaqueRef:sr"], "the SR can not do VDI.enable_cbt"),
    ] {
        let lab = Lab::small().await;
        lab.sim.fault(Fault::always("VDI.enable_cbt", error(code, &params)));
        assert_whole(&lab, "first-backup").await;
        let report = assert_whole(&lab, "cbt-unsupported").await;
        let text = warning(&report, "cbt-not-enabled");
        assert!(text.contains(said), "{text}");
        lab.assert_clean(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x18_storage_that_says_busy_at_the_clean_up_is_asked_again() {
    for code in ["SR_BACKEND_FAILURE_46", "SR_BACKEND_FAILURE_82", "DEVICE_ALREADY_ATTACHED", "VDI_IN_USE"] {
        let lab = Lab::small().await;
        lab.sim.fault(Fault { count: 2, ..Fault::once("VDI.data_destroy", error(code, &["", "busy", ""])) });
        let report = lab.incremental().await;
        assert!(report.warnings.is_empty(), "{code}: {:?}", report.warnings);
        lab.assert_clean(1);
    }
}

/// Changes the disk's snapshot behind everybody's back before it is read a second time.
struct Meddler {
    sim: SimPool,
    offset: u64,
}

impl JobMonitor for Meddler {
    fn stage(&self, stage: &Stage) {
        if !matches!(stage, Stage::Verify { .. }) {
            return;
        }
        for (class, _, record) in self.sim.new_objects() {
            if class == "VDI" && record["is_a_snapshot"] == true {
                let disk = self.sim.storage().disk(record["uuid"].as_str().unwrap().parse().unwrap()).unwrap();
                disk.write_all_at(&[0xa5; 4096], self.offset).unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_came_over_http_is_read_again_where_that_is_cheap() {
    let lab = older().await;
    let report = lab.incremental().await;
    for disk in &report.disks {
        // The begin of the disk, and places that the SR calls empty.
        assert!(disk.sample_bytes > MIB && disk.sample_bytes <= 3 * MIB, "{disk:?}");
    }
    // Of each disk: whole, the head with the allocation map, and the begin.
    assert_eq!(lab.calls("http/export_raw_vdi"), 6);
    assert!(warning(&report, "nbd-unsupported").contains("reads only a part of each again"));
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_reads_otherwise_over_http_the_second_time_makes_no_point() {
    let lab = older().await;
    let meddler = Arc::new(Meddler { sim: lab.sim.clone(), offset: 512 * 1024 });
    let options = EngineOptions::new(lab.path("state")).with_monitor(meddler);
    let engine = Engine::open(lab.session.clone(), Some(lab.repository.clone()), options).unwrap();
    let failure = engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap_err();
    assert!(matches!(failure, EngineError::SampleDiffers { .. }), "{failure:?}");
    assert_eq!(failure.kind(), ErrorKind::Verification);
    assert_eq!(lab.points().await, 0);
    lab.assert_clean(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_check_of_a_server_without_nbd_warns_where_a_backup_works_and_fails_where_it_fails() {
    let lab = older().await;
    let report = lab.engine.check(&CheckRequest::default()).await.unwrap();
    let found = |code: &str| report.findings.iter().find(|finding| finding.code == code);
    let warning = found("nbd-unsupported").unwrap();
    assert_eq!(warning.severity, Severity::Warning, "{warning:?}");
    assert!(warning.reason.contains("VDI.get_nbd_info") && warning.consequence.contains("over HTTP"), "{warning:?}");
    assert!(found("nbd-not-enabled").is_none());
    assert_eq!(report.count(Severity::Error), 0, "{:?}", report.findings);
    lab.incremental().await;

    let lab = Lab::new(SimOptions { nbd: NbdAccess::Off, ..Default::default() }).await;
    let report = lab.engine.check(&CheckRequest::default()).await.unwrap();
    let error = report.findings.iter().find(|finding| finding.code == "nbd-not-enabled").unwrap();
    assert_eq!(error.severity, Severity::Error);
    assert!(matches!(lab.fails().await, EngineError::Prerequisite { .. }));
}
