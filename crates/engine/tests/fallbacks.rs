//! Every error code that the table calls "fall back" has its other way: the run goes on by it, and says why.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::collections::BTreeSet;

use common::{Lab, MIB, noise};
use xenvault_engine::BackupReport;
use xenvault_sim::{Fault, FaultEffect};
use xenvault_xenapi::FailureClass;

/// What a backup does when a call fails with a code, for good.
struct Way {
    call: &'static str,
    code: &'static str,
    /// Reason of the disk in the report.
    reason: &'static str,
    /// A warning that the report has.
    warning: Option<&'static str>,
    /// Bases that are left.
    bases: usize,
}

const fn way(
    call: &'static str,
    code: &'static str,
    reason: &'static str,
    warning: Option<&'static str>,
    bases: usize,
) -> Way {
    Way { call, code, reason, warning, bases }
}

const LIST: &str = "VDI.list_changed_blocks";
const ENABLE: &str = "VDI.enable_cbt";
const PURGE: &str = "VDI.data_destroy";
const EXPORT: &str = "http/export_raw_vdi";

/// Of calls that a second backup makes, after a first one that was good.
const WAYS: &[Way] = &[
    way(LIST, "SR_BACKEND_FAILURE_459", "bitmap-invalid", Some("changes-not-listed"), 1),
    way(LIST, "SR_BACKEND_FAILURE_460", "unrelated", Some("changes-not-listed"), 1),
    way(LIST, "VDI_NO_CBT_METADATA", "base-gone", Some("changes-not-listed"), 1),
    way(LIST, "VDI_INCOMPATIBLE_TYPE", "listing-failed", Some("changes-not-listed"), 1),
    way(PURGE, "VDI_NO_CBT_METADATA", "changed-blocks", Some("base-lost"), 1),
];

/// Of calls that a first backup makes.
const FIRST_WAYS: &[Way] = &[
    way(ENABLE, "SR_BACKEND_FAILURE_457", "first-backup", Some("cbt-not-enabled"), 0),
    way(ENABLE, "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", "first-backup", Some("cbt-not-enabled"), 0),
    way(EXPORT, "VDI_NOT_SPARSE", "first-backup, no-allocation-map", None, 1),
    way(EXPORT, "VDI_TOO_LARGE", "first-backup, no-allocation-map", None, 1),
];

/// Codes whose other way is tried elsewhere, with the test.
const ELSEWHERE: &[(&str, &str)] = &[
    ("EVENTS_LOST", "xenapi: x08_a_lost_token_begins_again"),
    ("EVENT_FROM_TOKEN_PARSE_FAILURE", "xenapi: x08_lost_events_and_tokens_list_everything_again"),
    ("SR_BACKEND_FAILURE_458", "engine: x21 in chain.rs, where giving up a chain only warns"),
    (
        "VDI_CBT_ENABLED",
        "engine: x20 in chain.rs, where tracking is switched off for a move and the disk is read whole",
    ),
];

/// Codes of calls that neither a backup nor a restore makes: the way is the caller's who makes them.
const FOR_CALLERS: &[&str] =
    &["DEVICE_ALREADY_DETACHED", "DEVICE_ALREADY_EXISTS", "MAP_DUPLICATE_KEY", "SESSION_NOT_REGISTERED"];

async fn check(lab: &Lab, way: &Way) -> BackupReport {
    let params = vec![String::new(), "ordered".into(), String::new()];
    lab.sim.fault(Fault::always(way.call, FaultEffect::Error { code: way.code.into(), params }));
    let report = lab.incremental().await;
    lab.sim.clear_faults();
    assert_eq!(report.disks[0].reason, way.reason, "{} {}", way.call, way.code);
    let warned = |code: &str| report.warnings.iter().any(|warning| warning.code == code);
    assert!(way.warning.is_none_or(warned), "{} {}: {:?}", way.call, way.code, report.warnings);
    lab.assert_equals_guest(&report, "vm-1").await;
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_goes_on_by_another_way_for_every_code_that_has_one() {
    for way in WAYS {
        let lab = Lab::small().await;
        lab.incremental().await;
        lab.write(2 * MIB, &noise(1, 100_000));
        check(&lab, way).await;
        lab.assert_clean(way.bases);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_backup_goes_on_by_another_way_for_every_code_that_has_one() {
    for way in FIRST_WAYS {
        let lab = Lab::small().await;
        check(&lab, way).await;
        lab.assert_clean(way.bases);
    }
}

#[test]
fn no_code_is_called_fall_back_without_a_way() {
    let table = FailureClass::table().iter().filter(|row| row.class == FailureClass::FallBack);
    let table: BTreeSet<&str> = table.map(|row| row.code).collect();
    let ways = WAYS.iter().chain(FIRST_WAYS).map(|way| way.code);
    let elsewhere = ELSEWHERE.iter().map(|(code, _)| *code);
    let known: BTreeSet<&str> = ways.chain(elsewhere).chain(FOR_CALLERS.iter().copied()).collect();
    assert_eq!(known, table);
}
