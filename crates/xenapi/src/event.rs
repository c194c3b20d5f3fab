//! Events: what changed in the pool since a token.

use crate::error::XenApiError;
use crate::model::{Fields, Repeat};
use crate::session_handle::Session;
use crate::value::{DecodeError, FromValue, ToValue, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Added to the wait for the answer, beyond the time that the pool itself waits for events.
const SLACK: Duration = Duration::from_secs(30);

/// What happened to an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// It appeared, or was there when the token was empty.
    Add,
    /// It changed.
    Mod,
    /// It is gone.
    Del,
    /// A value of a newer server.
    Unknown(String),
}

crate::model::enumeration!(Operation {
    Add = "add",
    Mod = "mod",
    Del = "del",
});

/// One event.
#[derive(Clone, PartialEq)]
pub struct Event {
    /// Class, in lower case.
    pub class: String,
    /// What happened.
    pub operation: Operation,
    /// The object.
    pub reference: String,
    /// The object's record, except for [`Operation::Del`].
    pub snapshot: Option<Value>,
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Event");
        shown.field("class", &self.class).field("operation", &self.operation);
        if self.class == "session" {
            // The reference of a session is as good as a password.
            return shown.finish_non_exhaustive();
        }
        shown.field("reference", &self.reference).field("snapshot", &self.snapshot).finish()
    }
}

impl Event {
    /// The record, typed; `None` for [`Operation::Del`].
    ///
    /// # Errors
    /// [`XenApiError::Response`] if it is not one of `T`.
    pub fn record<T: FromValue>(&self) -> Result<Option<T>, XenApiError> {
        let snapshot = self.snapshot.clone();
        snapshot.map(T::from_value).transpose().map_err(|source| XenApiError::decode("event.from", source))
    }
}

impl FromValue for Event {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        let mut fields = Fields::of("event", value)?;
        Ok(Self {
            class: fields.take::<String>("class")?.to_lowercase(),
            operation: fields.take("operation")?,
            reference: fields.take("ref")?,
            snapshot: fields.rest().remove("snapshot"),
        })
    }
}

/// Events since a token.
#[derive(Clone, Debug, PartialEq)]
pub struct EventBatch {
    /// In order; none after a timeout.
    pub events: Vec<Event>,
    /// How many objects of each class exist.
    pub valid_ref_counts: BTreeMap<String, i64>,
    /// For the next call.
    pub token: String,
}

impl FromValue for EventBatch {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        let mut fields = Fields::of("event batch", value)?;
        Ok(Self {
            events: fields.take("events")?,
            valid_ref_counts: fields.take("valid_ref_counts")?,
            token: fields.take("token")?,
        })
    }
}

/// `event.from`: waits up to `timeout` for events of `classes` (`"vm"`, `"task/OpaqueRef:..."`, `"*"`) after `token`.
/// An empty token gives every object at once.
///
/// # Errors
/// Those of the call. `EVENTS_LOST` and a token that is not understood (X08) mean: begin again with an empty token.
pub async fn from(
    session: &Session,
    classes: &[&str],
    token: &str,
    timeout: Duration,
) -> Result<EventBatch, XenApiError> {
    // A token is the pool's, not the session's, so asking again after a new login loses nothing.
    ask(session, classes, token, timeout, SLACK, Repeat::Harmless).await
}

/// As [`from`], for callers that say for themselves how much longer than `timeout` the answer may take, and whether the
/// same token may be used again after a new login.
pub(crate) async fn ask(
    session: &Session,
    classes: &[&str],
    token: &str,
    timeout: Duration,
    slack: Duration,
    repeat: Repeat,
) -> Result<EventBatch, XenApiError> {
    let method = "event.from";
    let classes = Value::Array(classes.iter().map(|class| Value::from(*class)).collect());
    let arguments = vec![classes, token.to_value(), timeout.as_secs_f64().to_value()];
    let value = session.call_waiting(method, repeat, arguments, timeout + slack).await?;
    EventBatch::from_value(value).map_err(|source| XenApiError::decode(method, source))
}
