//! Debian packages in two versions: what an update changes on a disk is what it really changes.

use crate::run::{Outcome, output};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A package before and after an update, unpacked. Where the sources hold one version only, both are the same.
pub(crate) struct Update {
    pub(crate) older: PathBuf,
    pub(crate) newer: PathBuf,
}

/// A kernel, unpacked.
pub(crate) struct Kernel {
    pub(crate) files: PathBuf,
}

/// Fetches the oldest and the newest version that the package sources hold of each package.
pub(crate) fn updates(work: &Path, names: &[&str]) -> Outcome<Vec<Update>> {
    let mut updates = Vec::new();
    for name in names {
        let listed = String::from_utf8(output(Command::new("apt-cache").args(["madison", name]))?)?;
        // Newest first, as apt sorts them. The sources may list what they do not hold any more.
        let versions: Vec<&str> = listed.lines().filter_map(|line| line.split('|').nth(1).map(str::trim)).collect();
        let mut there = versions.iter().map(|version| unpacked(work, name, version)).filter_map(Result::ok);
        let newer = there.next().ok_or_else(|| {
            format!("the package sources hold no {name}; this benchmark needs Debian 12 (apt-get update)")
        })?;
        let older = there.next_back().unwrap_or_else(|| newer.clone());
        updates.push(Update { older, newer });
    }
    Ok(updates)
}

/// Fetches the newest kernels for virtual machines, oldest first.
pub(crate) fn kernels(work: &Path, count: usize) -> Outcome<Vec<Kernel>> {
    let names = String::from_utf8(output(Command::new("apt-cache").args(["pkgnames", "linux-image-"]))?)?;
    let number = |name: &&str| {
        let release = name.strip_prefix("linux-image-")?.strip_suffix("-cloud-amd64")?;
        release.split(['.', '-']).map(|part| part.parse().ok()).collect::<Option<Vec<u32>>>()
    };
    let mut found: Vec<(Vec<u32>, &str)> =
        names.lines().filter_map(|name| number(&name).map(|number| (number, name))).collect();
    found.sort();
    let mut kernels = Vec::new();
    for (_, name) in found.iter().rev() {
        if kernels.len() < count {
            kernels.extend(updates(work, &[name]).ok().and_then(|mut update| update.pop()));
        }
    }
    if kernels.len() < count {
        return Err("the package sources hold too few kernels".into());
    }
    let mut kernels: Vec<Kernel> = kernels.into_iter().map(|update| Kernel { files: update.newer }).collect();
    kernels.reverse();
    Ok(kernels)
}

fn unpacked(work: &Path, name: &str, version: &str) -> Outcome<PathBuf> {
    let folder = work.join(format!("{name}_{}", version.replace([':', '/', '~'], "-")));
    if folder.is_dir() {
        return Ok(folder);
    }
    let fetched = work.join("fetched");
    std::fs::create_dir_all(&fetched)?;
    output(
        Command::new("apt-get").args(["--quiet", "download"]).arg(format!("{name}={version}")).current_dir(&fetched),
    )?;
    let archive = std::fs::read_dir(&fetched)?.next().ok_or("apt-get has fetched nothing")??.path();
    output(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&folder))?;
    std::fs::remove_file(archive)?;
    Ok(folder)
}
