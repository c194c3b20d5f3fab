//! Candidates for the repository's format. Most of them the repository can be told to write; the others (*model*) are
//! written by a program that shares its packs, frames, seals and index, but has one thread and no disk maps.

use super::data::{DISKS, DataSet, GENERATIONS};
use super::programs::{self, Contender, Program};
use super::timed;
use crate::run::{Outcome, target_folder};
use std::process::Command;

/// Names of what the repository can write, with arguments of `init` and of `write`.
const REAL: [(&str, &[&str], &[&str]); 12] = [
    ("16 KiB", &["--cut-bits", "2", "--max-blocks", "16"], &LARGE_FRAMES),
    ("32 KiB", &[], &LARGE_FRAMES),
    ("64 KiB", &["--cut-bits", "4", "--max-blocks", "64"], &LARGE_FRAMES),
    ("128 KiB", &["--cut-bits", "5", "--max-blocks", "128"], &LARGE_FRAMES),
    ("256 KiB", &["--cut-bits", "6", "--max-blocks", "256"], &LARGE_FRAMES),
    ("1 MiB (and at most that)", &["--cut-bits", "8", "--max-blocks", "256"], &LARGE_FRAMES),
    ("32 KiB, zstd 2", &[], &["--level", "2", "--frame", "1048576"]),
    ("32 KiB, zstd 3", &[], &["--level", "3", "--frame", "1048576"]),
    ("32 KiB, zstd 6", &[], &["--level", "6", "--frame", "1048576"]),
    ("32 KiB, each chunk its own frame", &[], &["--frame", "0"]),
    ("**32 KiB, frames of 256 KiB**", &[], &[]),
    (
        "64 KiB, each chunk its own frame, zstd 3",
        &["--cut-bits", "4", "--max-blocks", "64"],
        &["--frame", "0", "--level", "3"],
    ),
];

const LARGE_FRAMES: [&str; 2] = ["--frame", "1048576"];

/// Names of what only the model writes, with its arguments.
const MODEL: [(&str, &[&str]); 9] = [
    ("*model*: 32 KiB", &["--average", "32768"]),
    ("*model*: 32 KiB, SHA-256", &["--average", "32768", "--hash", "sha256"]),
    ("*model*: fixed 32 KiB", &["--average", "32768", "--cut", "fixed"]),
    ("*model*: fixed 64 KiB", &["--average", "65536", "--cut", "fixed"]),
    ("*model*: fixed 1 MiB", &["--average", "1048576", "--cut", "fixed"]),
    ("*model*: rolling hash, 32 KiB", &["--average", "32768", "--cut", "rolling"]),
    ("*model*: rolling hash, 64 KiB", &["--average", "65536", "--cut", "rolling"]),
    (
        "*model*: 32 KiB, own frames, dictionary of 112 KiB",
        &["--average", "32768", "--frame", "0", "--dictionary", "114688"],
    ),
    ("*model*: 32 KiB, dictionary of 112 KiB", &["--average", "32768", "--dictionary", "114688"]),
];

/// Measures each candidate once and prints the table.
pub(super) fn run(disks: &DataSet) -> Outcome {
    programs::provide(&[])?;
    println!(
        "| average chunk | stored MiB | of it index | CPU s | s | peak MiB | read CPU s | read s | read peak MiB |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (name, init, write) in REAL {
        let contender = Contender::new(Program::Xenvault, name, init, write);
        println!("| {name} | {} |", super::row(&super::measure(&contender, disks, false)?));
    }
    for (name, arguments) in MODEL {
        let folder = super::fresh_folder()?;
        let mut command = Command::new(target_folder().join("release/examples/store-bench"));
        command.arg("model").arg(&folder);
        for generation in 1..=GENERATIONS {
            command.args(DISKS.map(|disk| disks.generation(generation).join(disk)));
        }
        let cost = timed::run(command.args(["--level", "1"]).args(arguments))?;
        let (mut stored, mut index) = (0, 0);
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let length = entry.metadata()?.len();
            stored += length;
            index += if entry.file_name().to_string_lossy().starts_with("index") { length } else { 0 };
        }
        std::fs::remove_dir_all(&folder)?;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        println!(
            "| {name} | {:.0} | {:.1} | {:.1} | {:.1} | {:.0} | | | |",
            mib(stored),
            mib(index),
            cost.cpu,
            cost.wall,
            cost.peak_kib / 1024.0
        );
    }
    Ok(())
}
