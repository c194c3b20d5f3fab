//! One file a command: calls the libraries and prints what they give back.

mod backup;
mod check;
mod init;
mod pin;
mod sweep;

use crate::arguments::Command;
use crate::shell::exit::Exit;
use crate::shell::output::Format;

/// Runs a command and gives the exit code; errors are printed here.
pub async fn run(command: Command, format: Format) -> Exit {
    let outcome = match command {
        Command::InitRepository(arguments) => init::run(&arguments, format).await,
        Command::Pin(arguments) => pin::run(arguments, format).await,
        Command::Backup(arguments) => backup::run(arguments, format).await,
        Command::Check(arguments) => check::run(arguments, format).await,
        Command::Sweep(arguments) => sweep::run(arguments, format).await,
    };
    outcome.unwrap_or_else(|error| format.error(error.as_ref()))
}
