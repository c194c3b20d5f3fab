//! Clients of others that run against the simulated pool: where they lie, and the certificate that they trust.

use crate::simulator::Simulator;
use crate::{Outcome, programs};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where `cargo xtask test` installed the libraries.
const FOLDER_VARIABLE: &str = "XENVAULT_CLIENTS";

/// The folder with the installed libraries: what `cargo xtask test` tells, or where it puts them.
///
/// # Errors
/// If they are not installed: a test that can not run has failed.
pub fn folder() -> Outcome<PathBuf> {
    let folder = match std::env::var_os(FOLDER_VARIABLE) {
        Some(folder) => PathBuf::from(folder),
        // Beside the profile's folder, in which the programs lie.
        None => programs::folder()?.with_file_name("clients"),
    };
    if folder.join("python/installed").is_file() && folder.join("node/installed").is_file() {
        return Ok(folder);
    }
    Err(format!("{} does not hold the clients: `cargo xtask test` installs them", folder.display()).into())
}

/// The script of that name in `tests/clients`.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients").join(name)
}

/// Saves the certificate that the coordinator's XenAPI port shows, as PEM, after comparing it with the fingerprint that
/// the simulator told.
///
/// # Errors
/// If openssl does not get it, or it is another one.
pub fn save_certificate(simulator: &Simulator, to: &Path) -> Outcome {
    let address = simulator.text("url")?.trim_start_matches("https://").trim_end_matches('/').to_owned();
    let shown = programs::finish(Command::new("openssl").args(["s_client", "-connect", &address]), "")?;
    let begin = shown.stdout.find("-----BEGIN CERTIFICATE-----").ok_or_else(|| format!("no certificate: {shown:?}"))?;
    let pem = shown.stdout.get(begin..).and_then(|rest| rest.split_inclusive("-----END CERTIFICATE-----\n").next());
    std::fs::write(to, pem.unwrap_or_default())?;
    let print = ["x509", "-noout", "-fingerprint", "-sha256", "-in"];
    let fingerprint = programs::finish(Command::new("openssl").args(print).arg(to), "")?;
    let found = fingerprint.stdout.split_once('=').map(|(_, text)| text.trim().replace(':', "").to_lowercase());
    if found.as_deref() == Some(simulator.text("fingerprint")?) {
        return Ok(());
    }
    Err(format!("the certificate is not the one that was told: {fingerprint:?}").into())
}

/// Runs a script with what the simulator told, and `more`, on its standard input; gives the JSON that it prints.
///
/// # Errors
/// If it fails, with all that it said.
pub fn run_script(simulator: &Simulator, command: &mut Command, more: &[(&str, &str)]) -> Outcome<Value> {
    let mut given = simulator.ready().clone();
    for (name, value) in more {
        if let Some(object) = given.as_object_mut() {
            object.insert((*name).to_owned(), (*value).into());
        }
    }
    let finished = programs::finish(command, &given.to_string())?;
    if finished.code == Some(0) { finished.json() } else { Err(format!("the client failed: {finished:?}").into()) }
}
