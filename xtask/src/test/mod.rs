//! `cargo xtask test`: the tools and the clients of others, then every test of the workspace, the documentation's examples, the embedding package.

mod bucket;
mod clients;
pub mod tools;

use crate::measure::{self, Figure};
use crate::run::{Outcome, cargo, output, show, target_folder, workspace};
use std::time::Instant;

/// The programs that the end-to-end tests run.
const PROGRAMS: [&str; 3] = ["xenvault-datamover", "xenvault-restore", "xenvault-sim"];

/// Told to the tests: where the programs lie.
pub const PROGRAMS_VARIABLE: &str = "XENVAULT_PROGRAMS";

/// Told to the tests: also what takes minutes or gigabytes.
pub const LONG_VARIABLE: &str = "XENVAULT_LONG";

/// Runs all tests; with `long` also those that take minutes, in an optimised build.
///
/// # Errors
/// A tool that is missing and can not be installed, or the first part of the tests that failed.
pub fn run(long: bool) -> Outcome {
    let started = Instant::now();
    tools::provide(tools::FOR_TESTS)?;
    let clients = clients::provide()?;
    let programs = build_programs(long)?;
    let profile = if long { &["--release"][..] } else { &[] };

    let nextest = output(cargo().args(["nextest", "--version"])).is_ok();
    let mut tests = cargo();
    if nextest {
        tests.args(["nextest", "run", "--workspace", "--no-fail-fast"]);
        tests.args(if long { &["--cargo-profile", "release"][..] } else { &[] });
    } else {
        tests.args(["test", "--workspace", "--no-fail-fast"]).args(profile);
    }
    tests.env(PROGRAMS_VARIABLE, &programs).env(clients::CLIENTS_VARIABLE, &clients);
    if long {
        tests.env(LONG_VARIABLE, "1");
    }
    let workspace_tests = show(&mut tests);
    let in_bucket = bucket::run(nextest, profile);
    // nextest leaves out the examples in the documentation.
    let examples = if nextest { show(cargo().args(["test", "--quiet", "--workspace", "--doc"])) } else { Ok(()) };
    let embed = show(
        cargo()
            .args(["test", "--locked", "--manifest-path"])
            .arg(workspace().join("tests/embed/Cargo.toml"))
            .env("CARGO_TARGET_DIR", target_folder())
            .env(PROGRAMS_VARIABLE, &programs),
    );

    let mut results = vec![
        ("workspace", workspace_tests),
        ("the repository on Ceph", in_bucket),
        ("documentation", examples),
        ("tests/embed", embed),
    ];
    if long {
        results.push(("NBD next to nbdcopy", measure::run(Figure::Nbd)));
    }
    println!("== test");
    let mut failed = Vec::new();
    for (name, result) in results {
        match result {
            Ok(()) => println!("   ok  {name}"),
            Err(error) => {
                println!("FAILED {name}: {error}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() {
        println!("xtask test: passed in {:.0} s", started.elapsed().as_secs_f32());
        return Ok(());
    }
    Err(format!("test failed: {}", failed.join(", ")).into())
}

/// Runs the tests of the repository in a bucket of Ceph.
///
/// # Errors
/// A tool that is missing and can not be installed, or that a test failed.
pub fn run_in_bucket() -> Outcome {
    tools::provide(tools::FOR_TESTS)?;
    bucket::run(output(cargo().args(["nextest", "--version"])).is_ok(), &[])
}

/// Builds the programs and gives the folder that they lie in.
pub fn build_programs(optimised: bool) -> Outcome<std::path::PathBuf> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--bins"]);
    for program in PROGRAMS {
        build.args(["--package", program]);
    }
    if optimised {
        build.arg("--release");
    }
    show(&mut build)?;
    Ok(target_folder().join(if optimised { "release" } else { "debug" }))
}
