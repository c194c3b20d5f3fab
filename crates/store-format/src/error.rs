//! Why bytes are not what they should be.

use crate::ChunkId;

/// Why an object of the repository can not be decoded or sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The first bytes belong to something else.
    #[error("the {what} does not begin with its magic")]
    Magic {
        /// Kind of object.
        what: &'static str,
    },
    /// Written by a later release.
    #[error("the {what} has format version {found}, this release reads up to version {supported}")]
    NewerVersion {
        /// Kind of object.
        what: &'static str,
        /// Version found.
        found: u16,
        /// Newest version that can be read.
        supported: u16,
    },
    /// Flags that this release does not know.
    #[error("the {what} has the unknown flags {flags:#06x}")]
    UnknownFlags {
        /// Kind of object.
        what: &'static str,
        /// The flags.
        flags: u16,
    },
    /// Fewer bytes than its fields say.
    #[error("the {what} ends at byte {found}, its fields need {wanted} bytes")]
    Truncated {
        /// Kind of object.
        what: &'static str,
        /// Bytes needed.
        wanted: u64,
        /// Bytes there.
        found: u64,
    },
    /// More bytes than its fields say.
    #[error("the {what} has {extra} bytes after its end")]
    TrailingBytes {
        /// Kind of object.
        what: &'static str,
        /// How many.
        extra: u64,
    },
    /// A length or count beyond what any writer makes.
    #[error("the {what} says {field} {found}, the limit is {limit}")]
    Limit {
        /// Kind of object.
        what: &'static str,
        /// Which field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// Largest (or, for key derivation, smallest) value that is accepted.
        limit: u64,
    },
    /// A field with a value that has no meaning.
    #[error("the {what} has no valid {field}: {found}")]
    Field {
        /// Kind of object.
        what: &'static str,
        /// Which field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// The bytes were changed by accident.
    #[error("the {what} has checksum {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// Kind of object.
        what: &'static str,
        /// Stored checksum.
        found: u32,
        /// Checksum of the bytes.
        computed: u32,
    },
    /// The checksum fits and the seal does not: another key, another place, or changed on purpose.
    #[error("the {what} does not open under this repository's key")]
    Authentication {
        /// Kind of object.
        what: &'static str,
    },
    /// It belongs to another repository.
    #[error("the {what} belongs to another repository")]
    ForeignRepository {
        /// Kind of object.
        what: &'static str,
    },
    /// The opened bytes do not have the hash that names them.
    #[error("the content of chunk {id} does not have the hash that names it")]
    WrongContent {
        /// The chunk.
        id: ChunkId,
    },
    /// A record that does not decode.
    #[error("the record in the {what} does not decode")]
    Record {
        /// Kind of object.
        what: &'static str,
        /// What the decoder said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Compressed bytes that do not unpack, or bytes that do not pack.
    #[error("the content of the {what} can not be (de)compressed")]
    Compression {
        /// Kind of object.
        what: &'static str,
        /// What the library said.
        source: std::io::Error,
    },
    /// Sealing is full: a pack of the largest size, or of the most frames.
    #[error("the pack has no room for another chunk")]
    PackFull,
    /// The key derivation refused its parameters.
    #[error("the key can not be derived from the passphrase")]
    KeyDerivation {
        /// What the library said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The content of disks and blobs can not be read with a writer's key.
    #[error("a key that only writes can not read the content of disks and blobs")]
    WriteOnly,
    /// The system gave no random bytes, or the cipher refused its input.
    #[error("the system's cryptography failed")]
    Cryptography,
}
