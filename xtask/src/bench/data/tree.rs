//! The files of a guest: paths inside of it, and where their content is now.

use crate::run::Outcome;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// A file with the content of this one.
    File(PathBuf),
    /// A symbolic link to this.
    Link(PathBuf),
}

/// Files and links by their paths without the first slash; folders follow from them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    nodes: BTreeMap<PathBuf, Node>,
}

/// No single file may be most of a guest.
const LONGEST_FILE: u64 = 24 << 20;

impl Tree {
    pub(crate) fn nodes(&self) -> &BTreeMap<PathBuf, Node> {
        &self.nodes
    }

    /// Takes files of this machine below `root`, in the order of their names, until `bytes` are together.
    pub(crate) fn add_folder(&mut self, root: &Path, bytes: u64) -> Outcome {
        let mut left = bytes;
        self.walk(root, Path::new("/"), &mut |length| {
            let fits = length <= left.min(LONGEST_FILE);
            if fits {
                left -= length;
            }
            fits
        })
    }

    /// Takes all files of an unpacked package.
    pub(crate) fn add_package(&mut self, root: &Path) -> Outcome {
        self.walk(root, root, &mut |_| true)
    }

    /// Removes the files that an unpacked package has.
    pub(crate) fn remove_package(&mut self, root: &Path) -> Outcome {
        let mut package = Self::default();
        package.add_package(root)?;
        self.nodes.retain(|path, _| !package.nodes.contains_key(path));
        Ok(())
    }

    /// Puts one file.
    pub(crate) fn add_file(&mut self, path: &Path, content: &Path) {
        self.nodes.insert(path.to_owned(), Node::File(content.to_owned()));
    }

    fn walk(&mut self, folder: &Path, root: &Path, wanted: &mut dyn FnMut(u64) -> bool) -> Outcome {
        let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (source, kind) = (entry.path(), entry.file_type()?);
            let Ok(path) = source.strip_prefix(root).map(Path::to_owned) else { continue };
            // What the tools below would need quoting for, and what only the administrator may read.
            let plain = |c: char| c.is_ascii_graphic() && !"\"'\\$`".contains(c);
            let private = path.starts_with("etc") && fs::File::open(&source).is_err() || is_secret(&path);
            if private || !path.to_str().is_some_and(|path| path.chars().all(plain)) {
                continue;
            }
            if kind.is_dir() {
                if !is_link_above(&self.nodes, &path) {
                    self.walk(&source, root, wanted)?;
                }
            } else if kind.is_symlink() {
                self.nodes.insert(path, Node::Link(fs::read_link(&source)?));
            } else if kind.is_file() && wanted(entry.metadata()?.len()) {
                self.nodes.insert(path, Node::File(source));
            }
        }
        Ok(())
    }
}

fn is_secret(path: &Path) -> bool {
    ["etc/shadow", "etc/gshadow", "etc/ssl/private", "etc/ssh"].iter().any(|secret| path.starts_with(secret))
        || path.to_string_lossy().contains("shadow-")
}

/// Whether a folder of a package is a link in the tree already (`/lib` to `/usr/lib`).
fn is_link_above(nodes: &BTreeMap<PathBuf, Node>, path: &Path) -> bool {
    path.ancestors().any(|above| matches!(nodes.get(above), Some(Node::Link(_))))
}
