//! `docs/xenapi.md` says in which order calls are made: real runs are held to it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Lab, MIB, data_disk, noise};
use xenvault_engine::{RestoreRequest, SrSelector};
use xenvault_sim::{SimOptions, VmSpec};

/// Columns of the table.
const BACKUP: usize = 3;
const RESTORE: usize = 4;

/// The steps of the table, by call, out of one of its columns.
fn documented(column: usize) -> BTreeMap<String, Vec<u32>> {
    let mut found = BTreeMap::new();
    for line in include_str!("../../../docs/xenapi.md").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if cells.len() != 8 {
            continue;
        }
        let steps: Vec<u32> = cells[column].split(", ").filter_map(|step| step.parse().ok()).collect();
        for call in cells[1].split(", ").filter_map(|call| call.strip_prefix('`')?.strip_suffix('`')) {
            let call = match call.split_once(" /") {
                Some((_, handler)) => format!("http/{handler}"),
                None => call.to_owned(),
            };
            if !steps.is_empty() {
                found.insert(call, steps.clone());
            }
        }
    }
    assert!(found.len() > 5, "{found:?}");
    found
}

/// The calls of a run must go through the document's steps without going back: each call has a step that is not before
/// the one that was reached. Gives the calls of the document that were made.
fn assert_order(sequence: &[String], column: usize) -> BTreeSet<String> {
    let documented = documented(column);
    let (mut reached, mut made) = (0, BTreeSet::new());
    for (at, call) in sequence.iter().enumerate() {
        let Some(steps) = documented.get(call) else { continue };
        let next = steps.iter().filter(|step| **step >= reached).min();
        reached = *next.unwrap_or_else(|| panic!("{call} comes at {at}, after step {reached}: {sequence:#?}"));
        made.insert(call.clone());
    }
    made
}

/// Every step of the document is one that was made.
fn assert_all(column: usize, made: &BTreeSet<String>) {
    let never: Vec<String> = documented(column).into_keys().filter(|call| !made.contains(call)).collect();
    assert!(never.is_empty(), "in the document, and not made: {never:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_and_restores_make_their_calls_in_the_documented_order() {
    let vm = VmSpec::new("vm-1").disk(data_disk(8 * MIB, MIB));
    let lab = Lab::new(SimOptions { vms: vec![vm], ..Default::default() }).await;
    let since = |before: usize| lab.sim.call_sequence().split_off(before);
    let calls = || lab.sim.call_sequence().len();
    // The first one switches tracking on and reads whole, the second one lists changes and removes the older base.
    let begin = calls();
    lab.incremental().await;
    let mut made = assert_order(&since(begin), BACKUP);
    lab.write(MIB, &noise(1, 100_000));
    let begin = calls();
    let report = lab.incremental().await;
    made.extend(assert_order(&since(begin), BACKUP));
    assert_all(BACKUP, &made);

    let begin = calls();
    let request = RestoreRequest::new(report.point, SrSelector::Uuid(lab.sim.srs()[0].uuid.clone()));
    lab.engine.restore(request).await.unwrap();
    assert_all(RESTORE, &assert_order(&since(begin), RESTORE));
}
