//! `cargo xtask bench`: the repository next to others, and candidates for its format next to each other, on the same
//! disks.

mod candidates;
mod data;
mod programs;
mod timed;

use crate::run::{Outcome, target_folder};
use data::{DISKS, DataSet, GENERATIONS};
use programs::{Contender, Place, Program};
use std::path::{Path, PathBuf};
use timed::Cost;

/// What is compared.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Subject {
    /// The repository with restic, borg and rustic; fails if a target is missed
    Store,
    /// Candidates for chunk size, cut rule, compression, dictionary, hash and framing
    Candidates,
}

/// The most that our part of the best of the others' may be.
const TARGETS: [(&str, f64); 3] =
    [("stored bytes", 0.8), ("CPU seconds of ingestion", 0.4), ("time to read a disk back", 0.7)];

/// Measures.
///
/// # Errors
/// If a target is missed, or a program fails.
pub fn run(subject: Subject, rounds: usize) -> Outcome {
    let disks = DataSet::provide()?;
    println!(
        "{GENERATIONS} generations of {} disks: {} MiB, {} MiB of them allocated",
        DISKS.len(),
        disks.virtual_bytes >> 20,
        disks.allocated_bytes >> 20
    );
    match subject {
        Subject::Store => compare(&disks, rounds.max(1)),
        Subject::Candidates => candidates::run(&disks),
    }
}

/// What one contender's repository costs.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    stored: u64,
    index: u64,
    write: Cost,
    read: Cost,
}

fn compare(disks: &DataSet, rounds: usize) -> Outcome {
    let contenders = programs::all();
    programs::provide(&contenders)?;
    let mut measured: Vec<Vec<Measured>> = vec![Vec::new(); contenders.len()];
    for round in 0..rounds {
        // One after the other within a round, so that a neighbour's load meets all of them.
        for (contender, results) in contenders.iter().zip(measured.iter_mut()) {
            if contender.every_round || round == 0 {
                let result = measure(contender, disks, round == 0)?;
                println!(
                    "  round {}: {}: {} MiB, {:.1} s CPU, {:.1} s, read {:.1} s",
                    round + 1,
                    contender.name,
                    result.stored >> 20,
                    result.write.cpu,
                    result.write.wall,
                    result.read.wall
                );
                results.push(result);
            }
        }
    }
    let medians: Vec<Measured> = measured.iter().map(|results| median(results)).collect();
    println!("\n{}\n", programs::versions()?);
    println!("| | stored MiB | of it index | CPU s | s | peak MiB | read CPU s | read s | read peak MiB | rounds |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for ((contender, median), results) in contenders.iter().zip(&medians).zip(&measured) {
        println!("| {} | {} | {} |", contender.name, row(median), results.len());
    }
    judge(&contenders, &medians)
}

fn row(measured: &Measured) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let Measured { stored, index, write, read } = measured;
    format!(
        "{:.0} | {:.1} | {:.1} | {:.1} | {:.0} | {:.1} | {:.1} | {:.0}",
        mib(*stored),
        mib(*index),
        write.cpu,
        write.wall,
        write.peak_kib / 1024.0,
        read.cpu,
        read.wall,
        read.peak_kib / 1024.0
    )
}

fn judge(contenders: &[Contender], medians: &[Measured]) -> Outcome {
    let figures = |measured: &Measured| [measured.stored as f64, measured.write.cpu, measured.read.wall];
    let (mut ours, mut best) = ([f64::MAX; 3], [(f64::MAX, ""); 3]);
    for (contender, measured) in contenders.iter().zip(medians) {
        if contender.program == Program::Xenvault {
            ours = figures(measured);
        } else if contender.counts {
            for (best, found) in best.iter_mut().zip(figures(measured)) {
                if found < best.0 {
                    *best = (found, &contender.name);
                }
            }
        }
    }
    let mut missed = Vec::new();
    println!();
    for (((name, limit), ours), (best, of)) in TARGETS.into_iter().zip(ours).zip(best) {
        let ratio = ours / best;
        println!("{name}: {ratio:.2} of the best ({of}), wanted under {limit}");
        if ratio >= limit {
            missed.push(name);
        }
    }
    if missed.is_empty() { Ok(()) } else { Err(format!("missed: {}", missed.join(", ")).into()) }
}

fn measure(contender: &Contender, disks: &DataSet, check: bool) -> Outcome<Measured> {
    let folder = fresh_folder()?;
    let measured = measure_in(contender, disks, &folder, check);
    std::fs::remove_dir_all(&folder)?;
    measured
}

/// An empty folder for a repository. Each process has its own, so that two may run.
fn fresh_folder() -> Outcome<PathBuf> {
    let folder = target_folder().join(format!("bench/repository-{}", std::process::id()));
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn measure_in(contender: &Contender, disks: &DataSet, folder: &Path, check: bool) -> Outcome<Measured> {
    let place = Place::make(contender, folder)?;
    let mut measured = Measured::default();
    let name = |number: usize| format!("generation-{number}");
    for number in 1..=GENERATIONS {
        measured.write += timed::run(&place.write(disks.folder(), &name(number)))?;
    }
    (measured.stored, measured.index) = place.stored()?;
    for disk in DISKS {
        measured.read += timed::run(&place.read(&name(GENERATIONS), disk))?;
    }
    if check && contender.program == Program::Xenvault {
        programs::compare(&place, disks.folder(), &name(GENERATIONS))?;
    }
    Ok(measured)
}

fn median(results: &[Measured]) -> Measured {
    let of = |figure: &dyn Fn(&Measured) -> f64| {
        let mut figures: Vec<f64> = results.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or_default()
    };
    let cost = |cost: &dyn Fn(&Measured) -> Cost| Cost {
        cpu: of(&|measured| cost(measured).cpu),
        wall: of(&|measured| cost(measured).wall),
        peak_kib: of(&|measured| cost(measured).peak_kib),
    };
    let first = results.first().copied().unwrap_or_default();
    Measured { write: cost(&|measured| measured.write), read: cost(&|measured| measured.read), ..first }
}
