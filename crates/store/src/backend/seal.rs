//! The broker of a local folder: takes finished objects over, so that whoever wrote them can not change them any more.
//!
//! It runs as root beside datamovers that do not. Folders belong to it and are sticky: a datamover puts new files into
//! them, and can neither replace nor remove those of others. A file is taken over as a copy under a new inode, which on
//! file systems with reflinks costs nothing: whoever still holds the old one open writes into a file that has no name any
//! more. The copy is read-only and, where the file system can do that, immutable.
//!
//! What is here knows nothing of what is in an object, and has no key.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{IFlags, OFlags, ioctl_getflags, ioctl_setflags};
use uuid::Uuid;

use super::{MAX_OBJECT_BYTES, Protection};
use crate::names;

/// Where copies are made: nobody else comes in.
const WORKSHOP: &str = "sealing";
/// Deepest folder of a repository, counted from its root.
const DEEPEST: usize = 4;
/// New files may be put in, others' can not be removed.
const SHARED: u32 = 0o1775;
/// Where everybody's unfinished files are.
const UNFINISHED: u32 = 0o1777;
const SEALED_FILE: u32 = 0o444;
/// Names that a report holds.
const MAX_NAMED: usize = 1000;

/// What a call of [`seal_folder`] has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SealReport {
    /// Objects that were taken over now.
    pub sealed: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that had been taken over before.
    pub before: u64,
    /// Of all of them, those that the file system refuses to change, whoever asks.
    pub immutable: u64,
    /// What is no object (a link, a device, something too long), at most a thousand. It stays as it is.
    pub strange: Vec<String>,
}

/// Takes over every finished object of the repository in a folder. `group` is that of the datamovers, which may put files
/// in. Interrupting it is harmless; it is repeated as often as objects are to be sealed.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`] if this is not root; what the file system says.
pub fn seal_folder(root: &Path, group: u32) -> io::Result<SealReport> {
    if !rustix::process::geteuid().is_root() {
        let text = "files can only be taken over by root";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    if !root.join(names::CONFIG).is_file() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no repository: it has no file \"config\""));
    }
    let sealer = Sealer { root, group };
    sealer.prepare()?;
    let mut report = SealReport::default();
    sealer.folder(root, 0, &mut report)?;
    Ok(report)
}

impl SealReport {
    fn note(&mut self, root: &Path, path: &Path) {
        if self.strange.len() < MAX_NAMED {
            self.strange.push(path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned());
        }
    }
}

struct Sealer<'a> {
    root: &'a Path,
    group: u32,
}

impl Sealer<'_> {
    /// Makes every folder that can be known, so that no datamover has to make it, and none owns it.
    fn prepare(&self) -> io::Result<()> {
        // First of all, so that nothing below can be exchanged any more while it is gone over.
        take_folder(self.root, self.group, 0o755)?;
        let workshop = self.root.join(WORKSHOP);
        if !workshop.is_dir() {
            fs::DirBuilder::new().mode(0o700).create(&workshop)?;
        }
        take_folder(&workshop, 0, 0o700)?;
        for entry in fs::read_dir(&workshop)? {
            // What an interrupted run has left.
            fs::remove_file(entry?.path())?;
        }
        let mut folders: Vec<String> = [
            names::KEYS,
            names::INDEX,
            names::POINTS,
            names::PACKS,
            names::SWEEPS,
            names::RECORDS,
            names::TOMBSTONES,
            names::UNDONE,
            names::RECEIPTS,
            names::DAMAGE,
            names::VERIFICATIONS,
        ]
        .map(str::to_owned)
        .into();
        folders.extend((0..=255_u8).map(|first| format!("{}/{first:02x}", names::PACKS)));
        for folder in folders {
            let path = self.root.join(folder);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => take_folder(&path, self.group, SHARED)?,
            }
        }
        let unfinished = self.root.join(names::TEMPORARY);
        match fs::create_dir(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => take_folder(&unfinished, self.group, UNFINISHED),
        }
    }

    fn folder(&self, folder: &Path, depth: usize, report: &mut SealReport) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let kept_out =
                depth == 0 && [WORKSHOP, names::TEMPORARY, "lost+found"].iter().any(|name| path.ends_with(name));
            if kept_out {
                continue;
            }
            let found = match fs::symlink_metadata(&path) {
                // A sweep was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                found => found?,
            };
            if found.is_dir() && depth < DEEPEST {
                let mode = if depth == 0 && !is_known(&path) { 0o755 } else { SHARED };
                take_folder(&path, self.group, mode)?;
                self.folder(&path, depth + 1, report)?;
            } else if found.is_file() && is_sealed(&found) {
                report.before += 1;
                report.immutable += u64::from(make_immutable(&path));
            } else if found.is_file() && found.len() <= MAX_OBJECT_BYTES as u64 {
                self.file(&path, report)?;
            } else {
                report.note(self.root, &path);
            }
        }
        Ok(())
    }

    /// Puts a copy of ours in the place of somebody's file.
    fn file(&self, path: &Path, report: &mut SealReport) -> io::Result<()> {
        let mut from = match open_as(path, OFlags::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            from => from?,
        };
        let found = from.metadata()?;
        // Another name of it can be of somebody else's file; one that is only just being published has two for a moment.
        if !found.is_file() || found.nlink() != 1 {
            report.note(self.root, path);
            return Ok(());
        }
        let copy = self.root.join(WORKSHOP).join(Uuid::new_v4().simple().to_string());
        let mut to = File::options().write(true).create_new(true).mode(SEALED_FILE).open(&copy)?;
        // Who is still writing can not make it longer than an object is.
        let bytes = copy_at_most(&mut from, &mut to, MAX_OBJECT_BYTES as u64)?;
        fchown(&to, Some(0), Some(self.group))?;
        to.set_permissions(fs::Permissions::from_mode(SEALED_FILE))?;
        // The time is when the object appeared, which a sweep goes by.
        to.set_modified(found.modified()?)?;
        to.sync_all()?;
        fs::rename(&copy, path)?;
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        report.sealed += 1;
        report.bytes += bytes;
        report.immutable += u64::from(make_immutable(path));
        Ok(())
    }
}

