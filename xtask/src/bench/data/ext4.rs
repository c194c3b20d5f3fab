//! ext4 guests: filled once, then changed as the guest would change them, with what lies elsewhere left as it is.

use super::State;
use super::tree::{Node, Tree};
use crate::run::{Outcome, output};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const BLOCK: usize = 4096;
/// The moment that all file systems are made at, so that they come out the same.
const MOMENT: &str = "1767225600";

/// The file system at each generation.
pub(crate) fn images(work: &Path, states: &[State], size: u64) -> Outcome<Vec<PathBuf>> {
    let mut images: Vec<PathBuf> = Vec::new();
    let mut before: Option<&Tree> = None;
    for (generation, state) in states.iter().enumerate() {
        let image = work.join(format!("ext4-{generation}.img"));
        match (before, images.last()) {
            (Some(before), Some(last)) => {
                output(Command::new("cp").arg("--sparse=always").arg(last).arg(&image))?;
                change(work, &image, before, state)?;
            }
            _ => make(work, &image, &state.tree, size)?,
        }
        output(Command::new("e2fsck").args(["-f", "-n"]).arg(&image))?;
        before = Some(&state.tree);
        images.push(image);
    }
    Ok(images)
}

fn make(work: &Path, image: &Path, tree: &Tree, size: u64) -> Outcome {
    let stage = work.join("stage");
    if stage.exists() {
        fs::remove_dir_all(&stage)?;
    }
    for (path, node) in tree.nodes() {
        let target = stage.join(path);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        match node {
            Node::File(source) => fs::copy(source, &target).map(|_| ())?,
            Node::Link(to) => std::os::unix::fs::symlink(to, &target)?,
        }
    }
    const UUID: &str = "6f3c7c0a-64e8-4a3e-9b83-5f2f5d1f9a01";
    File::create(image)?.set_len(size)?;
    output(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-U", UUID, "-E"])
            .arg(format!("hash_seed={UUID},root_owner=0:0"))
            .arg("-d")
            .arg(&stage)
            .arg(image)
            .env("E2FSPROGS_FAKE_TIME", MOMENT),
    )?;
    fs::remove_dir_all(stage)?;
    Ok(())
}

/// Makes the image of one generation that of the next: files that went are removed, changed ones are written anew, and
/// the pages of a database are overwritten where they are.
fn change(work: &Path, image: &Path, before: &Tree, state: &State) -> Outcome {
    let mut script = String::new();
    let in_place = state.in_place.as_ref();
    let stays = |path: &Path| in_place.is_some_and(|(place, _)| place == path);
    for (path, node) in before.nodes() {
        if state.tree.nodes().get(path) != Some(node) && !stays(path) {
            script.push_str(&format!("rm /{}\n", path.display()));
        }
    }
    let folders = |tree: &Tree| -> BTreeSet<PathBuf> {
        tree.nodes().keys().flat_map(|path| path.ancestors().skip(1).map(Path::to_owned).collect::<Vec<_>>()).collect()
    };
    for folder in folders(&state.tree).difference(&folders(before)) {
        script.push_str(&format!("mkdir /{}\n", folder.display()));
    }
    for (path, node) in state.tree.nodes() {
        if before.nodes().get(path) == Some(node) || stays(path) {
            continue;
        }
        let (folder, name) = (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default());
        script.push_str(&format!("cd /{}\n", folder.display()));
        match node {
            Node::File(source) => {
                script.push_str(&format!("write {} {}\n", source.display(), name.to_string_lossy()));
            }
            Node::Link(to) => script.push_str(&format!("symlink {} {}\n", name.to_string_lossy(), to.display())),
        }
    }
    let commands = work.join("debugfs.commands");
    fs::write(&commands, script)?;
    output(Command::new("debugfs").arg("-w").arg("-f").arg(&commands).arg(image).env("E2FSPROGS_FAKE_TIME", MOMENT))?;
    match in_place {
        Some((path, source)) => overwrite(image, path, source),
        None => Ok(()),
    }
}

/// Writes a file's changed pages over the blocks that it has.
fn overwrite(image: &Path, path: &Path, source: &Path) -> Outcome {
    let listed = output(Command::new("debugfs").arg("-R").arg(format!("blocks /{}", path.display())).arg(image))?;
    let blocks = String::from_utf8(listed)?;
    let (image, content) = (File::options().read(true).write(true).open(image)?, fs::read(source)?);
    let places = blocks.split_whitespace().map(str::parse::<u64>).collect::<Result<Vec<_>, _>>()?;
    if places.len() != content.len().div_ceil(BLOCK) {
        return Err(format!("{}: {} blocks for {} bytes", path.display(), places.len(), content.len()).into());
    }
    let mut there = [0; BLOCK];
    for (block, page) in places.into_iter().zip(content.chunks(BLOCK)) {
        image.read_exact_at(&mut there, block * BLOCK as u64)?;
        if !there.starts_with(page) {
            image.write_all_at(page, block * BLOCK as u64)?;
        }
    }
    Ok(())
}
