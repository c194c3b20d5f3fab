//! The programs that are compared, by their real command lines, each with its encryption.

use super::data::DISKS;
use crate::run::{Outcome, cargo, output, show, target_folder};
use crate::test::tools::{self, Tool};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian packages of the others.
const TOOLS: &[Tool] = &[("restic", "restic"), ("borg", "borgbackup"), ("time", "time")];

/// The version of the crate `rustic-rs` that is built.
const RUSTIC_VERSION: &str = "0.11.4";

const PASSWORD: &str = "the passphrase of a benchmark";

/// Which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Xenvault,
    Restic,
    Borg,
    Rustic,
}

/// A program with its settings.
#[derive(Clone, Debug)]
pub struct Contender {
    pub program: Program,
    pub name: String,
    /// Arguments of making the repository.
    init: Vec<String>,
    /// Arguments of each backup.
    write: Vec<String>,
    /// Measured in every round. Others only take more time than these, and what they store does not change.
    pub every_round: bool,
    /// Whether the targets look at it.
    pub counts: bool,
}

impl Contender {
    pub fn new(program: Program, name: &str, init: &[&str], write: &[&str]) -> Self {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Self { program, name: name.to_owned(), init: owned(init), write: owned(write), every_round: true, counts: true }
    }

    fn once(self) -> Self {
        Self { every_round: false, ..self }
    }

    fn for_information(self) -> Self {
        Self { counts: false, ..self.once() }
    }
}

/// All of the comparison: the defaults of each program and its best compression that is still of use every night.
pub fn all() -> Vec<Contender> {
    use Program::{Borg, Restic, Rustic, Xenvault};
    let borg = ["--encryption", "repokey-blake2"];
    vec![
        Contender::new(Xenvault, "Xenvault", &[], &[]),
        Contender::new(Restic, "restic, default", &[], &[]),
        Contender::new(Borg, "borg, default (lz4)", &borg, &[]),
        Contender::new(Rustic, "rustic, default", &[], &[]),
        Contender::new(Restic, "restic, `--compression max`", &[], &["--compression", "max"]).once(),
        Contender::new(Borg, "borg, `--compression zstd,3`", &borg, &["--compression", "zstd,3"]).once(),
        Contender::new(Rustic, "rustic, `--set-compression 12`", &["--set-compression", "12"], &[]).once(),
        // Whoever knows what virtual disks are like can choose chunks as small as ours.
        Contender::new(Rustic, "*rustic, chunks of 32 KiB*", &RUSTIC_SMALL_CHUNKS, &[]).for_information(),
    ]
}

const RUSTIC_SMALL_CHUNKS: [&str; 6] =
    ["--set-chunk-size", "32kiB", "--set-chunk-min-size", "8kiB", "--set-chunk-max-size", "128kiB"];

/// Installs or builds what is missing.
pub fn provide(contenders: &[Contender]) -> Outcome {
    tools::provide(TOOLS)?;
    if contenders.iter().any(|contender| contender.program == Program::Rustic) && !rustic().is_file() {
        println!("building rustic {RUSTIC_VERSION}: this takes long, once");
        let mut install = cargo();
        install.args(["install", "rustic-rs", "--version", RUSTIC_VERSION, "--locked", "--root"]);
        show(install.arg(rustic_root()).arg("--target-dir").arg(target_folder().join("bench/rustic-build")))?;
        std::fs::remove_dir_all(target_folder().join("bench/rustic-build"))?;
    }
    show(cargo().args(["build", "--quiet", "--release", "--package", "xenvault-store", "--example", "store-bench"]))
}

/// The versions, for the table.
pub fn versions() -> Outcome<String> {
    let said = |command: &mut Command| -> Outcome<String> {
        let text = String::from_utf8(output(command)?)?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    };
    let lines = [
        said(Command::new("restic").arg("version"))?,
        said(Command::new("borg").arg("--version"))?,
        said(Command::new(rustic()).arg("--version"))?,
    ];
    Ok(lines.join("; "))
}

fn rustic_root() -> PathBuf {
    target_folder().join("bench/tools")
}

fn rustic() -> PathBuf {
    rustic_root().join("bin/rustic")
}

/// A repository of one contender in a folder that is fresh.
pub struct Place<'a> {
    contender: &'a Contender,
    folder: &'a Path,
}

impl<'a> Place<'a> {
    /// Makes the repository.
    pub fn make(contender: &'a Contender, folder: &'a Path) -> Outcome<Self> {
        let place = Self { contender, folder };
        let mut command = place.command();
        match contender.program {
            Program::Xenvault => command.arg("init").arg(place.repository()),
            Program::Restic => command.args(["init", "--quiet", "--repository-version", "2"]),
            Program::Borg => command.arg("init"),
            Program::Rustic => command.arg("init"),
        };
        command.args(&contender.init);
        if contender.program == Program::Borg {
            command.arg(place.repository());
        }
        output(&mut command)?;
        Ok(place)
    }

