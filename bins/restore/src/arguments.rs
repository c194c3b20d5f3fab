//! The command line of `xenvault-restore`.

use crate::shell::OutputArguments;
use crate::shell::pool::{PoolArguments, StateArguments};
use crate::shell::repository::RepositoryArguments;
use crate::shell::secrets::SecretError;
use std::path::PathBuf;
use std::time::Duration;
use xenvault_block::ByteSize;
use xenvault_engine::MacPolicy;
use xenvault_store::{Repository, Secret};

/// Looks into a Xenvault repository and brings VMs and disks back.
///
/// Passwords and passphrases are never arguments: they come from a file, standard input or the environment.
#[derive(Debug, clap::Parser)]
#[command(name = "xenvault-restore", version)]
pub struct Arguments {
    #[command(flatten)]
    pub output: OutputArguments,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Lists the restore points
    #[command(
        after_help = "Example:\n    xenvault-restore points --repository /backup --passphrase-file ./passphrase --vm web\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Points(PointsArguments),
    /// Shows one point: its disks, what was read and why
    #[command(
        after_help = "Example:\n    xenvault-restore show POINT --repository /backup --passphrase-file ./passphrase\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Show(ShowArguments),
    /// Restores a point as a new VM
    #[command(
        after_help = "Example:\n    xenvault-restore vm POINT --repository /backup --passphrase-file ./passphrase --pool https://192.0.2.1 --fingerprint SHA256 --password-file ./password --name restored\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Vm(Box<VmArguments>),
    /// Writes one disk of a point to a raw, sparse file
    #[command(
        after_help = "Example:\n    xenvault-restore disk POINT 0 --repository /backup --passphrase-file ./passphrase --to web.raw\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Disk(DiskArguments),
    /// Lists points, forgets them, or takes that back
    #[command(
        after_help = "Example:\n    xenvault-restore point forget POINT --repository /backup --passphrase-file ./passphrase\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Point {
        #[command(subcommand)]
        command: PointCommand,
    },
    /// Removes forgotten points and whatever no point needs
    ///
    /// What goes is announced first and removed by the next sweep after the grace period, so a sweep each day is two half
    /// sweeps. Nothing is removed if it is doubtful that all points are known. Interrupting it is harmless.
    ///
    /// In this release no backup, repair or other sweep may run at the same moment: --alone says that none does.
    #[command(
        after_help = "Example:\n    xenvault-restore sweep --repository /backup --passphrase-file ./passphrase --dry-run\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Sweep(SweepArguments),
    /// Checks that everything is there and whole, and tells which points, VMs and ranges of disks are hurt; ends with
    /// code 9 if something is
    #[command(
        after_help = "Example:\n    xenvault-restore verify --repository /backup --passphrase-file ./passphrase --sample 10\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Verify(VerifyArguments),
    /// Keeps the locks of a repository in a bucket as long as its points are immutable
    ///
    /// With the keeper's credential, at least once in a quarter of the period of immutability, better each day. What new
    /// points use again is locked until their end, and what points beyond their end need for another quarter. Locks never
    /// become shorter.
    #[command(
        after_help = "Example:\n    xenvault-restore keep --repository /backup --passphrase-file ./passphrase --dry-run\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Keep(KeepArguments),
    /// Takes the files of a repository in a local folder over, as root, so that datamovers can not change them any more
    ///
    /// For repositories made with --immutability broker. Needs no passphrase. Each call takes over what was finished since
    /// the last one; with --every it stays and does so again and again.
    #[command(
        after_help = "Example:\n    xenvault-restore seal /backup --group xenvault --every 10s\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Seal(SealArguments),
    /// Writes index segments and receipts again that were lost; never touches a pack or a point
    #[command(
        after_help = "Example:\n    xenvault-restore repair --repository /backup --passphrase-file ./passphrase\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Repair(RepairArguments),
    /// Says who can open the repository: passphrases and recovery keys
    ///
    /// Wherever a passphrase is asked for, a recovery key will do. No backup is written again for any of this.
    #[command(
        after_help = "Example:\n    xenvault-restore key list --repository /backup --passphrase-file ./passphrase\n    xenvault-restore key add --repository /backup --passphrase-file ./passphrase --new-passphrase-file ./new --label anna\n    xenvault-restore key recovery --repository /backup --passphrase-file ./passphrase --to ./recovery-key\n    xenvault-restore key change --repository /backup --passphrase-file ./passphrase --new-passphrase-file ./new\n    xenvault-restore key remove SLOT --repository /backup --passphrase-file ./passphrase --dry-run\n\nExit codes and environment: see `xenvault-restore --help`."
    )]
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
}

