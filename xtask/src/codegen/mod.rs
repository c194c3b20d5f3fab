//! `cargo xtask codegen`: the data model of XenAPI to the generated modules of `crates/xenapi`.
//!
//! Two steps. `../shared/xapi-datamodel.json`, where it lies beside the checkout, is trimmed to
//! `crates/xenapi/datamodel/facts.json`: only what [`selection`] names. `facts.json` alone then gives
//! `crates/xenapi/src/generated/`. Both results are committed, so a plain clone builds without the data model, and can
//! generate again from the facts.

mod emit;
mod facts;
mod names;
mod selection;
mod types;

use crate::run::{Outcome, workspace};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why generating failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum CodegenError {
    /// A file or folder could not be read or written.
    Io {
        /// Which one.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not the JSON that is expected.
    Json {
        /// Which one.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The data model lacks something that the selection names, or has a type that is not known here.
    Model(String),
    /// `rustfmt` could not be run or refused the code.
    Format(String),
    /// `--check`: these committed files differ from what would be generated.
    Stale(Vec<PathBuf>),
}

impl std::fmt::Display for CodegenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io { path, .. } => write!(f, "cannot read or write {}", path.display()),
            Self::Json { path, .. } => write!(f, "{} is not the JSON that is expected", path.display()),
            Self::Model(text) => write!(f, "data model: {text}"),
            Self::Format(text) => write!(f, "rustfmt: {text}"),
            Self::Stale(paths) => {
                write!(f, "generated files are stale, run `cargo xtask codegen` and commit:")?;
                paths.iter().try_for_each(|path| write!(f, " {}", path.display()))
            }
        }
    }
}

impl std::error::Error for CodegenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Json { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Writes the generated code, or with `check` fails where what is committed is not what would be written.
pub fn run(check: bool) -> Outcome {
    Ok(generate(&workspace(), check)?)
}

/// Generates, or with `check` compares what would be generated with what is committed.
///
/// # Errors
/// [`CodegenError::Stale`] if `check` found a difference; the others if generating itself failed.
fn generate(root: &Path, check: bool) -> Result<(), CodegenError> {
    let facts_path = root.join("crates/xenapi/datamodel/facts.json");
    let model_path = root.join("../shared/xapi-datamodel.json");

    let mut wanted: BTreeMap<PathBuf, String> = BTreeMap::new();
    let facts_text = if model_path.exists() {
        let model = serde_json::from_str(&read(&model_path)?)
            .map_err(|source| CodegenError::Json { path: model_path.clone(), source })?;
        let facts = facts::trim(&model)?;
        let text = facts::to_text(&facts).map_err(|source| CodegenError::Json { path: facts_path.clone(), source })?;
        wanted.insert(facts_path.clone(), text.clone());
        text
    } else {
        read(&facts_path)?
    };
    let facts: facts::Facts =
        serde_json::from_str(&facts_text).map_err(|source| CodegenError::Json { path: facts_path.clone(), source })?;
    for (name, code) in emit::modules(&facts)? {
        wanted.insert(root.join("crates/xenapi/src/generated").join(name), format_code(root, &code)?);
    }

    let folder = root.join("crates/xenapi/src/generated");
    let mut surplus = Vec::new();
    if let Ok(entries) = std::fs::read_dir(&folder) {
        for entry in entries.flatten() {
            if !wanted.contains_key(&entry.path()) {
                surplus.push(entry.path());
            }
        }
    }
    let differing: Vec<PathBuf> = wanted
        .iter()
        .filter(|(path, text)| std::fs::read_to_string(path).ok().as_ref() != Some(text))
        .map(|(path, _)| path.clone())
        .collect();
    if check {
        let stale: Vec<PathBuf> = differing.into_iter().chain(surplus).collect();
        return if stale.is_empty() { Ok(()) } else { Err(CodegenError::Stale(stale)) };
    }
    for path in surplus {
        std::fs::remove_file(&path).map_err(|source| CodegenError::Io { path, source })?;
    }
    for path in differing {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|source| CodegenError::Io { path: parent.into(), source })?;
        }
        let text = wanted.get(&path).map(String::as_str).unwrap_or_default();
        std::fs::write(&path, text).map_err(|source| CodegenError::Io { path: path.clone(), source })?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, CodegenError> {
    std::fs::read_to_string(path).map_err(|source| CodegenError::Io { path: path.into(), source })
}

/// Runs the code through `rustfmt` with the workspace's settings.
fn format_code(root: &Path, code: &str) -> Result<String, CodegenError> {
    let failed = |text: String| CodegenError::Format(text);
    let mut child = Command::new("rustfmt")
        .args(["--edition", "2024", "--config-path"])
        .arg(root.join("rustfmt.toml"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("cannot be run ({error}); `rustup component add rustfmt`")))?;
    let input = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || input.map(|mut pipe| pipe.write_all(code.as_bytes())));
        child.wait_with_output()
    });
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    String::from_utf8(output.stdout).map_err(|error| failed(error.to_string()))
}
