//! What protects the objects of a repository from whoever writes it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest time of a promise: a hundred years, beyond which services take no date.
const MAX_SECONDS: u64 = 100 * 365 * 24 * 3600;

/// How firm a lock is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockMode {
    /// Can be lifted by whoever has the permission to bypass it.
    Governance,
    /// Can be lifted by nobody who uses the service's interface.
    Compliance,
}

impl LockMode {
    /// As services write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Governance => "GOVERNANCE",
            Self::Compliance => "COMPLIANCE",
        }
    }
}

impl fmt::Display for LockMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Governance => "governance",
            Self::Compliance => "compliance",
        })
    }
}

/// What a repository promises about its objects. As a text: `none`, `broker`, or `object-lock:compliance:30d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Immutability {
    /// Nothing: whoever may write may also remove.
    #[default]
    None,
    /// Files of a local folder belong to another user than the one that writes.
    Broker,
    /// Every version of an object is locked by the store when it appears.
    ObjectLock {
        /// How firmly.
        mode: LockMode,
        /// For how long after a point appeared nothing that it needs can be removed, in seconds; above 0.
        seconds: u64,
    },
}

/// A text that names no promise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no immutability: expected none, broker, object-lock:compliance:DAYS or object-lock:governance:DAYS"
)]
pub struct ParseImmutabilityError {
    text: String,
}

impl Immutability {
    /// How long a point can not be removed; nothing if no lock ends.
    pub fn period(&self) -> Option<Duration> {
        match self {
            Self::ObjectLock { seconds, .. } => Some(Duration::from_secs(*seconds)),
            Self::None | Self::Broker => None,
        }
    }

    /// How firm locks are.
    pub fn mode(&self) -> Option<LockMode> {
        match self {
            Self::ObjectLock { mode, .. } => Some(*mode),
            Self::None | Self::Broker => None,
        }
    }
}

impl fmt::Display for Immutability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.pad("none"),
            Self::Broker => f.pad("broker"),
            Self::ObjectLock { mode, seconds } => {
                let (number, unit) = match seconds {
                    seconds if seconds % (24 * 3600) == 0 => (seconds / (24 * 3600), 'd'),
                    seconds if seconds % 3600 == 0 => (seconds / 3600, 'h'),
                    seconds => (*seconds, 's'),
                };
                write!(f, "object-lock:{mode}:{number}{unit}")
            }
        }
    }
}

impl FromStr for Immutability {
    type Err = ParseImmutabilityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseImmutabilityError { text: text.chars().take(64).collect() };
        match text {
            "none" => return Ok(Self::None),
            "broker" => return Ok(Self::Broker),
            _ => {}
        }
        let (mode, period) =
            text.strip_prefix("object-lock:").and_then(|rest| rest.split_once(':')).ok_or_else(wrong)?;
        let mode = match mode {
            "governance" => LockMode::Governance,
            "compliance" => LockMode::Compliance,
            _ => return Err(wrong()),
        };
        let (number, unit) = match period.char_indices().next_back() {
            Some((at, 'd')) => (period.get(..at), 24 * 3600),
            Some((at, 'h')) => (period.get(..at), 3600),
            Some((at, 's')) => (period.get(..at), 1),
            _ => (Some(period), 24 * 3600),
        };
        let is_number = |number: &&str| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        let number: u64 = number.filter(is_number).and_then(|number| number.parse().ok()).ok_or_else(wrong)?;
        let seconds = number.checked_mul(unit).filter(|seconds| (1..=MAX_SECONDS).contains(seconds));
        Ok(Self::ObjectLock { mode, seconds: seconds.ok_or_else(wrong)? })
    }
}

impl TryFrom<String> for Immutability {
    type Error = ParseImmutabilityError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Immutability> for String {
    fn from(immutability: Immutability) -> Self {
        immutability.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn promises_are_written_as_people_say_them() {
        let lock = |mode, seconds| Immutability::ObjectLock { mode, seconds };
        for (text, promise, written) in [
            ("none", Immutability::None, "none"),
            ("broker", Immutability::Broker, "broker"),
            ("object-lock:compliance:30", lock(LockMode::Compliance, 30 * 86_400), "object-lock:compliance:30d"),
            ("object-lock:governance:36h", lock(LockMode::Governance, 36 * 3600), "object-lock:governance:36h"),
            ("object-lock:governance:90s", lock(LockMode::Governance, 90), "object-lock:governance:90s"),
        ] {
            assert_eq!(text.parse(), Ok(promise));
            assert_eq!(promise.to_string(), written);
        }
        for wrong in [
            "",
            "None",
            "object-lock",
            "object-lock:compliance",
            "object-lock:compliance:",
            "object-lock:compliance:0",
            "object-lock:compliance:-1",
            "object-lock:compliance:+1d",
            "object-lock:legal:3",
            "object-lock:compliance:d",
            "object-lock:compliance:36501",
            "object-lock:compliance:99999999999999999999d",
            "object-lock:compliance:3\u{e9}",
        ] {
            assert!(wrong.parse::<Immutability>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn promises_read_back(seconds in 1..=MAX_SECONDS, compliance in any::<bool>()) {
            let mode = if compliance { LockMode::Compliance } else { LockMode::Governance };
            let promise = Immutability::ObjectLock { mode, seconds };
            prop_assert_eq!(promise.to_string().parse(), Ok(promise));
        }

        #[test]
        fn foreign_texts_do_not_panic(text in ".{0,40}") {
            let _ = text.parse::<Immutability>();
            let _ = format!("object-lock:compliance:{text}").parse::<Immutability>();
        }
    }
}
