//! What one run of a workflow holds: its id, journal, lease and counters, and the promise to clean up.

use std::sync::Arc;

use xenvault_xenapi::Session;

use crate::marks;
use crate::meter::Meter;
use crate::state::{Entry, Journal, Lease, Made, Operation};
use crate::sweep::Ending;
use crate::{Engine, EngineError, sweep};

/// A run. Unless it is [completed](Self::complete), everything that it made in the pool is removed: by
/// [`abandon`](Self::abandon), or, if the workflow's future is dropped, by a task that the drop spawns.
pub(crate) struct Run {
    pub(crate) engine: Engine,
    pub(crate) meter: Arc<Meter>,
    /// Marks the tasks of transfers with this run.
    session: Session,
    held: Option<Held>,
}

/// What ends with the run.
struct Held {
    journal: Journal,
    _lease: Option<Lease>,
}

impl Run {
    pub(crate) fn begin(
        engine: &Engine,
        meter: Arc<Meter>,
        lease: Option<Lease>,
        operation: Operation,
    ) -> Result<Self, EngineError> {
        let run = uuid::Uuid::new_v4().to_string();
        let journal = engine.state().begin(&run, operation)?;
        let note = marks::operation_name("transfer", engine.instance(), &run);
        let session = engine.session().with_task_note(&note);
        Ok(Self { engine: engine.clone(), meter, session, held: Some(Held { journal, _lease: lease }) })
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// The run's id; a UUID.
    pub(crate) fn id(&self) -> &str {
        self.held.as_ref().map_or("", |held| held.journal.run())
    }

    /// The journal.
    pub(crate) fn journal(&self) -> Result<&Journal, EngineError> {
        let ended = || EngineError::Internal { what: "the run has ended".into() };
        self.held.as_ref().map(|held| &held.journal).ok_or_else(ended)
    }

    /// Notes that something is going to be made.
    pub(crate) fn intend(&self, what: Made, name: &str) -> Result<(), EngineError> {
        self.journal()?.write(&Entry::Intend { what, name: name.to_owned() })
    }

    /// Notes that something was made.
    pub(crate) fn created(&self, what: Made, id: &str) -> Result<(), EngineError> {
        self.journal()?.write(&Entry::Created { what, id: id.to_owned() })
    }

    /// Notes that something is gone.
    pub(crate) fn removed(&self, what: Made, id: &str) -> Result<(), EngineError> {
        self.journal()?.write(&Entry::Removed { what, id: id.to_owned() })
    }

    /// Ends a run that left nothing behind but what stays on purpose.
    ///
    /// Its result is good whatever becomes of the journal: one that can not be removed is a warning, and a sweep finds
    /// nothing to do for it.
    pub(crate) fn complete(mut self, meter: &Meter) {
        if let Some(Err(error)) = self.held.take().map(|held| held.journal.close()) {
            meter.warn("journal", format!("the journal of this run could not be removed: {error}"));
        }
    }

    /// Ends a good run that could not remove everything: its journal stays for the next sweep.
    pub(crate) fn leave_to_sweep(mut self) {
        self.held = None;
    }

    /// Ends a failed run: removes what it made. What can not be removed now is left to the next run or sweep.
    pub(crate) async fn abandon(mut self, why: &EngineError) {
        let cleaning = Cleaning {
            engine: self.engine.clone(),
            held: self.held.take(),
            ending: if why.is_lost_answer() { Ending::Open } else { Ending::Answered },
            place: Place::Caller,
        };
        cleaning.finish().await;
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        drop(Cleaning {
            engine: self.engine.clone(),
            held: self.held.take(),
            ending: Ending::Open,
            place: Place::Caller,
        });
    }
}

/// Removing what a run made. Dropped half way (or before it began), it goes on in a task of its own.
struct Cleaning {
    engine: Engine,
    held: Option<Held>,
    ending: Ending,
    place: Place,
}

/// Where a cleaning runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the caller's future.
    Caller,
    /// In a task of its own. If that is dropped too, the runtime is ending.
    Background,
}

impl Cleaning {
    async fn finish(mut self) {
        let Some(held) = &self.held else { return };
        let clean = Box::pin(sweep::clean_run(&self.engine, held.journal.run(), self.ending)).await;
        let Some(held) = self.held.take() else { return };
        match clean {
            Ok(true) => drop(held.journal.close()),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "what a failed run made is left to the next sweep"),
        }
    }
}

impl Drop for Cleaning {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        if self.place == Place::Caller
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let rest =
                Self { engine: self.engine.clone(), held: Some(held), ending: Ending::Open, place: Place::Background };
            let engine = self.engine.clone();
            engine.background().spawn_on(rest.finish(), &runtime);
        }
        // Without a runtime the journal stays, and its lock is gone: the next run or sweep does it.
    }
}