fn copy_at_most(from: &mut File, to: &mut File, limit: u64) -> io::Result<u64> {
    // `io::copy` between files goes by way of the kernel, which shares the blocks where the file system can do that.
    let mut limited = io::Read::take(from, limit);
    io::copy(&mut limited, to)
}

/// Whether this is one of the folders that a repository has, and not one that somebody has put beside them.
fn is_known(path: &Path) -> bool {
    let known = [names::KEYS, names::INDEX, names::POINTS, names::PACKS, names::SWEEPS, names::RECORDS];
    known.iter().any(|name| path.ends_with(name))
}

fn is_sealed(found: &fs::Metadata) -> bool {
    found.uid() == 0 && found.mode() & 0o222 == 0 && found.nlink() == 1
}

/// Opens what is really there: no link is followed and no pipe waited for, whatever it has become since it was looked at.
fn open_as(path: &Path, more: OFlags) -> io::Result<File> {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK | more).bits()).unwrap_or_default();
    File::options().read(true).custom_flags(flags).open(path)
}

fn take_folder(path: &Path, group: u32, mode: u32) -> io::Result<()> {
    // By its handle: a name could become a link to something else in between.
    let folder = open_as(path, OFlags::DIRECTORY)?;
    let found = folder.metadata()?;
    if (found.uid(), found.gid(), found.mode() & 0o7777) == (0, group, mode) {
        return Ok(());
    }
    fchown(&folder, Some(0), Some(group))?;
    folder.set_permissions(fs::Permissions::from_mode(mode))
}

/// Says whether the file system keeps it from now on.
fn make_immutable(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let Ok(flags) = ioctl_getflags(&file) else { return false };
    flags.contains(IFlags::IMMUTABLE) || ioctl_setflags(&file, flags | IFlags::IMMUTABLE).is_ok()
}

/// Lets root remove a file that was made immutable. Says whether it was.
pub(super) fn lift(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let Ok(flags) = ioctl_getflags(&file) else { return false };
    flags.contains(IFlags::IMMUTABLE) && ioctl_setflags(&file, flags - IFlags::IMMUTABLE).is_ok()
}

/// What protects a file of a repository from users other than root: it belongs to root and is read-only, and so does every
/// folder up to the repository's, none of which lets others remove it.
pub(super) fn protection(root: &Path, path: &Path) -> io::Result<Protection> {
    let found = fs::symlink_metadata(path)?;
    if !found.is_file() || !is_sealed(&found) {
        return Ok(Protection::None);
    }
    let mut folder: PathBuf = path.to_owned();
    while folder.pop() {
        let found = fs::symlink_metadata(&folder)?;
        let mode = found.mode();
        if found.uid() != 0 || (mode & 0o022 != 0 && mode & 0o1000 == 0) {
            return Ok(Protection::None);
        }
        if folder == root {
            let immutable = File::open(path).and_then(|file| Ok(ioctl_getflags(&file)?));
            let immutable = immutable.is_ok_and(|flags| flags.contains(IFlags::IMMUTABLE));
            return Ok(Protection::Sealed { immutable });
        }
    }
    Ok(Protection::None)
}
