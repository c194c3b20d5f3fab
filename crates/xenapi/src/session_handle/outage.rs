//! Since when a pool is out of reach: shared by all calls of a session, so that a pool that stays away is waited for once
//! and not by every call anew.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
pub(super) struct Outage(Mutex<Option<Instant>>);

impl Outage {
    /// The pool did not answer: the moment of the first of the failures since it last did.
    pub(super) fn began(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now)
    }

    /// The pool answered.
    pub(super) fn over(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
