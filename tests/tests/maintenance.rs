//! The life of a repository from the command line: points are forgotten and taken back, a sweep shows, announces and
//! removes, a verification names what is hurt, a repair and a backup heal.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "a test ends with a panic, and its helpers too"
)]

mod common;

use common::{Bench, assert_fails, one_vm};
use serde_json::Value;
use std::path::PathBuf;
use xenvault_tests::programs::{self, Finished};

/// Runs `xenvault-restore --json <command> <more> --repository ...` to its end.
fn maintain(bench: &Bench, command: &[&str]) -> Finished {
    let mut program = bench.program("xenvault-restore");
    program.arg("--json").args(command).args(bench.repository_arguments());
    programs::finish(&mut program, "").unwrap()
}

fn done(bench: &Bench, command: &[&str]) -> Value {
    let finished = maintain(bench, command);
    assert_eq!(finished.code, Some(0), "{command:?}: {finished:?}");
    finished.json().unwrap()
}

fn packs(bench: &Bench) -> Vec<PathBuf> {
    let mut folders = vec![bench.repository().join("packs")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    files
}

#[test]
fn a_point_is_forgotten_taken_back_forgotten_again_and_swept() {
    let bench = Bench::start(one_vm());
    let first = bench.backup("web")["point"].as_str().unwrap().to_owned();
    bench.pool.guest_write("web", "0", 1 << 20, &vec![7; 300_000]).unwrap();
    let second = bench.backup("web")["point"].as_str().unwrap().to_owned();
    assert_ne!(first, second);

    assert_eq!(done(&bench, &["point", "forget", &first[..13], "--reason", "a mistake"])["changed"][0], *first);
    assert_eq!(bench.points().len(), 1);
    let listing = done(&bench, &["point", "list"]);
    assert_eq!(
        (&listing["others"][0]["point"], &listing["others"][0]["state"]),
        (&first.clone().into(), &"forgotten".into())
    );
    assert_eq!(done(&bench, &["point", "undo", &first])["changed"][0], *first);
    assert_eq!(bench.points().len(), 2);

    done(&bench, &["point", "forget", &first]);
    let before = packs(&bench);
    // One of two is more than a fifth.
    assert_fails(&maintain(&bench, &["sweep", "--dry-run"]), 6, &["1 of 2 restore points would go at once"]);
    let shown = done(&bench, &["sweep", "--dry-run", "--confirm-many", "--grace", "0s"]);
    assert_eq!((&shown["begun"]["points"][0], &shown["ended"]), (&first.clone().into(), &Value::Null));
    assert_eq!(packs(&bench), before);
    assert!(!bench.repository().join("sweeps").exists());

    // Without a word that nothing else runs nothing is done.
    assert_fails(&maintain(&bench, &["sweep", "--confirm-many"]), 6, &["--alone", "--dry-run"]);
    assert!(!bench.repository().join("sweeps").exists());

    // Announced and not due: too late to take it back, and nothing is gone.
    let announced = done(&bench, &["sweep", "--alone", "--confirm-many"]);
    assert!(announced["waiting"]["seconds_left"].as_f64().unwrap() > 170_000.0, "{announced}");
    assert_fails(&maintain(&bench, &["point", "undo", &first]), 1, &["can not be taken back any more"]);
    assert_eq!(packs(&bench), before);
    bench.assert_repository_intact();
}

#[test]
fn a_sweep_removes_what_only_forgotten_points_need() {
    let bench = Bench::start(one_vm());
    let first = bench.backup("web")["point"].as_str().unwrap().to_owned();
    // Everything that the first point has is overwritten.
    let fresh: Vec<u8> = (0..8 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    bench.pool.guest_write("web", "0", 0, &fresh).unwrap();
    let second = bench.backup("web")["point"].as_str().unwrap().to_owned();
    let before = packs(&bench);
    done(&bench, &["point", "forget", &first]);
    let report = done(&bench, &["sweep", "--alone", "--grace", "0s", "--confirm-many"]);
    assert_eq!(report["ended"]["removed_points"][0], *first, "{report}");
    assert!(report["ended"]["removed_bytes"].as_u64().unwrap() > 4 << 20, "{report}");
    assert!(before.iter().any(|pack| !pack.exists()));
    assert_fails(&bench.try_restore_disk(&first, "0", &bench.path("gone.raw")), 5, &["there is no restore point"]);
    bench.assert_repository_intact();
    assert!(bench.restored_disk(&second, "0").starts_with(&fresh));
    // Backups go on as ever, and a full verification is content.
    bench.backup("web");
    let verified = done(&bench, &["verify", "--full"]);
    assert_eq!(
        (&verified["clean"], &verified["points"], &verified["share_percent"]),
        (&true.into(), &2.into(), &100.0.into())
    );
    let mut program = bench.program("xenvault-restore");
    let told =
        programs::finish(program.args(["sweep", "--alone", "--grace", "0s"]).args(bench.repository_arguments()), "")
            .unwrap();
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(told.stderr.contains("listing points") && told.stderr.contains("reading the maps"), "{told:?}");
}

#[test]
fn damage_is_named_with_points_and_ranges_and_a_full_backup_heals_it() {
    let bench = Bench::start(one_vm());
    let point = bench.backup("web")["point"].as_str().unwrap().to_owned();
    let content = bench.restored_disk(&point, "0");
    let largest = packs(&bench).into_iter().max_by_key(|pack| pack.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes).unwrap();

    assert_eq!(done(&bench, &["verify"])["clean"], true, "the frames of packs are whole");
    let finished = maintain(&bench, &["verify", "--full"]);
    assert_eq!(finished.code, Some(9), "{finished:?}");
    let report = finished.json().unwrap();
    let name = largest.file_name().unwrap().to_str().unwrap();
    assert!(report["damage"][0]["object"].as_str().unwrap().ends_with(name), "{report}");
    let hurt = &report["hurt"][0];
    assert_eq!((&hurt["point"], &hurt["vm_name"]), (&point.clone().into(), &"web".into()));
    let range = &hurt["disks"][0]["ranges"][0];
    let (start, end) = (range[0].as_u64().unwrap(), range[1].as_u64().unwrap());
    // The chunks of one frame.
    assert!(start < end && end <= 64 << 20 && report["marked_copies"].as_u64().unwrap() > 0, "{report}");

    // The next full backup meets the content and stores it again: the old point is whole again too.
    let mut arguments = bench.backup_arguments("web");
    arguments.push("--full".to_owned());
    let full = bench.datamover("backup", &arguments);
    assert_eq!(full.code, Some(0), "{full:?}");
    assert!(bench.restored_disk(&point[..18], "0") == content);
    let report = maintain(&bench, &["verify", "--full", "--read-only"]).json().unwrap();
    assert_eq!((report["hurt"].as_array().unwrap().len(), report["marked_copies"].as_u64()), (0, Some(0)), "{report}");

    // Lost index segments are written again.
    std::fs::remove_dir_all(bench.repository().join("index")).unwrap();
    assert_eq!(maintain(&bench, &["verify"]).code, Some(9));
    assert!(done(&bench, &["repair"])["index_bytes"].as_u64().unwrap() > 0);
    assert_eq!(done(&bench, &["verify"])["clean"], true);
    bench.assert_repository_intact();
}
