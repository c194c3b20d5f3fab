//! Moments as XenAPI writes them: `20261122T18:22:53Z`, always in UTC, whole seconds.

use crate::value::{DecodeError, FromValue, ToValue, Value};
use std::fmt;

/// A moment, in whole seconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DateTime {
    unix_seconds: i64,
}

impl DateTime {
    /// The moment that stands for "never" (1970-01-01); also the default.
    pub const NEVER: Self = Self { unix_seconds: 0 };

    /// A moment from seconds since 1970-01-01 UTC.
    pub fn from_unix_seconds(unix_seconds: i64) -> Self {
        Self { unix_seconds }
    }

    /// Seconds since 1970-01-01 UTC.
    pub fn unix_seconds(self) -> i64 {
        self.unix_seconds
    }

    /// Whether it stands for "never".
    pub fn is_never(self) -> bool {
        self.unix_seconds == 0
    }

    /// Reads `20261122T18:22:53Z`, with or without dashes, a fraction (ignored) and the time zone.
    fn parse(text: &str) -> Option<Self> {
        let (date, time) = text.trim().split_once('T')?;
        let digits: String = date.chars().filter(|c| *c != '-').collect();
        if digits.len() != 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let (year, rest) = digits.split_at_checked(4)?;
        let (month, day) = rest.split_at_checked(2)?;
        let zoned = time.ends_with('Z') || time.contains('+') || time.contains('-');
        let spelled = format!("{year}-{month}-{day}T{time}{}", if zoned { "" } else { "Z" });
        let moment: jiff::Timestamp = spelled.parse().ok()?;
        Some(Self { unix_seconds: moment.as_second() })
    }
}

impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_second(self.unix_seconds) {
            Ok(moment) => write!(f, "{moment}"),
            Err(_) => write!(f, "{} s after 1970", self.unix_seconds),
        }
    }
}

impl fmt::Debug for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromValue for DateTime {
    fn from_value(value: Value) -> Result<Self, DecodeError> {
        match &value {
            Value::String(text) => Self::parse(text).ok_or_else(|| DecodeError::kind("a date", &value)),
            _ => Err(DecodeError::kind("a date", &value)),
        }
    }
}

impl ToValue for DateTime {
    fn to_value(&self) -> Value {
        let spelled: String = self.to_string().chars().filter(|c| *c != '-').collect();
        Value::String(spelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_servers_write() {
        for text in ["20261122T18:22:53Z", "2026-11-22T18:22:53Z", "20261122T18:22:53", "20261122T18:22:53.250Z"] {
            let date = DateTime::from_value(Value::from(text)).unwrap();
            assert_eq!(date.unix_seconds(), 1_795_371_773, "{text}");
            assert_eq!(date.to_value(), Value::from("20261122T18:22:53Z"));
        }
        assert!(DateTime::from_value(Value::from("19700101T00:00:00Z")).unwrap().is_never());
        for text in ["", "T", "20261322T18:22:53Z", "2026-W05-6T00:00:00Z", "é0261122T18:22:53Z", "20261122"] {
            assert!(DateTime::from_value(Value::from(text)).is_err(), "{text}");
        }
    }
}
