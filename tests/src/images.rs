//! Real ext4 file systems in files: made from a tree of files, edited offline, checked, compared.

use crate::Outcome;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// The unit in which two states of an image are compared.
const COMPARE_BYTES: usize = 4096;

/// The longest run of changed bytes that is handed out as one.
const LONGEST_RUN_BYTES: usize = 1 << 20;

/// Makes an image of `size` bytes that holds a file system with the files of `tree`.
///
/// # Errors
/// With what `mkfs.ext4` says.
pub fn make(image: &Path, tree: &Path, size: u64) -> Outcome {
    File::create(image)?.set_len(size)?;
    tool(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(tree).arg(image))
}

/// Edits the file system with commands of `debugfs`, such as `write FILE NAME` or `rm NAME`.
///
/// # Errors
/// With what `debugfs` says.
pub fn edit(image: &Path, commands: &[String]) -> Outcome {
    let script = tempfile::NamedTempFile::new()?;
    std::fs::write(script.path(), commands.join("\n") + "\n")?;
    tool(Command::new("debugfs").arg("-w").arg("-f").arg(script.path()).arg(image))
}

/// Reads one file out of the file system.
///
/// # Errors
/// With what `debugfs` says.
pub fn read_file(image: &Path, name: &str) -> Outcome<Vec<u8>> {
    let out = tempfile::NamedTempFile::new()?;
    tool(Command::new("debugfs").arg("-R").arg(format!("dump {name} {}", out.path().display())).arg(image))?;
    Ok(std::fs::read(out.path())?)
}

/// Checks the file system without changing it (`e2fsck -fn`).
///
/// # Errors
/// With what `e2fsck` found.
pub fn check(image: &Path) -> Outcome {
    tool(Command::new("e2fsck").arg("-fn").arg(image))
}

/// What differs in `new` from `old`, as runs of bytes at their offsets. Both have the same length.
///
/// # Errors
/// If a file can not be read.
pub fn differing_runs(old: &Path, new: &Path) -> Outcome<Vec<(u64, Vec<u8>)>> {
    let (old, new) = (File::open(old)?, File::open(new)?);
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut offset = 0;
    loop {
        let before = read_at_most(&old, offset, LONGEST_RUN_BYTES)?;
        let after = read_at_most(&new, offset, LONGEST_RUN_BYTES)?;
        if after.is_empty() {
            return Ok(runs);
        }
        if before != after {
            let mut at = offset;
            for (left, right) in before.chunks(COMPARE_BYTES).zip(after.chunks(COMPARE_BYTES)) {
                if left != right {
                    match runs.last_mut() {
                        Some((start, run)) if *start + run.len() as u64 == at && run.len() < LONGEST_RUN_BYTES => {
                            run.extend_from_slice(right);
                        }
                        _ => runs.push((at, right.to_vec())),
                    }
                }
                at += right.len() as u64;
            }
        }
        offset += after.len() as u64;
    }
}

fn read_at_most(file: &File, offset: u64, length: usize) -> Outcome<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// SHA-256 of everything that `input` gives, as lower-case hexadecimal.
///
/// # Errors
/// If it can not be read.
pub fn sha256(input: &mut dyn Read) -> Outcome<String> {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = input.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        context.update(bytes);
    }
    Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn tool(command: &mut Command) -> Outcome {
    // Tools for file systems are often not on the path of an ordinary user.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsString::from(":/usr/sbin:/sbin"));
    let output = command.env("PATH", path).output()?;
    let messages = String::from_utf8_lossy(&output.stderr);
    // debugfs ends with 0 whatever happened; its first line of messages is its version.
    let complaint = messages.lines().skip(1).find(|line| !line.trim().is_empty());
    let is_debugfs = command.get_program() == "debugfs";
    if output.status.success() && !(is_debugfs && complaint.is_some()) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    Err(format!("{:?} ended with {}: {messages}{said}", command.get_program(), output.status).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edited_file_shows_up_in_the_differing_runs() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("hello"), "hello").unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        make(&old, &tree, 8 << 20).unwrap();
        std::fs::copy(&old, &new).unwrap();
        assert!(differing_runs(&old, &new).unwrap().is_empty());

        std::fs::write(tree.join("more"), vec![7; 10_000]).unwrap();
        edit(&new, &[format!("write {} more", tree.join("more").display())]).unwrap();
        check(&new).unwrap();
        assert_eq!(read_file(&new, "more").unwrap(), vec![7; 10_000]);

        let copy = std::fs::OpenOptions::new().write(true).open(&old).unwrap();
        for (offset, run) in differing_runs(&old, &new).unwrap() {
            copy.write_all_at(&run, offset).unwrap();
        }
        assert_eq!(std::fs::read(&old).unwrap(), std::fs::read(&new).unwrap());
    }

    #[test]
    fn a_broken_edit_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (image, tree) = (folder.path().join("image"), folder.path().join("tree"));
        std::fs::create_dir(&tree).unwrap();
        make(&image, &tree, 8 << 20).unwrap();
        assert!(edit(&image, &["rm no-such-file".to_owned()]).is_err());
    }

    #[test]
    fn sha256_is_sha256() {
        let digest = sha256(&mut &b"abc"[..]).unwrap();
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
