//! Worker threads for what costs processor time: hashing, compressing, sealing.
//!
//! The seam between async and computing. Two queues, so that cutting (which feeds the others) never waits behind work
//! that is already there; whoever puts work in holds a permit in bytes for it, which bounds both.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tokio::sync::oneshot;

type Work = Box<dyn FnOnce() + Send>;

/// A fixed number of threads. Work that has not begun when the pool is dropped is dropped too.
#[derive(Debug)]
pub(crate) struct WorkerPool {
    queue: Arc<Queue>,
    threads: usize,
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    wake: Condvar,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Queue")
    }
}

#[derive(Default)]
struct State {
    urgent: VecDeque<Work>,
    normal: VecDeque<Work>,
    ended: bool,
}

/// Which queue.
#[derive(Clone, Copy)]
pub(crate) enum Priority {
    Urgent,
    Normal,
}

/// The worker died over this piece of work, or the pool ended first.
#[derive(Debug, thiserror::Error)]
#[error("a worker thread of the repository did not finish its work")]
pub(crate) struct WorkerGone;

impl WorkerPool {
    /// Starts the threads; 0 means one per core, at most 8.
    pub(crate) fn start(threads: usize) -> std::io::Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(2, |cores| cores.get().min(8));
        let threads = if threads == 0 { cores() } else { threads };
        let pool = Self { queue: Arc::default(), threads };
        for number in 0..threads {
            let queue = Arc::clone(&pool.queue);
            std::thread::Builder::new().name(format!("store-{number}")).spawn(move || queue.serve())?;
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Puts work into a queue. A panic in it ends the work and not the thread.
    pub(crate) fn spawn(&self, priority: Priority, work: impl FnOnce() + Send + 'static) {
        let mut state = self.queue.state.lock().unwrap_or_else(PoisonError::into_inner);
        match priority {
            Priority::Urgent => state.urgent.push_back(Box::new(work)),
            Priority::Normal => state.normal.push_back(Box::new(work)),
        }
        drop(state);
        self.queue.wake.notify_one();
    }

    /// Runs work at high priority and waits for its result.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkerGone> {
        let (send, receive) = oneshot::channel();
        self.spawn(Priority::Urgent, move || {
            let _ = send.send(work());
        });
        receive.await.map_err(|_| WorkerGone)
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ended = true;
        let left = (std::mem::take(&mut state.urgent), std::mem::take(&mut state.normal));
        drop(state);
        // Outside of the lock: dropping work may drop whatever it holds.
        drop(left);
        self.queue.wake.notify_all();
    }
}

impl Queue {
    fn serve(&self) {
        while let Some(work) = self.next() {
            let _ = catch_unwind(AssertUnwindSafe(work));
        }
    }

    fn next(&self) -> Option<Work> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.ended {
                return None;
            }
            if let Some(work) = state.urgent.pop_front() {
                return Some(work);
            }
            if let Some(work) = state.normal.pop_front() {
                return Some(work);
            }
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_in_work_is_an_error_and_the_thread_lives_on() {
        let pool = WorkerPool::start(1).unwrap();
        assert!(pool.run(|| panic!("on purpose")).await.is_err());
        assert_eq!(pool.run(|| 2 + 2).await.unwrap(), 4);
    }
}
