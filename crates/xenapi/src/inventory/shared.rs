//! What the follower of an inventory writes and its users read: the state under a lock, and those who wait for news.

use super::classes::{Change, ObjectClass, Sighting};
use super::snapshot::{Freshness, Snapshot, Status};
use super::state::{Answer, Question, State};
use crate::generated::{host, host_metrics, task};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{broadcast, watch};

/// What is known of a task that somebody waits for.
#[derive(Clone, Debug, Default)]
pub(crate) struct TaskView {
    /// Its last record.
    pub(crate) record: Option<Arc<task::Record>>,
    /// Whether it is gone since.
    pub(crate) gone: bool,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    status: watch::Sender<Status>,
    changes: broadcast::Sender<Change>,
    /// Tasks that are waited for: their last state is kept here, since a task may end and go between two looks.
    tasks: Mutex<HashMap<task::Ref, watch::Sender<TaskView>>>,
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
            tasks: Mutex::default(),
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
        let gone: Vec<task::Ref> = answer.sightings.iter().filter_map(gone_task).collect();
        let Some(changes) = state.answer(question, login, answer) else { return false };
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.tell_tasks(&changes, &gone);
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

    fn tell_tasks(&self, changes: &[Change], gone: &[task::Ref]) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.is_empty() {
            return;
        }
        for change in changes {
            let Change::Task(delta) = change else { continue };
            let Some(waiting) = tasks.get(&delta.reference) else { continue };
            waiting.send_modify(|view| {
                view.gone = delta.after.is_none();
                view.record = delta.after.clone().or_else(|| view.record.take());
            });
        }
        for waiting in gone.iter().filter_map(|task| tasks.get(task)) {
            waiting.send_modify(|view| view.gone = true);
        }
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

    /// Whether tasks can be awaited here: they are followed, and what is known is not old.
    pub(crate) fn follows_tasks(&self) -> bool {
        // The state's lock first, as everywhere.
        let state = self.lock();
        state.classes().contains(&ObjectClass::Task) && self.status.borrow().freshness.is_live()
    }

    /// From now on the states of this task are kept until the receiver and its clones are gone.
    pub(crate) fn follow_task(&self, task: &task::Ref) -> watch::Receiver<TaskView> {
        // Under the state's lock, so that no answer falls between the look and the registration.
        let state = self.lock();
        let known = state.tables.task(task);
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|_, waiting| waiting.receiver_count() > 0);
        let waiting =
            tasks.entry(task.clone()).or_insert_with(|| watch::Sender::new(TaskView { record: known, gone: false }));
        waiting.subscribe()
    }

    /// A host and whether it lives, if hosts are followed and what is known is not old.
    pub(crate) fn host(&self, host: &host::Ref) -> Option<(Arc<host::Record>, Arc<host_metrics::Record>)> {
        let snapshot = self.snapshot();
        if !snapshot.status().freshness.is_live() {
            return None;
        }
        let record = snapshot.get(host)?;
        let metrics = snapshot.get(&record.metrics)?;
        Some((Arc::clone(record), Arc::clone(metrics)))
    }
}

fn gone_task(sighting: &Sighting) -> Option<task::Ref> {
    match sighting {
        Sighting::Task(task, _) if !sighting.exists() => Some(task.clone()),
        _ => None,
    }
}
