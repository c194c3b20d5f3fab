//! The embedding example in the README is the code that `tests/embed` builds and runs, to the letter.

use crate::run::{Outcome, workspace};

/// The source whose text the README shows.
const EXAMPLE: &str = "tests/embed/src/example.rs";

/// Compares the README's first Rust block with the example, without its module comment.
///
/// # Errors
/// The first line that differs.
pub fn check() -> Outcome {
    let readme = std::fs::read_to_string(workspace().join("README.md"))?;
    let source = std::fs::read_to_string(workspace().join(EXAMPLE))?;
    compare(&readme, &source).map_err(|problem| format!("README.md: {problem}").into())
}

fn compare(readme: &str, source: &str) -> Result<(), String> {
    let block = readme
        .split_once("```rust\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .map(|(block, _)| block)
        .ok_or("there is no Rust block")?;
    let source = without_module_comment(source);
    if block == source {
        return Ok(());
    }
    let number = block.lines().zip(source.lines()).take_while(|(left, right)| left == right).count() + 1;
    Err(format!("line {number} of the Rust block is not that of {EXAMPLE}; copy the file's text"))
}

fn without_module_comment(source: &str) -> &str {
    let mut rest = source;
    while let Some((line, after)) = rest.split_once('\n') {
        if !line.starts_with("//!") && !line.is_empty() {
            break;
        }
        rest = after;
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "//! What it is.\n\nuse a::B;\n\nfn c() {}\n";

    #[test]
    fn the_same_code_passes() {
        assert_eq!(compare("Text\n```rust\nuse a::B;\n\nfn c() {}\n```\nmore", SOURCE), Ok(()));
    }

    #[test]
    fn other_code_and_no_code_are_named() {
        let other = compare("```rust\nuse a::B;\n\nfn d() {}\n```", SOURCE);
        assert!(other.unwrap_err().starts_with("line 3 "));
        assert!(compare("no code", SOURCE).is_err());
    }
}
