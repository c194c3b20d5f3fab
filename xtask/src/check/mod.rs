//! `cargo xtask check`: what must hold before a change is looked at. All parts run, then the failures are listed.

mod floors;
mod licences;
mod pitfalls;
mod readme;

use crate::run::{Outcome, cargo, show, workspace};
use std::time::Instant;

/// A part's name and what it does.
type Part = (&'static str, fn() -> Outcome);

/// Cheap parts first, so that the usual mistakes are seen within seconds.
const PARTS: [Part; 7] = [
    ("floors table", floors::check),
    ("pitfall tests", pitfalls::check),
    ("README example", readme::check),
    ("format", format),
    ("generated code", || crate::codegen::run(true)),
    ("clippy", clippy),
    ("licences, bans, sources", licences::check),
];

/// Runs every part and ends with one line a part.
///
/// # Errors
/// The names of the parts that failed.
pub fn run() -> Outcome {
    let mut lines = Vec::new();
    let mut failed = Vec::new();
    for (name, part) in PARTS {
        println!("== {name}");
        let started = Instant::now();
        let result = part();
        let seconds = started.elapsed().as_secs_f32();
        match result {
            Ok(()) => lines.push(format!("   ok  {name} ({seconds:.1} s)")),
            Err(error) => {
                eprintln!("{error}");
                lines.push(format!("FAILED {name} ({seconds:.1} s)"));
                failed.push(name);
            }
        }
    }
    println!("== check");
    for line in lines {
        println!("{line}");
    }
    if failed.is_empty() {
        println!("xtask check: passed, {} of {} parts", PARTS.len(), PARTS.len());
        return Ok(());
    }
    Err(format!("check failed: {}", failed.join(", ")).into())
}

fn format() -> Outcome {
    show(cargo().args(["fmt", "--all", "--check"]))?;
    let embed = workspace().join("tests/embed/Cargo.toml");
    show(cargo().args(["fmt", "--check", "--manifest-path"]).arg(embed))
}

fn clippy() -> Outcome {
    show(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}
