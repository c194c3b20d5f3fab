//! The bytes of the repository: encode, decode, version, seal; and nothing else.
//!
//! Floor 1, pure: no I/O, no clock, no async. The only user of `bincode`. Every object begins with a magic and a
//! format version, carries its lengths under a limit and a checksum, and is authenticated under a key that is derived
//! from the repository's master key. What each byte means is written down in `docs/repository-format.md`.

mod ids;
mod point;
mod secret;

pub use ids::{BlobRef, ChunkId, DiskMapRef, PackId, ParseIdError, PointId, RepositoryId};
pub use point::{Level, PointDisk, PointManifest};
pub use secret::Secret;
