//! What a program costs: processor time, time, memory. Taken by GNU time, since the standard library tells none of them
//! of another process.

use crate::run::{Outcome, line};
use std::ops::AddAssign;
use std::path::Path;
use std::process::{Command, Stdio};

/// The cost of one or more programs that ran one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Seconds of processor time, of the program and of the kernel for it.
    pub cpu: f64,
    /// Seconds that passed.
    pub wall: f64,
    /// Highest resident memory, in KiB.
    pub peak_kib: f64,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.cpu += other.cpu;
        self.wall += other.wall;
        self.peak_kib = self.peak_kib.max(other.peak_kib);
    }
}

/// Runs a program with its output thrown away; what it says about errors is part of the error.
///
/// # Errors
/// An exit code other than 0.
pub fn run(command: &Command) -> Outcome<Cost> {
    let report = tempfile::NamedTempFile::new()?;
    let mut timed = Command::new("/usr/bin/time");
    timed.args(["--format", "%e %U %S %M", "--output"]).arg(report.path());
    timed.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => timed.env(name, value),
            None => timed.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        timed.current_dir(folder);
    }
    let done = timed.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    if !done.status.success() {
        let messages = String::from_utf8_lossy(&done.stderr);
        return Err(format!("{} ended with {}: {}", line(command), done.status, messages.trim()).into());
    }
    read(report.path())
}

fn read(report: &Path) -> Outcome<Cost> {
    let text = std::fs::read_to_string(report)?;
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match numbers.as_slice() {
        [wall, user, system, peak_kib] => Ok(Cost { cpu: user + system, wall: *wall, peak_kib: *peak_kib }),
        _ => Err(format!("GNU time has reported \"{}\"", text.trim()).into()),
    }
}
