//! A datamover that is killed or stopped at any moment: no published point is hurt, the next run succeeds, and nothing
//! is left in the pool but what the next backup counts from.
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

use common::{Bench, assert_fails, disk, one_vm};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use xenvault_sim::{Fault, FaultEffect, SimOptions, VmSpec};
use xenvault_tests::programs::Finished;

/// How many moments of a backup are tried.
const MOMENTS: u32 = 20;

const DISK_BYTES: u64 = 96 << 20;

fn start(bench: &Bench) -> Child {
    let mut program = bench.program("xenvault-datamover");
    program.args(["--json", "backup"]).args(bench.backup_arguments("web"));
    program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn killed_at_twenty_moments_then_run_again() {
    let options = SimOptions {
        vms: vec![VmSpec::new("web").disk(disk(DISK_BYTES, 24 << 20))],
        attach_delay: Duration::from_millis(100),
        detach_delay: Duration::from_millis(50),
        ..SimOptions::default()
    };
    let bench = Bench::start(options);
    let started = Instant::now();
    let first = bench.backup("web");
    let whole = started.elapsed();
    // Each point with what it must hold.
    let mut states = vec![(point(&first), bench.guest_disk("web", "0", DISK_BYTES))];

    let mut unnoted = 0;
    for moment in 0..MOMENTS {
        // Something changes between any two runs: 3 MiB of it, so that the middle of a run is in the data.
        let data: Vec<u8> =
            (0..3_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ moment as u8).collect();
        bench.pool.guest_write("web", "0", u64::from(moment) << 22, &data).unwrap();
        let mut child = start(&bench);
        let deadline = Instant::now() + whole * moment / MOMENTS;
        while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();

        let unknown: Vec<String> =
            bench.points().iter().map(point).filter(|id| states.iter().all(|(known, _)| known != id)).collect();
        assert!(unknown.len() <= 1, "a run writes one point at most: {unknown:?}");
        let state = bench.guest_disk("web", "0", DISK_BYTES);
        states.extend(unknown.into_iter().map(|id| (id, state.clone())));

        let again = bench.backup("web");
        println!("moment {moment}: then {} ({})", again["level"], again["disks"][0]["reason"]);
        states.push((point(&again), state));
        // The killed process could not log out; the pool ends its session by itself. Nor could it note a task whose
        // reference was still on its way to it: such a task holds nothing, nobody can tell whose it is, and the pool
        // forgets it. There is one of them at most for each kill.
        let left: Vec<String> = bench.left_over().into_iter().filter(|object| !object.starts_with("session")).collect();
        let (tasks, rest): (Vec<String>, Vec<String>) =
            left.into_iter().partition(|object| object.starts_with("task \"Async."));
        assert!(tasks.len() <= unnoted + 1, "after moment {moment}: {tasks:?}");
        unnoted = tasks.len();
        assert_eq!(rest, Vec::<String>::new(), "after moment {moment}");
        assert_eq!(bench.bases(), 1, "after moment {moment}");
    }

    assert_eq!(bench.points().len(), states.len());
    for (id, state) in &states {
        assert!(bench.restored_disk(id, "0") == *state, "point {id} is not the disk at its moment");
    }
}

/// The id of a point, in a list or a report.
fn point(record: &serde_json::Value) -> String {
    record["point"].as_str().unwrap().to_owned()
}

/// Sends a signal by its name.
fn signal(child: &Child, name: &str) {
    let kill = std::process::Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
}

fn stopped_by(name: &str) -> (Bench, Finished) {
    let bench = Bench::start(one_vm());
    bench.pool.fault(Fault::always("nbd/read", FaultEffect::Delay(Duration::from_millis(200))));
    let child = start(&bench);
    while bench.pool.counters().nbd.values().all(|disk| disk.opens == 0) {
        std::thread::yield_now();
    }
    signal(&child, name);
    let finished = Finished::from(child.wait_with_output().unwrap());
    bench.pool.clear_faults();
    (bench, finished)
}

#[test]
fn ctrl_c_cleans_up() {
    let (bench, finished) = stopped_by("-INT");
    assert_fails(&finished, 130, &["stopped by a signal"]);
    bench.assert_pool_is_clean();
    assert_eq!(bench.points().len(), 0);
    bench.backup("web");
    bench.assert_repository_intact();
}

#[test]
fn sigterm_cleans_up() {
    let (bench, finished) = stopped_by("-TERM");
    assert_fails(&finished, 143, &["stopped by a signal"]);
    bench.assert_pool_is_clean();
    assert_eq!(bench.points().len(), 0);
}

#[test]
fn nobody_who_reads_the_output_is_no_reason_to_leave_a_snapshot_behind() {
    let bench = Bench::start(one_vm());
    let device = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();

    // Standard error is full (a log on a full disk) and nobody reads standard output: the backup goes on.
    let mut program = bench.program("xenvault-datamover");
    program.args(["--log", "debug", "backup"]).args(bench.backup_arguments("web"));
    let mut child = program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(device()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    bench.assert_pool_is_clean();

    // A result that can not be written is not told, and the exit code says so; the point is good.
    let mut program = bench.program("xenvault-datamover");
    program.args(["--json", "backup"]).args(bench.backup_arguments("web"));
    let ended = program.stdin(Stdio::null()).stdout(device()).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("the work is done"), "{ended:?}");
    bench.assert_pool_is_clean();
    let mut points = bench.program("xenvault-restore");
    points.args(["--json", "points"]).args(bench.repository_arguments());
    let listed = Finished::from(points.output().unwrap()).json().unwrap();
    assert_eq!(listed["points"].as_array().unwrap().len(), 2, "{listed}");
}
