//! x
use crate::error::XenApiError;
use crate::session_handle::Session;
use crate::value::{FromValue, Value};
use std::collections::BTreeMap;
use std::time::Duration;

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

/// One event.
#[derive(Clone, Debug, PartialEq)]
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

impl Event {
    /// The record, typed.
    ///
    /// # Errors
    /// [`XenApiError::Response`] if it is not one of `T`.
    pub fn record<T: FromValue>(&self) -> Result<Option<T>, XenApiError> {
        todo!()
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

/// `event.from`: waits up to `timeout` for events of `classes` (`"vm"`, `"task/OpaqueRef:..."`, `"*"`) after `token`.
/// An empty token gives every object at once.
///
/// # Errors
/// Those of the call. `EVENTS_LOST` and a token that is not understood mean: begin again with an empty token.
pub async fn from(
    _session: &Session,
    _classes: &[&str],
    _token: &str,
    _timeout: Duration,
) -> Result<EventBatch, XenApiError> {
    todo!()
}
