//! Tasks: awaiting one by events with polling as a fallback, cancelling it, destroying it.

mod host_life;

use crate::error::{ApiFailure, XenApiError};
use crate::event;
use crate::generated::ErrorCode;
use crate::session_handle::Session;
use crate::task;
use crate::value::{FromValue, xml};
use host_life::Watch;
pub use host_life::{HostLives, host_lives};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How long one call waits for events. An event that is lost costs at most this.
const EVENT_WAIT: Duration = Duration::from_secs(20);

/// How long the pool may be out of reach while a task is awaited (a restart of the toolstack, a fail-over) before the
/// wait fails and the task is given up.
const OUTAGE_LIMIT: Duration = Duration::from_secs(90);

/// How long a cancelled task may take to end before it is destroyed as it is.
const END_LIMIT: Duration = Duration::from_secs(60);

/// The same for a task whose host is gone: nobody is there to end it.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// How long the first wait for events is. Most tasks are over by then, and their hosts need not be looked at.
const FIRST_WAIT: Duration = Duration::from_secs(2);

/// How to wait for a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitOptions {
    /// What the task is for, for messages.
    pub operation: String,
    /// The task is cancelled if neither its progress nor its state changes for this long.
    pub progress_deadline: Duration,
    /// How often to look where events do not come.
    pub poll: Duration,
    /// Hosts that the work needs, besides the one where the task was made, as [`host_lives`] saw them before the call.
    pub hosts: HostLives,
    /// How often to look whether those hosts are still there and have not been started anew.
    pub host_check: Duration,
}

impl Default for WaitOptions {
    fn default() -> Self {
        Self {
            operation: "task".to_owned(),
            progress_deadline: Duration::from_secs(3600),
            poll: Duration::from_secs(5),
            hosts: HostLives::default(),
            host_check: Duration::from_secs(20),
        }
    }
}

impl WaitOptions {
    /// Defaults, with a name for messages.
    pub fn of(operation: &str) -> Self {
        Self { operation: operation.to_owned(), ..Self::default() }
    }
}

/// A type that can be read from a task's result.
pub trait FromTaskResult: FromValue + Send {}

impl<T: FromValue + Send> FromTaskResult for T {}

/// Waits for the end of a task, gives its result and destroys it.
///
/// When `cancel` fires, the deadline passes or the future is dropped (even before it was polled), the task is
/// cancelled and, when it has ended, destroyed (in the background in the last case; [`Session::logout`] waits for
/// that). A task that ended well while it was being cancelled counts as done.
///
/// # Errors
/// [`XenApiError::Api`] with the task's own failure, [`XenApiError::TaskVanished`], [`XenApiError::TaskStalled`],
/// [`XenApiError::TaskHostGone`], [`XenApiError::Cancelled`], and those of calls.
pub fn wait<'a, T>(
    session: &Session,
    task: task::Ref,
    options: WaitOptions,
    cancel: &'a CancellationToken,
) -> impl Future<Output = Result<T, XenApiError>> + Send + 'a
where
    T: FromTaskResult + 'a,
{
    let guard = TaskGuard::new(session, task);
    async move { guard.result(&options, cancel).await }
}

/// Who ends a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    /// The pool, that made it for a call.
    Pool,
    /// We made it, and no handler of the pool has taken it: it ends when we say so.
    Us,
    /// We made it, and a handler of the pool has taken it.
    Handler,
}

/// A task that is cancelled and destroyed unless its end was seen.
#[derive(Debug)]
pub(crate) struct TaskGuard {
    session: Session,
    task: Option<task::Ref>,
    maker: Maker,
}

impl TaskGuard {
    pub(crate) fn new(session: &Session, task: task::Ref) -> Self {
        Self { session: session.clone(), task: Some(task), maker: Maker::Pool }
    }

    /// A task that we made with `task.create`, for a handler that has not begun yet.
    pub(crate) fn own(session: &Session, task: task::Ref) -> Self {
        Self { session: session.clone(), task: Some(task), maker: Maker::Us }
    }

    /// A handler of the pool has taken our task.
    pub(crate) fn begun(&mut self) {
        self.maker = Maker::Handler;
    }

    /// The task's reference, for somebody else to guard.
    pub(crate) fn release(mut self) -> task::Ref {
        self.task.take().unwrap_or_default()
    }

    /// The guard itself, leaving one that guards nothing.
    pub(crate) fn take(&mut self) -> Self {
        Self { session: self.session.clone(), task: self.task.take(), maker: self.maker }
    }

    /// The task's reference.
    pub(crate) fn reference(&self) -> task::Ref {
        self.task.clone().unwrap_or_default()
    }

