//! Names of things in a repository. Ids are opaque; they print and parse as lower-case hexadecimal or as UUIDs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a text is no id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is no {what}: expected {expected}")]
pub struct ParseIdError {
    /// What was given.
    pub text: String,
    /// What it should have been.
    pub what: &'static str,
    /// The form that was expected.
    pub expected: &'static str,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name([u8; 16]);

        impl $name {
            /// A new id that nothing else has (122 random bits).
            pub fn random() -> Self {
                Self(*Uuid::new_v4().as_bytes())
            }

            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The bytes of the id.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                Uuid::from_bytes(self.0).fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let error = || ParseIdError { text: text.to_owned(), what: $what, expected: "a UUID" };
                Uuid::parse_str(text).map(|uuid| Self(*uuid.as_bytes())).map_err(|_| error())
            }
        }
    };
}

uuid_id!(
    /// The identity of a repository, drawn once when it is made.
    RepositoryId,
    "repository id"
);
uuid_id!(
    /// The identity of a restore point.
    PointId,
    "restore point id"
);
uuid_id!(
    /// The identity of a record: a tombstone, a damage mark, a result of a verification.
    RecordId,
    "record id"
);

/// Keyed hash of the plain bytes of a chunk; the key belongs to the repository, so an outsider can not test for known
/// content, and different kinds of chunk never share an id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    /// Length of an id in bytes.
    pub const BYTES: usize = 32;

    /// The id with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes of the id.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Name of a pack: the first half of the hash of its salt, so that a pack under a wrong name is noticed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PackId([u8; 16]);

impl PackId {
    /// The id with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes of the id.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let digits = text.as_bytes();
    if digits.len() != N.checked_mul(2)? {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        if pair.bytes().any(|digit| !matches!(digit, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(bytes)
}

macro_rules! hex_id {
    ($name:ident, $what:literal, $expected:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let error = || ParseIdError { text: text.to_owned(), what: $what, expected: $expected };
                parse_hex(text).map(Self).ok_or_else(error)
            }
        }
    };
}

hex_id!(ChunkId, "chunk id", "64 lower-case hexadecimal digits");
hex_id!(PackId, "pack id", "32 lower-case hexadecimal digits");

/// The content of a whole disk: the root of its map and the size that it has.
///
/// Without a root every byte is zero. Equal content and size give an equal reference within a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DiskMapRef {
    /// The root page; `None` if the disk holds nothing but zeros.
    pub root: Option<ChunkId>,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
}

/// A stored run of bytes that is no disk: a bitmap, a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlobRef {
    /// The chunk with the bytes, or with the list of the pieces where the blob is longer than one piece.
    pub id: ChunkId,
    /// Length in bytes.
    pub length: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_print_and_parse_to_the_same_id() {
        let chunk = ChunkId::from_bytes([0xa7; 32]);
        assert_eq!(chunk.to_string().parse(), Ok(chunk));
        let pack = PackId::from_bytes([0x0f; 16]);
        assert_eq!(pack.to_string(), "0f".repeat(16));
        assert_eq!(pack.to_string().parse(), Ok(pack));
        let point = PointId::random();
        assert_eq!(point.to_string().parse(), Ok(point));
    }

    #[test]
    fn texts_that_are_no_ids_are_refused() {
        for text in ["", "0F0F0F0F0F0F0F0F0F0F0F0F0F0F0F0F", "0f0f", &"+f".repeat(16), &"é".repeat(16)] {
            assert!(text.parse::<PackId>().is_err(), "{text}");
        }
        assert!("not-a-uuid".parse::<PointId>().is_err());
    }
}
