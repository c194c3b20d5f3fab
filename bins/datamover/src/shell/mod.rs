//! What both programs have in common: secrets from files, trust, progress, output, signals, exit codes.
//!
//! It belongs to the datamover; the restore program includes the same files by path.

pub mod bucket;
pub mod exit;
pub mod help;
pub mod output;
pub mod pins;
pub mod pool;
pub mod progress;
pub mod repository;
pub mod secrets;
pub mod signals;

/// Log lines go to standard error, only where the operator asked for them.
pub fn start_log(filter: Option<&str>) {
    let Some(filter) = filter else { return };
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // It would print the failure to the very stream that failed, and panic there.
        .log_internal_errors(false)
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .finish();
    if tracing::subscriber::set_global_default(subscriber).is_err() {
        tracing::debug!("there was a log already");
    }
}

/// Options about what is printed, for all commands.
#[derive(Clone, Debug, clap::Args)]
pub struct OutputArguments {
    /// Print one JSON object as the result, and progress as JSON lines on standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Log to standard error; a level (info, debug) or a filter such as xenvault_nbd=debug
    #[arg(long, global = true, value_name = "FILTER", env = "XENVAULT_LOG")]
    pub log: Option<String>,
}
