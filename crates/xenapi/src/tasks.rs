//! x
use crate::error::XenApiError;
use crate::session_handle::Session;
use crate::task;
use crate::value::FromValue;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How to wait for a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitOptions {
    /// What the task is for, for messages.
    pub operation: String,
    /// The task is cancelled if neither its progress nor its state changes for this long.
    pub progress_deadline: Duration,
    /// How often to look where events do not come.
    pub poll: Duration,
}

impl Default for WaitOptions {
    fn default() -> Self {
        Self {
            operation: "task".to_owned(),
            progress_deadline: Duration::from_secs(3600),
            poll: Duration::from_secs(5),
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
/// When `cancel` fires, the deadline passes or the future is dropped, the task is cancelled and, when it has ended,
/// destroyed (in the background in the last case; [`Session::logout`] waits for that).
///
/// # Errors
/// [`XenApiError::Api`] with the task's own failure, [`XenApiError::TaskVanished`], [`XenApiError::TaskStalled`],
/// [`XenApiError::Cancelled`], and those of calls.
pub async fn wait<T: FromTaskResult>(
    _session: &Session,
    _task: task::Ref,
    _options: WaitOptions,
    _cancel: &CancellationToken,
) -> Result<T, XenApiError> {
    todo!()
}
