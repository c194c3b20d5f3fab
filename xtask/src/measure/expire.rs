//! Forgets 1,000 points of a repository of 1,200 and announces the sweep: what that takes, and that nothing is rewritten.

use crate::run::{Outcome, cargo, output, show, target_folder};
use std::collections::BTreeMap;
use std::process::Command;

const POINTS: u32 = 1000;

/// Forgetting takes no longer, with the announcement of the sweep.
const LIMIT_SECONDS: f64 = 10.0;

/// Measures.
///
/// # Errors
/// If the limit is passed, or a pack was touched.
pub fn run() -> Outcome {
    show(cargo().args(["build", "--quiet", "--release", "--package", "xenvault-store", "--example", "expire"]))?;
    let folder = tempfile::tempdir()?;
    let mut program = Command::new(target_folder().join("release/examples/expire"));
    let said = output(program.arg(folder.path().join("repository")).arg(POINTS.to_string()))?;
    let said = String::from_utf8(said)?;
    let figures: BTreeMap<&str, f64> = said
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, n)| Some((name, n.parse().ok()?)))
        .collect();
    let figure = |name: &str| figures.get(name).copied().ok_or_else(|| format!("the program did not tell {name}"));
    let (forget, announce, list) = (figure("forget_seconds")?, figure("announce_seconds")?, figure("list_seconds")?);
    let (forgotten, total) = (figure("forgotten")?, figure("points")?);
    println!("{forgotten} of {total} points: forgotten in {forget:.2} s, sweep announced in {announce:.2} s");
    println!("the other {} points are listed in {list:.2} s", figure("left")?);
    let changed = figure("packs_changed_by_forget")?;
    if changed > 0.0 {
        return Err(format!("forgetting has changed {changed} packs").into());
    }
    if forgotten < f64::from(POINTS)
        || figure("announced")? < f64::from(POINTS)
        || figure("left")? != figure("staying")?
    {
        return Err("not all of the points went".into());
    }
    let seconds = forget + announce;
    if seconds > LIMIT_SECONDS {
        return Err(format!("{seconds:.2} seconds, the limit is {LIMIT_SECONDS}").into());
    }
    Ok(())
}
