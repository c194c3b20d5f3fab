//! Ctrl-C, SIGTERM and the end of the terminal: the work is cancelled and cleaned up, not cut off.

use super::exit::Exit;
use std::future::Future;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How a piece of work ended.
#[derive(Debug)]
pub enum Ended<T> {
    /// By itself.
    Done(T),
    /// By a signal; the future was dropped.
    Stopped(Exit),
}

/// The signals that ask for an end. Made before the work begins, so that none is lost.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// The terminal or the connection that the program was started from is gone.
    hang_up: Signal,
}

impl Signals {
    /// Takes the signals over from their default of ending the process at once.
    ///
    /// # Errors
    /// Where the operating system refuses.
    pub fn take() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Runs `work` to its end or to the first signal.
    pub async fn run<T>(&mut self, work: impl Future<Output = T>) -> Ended<T> {
        tokio::select! {
            result = work => Ended::Done(result),
            exit = self.next() => Ended::Stopped(exit),
        }
    }

    /// The exit code that the next signal stands for.
    async fn next(&mut self) -> Exit {
        tokio::select! {
            _ = self.interrupt.recv() => Exit::Interrupted,
            _ = self.terminate.recv() => Exit::Terminated,
            _ = self.hang_up.recv() => Exit::Terminated,
        }
    }
}