    /// What counts as stored.
    pub fn repository(&self) -> PathBuf {
        self.folder.join("repository")
    }

    /// Backs up the folder of one generation, which stands in `disks`.
    pub fn write(&self, disks: &Path, generation: &str) -> Command {
        let mut command = self.command();
        command.current_dir(disks);
        match self.contender.program {
            Program::Xenvault => {
                command.arg("write").arg(self.repository()).arg(generation).args(&self.contender.write)
            }
            Program::Restic => command.args(["backup", "--quiet"]).args(&self.contender.write).arg(generation),
            Program::Borg => {
                let archive = format!("{}::{generation}", self.repository().display());
                command.arg("create").args(&self.contender.write).args([&archive, generation])
            }
            Program::Rustic => command.arg("backup").args(&self.contender.write).arg(generation),
        };
        command
    }

    /// Reads one disk of the newest generation to standard output.
    pub fn read(&self, generation: &str, disk: &str) -> Command {
        let mut command = self.command();
        let path = format!("{generation}/{disk}");
        match self.contender.program {
            Program::Xenvault => {
                command.arg("read").arg(self.repository()).arg(disk.strip_suffix(".raw").unwrap_or(disk))
            }
            Program::Restic => command.args(["dump", "--quiet", "latest", &format!("/{path}")]),
            Program::Borg => {
                let archive = format!("{}::{generation}", self.repository().display());
                command.args(["extract", "--stdout", &archive, &path])
            }
            Program::Rustic => command.args(["dump", &format!("latest:/{path}")]),
        };
        command
    }

    /// Bytes of all files of the repository, and those of its index.
    pub fn stored(&self) -> Outcome<(u64, u64)> {
        let is_index = |name: &str| match self.contender.program {
            Program::Borg => name.starts_with("index.") || name.starts_with("hints."),
            _ => name.starts_with("index/"),
        };
        let mut sizes = (0, 0);
        sum(&self.repository(), "", &mut |name, length| {
            sizes.0 += length;
            sizes.1 += if is_index(name) { length } else { 0 };
        })?;
        Ok(sizes)
    }

    fn command(&self) -> Command {
        let (repository, cache) = (self.repository(), self.folder.join("cache"));
        match self.contender.program {
            Program::Xenvault => Command::new(target_folder().join("release/examples/store-bench")),
            Program::Restic => {
                let mut command = Command::new("restic");
                command.env("RESTIC_REPOSITORY", repository).env("RESTIC_PASSWORD", PASSWORD);
                command.env("RESTIC_CACHE_DIR", cache);
                command
            }
            Program::Borg => {
                let mut command = Command::new("borg");
                command.env("BORG_PASSPHRASE", PASSWORD).env("BORG_BASE_DIR", cache);
                command
            }
            Program::Rustic => {
                let mut command = Command::new(rustic());
                command.env("RUSTIC_REPOSITORY", repository).env("RUSTIC_PASSWORD", PASSWORD);
                command.env("RUSTIC_CACHE_DIR", cache).env("RUSTIC_NO_PROGRESS", "true");
                command
            }
        }
    }
}

fn sum(folder: &Path, prefix: &str, done: &mut dyn FnMut(&str, u64)) -> Outcome {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            sum(&entry.path(), &format!("{name}/"), done)?;
        } else {
            done(&name, entry.metadata()?.len());
        }
    }
    Ok(())
}

/// Compares what our program reads with the disks.
///
/// # Errors
/// The first disk that differs.
pub fn compare(place: &Place<'_>, disks: &Path, generation: &str) -> Outcome {
    use std::io::Read as _;
    for disk in DISKS {
        let mut child = place.read(generation, disk).stdout(std::process::Stdio::piped()).spawn()?;
        let mut found = child.stdout.take().ok_or("no output")?;
        let mut expected = std::fs::File::open(disks.join(generation).join(disk))?;
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        loop {
            let count = expected.read(&mut left)?;
            let (Some(left), Some(right)) = (left.get(..count), right.get_mut(..count)) else { break };
            if count == 0 {
                break;
            }
            found.read_exact(right)?;
            if left != &*right {
                return Err(format!("{disk} of {generation} reads back with other bytes").into());
            }
        }
        if found.read(&mut left)? > 0 || !child.wait()?.success() {
            return Err(format!("{disk} of {generation} does not read back as it was").into());
        }
    }
    Ok(())
}
