//! The command line of `xenvault-restore`.

use crate::shell::OutputArguments;
use crate::shell::pool::{PoolArguments, StateArguments};
use crate::shell::repository::RepositoryArguments;
use std::path::PathBuf;
use xenvault_engine::MacPolicy;

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
}

#[derive(Debug, clap::Args)]
pub struct PointsArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// Only points of this VM, by UUID or by the name at the time of the backup
    #[arg(long, value_name = "NAME_OR_UUID")]
    pub vm: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct ShowArguments {
    /// The point: its id, or enough of its beginning
    pub point: String,
    #[command(flatten)]
    pub repository: RepositoryArguments,
}

#[derive(Debug, clap::Args)]
pub struct VmArguments {
    /// The point: its id, or enough of its beginning
    pub point: String,
    #[command(flatten)]
    pub repository: RepositoryArguments,
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
    pub repository: RepositoryArguments,
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_network_map_has_two_sides() {
        assert_eq!(network("a=b"), Ok(("a".to_owned(), "b".to_owned())));
        assert!(network("a").is_err() && network("=b").is_err() && network("a=").is_err());
    }
}
