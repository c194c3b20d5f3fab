//! Finds and runs the built programs, as a user would.

use crate::Outcome;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Where `cargo xtask test` put the programs.
const FOLDER_VARIABLE: &str = "XENVAULT_PROGRAMS";

/// Everything that the programs would take from the caller's environment.
const THEIR_VARIABLES: [&str; 11] = [
    "XENVAULT_PASSWORD",
    "XENVAULT_PASSPHRASE",
    "XENVAULT_STATE",
    "XENVAULT_LOG",
    "XENVAULT_CACHE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_CA_BUNDLE",
];

/// The programs that are tested.
const PROGRAMS: [&str; 3] = ["xenvault-datamover", "xenvault-restore", "xenvault-sim"];

static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();

/// Takes the programs from this folder, before anything asks for one.
pub fn use_folder(folder: PathBuf) {
    // Only the first one counts.
    let _ = FOLDER.set(Ok(folder));
}

/// The folder with the built programs. They are built first where nobody says that they are.
///
/// # Errors
/// If the build fails.
pub fn folder() -> Outcome<PathBuf> {
    let find = || match std::env::var_os(FOLDER_VARIABLE) {
        Some(folder) => Ok(PathBuf::from(folder)),
        None => build().map_err(|error| error.to_string()),
    };
    FOLDER.get_or_init(find).clone().map_err(Into::into)
}

fn build() -> Outcome<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--bins"]).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    for program in PROGRAMS {
        cargo.args(["--package", program]);
    }
    let output = cargo.output()?;
    if !output.status.success() {
        return Err(format!("the programs do not build: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    // A test lies in `<target>/<profile>/deps`, a program one folder above.
    let own = std::env::current_exe()?;
    let profile = own.ancestors().nth(2).ok_or("a test without a folder")?;
    Ok(profile.with_file_name("debug"))
}

/// One of the programs, with an environment that holds nothing of ours.
///
/// # Errors
/// If it can not be built.
pub fn program(name: &str) -> Outcome<Command> {
    let mut command = Command::new(folder()?.join(name));
    for variable in THEIR_VARIABLES {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    Ok(command)
}

/// How a program ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// The one JSON object on standard output.
    ///
    /// # Errors
    /// If there is none, with both outputs.
    pub fn json(&self) -> Outcome<serde_json::Value> {
        serde_json::from_str(&self.stdout).map_err(|error| format!("no JSON ({error}): {self:?}").into())
    }
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs a program to its end, with `input` as its standard input.
///
/// # Errors
/// If it can not be started; its exit code is not looked at.
pub fn finish(command: &mut Command, input: &str) -> Outcome<Finished> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends before it has read everything is no failure of the test.
        let _ = stdin.write_all(input.as_bytes());
    }
    Ok(child.wait_with_output()?.into())
}

/// The highest resident memory that a running process had so far, in bytes, from `/proc`.
///
/// # Errors
/// If the process is gone.
pub fn peak_memory_bytes(process: u32) -> Outcome<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let kibibytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|value| value.trim().strip_suffix("kB"))
        .ok_or("the kernel does not tell VmHWM")?;
    Ok(kibibytes.trim().parse::<u64>()? * 1024)
}
