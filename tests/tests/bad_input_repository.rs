//! What can be wrong with a repository, seen from the command line: the message says what to do, the exit code tells
//! scripts, nothing is left in the pool, the repository is as intact as it was.
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

use common::{Bench, PASSPHRASE, assert_fails, one_vm, text};
use std::path::PathBuf;
use std::process::Command;
use xenvault_tests::programs;

/// All files below a folder, with a given first path component.
fn files(bench: &Bench, kind: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![bench.repository().join(kind)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() { folders.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found.sort();
    found
}

#[test]
fn a_folder_that_is_no_repository() {
    let bench = Bench::without_repository(one_vm());
    std::fs::create_dir(bench.repository()).unwrap();
    std::fs::write(bench.repository().join("something else"), "keep").unwrap();
    assert_fails(&bench.try_backup("web"), 8, &["is no Xenvault repository", "init-repository"]);
    let made = bench.datamover("init-repository", &bench.repository_arguments());
    assert_fails(&made, 8, &["not empty"]);
    assert_eq!(std::fs::read_to_string(bench.repository().join("something else")).unwrap(), "keep");
    bench.assert_pool_is_clean();
}

#[test]
fn a_wrong_passphrase_is_told_apart_from_damage() {
    let bench = Bench::start(one_vm());
    bench.backup("web");
    let mut program = bench.program("xenvault-restore");
    program.arg("--json").arg("points").args(bench.repository_arguments()).env("XENVAULT_PASSPHRASE", "not it");
    let finished = programs::finish(&mut program, "").unwrap();
    assert_fails(&finished, 7, &["passphrase does not open this repository"]);

    let mut program = bench.program("xenvault-datamover");
    program.arg("--json").arg("backup").args(bench.backup_arguments("web")).env("XENVAULT_PASSPHRASE", "not it");
    assert_fails(&programs::finish(&mut program, "").unwrap(), 7, &["passphrase"]);
    bench.assert_pool_is_clean();

    // The key itself is damaged: another message, another code.
    let key = files(&bench, "keys").remove(0);
    let intact = std::fs::read(&key).unwrap();
    let mut damaged = intact.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&key, &damaged).unwrap();
    let finished = bench.restore("points", &bench.repository_arguments());
    assert_fails(&finished, 9, &["damaged"]);
    std::fs::write(&key, intact).unwrap();
    bench.assert_repository_intact();
}

#[test]
fn a_repository_of_a_newer_format() {
    let bench = Bench::start(one_vm());
    bench.backup("web");
    let config = bench.repository().join("config");
    let intact = std::fs::read(&config).unwrap();
    std::fs::write(&config, newer(&intact)).unwrap();
    assert_fails(&bench.try_backup("web"), 8, &["format version", "use a newer release"]);
    bench.assert_pool_is_clean();
    std::fs::write(&config, intact).unwrap();
    bench.assert_repository_intact();
}

/// The same object as a later release would write it: only magic and version can be relied on.
fn newer(object: &[u8]) -> Vec<u8> {
    let mut object = object.to_vec();
    // docs/repository-format.md: eight bytes of magic, then the version as a little-endian u16.
    object[8..10].copy_from_slice(&0x7fff_u16.to_le_bytes());
    object
}

#[test]
fn a_damaged_pack() {
    let bench = Bench::start(one_vm());
    let report = bench.backup("web");
    let point = report["point"].as_str().unwrap();
    let before: Vec<String> = bench.left_over();
    let packs = files(&bench, "packs");
    let intact: Vec<Vec<u8>> = packs.iter().map(|pack| std::fs::read(pack).unwrap()).collect();
    for (pack, bytes) in packs.iter().zip(&intact) {
        let mut damaged = bytes.clone();
        for at in (damaged.len() / 3..damaged.len() * 2 / 3).step_by(4096) {
            damaged[at] ^= 0x55;
        }
        std::fs::write(pack, damaged).unwrap();
    }
    let file = bench.path("damaged.raw");
    assert_fails(&bench.try_restore_disk(point, "0", &file), 9, &["damaged"]);
    assert!(!file.exists(), "a half-written file is no result");
    assert_fails(&bench.try_restore_vm(point, &["--name", "half"]), 9, &["damaged"]);
    assert_eq!(bench.left_over(), before, "nothing of the failed restore is left");

    for (pack, bytes) in packs.iter().zip(&intact) {
        std::fs::write(pack, bytes).unwrap();
    }
    bench.assert_repository_intact();
}

#[test]
fn a_damaged_point_is_listed_as_damaged_and_spoils_no_other() {
    let bench = Bench::start(one_vm());
    bench.backup("web");
    bench.pool.guest_write("web", "0", 1 << 20, &[9; 65536]).unwrap();
    let second = bench.backup("web");
    let damaged =
        files(&bench, "points").into_iter().find(|file| !text(file).contains(second["point"].as_str().unwrap()));
    let damaged = damaged.unwrap();
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();

    let finished = bench.restore("points", &bench.repository_arguments());
    assert_eq!(finished.code, Some(9), "{finished:?}");
    let listing = finished.json().unwrap();
    assert_eq!(listing["points"].as_array().unwrap().len(), 1);
    assert_eq!(listing["damaged"].as_array().unwrap().len(), 1);
    let restored = bench.restored_disk(second["point"].as_str().unwrap(), "0");
    assert!(restored == bench.guest_disk("web", "0", 64 << 20));
}

/// Runs `script` where a file system of 6 MiB is mounted on `$1`; `None` where this machine does not allow it.
fn with_small_file_system(bench: &Bench, script: &str, arguments: &[String]) -> Option<programs::Finished> {
    for namespaces in [&["-m"][..], &["-r", "-m"]] {
        let mut probe = Command::new("unshare");
        probe.args(namespaces).args(["mount", "-t", "tmpfs", "tmpfs"]).arg(bench.folder.path());
        if probe.output().is_ok_and(|output| output.status.success()) {
            let mut command = Command::new("unshare");
            command
                .args(namespaces)
                .args(["sh", "-c"])
                .arg(format!("mkdir -p \"$1\" && mount -t tmpfs -o size=6m tmpfs \"$1\" && {script}"));
            command.arg("sh").arg(bench.repository()).arg(programs::folder().unwrap()).args(arguments);
            command.env("XENVAULT_PASSWORD", bench.pool.password()).env("XENVAULT_PASSPHRASE", PASSPHRASE);
            return Some(programs::finish(&mut command, "").unwrap());
        }
    }
    println!("left out: this machine does not let us mount a small file system");
    None
}

#[test]
fn the_repositorys_file_system_is_full() {
    let bench = Bench::without_repository(one_vm());
    // 8 MiB of data that does not compress do not fit into 6 MiB.
    let script = "\
        repository=$1; programs=$2; shift 2
        \"$programs/xenvault-datamover\" init-repository --repository \"$repository\" >&2 || exit 99
        \"$programs/xenvault-datamover\" --json backup \"$@\"; code=$?
        \"$programs/xenvault-restore\" points --repository \"$repository\" >&2 || exit 98
        exit $code";
    let Some(finished) = with_small_file_system(&bench, script, &bench.backup_arguments("web")) else { return };
    assert_fails(&finished, 8, &["file system is full", "free space"]);
    assert!(finished.stderr.contains("there are no restore points"), "{finished:?}");
    bench.assert_pool_is_clean();
}

#[test]
fn secrets_from_files_and_standard_input() {
    let bench = Bench::without_repository(one_vm());
    let passphrase = bench.path("passphrase");
    std::fs::write(&passphrase, format!("{PASSPHRASE}\n")).unwrap();
    let mut program = programs::program("xenvault-datamover").unwrap();
    program.arg("init-repository").args(bench.repository_arguments()).arg("--passphrase-file").arg(&passphrase);
    assert_eq!(programs::finish(&mut program, "").unwrap().code, Some(0));

    // Both on one input: the password first.
    let mut program = programs::program("xenvault-datamover").unwrap();
    program.arg("backup").args(bench.backup_arguments("web")).args(["--password-file", "-", "--passphrase-file", "-"]);
    let finished = programs::finish(&mut program, &format!("{}\n{PASSPHRASE}\n", bench.pool.password())).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    bench.assert_repository_intact();
}