#[derive(Debug, clap::Subcommand)]
pub enum KeyCommand {
    /// Lists the key slots: what opens each, what it gives, whose it is
    List(RepositoryArguments),
    /// Adds a passphrase
    Add(KeyAddArguments),
    /// Makes a recovery key and shows it once
    Recovery(KeyRecoveryArguments),
    /// Puts a new passphrase in the place of the one that is given
    Change(KeyChangeArguments),
    /// Removes key slots: what opens only these opens nothing any more. The slot that is used for this stays
    Remove(KeyRemoveArguments),
}

#[derive(Debug, clap::Args)]
pub struct KeyAddArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// File whose first line is the new passphrase; `-` is standard input. Otherwise XENVAULT_NEW_PASSPHRASE is used
    #[arg(long, value_name = "FILE")]
    pub new_passphrase_file: Option<PathBuf>,
    /// Whose it is, for `key list`; at most 64 bytes
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    /// For a datamover that backs up and can not read what disks hold
    #[arg(long)]
    pub write_only: bool,
}

#[derive(Debug, clap::Args)]
pub struct KeyRecoveryArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// Write it to this file, which must not exist, and not to standard output
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,
    /// Where it is kept, for `key list`; at most 64 bytes
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
}

#[derive(Debug, clap::Args)]
pub struct KeyChangeArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// File whose first line is the new passphrase; `-` is standard input. Otherwise XENVAULT_NEW_PASSPHRASE is used
    #[arg(long, value_name = "FILE")]
    pub new_passphrase_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct KeyRemoveArguments {
    /// The slots: their names as `key list` shows them, or enough of their beginnings
    #[arg(required = true, value_name = "SLOT")]
    pub slots: Vec<String>,
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// Show what would go, and touch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// It is meant: remove them
    #[arg(long, conflicts_with = "dry_run")]
    pub confirm: bool,
}

#[derive(Debug, clap::Subcommand)]
pub enum PointCommand {
    /// Lists the restore points, as `points` does
    List(PointsArguments),
    /// Shows one point, and proves what protects it by asking the store about each of its objects
    Show(ShowArguments),
    /// Forgets points: they are not listed any more, and a sweep removes them
    Forget(ForgetArguments),
    /// Takes the forgetting of points back, which is possible until a sweep has announced them
    Undo(ChangeArguments),
}

#[derive(Debug, clap::Args)]
pub struct ChangeArguments {
    /// The points: their ids, or enough of their beginnings
    #[arg(required = true)]
    pub points: Vec<String>,
    #[command(flatten)]
    pub repository: RepositoryArguments,
}

#[derive(Debug, clap::Args)]
pub struct ForgetArguments {
    #[command(flatten)]
    pub change: ChangeArguments,
    /// Why, for whoever asks later
    #[arg(long, value_name = "TEXT", default_value = "by hand")]
    pub reason: String,
}

#[derive(Debug, clap::Args)]
pub struct SweepArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// Show what would go, and touch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// No backup, repair or other sweep works on the repository until this command has ended
    #[arg(long)]
    pub alone: bool,
    /// Time between announcement and removal, such as 48h, 3d, 90m or 0s; longer than the longest backup
    #[arg(long, value_name = "TIME", default_value = "48h", value_parser = time)]
    pub grace: Duration,
    /// Most bytes to store again so that packs can go that are mostly dead
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub rewrite_budget: ByteSize,
    /// A pack is mostly dead if less than this percentage of it is needed
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rewrite_below: u8,
    /// More than a fifth of all points may go at once
    #[arg(long)]
    pub confirm_many: bool,
    /// Go on without points that are gone though nobody has forgotten them, however many they are
    #[arg(long, requires = "confirm_many")]
    pub accept_lost_points: bool,
}

#[derive(Debug, clap::Args)]
pub struct VerifyArguments {
    #[command(flatten)]
    pub repository: ReadingArguments,
    /// Read, authenticate and hash every chunk of every pack. Without it, only the frame of each pack is looked at
    #[arg(long, conflicts_with = "sample")]
    pub full: bool,
    /// Read this percentage of the packs as a whole
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub sample: Option<u8>,
    /// Number that chooses the packs of the sample [default: another one each day]
    #[arg(long, value_name = "N", requires = "sample")]
    pub seed: Option<u64>,
    /// Write neither damage marks nor the result into the repository
    #[arg(long)]
    pub read_only: bool,
}

