//! The command line of `xenvault-datamover`.

use crate::shell::OutputArguments;
use crate::shell::pool::{PoolArguments, StateArguments};
use crate::shell::repository::RepositoryArguments;
use std::path::PathBuf;
use xenvault_store::Immutability;

/// Backs up VMs of a XenServer, Citrix Hypervisor or XCP-ng pool.
///
/// Passwords and passphrases are never arguments: they come from a file, standard input or the environment.
#[derive(Debug, clap::Parser)]
#[command(name = "xenvault-datamover", version)]
pub struct Arguments {
    #[command(flatten)]
    pub output: OutputArguments,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Makes an empty repository in a folder, or in a folder of an S3 bucket
    ///
    /// In a bucket it finds out by trying what the service really does, and writes that down in the repository.
    #[command(
        after_help = "Example:\n    xenvault-datamover init-repository --repository /backup --passphrase-file ./passphrase\n    xenvault-datamover init-repository --repository s3://backups/berlin --s3-endpoint https://s3.example.com:7480 --s3-keys-file ./keys --passphrase-file ./passphrase --immutability object-lock:compliance:30\n\nExit codes and environment: see `xenvault-datamover --help`."
    )]
    InitRepository(InitArguments),
    /// Shows the certificates of a pool, for a person to compare with the hosts' own consoles
    ///
    /// Without --fingerprint it shows the certificate at the address, and sends nothing. With the confirmed fingerprint it
    /// logs in over the connection that this secures, shows what the coordinator says of every member's certificate and
    /// what each member shows itself, and remembers the coordinator's word for later runs in place of what was remembered
    /// before: the way to go on after a member's certificate was changed on purpose.
    #[command(
        after_help = "Example:\n    xenvault-datamover pin https://192.0.2.1\n    xenvault-datamover pin https://192.0.2.1 --fingerprint SHA256 --password-file ./password\n\nExit codes and environment: see `xenvault-datamover --help`."
    )]
    Pin(PinArguments),
    /// Backs up one VM
    ///
    /// The first backup reads what is allocated, the following ones what changed. Whatever is read, the point is complete.
    /// A run that fails or is stopped removes what it made in the pool; what it could not remove is told, and the next
    /// backup of the VM or `sweep` removes it.
    #[command(
        after_help = "Example:\n    xenvault-datamover backup --pool https://192.0.2.1 --fingerprint SHA256 --password-file ./password --vm web --repository /backup --passphrase-file ./passphrase\n\nExit codes and environment: see `xenvault-datamover --help`."
    )]
    Backup(BackupArguments),
    /// Names what stands in the way of backups, with the remedy; changes nothing in the pool
    ///
    /// An error among the findings means that backups fail until it is put right: then it ends with code 6. Warnings and
    /// notes alone are code 0.
    #[command(
        after_help = "Example:\n    xenvault-datamover check --pool https://192.0.2.1 --fingerprint SHA256 --password-file ./password\n    xenvault-datamover check --pool https://192.0.2.1 --fingerprint SHA256 --password-file ./password --vm web --json\n\nExit codes and environment: see `xenvault-datamover --help`."
    )]
    Check(CheckArguments),
    /// Removes what dead runs of this installation left in the pool
    ///
    /// Only what carries the marks of this installation, or stands in its journal as made by it, and is of no running
    /// work. Everything else is never touched.
    #[command(
        after_help = "Example:\n    xenvault-datamover sweep --pool https://192.0.2.1 --fingerprint SHA256 --password-file ./password --dry-run\n\nExit codes and environment: see `xenvault-datamover --help`."
    )]
    Sweep(SweepArguments),
}

#[derive(Debug, clap::Args)]
pub struct InitArguments {
    #[command(flatten)]
    pub repository: RepositoryArguments,
    /// What is to protect points from whoever writes them: none; object-lock:compliance:DAYS or object-lock:governance:DAYS
    /// in a bucket with object lock, which is tried out before it is promised; broker in a local folder
    #[arg(long, value_name = "PROMISE", default_value = "none")]
    pub immutability: Immutability,
}

#[derive(Debug, clap::Args)]
pub struct BackupArguments {
    #[command(flatten)]
    pub pool: PoolArguments,
    /// The VM, by UUID or by exact name
    #[arg(long, value_name = "NAME_OR_UUID")]
    pub vm: String,
    #[command(flatten)]
    pub repository: RepositoryArguments,
    #[command(flatten)]
    pub state: StateArguments,
    /// Read every disk as a whole, whatever is known about changes
    #[arg(long)]
    pub full: bool,
    /// Every N runs, read the whole disk and check that the pool had listed everything that changed
    #[arg(long, value_name = "N")]
    pub verify_every: Option<std::num::NonZeroU32>,
    /// NBD connections per disk
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=16))]
    pub connections: usize,
}

#[derive(Debug, clap::Args)]
pub struct CheckArguments {
    #[command(flatten)]
    pub pool: PoolArguments,
    /// A VM to check, by UUID or by exact name; may be repeated. All VMs are checked if none is named
    #[arg(long, value_name = "NAME_OR_UUID")]
    pub vm: Vec<String>,
    #[command(flatten)]
    pub state: StateArguments,
}

#[derive(Debug, clap::Args)]
pub struct PinArguments {
    /// Address of the pool's coordinator, such as https://192.0.2.1
    pub url: String,
    /// SHA-256 of the coordinator's certificate that a person confirmed: log in, and show those of all members
    #[arg(long, value_name = "SHA256")]
    pub fingerprint: Option<String>,
    /// Account of the pool, to log in with --fingerprint
    #[arg(long, value_name = "NAME", default_value = "root", requires = "fingerprint")]
    pub user: String,
    /// File whose first line is the password; `-` is standard input. Otherwise XENVAULT_PASSWORD is used
    #[arg(long, value_name = "FILE", requires = "fingerprint")]
    pub password_file: Option<PathBuf>,
    #[command(flatten)]
    pub state: StateArguments,
}

#[derive(Debug, clap::Args)]
pub struct SweepArguments {
    #[command(flatten)]
    pub pool: PoolArguments,
    #[command(flatten)]
    pub state: StateArguments,
    /// Show what would be removed, and touch nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
