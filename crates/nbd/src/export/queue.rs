//! The jobs that wait for a connection, oldest first.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};
use xenvault_block::ByteRange;

use crate::error::NbdError;

/// What became of a job.
pub(super) enum Outcome {
    Data(Bytes),
    /// The connection ended at this very range.
    Failed(Failed),
    /// The pool can not serve it at all.
    Hopeless(NbdError),
}

/// A connection that ended at a job's range.
pub(super) struct Failed {
    pub(super) error: NbdError,
    /// Number of the connection.
    pub(super) connection: u64,
    /// How much of the range had come.
    pub(super) received_bytes: u64,
    /// Requests that the export had answered by then.
    pub(super) answered_requests: u64,
}

/// One request that is to be made.
pub(super) struct Job {
    pub(super) range: ByteRange,
    pub(super) answer: oneshot::Sender<Outcome>,
}

#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// One permit's worth for each job that came.
    arrived: Notify,
}

#[derive(Default)]
struct State {
    jobs: BTreeMap<u64, Job>,
    next: u64,
    waiting_bytes: u64,
}

impl Queue {
    /// Appends a job.
    pub(super) fn push(&self, job: Job) {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.waiting_bytes += job.range.len();
        state.jobs.insert(number, job);
        drop(state);
        self.arrived.notify_waiters();
    }

    /// Puts a job back to its old place.
    pub(super) fn put_back(&self, number: u64, job: Job) {
        let mut state = self.state();
        state.waiting_bytes += job.range.len();
        state.jobs.insert(number, job);
        drop(state);
        self.arrived.notify_waiters();
    }

    /// The oldest job that somebody still waits for, with its number.
    pub(super) fn pop(&self) -> Option<(u64, Job)> {
        let mut state = self.state();
        loop {
            let (number, job) = state.jobs.pop_first()?;
            state.waiting_bytes -= job.range.len();
            if !job.answer.is_closed() {
                return Some((number, job));
            }
        }
    }

    /// The oldest job, as soon as there is one.
    pub(super) async fn next(&self) -> (u64, Job) {
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            arrived.as_mut().enable();
            if let Some(job) = self.pop() {
                return job;
            }
            arrived.await;
        }
    }

    /// Waits until `condition` holds for the number of bytes that wait; looked at whenever jobs arrive.
    pub(super) async fn until(&self, condition: impl Fn(u64) -> bool) {
        loop {
            let mut arrived = std::pin::pin!(self.arrived.notified());
            arrived.as_mut().enable();
            if condition(self.waiting_bytes()) {
                return;
            }
            arrived.await;
        }
    }

    /// Lets everybody who waits look again.
    pub(super) fn nudge(&self) {
        self.arrived.notify_waiters();
    }

    pub(super) fn waiting_bytes(&self) -> u64 {
        self.state().waiting_bytes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
