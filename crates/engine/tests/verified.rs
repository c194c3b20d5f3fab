//! Verified incrementals: the pool's list of changes is checked against the whole disk every N runs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::num::NonZeroU32;

use common::{BLOCK, Lab, MIB, data_disk, name, noise};
use xenvault_engine::{BackupReport, BackupRequest};
use xenvault_sim::storage::LostBits;
use xenvault_sim::{SimOptions, VmSpec};

async fn backup(lab: &Lab, every: u32) -> BackupReport {
    let request = BackupRequest::incremental(name("vm-1")).verified_every(NonZeroU32::new(every));
    let report = lab.engine.backup(request).await.unwrap();
    lab.assert_equals_guest(&report, "vm-1").await;
    report
}

async fn running() -> Lab {
    let disk = data_disk(16 * MIB, 4 * MIB);
    Lab::new(SimOptions { vms: vec![VmSpec::new("vm-1").disk(disk).running()], ..Default::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_third_run_checks_the_list_and_finds_nothing_where_nothing_is_wrong() {
    let lab = running().await;
    let mut reasons = Vec::new();
    for round in 0..7_u64 {
        lab.write(round * MIB, &noise(round, 100_000));
        let report = backup(&lab, 3).await;
        let checked = report.disks[0].reason == "verification";
        assert_eq!(report.disks[0].verification.is_some(), checked);
        if let Some(found) = &report.disks[0].verification {
            assert_eq!((found.compared_bytes, found.unlisted_bytes), (16 * MIB, 0));
        }
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
        reasons.push(report.reason);
    }
    let (inc, check) = ("changed-blocks", "verification");
    assert_eq!(reasons, ["first-backup", inc, inc, check, inc, inc, check]);
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_was_not_listed_is_named_and_the_next_run_checks_again() {
    let lab = running().await;
    backup(&lab, 1).await;
    lab.write(2 * MIB + 5, &noise(1, 70_000));
    lab.write(9 * MIB, &noise(2, 512));
    // The storage forgets what it had recorded, and tells nobody.
    lab.sim.storage().crash(lab.disk().parse().unwrap(), LostBits::SinceAttach).unwrap();
    lab.write(4 * MIB, &noise(3, 1000));
    let report = backup(&lab, 1).await;
    let found = report.disks[0].verification.clone().unwrap();
    let places: Vec<(u64, u64)> = found.unlisted.iter().map(|range| (range.start(), range.len())).collect();
    assert_eq!(places, [(2 * MIB, 2 * BLOCK), (9 * MIB, BLOCK)]);
    assert_eq!(found.unlisted_bytes, 3 * BLOCK);
    let warning = report.warnings.iter().find(|warning| warning.code == "cbt-incomplete").unwrap();
    assert!(warning.text.contains("disk 0") && warning.text.contains("196608 bytes"), "{warning}");
    assert!(lab.point(&report).await.disks[0].bitmap.is_none(), "a list that lacks something is not kept");

    // Long before its turn, since the last check failed.
    lab.write(5 * MIB, &noise(4, 1000));
    let again = backup(&lab, 2).await;
    assert_eq!(again.disks[0].reason, "verification");
    assert_eq!(again.disks[0].verification.clone().unwrap().unlisted_bytes, 0);
    assert_eq!(backup(&lab, 2).await.reason, "changed-blocks");
    lab.assert_clean(1);
}
