//! XenAPI clients written by others, which tests run against the simulated pool: installed under the target folder, in
//! the exact versions of `tests/clients`, checked against the hashes there.

use super::tools;
use crate::run::{Outcome, output, show, target_folder, workspace};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Told to the tests: where the clients lie.
pub const CLIENTS_VARIABLE: &str = "XENVAULT_CLIENTS";

/// Written last, and compared: an installation that broke off, or is of other versions, is made again.
const STAMP: &str = "installed";

/// Makes sure that the clients are installed, and gives their folder.
///
/// # Errors
/// What is missing and the command that failed: a package of the system, or the network to fetch the clients.
pub fn provide() -> Outcome<PathBuf> {
    let folder = target_folder().join("clients");
    std::fs::create_dir_all(&folder)?;
    install(&folder.join("python"), &["requirements.txt"], python)?;
    install(&folder.join("node"), &["package.json", "package-lock.json"], node)?;
    Ok(folder)
}

/// Runs `how` in an empty `folder` with copies of `inputs`, unless it has been done with the same ones.
fn install(folder: &Path, inputs: &[&str], how: fn(&Path) -> Outcome) -> Outcome {
    let from = workspace().join("tests/clients");
    let wanted = inputs.iter().map(|name| std::fs::read(from.join(name))).collect::<Result<Vec<_>, _>>()?.concat();
    if std::fs::read(folder.join(STAMP)).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    if folder.exists() {
        std::fs::remove_dir_all(folder)?;
    }
    std::fs::create_dir_all(folder)?;
    for name in inputs {
        std::fs::copy(from.join(name), folder.join(name))?;
    }
    how(folder).map_err(|error| {
        format!("the clients that tests run could not be installed ({}): {error}", inputs.join(", "))
    })?;
    Ok(std::fs::write(folder.join(STAMP), wanted)?)
}

fn python(folder: &Path) -> Outcome {
    // Debian ships the module without which no environment can be made in a package of its own.
    if output(Command::new("python3").args(["-c", "import ensurepip, venv"])).is_err() {
        tools::install(&["python3-venv"])?;
    }
    show(Command::new("python3").args(["-m", "venv"]).arg(folder.join("venv")))?;
    let mut pip = Command::new(folder.join("venv/bin/python"));
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "-r"]);
    // A cache of its own: the account may have no home folder.
    show(pip.arg(folder.join("requirements.txt")).env("PIP_CACHE_DIR", folder.join("cache")))
}

fn node(folder: &Path) -> Outcome {
    let mut npm = Command::new("npm");
    npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--cache"]);
    show(npm.arg(folder.join("cache")).current_dir(folder))
}
