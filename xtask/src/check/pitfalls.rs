//! Every protocol pitfall that the code claims to handle has a test whose name begins with its number (`x27_...`).

use crate::run::{Outcome, workspace};
use std::collections::BTreeSet;
use std::path::Path;

/// The pitfalls of backing up over XenAPI, CBT and NBD that are handled today, by their numbers.
const HANDLED: [u8; 33] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 32,
    33, 34,
];

/// Looks for the tests in all sources of the workspace.
///
/// # Errors
/// The numbers that no test bears.
pub fn check() -> Outcome {
    let mut found = BTreeSet::new();
    for folder in ["crates", "bins", "tests"] {
        collect(&workspace().join(folder), &mut found)?;
    }
    let missing: Vec<String> =
        HANDLED.iter().filter(|number| !found.contains(number)).map(|number| format!("X{number:02}")).collect();
    if missing.is_empty() {
        println!("{} pitfalls have their tests", HANDLED.len());
        return Ok(());
    }
    Err(format!("no test bears the number of {} (name it x<number>_...)", missing.join(", ")).into())
}

fn collect(folder: &Path, found: &mut BTreeSet<u8>) -> Outcome {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                collect(&path, found)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.extend(tests_in(&std::fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

/// The pitfall numbers of the test functions in `source`.
fn tests_in(source: &str) -> BTreeSet<u8> {
    let mut numbers = BTreeSet::new();
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        if line.starts_with("#[") {
            is_test |= line.contains("test]") || line.contains("test(");
        } else if let Some(name) = line.trim_start_matches("async ").strip_prefix("fn ") {
            if is_test {
                numbers.extend(number_of(name));
            }
            is_test = false;
        } else if !line.starts_with("//") && !line.is_empty() {
            is_test = false;
        }
    }
    numbers
}

/// `27` of `x27_only_reads_and_disconnects`.
fn number_of(name: &str) -> Option<u8> {
    let (digits, _) = name.strip_prefix('x')?.split_once('_')?;
    (digits.len() == 2).then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tests_with_a_number_count() {
        let source = "
            #[test]
            fn x27_old_dialect() {}
            #[tokio::test(flavor = \"multi_thread\")]
            // a comment between
            async fn x04_session_in_the_name() {}
            fn x05_not_a_test() {}
            #[test]
            fn x1_too_short() {}
            #[test]
            fn extent() {}
        ";
        assert_eq!(tests_in(source), [4, 27].into());
    }
}
