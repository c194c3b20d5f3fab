//! `xenvault-datamover`: backs up VMs into a repository. Only wiring: arguments in, engine called, result printed.

mod arguments;
mod commands;
mod shell;

use arguments::Arguments;
use clap::{CommandFactory, FromArgMatches};
use shell::exit::Exit;
use shell::help;
use shell::output::Format;
use std::process::ExitCode;

fn main() -> ExitCode {
    let matches = Arguments::command().after_help(help::end()).get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    shell::start_log(arguments.output.log.as_deref());
    let format = Format::json(arguments.output.json);
    let exit = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(commands::run(arguments.command, format)),
        Err(error) => format.error(&error),
    };
    ExitCode::from(exit)
}

/// A failure on its way to the terminal.
type Failure = Box<dyn std::error::Error>;

/// What a command ends with.
type Outcome = Result<Exit, Failure>;
