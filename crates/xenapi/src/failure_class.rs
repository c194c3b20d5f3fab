//! What each error code of the pool means for those who called: one class for every code, in one table.
//!
//! The client acts on a part of the classes itself (it repeats, goes to the coordinator, logs in again); the others are
//! for the caller. A scheduler needs less and asks [`FailureClass::retry`]. A code that is not in the table is
//! permanent: repeating what nobody understands helps nobody.

mod table;

use crate::error::Retry;
use std::fmt;

/// What is done about a failure that the pool reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FailureClass {
    /// Passes by itself within moments. The client repeats the call itself, up to
    /// [`Limits::busy_attempts`](crate::Limits::busy_attempts) times, where repeating is harmless or nothing was begun.
    RetryNow,
    /// The object (or the pool) is busy. What was refused before it began is repeated by the client as above; otherwise
    /// the caller repeats once the object is free.
    WhenFree,
    /// A host, a path to storage or space is away: the next attempt of the scheduler can succeed.
    Later,
    /// Another host is the coordinator; the client goes there and repeats, since nothing was begun.
    Redirect,
    /// The session ended; the client logs in again, and repeats where that is harmless.
    RenewSession,
    /// This way is closed, and the caller has another one.
    FallBack,
    /// This server, its licence or its storage can not do it; see [`Unsupported`](crate::Unsupported).
    NotSupported,
    /// Repeating gives the same; a person has to act.
    Permanent,
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Classified {
    /// The error code.
    pub code: &'static str,
    /// Its class.
    pub class: FailureClass,
    /// What it says, or what is done, in a few words.
    pub meaning: &'static str,
}

/// Codes that a pool answers before it begins anything, so that even work can be sent again.
const TURNED_AWAY: [&str; 4] =
    ["HOST_STILL_BOOTING", "OTHER_OPERATION_IN_PROGRESS", "TOO_BUSY", "TOO_MANY_PENDING_TASKS"];

/// Codes by which a host says to every call that it can not serve at all: it still starts, or it has lost its
/// coordinator ("emergency mode", whose code is `HOST_STILL_BOOTING` where nothing more is known).
const AWAY: [&str; 8] = [
    "HA_HEARTBEAT_DAEMON_STARTUP_FAILED",
    "HA_HOST_CANNOT_ACCESS_STATEFILE",
    "HA_HOST_CANNOT_SEE_PEERS",
    "HOST_HAS_NO_MANAGEMENT_IP",
    "HOST_IN_EMERGENCY_MODE",
    "HOST_MASTER_CANNOT_TALK_BACK",
    "HOST_STILL_BOOTING",
    "HOST_UNKNOWN_TO_MASTER",
];

impl FailureClass {
    /// The class of an error code.
    pub fn of(code: &str) -> Self {
        let found = table::TABLE.binary_search_by(|row| row.code.cmp(code));
        found.ok().and_then(|at| table::TABLE.get(at)).map_or(Self::Permanent, |row| row.class)
    }

    /// Every code with a class of its own, sorted by code.
    pub fn table() -> &'static [Classified] {
        table::TABLE
    }

    /// What a scheduler does: all it needs to know of a class.
    pub fn retry(self) -> Retry {
        match self {
            Self::RetryNow | Self::WhenFree | Self::Later | Self::Redirect => Retry::Later,
            Self::RenewSession => Retry::AfterLogin,
            Self::FallBack | Self::NotSupported | Self::Permanent => Retry::Never,
        }
    }
}

impl fmt::Display for FailureClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::RetryNow => "retry now",
            Self::WhenFree => "when free",
            Self::Later => "later",
            Self::Redirect => "redirect",
            Self::RenewSession => "renew session",
            Self::FallBack => "fall back",
            Self::NotSupported => "not supported",
            Self::Permanent => "permanent",
        })
    }
}

/// Whether the pool turned the call away before it began anything.
pub(crate) fn began_nothing(code: &str) -> bool {
    TURNED_AWAY.contains(&code)
}

/// Whether a host turned the call away because it can not serve any call at the moment.
pub(crate) fn is_away(code: &str) -> bool {
    AWAY.contains(&code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_names_each_code_once() {
        assert!(table::TABLE.is_sorted_by(|one, next| one.code < next.code));
        assert!(AWAY.iter().all(|code| FailureClass::of(code).retry() == Retry::Later));
        assert!(TURNED_AWAY.iter().all(|code| FailureClass::of(code).retry() == Retry::Later));
        assert_eq!(FailureClass::of("NOBODY_KNOWS_THIS"), FailureClass::Permanent);
        assert_eq!(FailureClass::of("SR_BACKEND_FAILURE_99999"), FailureClass::Permanent);
    }
}
