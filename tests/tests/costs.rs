//! What a backup costs: bytes that the pool sent (counted by the simulator, not by us), bytes stored, time, memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    missing_docs,
    reason = "a test ends with a panic, and its helpers too"
)]

mod common;

use common::{Bench, disk};
use serde_json::Value;
use std::process::Stdio;
use std::time::{Duration, Instant};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{SimOptions, SrSpec, VmSpec};
use xenvault_tests::programs;

const GIB: u64 = 1 << 30;

/// One block of changed block tracking.
const BLOCK_BYTES: u64 = 64 * 1024;

/// Blocks of the check sample of one disk, at most.
const SAMPLE_BLOCKS: u64 = 16;

/// The long run has the full sizes; the usual one is a smaller picture of the same.
fn is_long() -> bool {
    std::env::var_os("XENVAULT_LONG").is_some()
}

fn one_disk(size: u64, data: u64) -> SimOptions {
    SimOptions { vms: vec![VmSpec::new("web").disk(disk(size, data))], ..SimOptions::default() }
}

/// Bytes in all files below a folder.
fn folder_bytes(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| match entry.file_type().unwrap().is_dir() {
            true => folder_bytes(&entry.path()),
            false => entry.metadata().unwrap().len(),
        })
        .sum()
}

fn number(report: &Value, name: &str) -> u64 {
    report["totals"][name].as_u64().unwrap()
}

#[test]
fn an_unchanged_disk_costs_nothing() {
    let mut options = one_disk(1024 * GIB, 2 * GIB);
    options.attach_delay = Duration::from_millis(200);
    let bench = Bench::start(options);
    bench.backup("web");
    let (sent, stored) = (bench.pool.counters().nbd_sent_bytes(), folder_bytes(&bench.repository()));

    let started = Instant::now();
    let report = bench.backup("web");
    let elapsed = started.elapsed();
    assert_eq!(report["level"], "INC", "{report}");
    assert_eq!(number(&report, "read_bytes"), 0, "{report}");
    let sample = bench.pool.counters().nbd_sent_bytes() - sent;
    assert_eq!(sample, number(&report, "sample_bytes"), "the sample is counted apart");
    assert!(sample <= SAMPLE_BLOCKS * BLOCK_BYTES, "{sample} bytes were read");
    let more = folder_bytes(&bench.repository()) - stored;
    assert!(more < 100 * 1024, "{more} bytes were stored");
    let attaching = Duration::from_secs_f64(report["attach_seconds"].as_f64().unwrap());
    let beside = elapsed.saturating_sub(attaching);
    println!("unchanged 1 TiB: {elapsed:?}, {attaching:?} of it attaching; {sample} bytes read, {more} stored");
    // The limit is for a machine of its own; a loaded one may take longer before it says something about us.
    assert!(beside < Duration::from_secs(if is_long() { 2 } else { 10 }), "{beside:?} beside attaching");
}

#[test]
fn scattered_writes_cost_their_blocks() {
    let writes = 10_000_u64;
    let size = writes * 40 * BLOCK_BYTES / 8;
    let bench = Bench::start(one_disk(size, GIB / 16));
    bench.backup("web");

    let blocks = size / BLOCK_BYTES;
    let mut changed = std::collections::BTreeSet::new();
    for write in 0..writes {
        // A permutation-like walk: scattered, the same each time.
        let block = write.wrapping_mul(2_654_435_761) % blocks;
        changed.insert(block);
        let page = (write % 16) * 4096;
        bench.pool.guest_write("web", "0", block * BLOCK_BYTES + page, &[write as u8 | 1; 4096]).unwrap();
    }
    let sent = bench.pool.counters().nbd_sent_bytes();
    let report = bench.backup("web");
    assert_eq!(report["level"], "INC", "{report}");
    let read = bench.pool.counters().nbd_sent_bytes() - sent - number(&report, "sample_bytes");
    let exact = changed.len() as u64 * BLOCK_BYTES;
    println!(
        "{writes} scattered writes in {} blocks: {read} bytes read, {:.3} of the blocks",
        changed.len(),
        read as f64 / exact as f64
    );
    assert_eq!(report["disks"][0]["changed_bytes"].as_u64().unwrap(), exact);
    assert!(read * 10 <= exact * 12, "{read} bytes read for {exact} in changed blocks");
    bench.assert_pool_is_clean();
}

/// Runs a program to its end and gives its result and its highest resident memory in bytes.
fn watched(command: &mut std::process::Command) -> (Value, u64) {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let process = child.id();
    let watcher = std::thread::spawn(move || {
        let mut peak = 0;
        // Until the process is gone; the value only grows.
        while let Ok(bytes) = programs::peak_memory_bytes(process) {
            peak = bytes;
            std::thread::sleep(Duration::from_millis(20));
        }
        peak
    });
    let finished = programs::Finished::from(child.wait_with_output().unwrap());
    assert_eq!(finished.code, Some(0), "{finished:?}");
    (finished.json().unwrap(), watcher.join().unwrap())
}

/// Peak memory of a backup and of a restore of one disk.
fn memory_of(options: SimOptions, sr: &str) -> (u64, u64) {
    let bench = Bench::start(options);
    let mut backup = bench.program("xenvault-datamover");
    let (report, backup) = watched(backup.args(["--json", "backup"]).args(bench.backup_arguments("web")));
    let mut restore = bench.program("xenvault-restore");
    restore.args(["--json", "vm", report["point"].as_str().unwrap(), "--name", "copy", "--sr", sr]);
    restore.args(bench.repository_arguments()).args(bench.pool_arguments());
    let (restored, restore) = watched(&mut restore);
    assert_eq!(restored["vm_name"], "copy");
    (backup, restore)
}

const MEMORY_LIMIT_BYTES: u64 = 256 << 20;

#[test]
fn memory_does_not_grow_with_a_vhd_disk() {
    let (size, data) = (2040 * GIB, GIB);
    let (backup, restore) = memory_of(one_disk(size, data), "Local storage");
    println!("2040 GiB, {} MiB of data: backup {} MiB, restore {} MiB", data >> 20, backup >> 20, restore >> 20);
    assert!(backup < MEMORY_LIMIT_BYTES && restore < MEMORY_LIMIT_BYTES, "{backup} {restore}");
}

#[test]
fn memory_does_not_grow_with_a_disk_without_allocation_map() {
    // Read as a whole: 3 TiB take hours here, so the size is scaled; what memory depends on is the stream, not its end.
    let (size, data) = if is_long() { (96 * GIB, GIB / 2) } else { (4 * GIB, GIB / 8) };
    let options = SimOptions { srs: vec![SrSpec::new("large", SrKind::Large)], ..one_disk(size, data) };
    let (backup, restore) = memory_of(options, "large");
    println!("{} GiB without allocation map: backup {} MiB, restore {} MiB", size / GIB, backup >> 20, restore >> 20);
    assert!(backup < MEMORY_LIMIT_BYTES && restore < MEMORY_LIMIT_BYTES, "{backup} {restore}");
}
