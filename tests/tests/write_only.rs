//! A datamover whose key only writes: full and incremental backups that only the full key restores.
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

use common::{Bench, assert_fails, one_vm, text};
use serde_json::Value;
use xenvault_tests::programs::{self, Finished};

const WRITER: &str = "the passphrase of a datamover";

/// Runs a program with the writer's passphrase.
fn writing(bench: &Bench, program: &str, arguments: &[String]) -> Finished {
    let mut command = bench.program(program);
    command.env("XENVAULT_PASSPHRASE", WRITER).arg("--json").args(arguments);
    programs::finish(&mut command, "").unwrap()
}

fn backup(bench: &Bench, more: &[&str]) -> Value {
    let mut arguments = vec!["backup".to_owned()];
    arguments.extend(bench.backup_arguments("web"));
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    let finished = writing(bench, "xenvault-datamover", &arguments);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    finished.json().unwrap()
}

fn restore(bench: &Bench, command: &[&str]) -> Finished {
    let mut arguments: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
    arguments.extend(bench.repository_arguments());
    writing(bench, "xenvault-restore", &arguments)
}

#[test]
fn a_datamover_with_a_writers_key_backs_up_and_only_the_full_key_restores() {
    let bench = Bench::start(one_vm());
    let mut program = bench.program("xenvault-restore");
    program.env("XENVAULT_NEW_PASSPHRASE", WRITER);
    program.args(["--json", "key", "add", "--write-only", "--label", "datamover"]).args(bench.repository_arguments());
    let added = programs::finish(&mut program, "").unwrap();
    assert_eq!((added.code, &added.json().unwrap()["access"]), (Some(0), &"writing".into()), "{added:?}");

    // A full one, and two incrementals whose changes begin and end within blocks and chunks, and fill a hole.
    let mut contents = Vec::new();
    let full = backup(&bench, &[]);
    contents.push((full, bench.guest_disk("web", "0", 64 << 20)));
    bench.pool.guest_write("web", "0", (1 << 20) + 1000, &vec![7; 100_000]).unwrap();
    bench.pool.guest_write("web", "0", 40 << 20, &[8; 70_000]).unwrap();
    let second = backup(&bench, &[]);
    assert_eq!((&second["level"], &second["disks"][0]["reason"]), (&"INC".into(), &"changed-blocks".into()));
    let (changed, read) = (&second["disks"][0]["changed_bytes"], &second["disks"][0]["read_bytes"]);
    assert!(read.as_u64().unwrap() < changed.as_u64().unwrap() + (2 << 20), "{second}");
    assert!(second["disks"][0]["sample_bytes"].as_u64().unwrap() > 0, "{second}");
    contents.push((second, bench.guest_disk("web", "0", 64 << 20)));
    bench.pool.guest_write("web", "0", (40 << 20) + 65_536, &[0; 30_000]).unwrap();
    let third = backup(&bench, &["--verify-every", "1"]);
    assert!(third["warnings"].to_string().contains("verification-skipped"), "{third}");
    contents.push((third, bench.guest_disk("web", "0", 64 << 20)));

    // Who only writes sees what there is, and gets nothing of it.
    let listed = restore(&bench, &["points"]);
    assert_eq!(listed.json().unwrap()["points"].as_array().unwrap().len(), 3, "{listed:?}");
    let point = contents[0].0["point"].as_str().unwrap();
    let file = bench.path("stolen.raw");
    assert_fails(&restore(&bench, &["disk", point, "0", "--to", &text(&file)]), 6, &["only writes"]);
    assert!(!file.exists());
    for command in
        [&["show", point][..], &["verify", "--full"], &["sweep", "--alone"], &["key", "remove", "1", "--confirm"]]
    {
        assert_fails(&restore(&bench, command), 6, &["only writes"]);
    }
    assert_eq!(restore(&bench, &["verify"]).code, Some(0));

    // The full key restores every point bit for bit, as a disk and as a VM.
    for (report, content) in &contents {
        assert!(bench.restored_disk(report["point"].as_str().unwrap(), "0") == *content, "{report}");
    }
    let restored = bench.try_restore_vm(contents[1].0["point"].as_str().unwrap(), &["--name", "restored"]);
    assert_eq!(restored.code, Some(0), "{restored:?}");
    assert!(bench.guest_disk("restored", "0", 64 << 20) == contents[1].1);
    let mut program = bench.program("xenvault-restore");
    program.args(["--json", "verify", "--full"]).args(bench.repository_arguments());
    let verified = programs::finish(&mut program, "").unwrap();
    assert_eq!(verified.code, Some(0), "{verified:?}");

    // The full key goes on where the writer was, and the other way round.
    bench.pool.guest_write("web", "0", 5 << 20, &[3; 5000]).unwrap();
    let fourth = bench.backup("web");
    assert_eq!(fourth["level"], "INC");
    bench.pool.guest_write("web", "0", 6 << 20, &[4; 5000]).unwrap();
    let fifth = backup(&bench, &[]);
    assert_eq!(fifth["level"], "INC");
    let content = bench.guest_disk("web", "0", 64 << 20);
    assert!(bench.restored_disk(fifth["point"].as_str().unwrap(), "0") == content);
}
