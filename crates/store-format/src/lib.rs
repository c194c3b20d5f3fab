//! The bytes of the repository: encode, decode, version, seal; and nothing else.
//!
//! Floor 1, pure: no I/O, no clock, no async. The only user of `bincode`. Every object begins with a magic and a
//! format version, carries its lengths under a limit and a checksum, and is authenticated under a key that is derived
//! from the repository's master key. What each byte means is written down in `docs/repository-format.md`.
//!
//! Where content is cut into chunks belongs here too: it is a property of the format, since writers that cut
//! differently would not find each other's chunks.

mod blob;
mod config;
mod cut;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod ids;
mod immutability;
mod index;
mod keypair;
mod keys;
mod keyslot;
mod map;
mod pack;
mod payload;
mod point;
mod record;
mod recovery;
mod secret;
#[cfg(test)]
mod testing;
mod wire;

pub use blob::{BLOB_PIECE_BYTES, MAX_BLOB_BYTES, decode_piece_list, encode_piece_list};
pub use config::{Config, StoredConfig};
pub use cut::{Chunker, CutChunk, CutRule};
pub use error::FormatError;
pub use ids::{BlobRef, ChunkId, DiskMapRef, PackId, ParseIdError, PointId, RecordId, RepositoryId};
pub use immutability::{Immutability, LockMode, ParseImmutabilityError};
pub use index::{
    INDEX_HEADER_BYTES, IndexEntry, IndexLayout, MAX_RUN_LEVEL, MAX_RUN_PARTS, MAX_SEGMENT_BYTES, MAX_SEGMENT_ENTRIES,
    MAX_SEGMENT_PACKS, RunPart, SegmentContent, encode_index, parts_for,
};
pub use keys::{ChunkKind, KeyMaterial, Keys, MasterKey, PackClass, PackSalt, PackSealing, WriterKey};
pub use keyslot::{KdfParams, KeyAccess, KeySlot, MAX_LABEL_BYTES, SlotHead, SlotKind, SlotSecret};
pub use map::{
    LEAF_BLOCKS, LEAF_BYTES, LeafEntry, LeafPage, MAP_FANOUT, MAX_MAP_LEVEL, NodePage, leaves_of, leaves_under,
    level_of,
};
pub use pack::{
    DirectoryEntry, DirectoryKey, FRAME_OVERHEAD_BYTES, MAX_PACK_BYTES, MAX_PACK_CHUNKS, PACK_END_BYTES,
    PACK_HEADER_BYTES, PACK_TRAILER_BYTES, PackEncoder, PackHeader, PackKey, PackTrailer, Placement,
};
pub use payload::{Compressor, MAX_FRAME_CHUNKS, MAX_PLAIN_BYTES, Payload, PlainFrame};
pub use point::{Level, MAX_POINT_BYTES, PointDisk, PointManifest, decode_point, encode_point};
pub use record::{
    DamageMark, DamagedCopy, ForgottenPoint, MAX_CONDEMNED_PACKS, MAX_DAMAGED_COPIES, MAX_FORGOTTEN_POINTS,
    MAX_HURT_POINTS, MAX_RECORD_BYTES, Receipt, Record, SweepEnd, SweepIntent, Tombstone, Undo, VerifyResult,
    decode_record, encode_record,
};
pub use recovery::{RecoveryKey, RecoveryKeyError};
pub use secret::Secret;

/// Format version that this release writes; it reads no later one.
pub const FORMAT_VERSION: u16 = 0;

/// Unit of cutting and of disk maps, in bytes.
pub const BLOCK_BYTES: usize = 4096;