#[derive(Debug, clap::Args)]
pub struct KeepArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// Show what would be locked for longer, and touch nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub struct SealArguments {
    /// Folder of the repository
    pub folder: PathBuf,
    /// Group of the datamovers, by name or number: who may put new files in
    #[arg(long, value_name = "NAME_OR_GID")]
    pub group: String,
    /// Stay, and take over what is new each time that this has passed, such as 10s
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub every: Option<Duration>,
}

/// A repository that is only read.
#[derive(Debug, clap::Args)]
pub struct ReadingArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// Read as if nobody had ever forgotten or swept anything: after an attack with a datamover's key, which can write
    /// tombstones
    #[arg(long)]
    pub ignore_tombstones: bool,
}

impl ReadingArguments {
    /// As [`RepositoryArguments::passphrase`].
    ///
    /// # Errors
    /// The same.
    pub fn passphrase(&self) -> Result<Secret, SecretError> {
        self.repository.passphrase()
    }

    /// Opens the repository with a passphrase that was read before.
    ///
    /// # Errors
    /// As [`RepositoryArguments::open_with`].
    pub async fn open_with(&self, passphrase: &Secret) -> Result<Repository, crate::Failure> {
        let repository = self.repository.open_with(passphrase).await?;
        Ok(if self.ignore_tombstones { repository.without_deletions()? } else { repository })
    }
}

#[derive(Debug, clap::Args)]
pub struct RepairArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
}

#[derive(Debug, clap::Args)]
pub struct PointsArguments {
    #[command(flatten)]
    pub repository: ReadingArguments,
    /// Only points of this VM, by UUID or by the name at the time of the backup
    #[arg(long, value_name = "NAME_OR_UUID")]
    pub vm: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct ShowArguments {
    /// The point: its id, or enough of its beginning
    pub point: String,
    #[command(flatten)]
    pub repository: ReadingArguments,
}

#[derive(Debug, clap::Args)]
pub struct VmArguments {
    /// The point: its id, or enough of its beginning
    pub point: String,
    #[command(flatten)]
    pub repository: ReadingArguments,
    #[command(flatten)]
    pub pool: PoolArguments,
    #[command(flatten)]
    pub state: StateArguments,
    /// SR for the disks, by UUID or by exact name [default: the pool's default SR]
    #[arg(long, value_name = "NAME_OR_UUID")]
    pub sr: Option<String>,
    /// Name of the new VM [default: the name at the time of the backup]
    #[arg(long)]
    pub name: Option<String>,
    /// Puts VIFs of one network on another; may be repeated. Networks that are not named are found by UUID or name,
    /// and where there is none the VIF is left out
    #[arg(long = "network", value_name = "OLD=NEW", value_parser = network)]
    pub networks: Vec<(String, String)>,
    /// MAC addresses of the new VM
    #[arg(long, value_enum, default_value_t = Mac::KeepIfFree)]
    pub mac: Mac,
}

#[derive(Debug, clap::Args)]
pub struct DiskArguments {
    /// The point: its id, or enough of its beginning
    pub point: String,
    /// The disk: its position (0, 1, ...) or its UUID, as `show` lists them
    pub disk: String,
    #[command(flatten)]
    pub repository: ReadingArguments,
    /// File to write; it must not exist
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
}

/// What the restored VM gets as MAC addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mac {
    /// Those of the original where nothing else in the pool uses them, else new ones
    KeepIfFree,
    /// Those of the original in any case
    Keep,
    /// New ones
    New,
}

impl From<Mac> for MacPolicy {
    fn from(mac: Mac) -> Self {
        match mac {
            Mac::KeepIfFree => Self::KeepIfFree,
            Mac::Keep => Self::Keep,
            Mac::New => Self::New,
        }
    }
}

fn network(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("write OLD=NEW, two networks by name or UUID".to_owned()),
    }
}

/// A time such as `48h`, `3d`, `90m` or `0s`.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: write a number and s, m, h or d, such as 48h");
    let unit = text.chars().next_back().ok_or_else(wrong)?;
    let number = text.strip_suffix(unit).and_then(|number| number.parse::<u64>().ok()).ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return Err(wrong()),
    };
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn times_have_a_unit() {
        for (text, seconds) in [("0s", 0), ("90m", 5400), ("48h", 172_800), ("3d", 259_200)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)));
        }
        for wrong in ["", "h", "48", "1.5h", "-1h", "1w", "99999999999999999999d", "9999999999999999999d", "3é"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_network_map_has_two_sides() {
        assert_eq!(network("a=b"), Ok(("a".to_owned(), "b".to_owned())));
        assert!(network("a").is_err() && network("=b").is_err() && network("a=").is_err());
    }
}
