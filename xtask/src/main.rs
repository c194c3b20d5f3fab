//! The developer's commands: `cargo xtask check|test|demo|codegen|measure|bench`.
//!
//! `check` and `test` are what CI runs; everything that they need beyond Rust they install or name themselves.
//! Nothing here is shipped, so the commands print, and may depend on anything.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod bench;
mod check;
mod codegen;
mod demo;
mod fuzz_seeds;
mod measure;
mod run;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The developer's commands of Xenvault")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Format, lints, floors table, generated code, licences and sources, pitfall tests: fails if one is not as it must be
    Check,
    /// Installs or names the system tools that tests need, then runs all tests and the embedding example
    Test {
        /// Also the tests that take minutes or gigabytes (built with optimisation)
        #[arg(long)]
        long: bool,
        /// Only the tests of the repository, in a bucket of Ceph
        #[arg(long, conflicts_with = "long")]
        bucket: bool,
    },
    /// Backs up three VMs of a simulated pool, changes files in them, backs up again, restores one and compares
    Demo,
    /// Measures a figure that the README states, at full size
    Measure {
        /// Which one
        figure: measure::Figure,
    },
    /// Compares the repository with others, and candidates for its format with each other
    Bench {
        /// What is compared
        what: bench::Subject,
        /// How often each is measured; medians count
        #[arg(long, default_value_t = 3)]
        rounds: usize,
    },
    /// Fills the corpora of the fuzz targets that read a pool's answers from the recordings of real servers
    FuzzSeeds,
    /// Makes the XenAPI records and wrappers from the committed list of facts
    Codegen {
        /// Write nothing, fail if what is committed is not what would be written
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Check => check::run(),
        Command::Test { bucket: true, .. } => test::run_in_bucket(),
        Command::Test { long, .. } => test::run(long),
        Command::Demo => demo::run(),
        Command::Measure { figure } => measure::run(figure),
        Command::Bench { what, rounds } => bench::run(what, rounds),
        Command::FuzzSeeds => fuzz_seeds::run(),
        Command::Codegen { check } => codegen::run(check),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
