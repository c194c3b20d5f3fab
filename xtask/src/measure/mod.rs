//! `cargo xtask measure`: the figures that the README states, measured again, with the limits that must hold.

pub mod expire;
mod index;
mod inventory;
mod nbd;

use crate::run::{Outcome, cargo, show};
use crate::test::{self, tools};

/// What is measured.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Figure {
    /// Highest resident memory of backup and restore: a VHD disk of 2040 GiB, a large disk without allocation map
    Memory,
    /// Bytes read and stored by the second backup: an unchanged disk of 1 TiB, 10,000 scattered writes
    Costs,
    /// Speed and content of 8 GiB over NBD, next to nbdcopy
    Nbd,
    /// Time and memory to load and follow a pool of 1,000 VMs and 3,000 disks
    Inventory,
    /// Time to forget 1,000 points and to announce the sweep of them; nothing is rewritten by that
    Expire,
    /// An index of 100 million chunks: time to open it, time of a look-up, memory. Takes 7 GB of disk and some minutes
    Index,
}

/// Measures at full size, with optimisation.
///
/// # Errors
/// If a limit is passed.
pub fn run(figure: Figure) -> Outcome {
    tools::provide(tools::FOR_TESTS)?;
    match figure {
        Figure::Memory => costs("memory"),
        Figure::Costs => costs("cost"),
        Figure::Nbd => nbd::run(),
        Figure::Inventory => inventory::run(),
        Figure::Expire => expire::run(),
        Figure::Index => index::run(),
    }
}

fn costs(filter: &str) -> Outcome {
    let programs = test::build_programs(true)?;
    show(
        cargo()
            .args(["test", "--quiet", "--release", "--package", "xenvault-tests", "--test", "costs", filter])
            .args(["--", "--nocapture", "--test-threads", "1"])
            .env(test::LONG_VARIABLE, "1")
            .env(test::PROGRAMS_VARIABLE, programs),
    )
}
