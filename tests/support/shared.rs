//! Finds the recordings of real servers that lie beside the checkout (`../shared`).
//!
//! Included with `#[path = "../../../tests/support/shared.rs"] mod shared;` by the tests that read them. A plain clone
//! has no recordings: then the caller falls back on fixtures of its own. CI always has them.

#![allow(clippy::print_stdout, reason = "a test tells what it leaves out")]

use std::path::{Path, PathBuf};

/// The path of `relative` in the recordings, or `None` in a plain clone, after one line that says what is left out.
///
/// Panics where `CI=true` and the recordings are missing: there their absence is a broken set-up.
pub fn shared(relative: &str) -> Option<PathBuf> {
    let start = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = start.ancestors().find(|folder| folder.join("Cargo.lock").exists()).unwrap_or(start);
    let path = root.join("../shared").join(relative);
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must have {}", path.display());
    println!("left out: {relative} is not beside this checkout; only the tests' own fixtures were used");
    None
}
