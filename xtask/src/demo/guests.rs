//! The three guests: their file trees, their disks, and what changes inside them between two backups.

use crate::run::{Outcome, workspace};
use std::path::{Path, PathBuf};
use std::process::Command;
use xenvault_tests::images;
use xenvault_tests::simulator::Simulator;

/// A VM of the demo.
#[derive(Debug)]
pub struct Guest {
    /// Its name, as the simulator gives it.
    pub name: String,
    /// Its disk as the guest sees it now.
    pub image: PathBuf,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The disk as it was at each backup, by SHA-256.
    pub states: std::cell::RefCell<Vec<String>>,
    /// New content that the change writes.
    change: PathBuf,
}

/// Sizes of the disks in MiB, and which of the file trees are on them; trees that two guests share are stored once.
const DISKS: [(u64, &[Tree]); 3] =
    [(256, &[Tree::Sources]), (512, &[Tree::Programs]), (384, &[Tree::Sources, Tree::Records])];

#[derive(Clone, Copy)]
enum Tree {
    /// The sources of this workspace.
    Sources,
    /// The programs that were just built.
    Programs,
    /// Lines such as a log or a table holds.
    Records,
}

/// Makes the disks in `folder`. The simulator names VMs `vm-1`, `vm-2`, ...
pub fn make(folder: &Path) -> Outcome<Vec<Guest>> {
    let mut guests = Vec::new();
    for (index, (mebibytes, trees)) in DISKS.into_iter().enumerate() {
        let name = format!("vm-{}", index + 1);
        let root = folder.join(&name);
        std::fs::create_dir_all(root.join("var"))?;
        for tree in trees {
            plant(*tree, &root)?;
        }
        let image = folder.join(format!("{name}.raw"));
        let size = mebibytes << 20;
        images::make(&image, &root, size)?;
        images::check(&image)?;
        let change = folder.join(format!("{name}.new"));
        std::fs::write(&change, records(20_000, index + 100))?;
        guests.push(Guest { name, image, size, states: Vec::new().into(), change });
    }
    Ok(guests)
}

fn plant(tree: Tree, root: &Path) -> Outcome {
    match tree {
        Tree::Sources => copy(&["crates", "bins", "tests/src", "xtask/src"].map(|name| workspace().join(name)), root),
        Tree::Programs => {
            let folder = xenvault_tests::programs::folder()?;
            copy(&["xenvault-datamover", "xenvault-restore"].map(|name| folder.join(name)), root)
        }
        Tree::Records => Ok(std::fs::write(root.join("var/records"), records(200_000, 0))?),
    }
}

fn copy(from: &[PathBuf], to: &Path) -> Outcome {
    let status = Command::new("cp").arg("-r").args(from).arg(to).status()?;
    if status.success() { Ok(()) } else { Err(format!("cp ended with {status}").into()) }
}

/// Text that is different in every line, the same in every run.
fn records(lines: usize, seed: usize) -> String {
    let mut text = String::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ seed as u64;
    for line in 0..lines {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(&format!("{line} user-{:x} bought {} pieces\n", state >> 32, state % 97));
    }
    text
}

impl Guest {
    /// SHA-256 of the disk now.
    pub fn sha256(&self) -> Outcome<String> {
        images::sha256(&mut std::fs::File::open(&self.image)?)
    }

    /// Writes a new file, replaces one, and deletes one inside the file system; what that changes on the disk is
    /// written through the simulator as the guest's own writes.
    pub fn change(&self, pool: &Simulator) -> Outcome {
        let before = self.image.with_extension("before");
        std::fs::copy(&self.image, &before)?;
        let change = self.change.display();
        images::edit(
            &self.image,
            &[
                format!("write {change} var/new-records"),
                "mkdir var/spool".to_owned(),
                format!("write {change} var/spool/more"),
            ],
        )?;
        images::edit(&self.image, &["rm var/spool/more".to_owned()])?;
        images::check(&self.image)?;
        let mut bytes = 0;
        let runs = images::differing_runs(&before, &self.image)?;
        for (offset, run) in &runs {
            pool.guest_write(&self.name, "0", *offset, run)?;
            bytes += run.len();
        }
        println!("   {} KiB in {} places", bytes / 1024, runs.len());
        std::fs::remove_file(before)?;
        Ok(())
    }
}
