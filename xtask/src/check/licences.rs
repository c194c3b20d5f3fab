//! Runs cargo-deny over `deny.toml`, offline and in one pinned version, which is installed where it is missing.

use crate::run::{Outcome, cargo, output, show, target_folder};
use std::path::PathBuf;
use std::process::Command;

/// Pinned, so that a new release does not turn CI red.
const VERSION: &str = "0.20.2";

/// Licences, bans and sources; advisories are left out because their list can not always be fetched.
pub fn check() -> Outcome {
    let program = program()?;
    // Offline needs the packages of every platform in place.
    show(cargo().args(["fetch", "--locked", "--quiet"]))?;
    show(cargo_env(Command::new(program)).args([
        "deny",
        "--offline",
        "check",
        "--hide-inclusion-graph",
        "licenses",
        "bans",
        "sources",
    ]))
}

fn cargo_env(mut command: Command) -> Command {
    command.current_dir(crate::run::workspace());
    command
}

/// The pinned version: the one on the path, else our own, built once into the target folder.
fn program() -> Outcome<PathBuf> {
    let own = target_folder().join("tools/bin/cargo-deny");
    for candidate in [PathBuf::from("cargo-deny"), own.clone()] {
        let found = output(Command::new(&candidate).args(["deny", "--version"]));
        if found.is_ok_and(|text| String::from_utf8_lossy(&text).trim().ends_with(VERSION)) {
            return Ok(candidate);
        }
    }
    println!("cargo-deny {VERSION} is not there; installing it takes some minutes, once");
    let root = target_folder().join("tools");
    show(cargo().args(["install", "cargo-deny", "--quiet", "--locked", "--version", VERSION, "--root"]).arg(root))?;
    Ok(own)
}
