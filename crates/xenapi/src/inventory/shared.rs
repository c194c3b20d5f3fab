//! What the follower of an inventory writes and its users read: the state under a lock, and those who wait for news.

use super::classes::{Change, ObjectClass};
use super::snapshot::{Freshness, Snapshot, Status};
use super::state::{Answer, Question, State};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{broadcast, watch};

pub(crate) struct Shared {
    state: Mutex<State>,
    status: watch::Sender<Status>,
    changes: broadcast::Sender<Change>,
    answered: Mutex<Option<Instant>>,
}

impl Shared {
    pub(super) fn new(classes: Vec<ObjectClass>, kept_changes: usize) -> Self {
        let status = Status {
            freshness: Freshness::Loading { trouble: None },
            revision: 0,
            loads: 0,
            events: 0,
            complete: false,
            unreadable: 0,
        };
        Self {
            state: Mutex::new(State::new(classes)),
            status: watch::Sender::new(status),
            changes: broadcast::Sender::new(kept_changes.max(1)),
            answered: Mutex::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Objects and status of the same moment.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        Snapshot { tables: state.tables.clone(), status: self.status.borrow().clone() }
    }

    /// Takes an answer over and tells everyone. Whether it counted.
    pub(super) fn answer(&self, question: &Question, login: u64, answer: Answer) -> bool {
        let mut state = self.lock();
        let Some(changes) = state.answer(question, login, answer) else { return false };
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        // Still under the lock, so that whoever sees a change or the new revision sees its objects too.
        for change in changes {
            // Nobody may be listening.
            let _ = self.changes.send(change);
        }
        self.status.send_modify(|status| {
            status.freshness = Freshness::Live;
            status.revision = state.revision;
            status.loads = state.loads;
            status.events = state.events;
            status.complete = state.complete;
            status.unreadable = state.tables.hidden();
        });
        true
    }

    /// The pool could not be asked.
    pub(super) fn trouble(&self, trouble: &str) {
        let answered = *self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let trouble: Arc<str> = Arc::from(trouble);
        self.status.send_modify(|status| {
            status.freshness = match answered {
                Some(since) => Freshness::Stale { since, trouble },
                None => Freshness::Loading { trouble: Some(trouble) },
            };
        });
    }

    pub(super) fn end(&self) {
        self.status.send_modify(|status| status.freshness = Freshness::Ended);
    }
}
