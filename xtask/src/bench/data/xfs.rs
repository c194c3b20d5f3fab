//! XFS guests. Nothing changes an XFS file system that is not mounted, so each generation is filled anew, from a
//! description of its files in the same order: what was there before keeps its place, and what changed comes last.

use super::State;
use super::tree::{Node, Tree};
use crate::run::{Outcome, output};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The file system at each generation.
pub(crate) fn images(work: &Path, states: &[State], size: u64) -> Outcome<Vec<PathBuf>> {
    let mut images = Vec::new();
    for (generation, state) in states.iter().enumerate() {
        let (image, description) = (work.join(format!("xfs-{generation}.img")), work.join("xfs.proto"));
        std::fs::write(&description, describe(&state.tree)?)?;
        File::create(&image)?.set_len(size)?;
        // The time stands in every inode; the program takes it from nowhere but the clock.
        output(
            Command::new("faketime")
                .args(["-f", "2026-01-01 00:00:00", "mkfs.xfs", "-q", "-f"])
                .args(["-m", "uuid=0c3f6c3e-20dd-4a52-9a40-3df2f41e2f11", "-p"])
                .arg(&description)
                .arg(&image),
        )?;
        output(Command::new("xfs_repair").args(["-n", "-f"]).arg(&image))?;
        images.push(image);
    }
    Ok(images)
}

/// A folder in the making.
#[derive(Default)]
struct Folder<'a> {
    folders: BTreeMap<&'a str, Folder<'a>>,
    others: BTreeMap<&'a str, &'a Node>,
}

fn describe(tree: &Tree) -> Outcome<String> {
    let mut root = Folder::default();
    for (path, node) in tree.nodes() {
        let mut folder = &mut root;
        let path = path.to_str().ok_or("a name that is not UTF-8")?;
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        for part in above.split('/').filter(|part| !part.is_empty()) {
            folder = folder.folders.entry(part).or_default();
        }
        folder.others.insert(name, node);
    }
    // What stands first is not used, and has to be there.
    let mut text = "-\n0 0\nd--755 0 0\n".to_owned();
    list(&root, &mut text)?;
    text.push_str("$\n");
    Ok(text)
}

fn list(folder: &Folder<'_>, text: &mut String) -> Outcome {
    for (name, node) in &folder.others {
        if folder.folders.contains_key(name) {
            continue;
        }
        match node {
            Node::File(source) => writeln!(text, "{name} ---644 0 0 {}", source.display())?,
            Node::Link(to) => writeln!(text, "{name} l--777 0 0 {}", to.display())?,
        }
    }
    // Other places of the disk follow from what stands before; what grows stands last.
    let last = |name: &&str| ["lib", "boot", "log", "var", "srv"].iter().position(|grows| grows == name);
    let mut folders: Vec<_> = folder.folders.iter().collect();
    folders.sort_by_key(|(name, _)| last(name).map_or(0, |at| at + 1));
    for (name, below) in folders {
        writeln!(text, "{name} d--755 0 0")?;
        list(below, text)?;
        text.push_str("$\n");
    }
    Ok(())
}
