//! An index of 100 million chunks: how long it takes to open, what a look-up costs, and the memory for it.

use std::collections::BTreeMap;
use std::process::Command;

use crate::run::{Outcome, cargo, output, show, target_folder};

const CHUNKS: u64 = 100_000_000;
const LOOKUPS: u64 = 1_000_000;
const LIMIT_SECONDS: f64 = 5.0;
const LIMIT_BYTES: f64 = 1024.0 * 1024.0 * 1024.0;
/// Average length of a chunk in bytes.
const CHUNK_BYTES: f64 = 32.0 * 1024.0;

/// Measures.
///
/// # Errors
/// If a limit is passed, or a look-up gives a wrong answer.
pub fn run() -> Outcome {
    show(cargo().args(["build", "--quiet", "--release", "--package", "xenvault-store", "--example", "index-scale"]))?;
    let program = target_folder().join("release/examples/index-scale");
    // Some GiB: not in a temporary folder that may be memory.
    let folder = tempfile::tempdir_in(target_folder())?;
    let repository = folder.path().join("repository");
    println!("writing an index of {CHUNKS} chunks (7 GB), which takes some minutes");
    let mut figures = BTreeMap::new();
    let (chunks, lookups) = (CHUNKS.to_string(), LOOKUPS.to_string());
    for arguments in [vec!["make"], vec!["look"]] {
        let mut command = Command::new(&program);
        command.args(&arguments).arg(&repository).arg(&chunks);
        if arguments == ["look"] {
            command.arg(&lookups);
        }
        let said = String::from_utf8(output(&mut command)?)?;
        let lines = said.lines().filter_map(|line| line.split_once(' '));
        figures.extend(lines.filter_map(|(name, number)| Some((name.to_owned(), number.parse::<f64>().ok()?))));
    }
    let figure = |name: &str| figures.get(name).copied().ok_or_else(|| format!("the program did not tell {name}"));
    let (chunks, bytes) = (figure("chunks")?, figure("index_bytes")?);
    let (open, memory) = (figure("open_seconds")?, figure("anonymous_bytes")?.max(figure("open_anonymous_bytes")?));
    println!("{chunks} chunks in {} segments, {:.2} GB on the medium", figure("segments")?, bytes / 1e9);
    println!("opened in {open:.2} s, and {:.2} s before that for the passphrase", figure("unlock_seconds")?);
    let each = |name: &str| figure(name).map(|seconds| seconds * 1e6 / LOOKUPS as f64);
    println!(
        "a look-up takes {:.2} µs for a known chunk, {:.2} µs for a new one",
        each("known_seconds")?,
        each("unknown_seconds")?
    );
    println!("{:.0} MiB of anonymous memory", memory / 1024.0 / 1024.0);
    let of_100_tib = 100.0 * 1024_f64.powi(4) / CHUNK_BYTES;
    println!(
        "per chunk {:.1} bytes on the medium and {:.2} in memory; 100 TiB of different data: {:.0} GB and {:.1} GB",
        bytes / chunks,
        memory / chunks,
        of_100_tib * bytes / chunks / 1e9,
        of_100_tib * memory / chunks / 1e9,
    );
    if open > LIMIT_SECONDS {
        return Err(format!("opened in {open:.2} s, the limit is {LIMIT_SECONDS}").into());
    }
    if memory > LIMIT_BYTES {
        return Err(format!("{memory} bytes of anonymous memory, the limit is {LIMIT_BYTES}").into());
    }
    Ok(())
}
