//! The system tools that tests and demo need: installed with apt where we may, else named with the command to run.

use crate::run::{Outcome, show};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program and the Debian package that holds it.
pub type Tool = (&'static str, &'static str);

/// What the demo needs: real file systems.
pub const FOR_DEMO: &[Tool] = &[("mkfs.ext4", "e2fsprogs"), ("debugfs", "e2fsprogs"), ("e2fsck", "e2fsprogs")];

/// What the tests need: file systems, and other implementations of NBD, disk formats and XenAPI's encodings.
pub const FOR_TESTS: &[Tool] = &[
    ("mkfs.ext4", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("nbdkit", "nbdkit"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    // Whatever version is there is taken: replacing it can be impossible where others hold to it.
    ("qemu-nbd", "qemu-utils"),
    ("qemu-img", "qemu-utils"),
    ("openssl", "openssl"),
    ("python3", "python3"),
    ("curl", "curl"),
    ("sha256sum", "coreutils"),
    ("tar", "tar"),
    ("gzip", "gzip"),
    // An S3 service that people run; without the recommended packages it is small.
    ("ceph-mon", "ceph-mon"),
    ("ceph-osd", "ceph-osd"),
    ("radosgw", "radosgw"),
    // For XenAPI clients of others, which `clients.rs` installs.
    ("node", "nodejs"),
    ("npm", "npm"),
];

/// Folders that hold system programs but are often not on the path of an ordinary user.
const MORE_FOLDERS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Makes sure that `tools` can be started.
///
/// # Errors
/// The exact command that installs what is missing, where we may not do so ourselves.
pub fn provide(tools: &[Tool]) -> Outcome {
    let packages = missing_packages(tools, &|program| find(program).is_some());
    if packages.is_empty() {
        return Ok(());
    }
    install(&packages)?;
    if missing_packages(tools, &|program| find(program).is_some()).is_empty() {
        Ok(())
    } else {
        Err(by_hand(&packages).into())
    }
}

/// Installs Debian packages.
///
/// # Errors
/// The exact command that installs them, where we may not do so ourselves; or what apt failed with.
pub fn install(packages: &[&str]) -> Outcome {
    if !is_root() || find("apt-get").is_none() {
        return Err(by_hand(packages).into());
    }
    println!("installing {}", packages.join(" "));
    let install = || {
        let mut command = Command::new("apt-get");
        command.args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(packages);
        show(command.env("DEBIAN_FRONTEND", "noninteractive"))
    };
    // A fresh machine has no package lists yet; a prepared one needs no update.
    install().or_else(|_| {
        show(Command::new("apt-get").args(["update", "--quiet"]))?;
        install()
    })
}

fn by_hand(packages: &[&str]) -> String {
    format!(
        "these tools are missing; install them with:\n    sudo apt-get install --no-install-recommends {}",
        packages.join(" ")
    )
}

/// The packages of the tools that are not there, each once.
fn missing_packages(tools: &[Tool], is_there: &dyn Fn(&str) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<&str> =
        tools.iter().filter(|(program, _)| !is_there(program)).map(|(_, package)| *package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Where a program lies.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(MORE_FOLDERS.map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(Path::new("/proc/self")).is_ok_and(|metadata| metadata.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_named_once_and_only_if_needed() {
        assert_eq!(missing_packages(FOR_TESTS, &|_| true), Vec::<&str>::new());
        assert_eq!(missing_packages(FOR_DEMO, &|_| false), ["e2fsprogs"]);
        assert_eq!(missing_packages(FOR_TESTS, &|program| !program.starts_with("qemu")), ["qemu-utils"]);
    }
}