    /// Waits for the end and reads the result.
    pub(crate) async fn result<T: FromTaskResult>(
        self,
        options: &WaitOptions,
        cancel: &CancellationToken,
    ) -> Result<T, XenApiError> {
        let text = self.ended(options, cancel).await?;
        let failed = |source| XenApiError::Response { operation: options.operation.clone(), source };
        let value = xml::decode_fragment(&text).map_err(failed)?;
        T::from_value(value).map_err(|source| XenApiError::decode(&options.operation, source))
    }

    /// Waits for the end; the result is the fragment as the pool wrote it.
    pub(crate) async fn ended(
        mut self,
        options: &WaitOptions,
        cancel: &CancellationToken,
    ) -> Result<String, XenApiError> {
        let task = self.reference();
        let operation = || options.operation.clone();
        let watching = watch(&self.session, &task, options, OUTAGE_LIMIT);
        let end = tokio::select! {
            end = watching => end,
            () = cancel.cancelled() => Err(XenApiError::Cancelled { operation: operation() }),
        };
        let end = match end {
            Ok(record) => Ok(record),
            Err(
                error @ (XenApiError::Cancelled { .. }
                | XenApiError::TaskStalled { .. }
                | XenApiError::TaskHostGone { .. }),
            ) => {
                let gone = matches!(error, XenApiError::TaskHostGone { .. });
                let limit = if gone { GONE_LIMIT } else { END_LIMIT };
                let last = cancel_and_wait(&self.session, &task, limit).await;
                match last {
                    Some(record) if record.status == task::StatusType::Success => Ok(record),
                    _ => {
                        self.task = None;
                        destroy(&self.session, &task).await;
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        };
        match end {
            Ok(record) => {
                self.task = None;
                destroy(&self.session, &task).await;
                outcome(record, operation(), &self.session)
            }
            Err(error @ XenApiError::TaskVanished { .. }) => {
                self.task = None;
                Err(error)
            }
            // The guard cancels and destroys it in the background, as far as that is still needed.
            Err(error) => Err(error),
        }
    }

    /// Waits for the end of a task that was left alone on purpose; how it ends does not matter, nor that it is gone.
    pub(crate) async fn expect_failure(mut self) -> Result<(), XenApiError> {
        let task = self.reference();
        let options = WaitOptions { progress_deadline: END_LIMIT, ..WaitOptions::of("the end of a transfer") };
        match watch(&self.session, &task, &options, OUTAGE_LIMIT).await {
            Ok(_) => {
                self.task = None;
                destroy(&self.session, &task).await;
                Ok(())
            }
            Err(XenApiError::TaskVanished { .. }) => {
                self.task = None;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for TaskGuard {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            let (session, maker) = (self.session.clone(), self.maker);
            self.session.background(async move { give_up(&session, task, maker).await });
        }
    }
}

/// Cancels a task that the pool made, waits a little for its end and destroys it. Nothing is reported: this is the way
/// out of something that was given up. A task of our own that does not end is ended by us: the pool only notes that a
/// pending task is to be destroyed, and keeps it for a day.
async fn give_up(session: &Session, task: task::Ref, maker: Maker) {
    let ended = maker != Maker::Us && cancel_and_wait(session, &task, END_LIMIT).await.is_some();
    if !ended && maker != Maker::Pool {
        // Unknown to older servers, which then collect the task in time.
        if let Err(error) = task::set_status(session, &task, &task::StatusType::Cancelled).await {
            tracing::debug!(%error, "a task of ours could not be ended");
        }
    }
    destroy(session, &task).await;
}

/// The task's record at its end, if it came.
async fn cancel_and_wait(session: &Session, task: &task::Ref, limit: Duration) -> Option<task::Record> {
    let options = WaitOptions { progress_deadline: limit, host_check: limit, ..WaitOptions::of("cancelling a task") };
    let cancelling = async {
        if let Err(error) = task::cancel(session, task).await {
            tracing::debug!(%error, "a task could not be cancelled");
        }
        watch(session, task, &options, Duration::ZERO).await
    };
    tokio::time::timeout(limit, cancelling).await.ok()?.ok()
}

async fn destroy(session: &Session, task: &task::Ref) {
    match task::destroy(session, task).await {
        Ok(()) => {}
        Err(error) if error.code() == Some(&ErrorCode::HandleInvalid) => {}
        Err(error) => tracing::debug!(%error, "a task could not be destroyed"),
    }
}

fn is_over(record: &task::Record) -> bool {
    use task::StatusType::{Cancelled, Failure, Success};
    matches!(record.status, Success | Failure | Cancelled)
}

/// The result of a task that has ended.
fn outcome(record: task::Record, operation: String, session: &Session) -> Result<String, XenApiError> {
    match record.status {
        task::StatusType::Success => Ok(record.result),
        task::StatusType::Cancelled => {
            let failure = ApiFailure { code: ErrorCode::TaskCancelled, params: Vec::new() };
            Err(XenApiError::Api { operation, failure })
        }
        _ => {
            // The handlers of transfers get the session's reference in their address.
            let failure = ApiFailure::from_description(record.error_info).without(session.reference().as_str());
            Err(XenApiError::of_failure(&operation, failure, &session.server()))
        }
    }
}

/// Watches a task until it has ended. The pool may be out of reach for up to `outage_limit`.
async fn watch(
    session: &Session,
    task: &task::Ref,
    options: &WaitOptions,
    outage_limit: Duration,
) -> Result<task::Record, XenApiError> {
    let mut watcher = Watcher { session, task, options, token: String::new(), source: Source::Record };
    let mut hosts = Watch::new(session, options);
    let mut last: Option<task::Record> = None;
    let began = Instant::now();
    let first_wait = FIRST_WAIT.min(options.host_check);
    let mut changed = Instant::now();
    let mut reached = Instant::now();
    loop {
        let left = options.progress_deadline.saturating_sub(changed.elapsed());
        let young = first_wait.saturating_sub(began.elapsed());
        let wait = if young.is_zero() { EVENT_WAIT.min(options.host_check) } else { young };
        match watcher.look(wait.min(left)).await {
            Ok(records) => {
                reached = Instant::now();
                for record in records {
                    if is_over(&record) {
                        return Ok(record);
                    }
                    if last.as_ref() != Some(&record) {
                        changed = Instant::now();
                        last = Some(record);
                    }
                }
                let resident = last.as_ref().map(|record| &record.resident_on);
                if began.elapsed() >= first_wait
                    && let Some(host) = hosts.gone(resident).await
                {
                    return Err(XenApiError::TaskHostGone { operation: options.operation.clone(), host });
                }
            }
            Err(error) if error.is_away() && reached.elapsed() < outage_limit => {
                tracing::debug!(%error, "the pool can not be reached, the task is looked for again");
                tokio::time::sleep(options.poll.min(outage_limit)).await;
                // Not held against the task: nothing could be seen of it.
                changed = Instant::now();
            }
            Err(error) => return Err(error),
        }
        let waited = changed.elapsed();
        if waited >= options.progress_deadline {
            return Err(XenApiError::TaskStalled { operation: options.operation.clone(), waited });
        }
    }
}

/// Where a task's state is looked up next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// Its record: at first, since no events come for a task that is gone.
    Record,
    /// Events.
    Events,
    /// Its record every now and then: events do not work here.
    Polling,
}

struct Watcher<'a> {
    session: &'a Session,
    task: &'a task::Ref,
    options: &'a WaitOptions,
    token: String,
    source: Source,
}

impl Watcher<'_> {
    /// Waits up to `wait` for news and gives the states that were seen, in order.
    async fn look(&mut self, wait: Duration) -> Result<Vec<task::Record>, XenApiError> {
        let mut seen = Vec::new();
        match self.source {
            Source::Record => self.source = Source::Events,
            Source::Events => seen = self.events(wait).await?,
            Source::Polling => tokio::time::sleep(self.options.poll.min(wait)).await,
        }
        if seen.is_empty() {
            // Nothing came: it may be slow, or gone.
            seen.push(task::get_record(self.session, self.task).await.map_err(|error| match error.code() {
                Some(ErrorCode::HandleInvalid) => self.vanished(),
                _ => error,
            })?);
        }
        Ok(seen)
    }

    async fn events(&mut self, wait: Duration) -> Result<Vec<task::Record>, XenApiError> {
        let subscription = format!("task/{}", self.task.as_str());
        let batch = match event::from(self.session, &[&subscription], &self.token, wait).await {
            Ok(batch) => batch,
            // A token of an earlier coordinator, or events that were lost: begin again with everything.
            Err(error) if error.api().is_some() && !self.token.is_empty() => {
                self.token.clear();
                return Ok(Vec::new());
            }
            Err(error) if error.api().is_some() => {
                tracing::debug!(%error, "events do not work, the task is polled");
                self.source = Source::Polling;
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        self.token = batch.token;
        let mut seen = Vec::new();
        for event in batch.events.iter().filter(|event| event.reference == self.task.as_str()) {
            if event.operation == event::Operation::Del {
                return Err(self.vanished());
            }
            seen.extend(event.record::<task::Record>()?);
        }
        Ok(seen)
    }

    fn vanished(&self) -> XenApiError {
        XenApiError::TaskVanished { operation: self.options.operation.clone() }
    }
}
