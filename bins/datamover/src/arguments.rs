//! The command line of `xenvault-datamover`.

use crate::shell::OutputArguments;
use crate::shell::pool::{PoolArguments, StateArguments};
use crate::shell::repository::RepositoryArguments;

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
    /// Makes an empty repository in a folder
    InitRepository(RepositoryArguments),
    /// Shows the certificate of a pool, for a person to compare with the host's own console
    Pin {
        /// Address of the pool's coordinator, such as https://192.0.2.1
        url: String,
    },
    /// Backs up one VM
    Backup(BackupArguments),
    /// Removes what dead runs of this installation left in the pool
    Sweep(SweepArguments),
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
