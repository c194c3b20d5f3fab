//! One file a command: calls the libraries and prints what they give back.

mod disk;
mod keep;
mod key;
mod point;
mod points;
mod proof;
mod seal;
mod show;
mod sweep;
mod verify;
mod vm;

use crate::arguments::Command;
use crate::shell::exit::Exit;
use crate::shell::output::Format;

/// Runs a command and gives the exit code; errors are printed here.
pub async fn run(command: Command, format: Format) -> Exit {
    let outcome = match command {
        Command::Points(arguments) => points::run(&arguments, format).await,
        Command::Show(arguments) => show::run(&arguments, format).await,
        Command::Vm(arguments) => vm::run(*arguments, format).await,
        Command::Disk(arguments) => disk::run(&arguments, format).await,
        Command::Point { command } => point::run(command, format).await,
        Command::Sweep(arguments) => sweep::run(&arguments, format).await,
        Command::Verify(arguments) => verify::run(&arguments, format).await,
        Command::Keep(arguments) => keep::run(&arguments, format).await,
        Command::Seal(arguments) => seal::run(&arguments, format).await,
        Command::Repair(arguments) => verify::repair(&arguments, format).await,
        Command::Key { command } => key::run(command, format).await,
    };
    outcome.unwrap_or_else(|error| format.error(error.as_ref()))
}

/// A moment of a store's clock as people read it.
fn instant(moment_of_store: std::time::SystemTime) -> String {
    moment(unix_ms(moment_of_store))
}

fn unix_ms(moment: std::time::SystemTime) -> u64 {
    let since = moment.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A moment as people read it, in UTC.
fn moment(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|unix_ms| jiff::Timestamp::from_millisecond(unix_ms).ok())
        .map_or_else(|| unix_ms.to_string(), |moment| moment.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

#[cfg(test)]
mod tests {
    #[test]
    fn moments_are_in_utc() {
        assert_eq!(super::moment(1_700_000_000_123), "2023-11-14 22:13:20 UTC");
    }
}
