//! The repository: chunks, packs, index, disk maps, points.
//!
//! Floor 2. Owns what is written when, and finds it again; the bytes themselves are `store-format`'s. Any number of
//! writers and readers share a repository without a lock: a writer publishes packs, then index segments, then the
//! point, each of them at once and for good, so that an interruption at any byte leaves a readable repository.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use xenvault_store::{Repository, Secret};
//! let repository = Repository::open("/backup".as_ref(), &Secret::new("a passphrase")).await?;
//! for point in repository.points(&Default::default()).await?.points {
//!     println!("{} {}", point.id, point.vm_name);
//! }
//! # Ok(())
//! # }
//! ```

pub mod backend;
mod cache;
mod counters;
mod disk;
mod error;
mod fetch;
mod forget;
mod frames;
mod heal;
mod index;
mod keep;
mod leaf;
mod map;
mod mark;
mod monitor;
mod names;
mod pack_keys;
mod packs;
mod place;
mod points;
mod pool;
mod promise;
mod publish;
mod reader;
mod records;
mod repository;
mod slots;
mod sweep;
mod sweeps;
mod tree;
mod verify;
mod writer;

pub use counters::{Stage, WriteCounters, WriteProgress};
pub use disk::{DiskOptions, DiskResult, DiskStats, DiskWriter};
pub use error::{Retry, StoreError};
pub use forget::ForgetReport;
pub use index::IndexCacheOptions;
pub use keep::{KeepOptions, KeepReport, PointProtection};
pub use monitor::{MaintenanceMonitor, MaintenanceProgress, MaintenanceStage};
pub use place::PlaceFacts;
pub use points::{DamagedPoint, Point, PointFilter, PointListing, PointSummary};
pub use reader::{DiskReader, ReadOptions};
pub use repository::{InitOptions, Repository};
pub use slots::{KeySlotListing, KeySlotSummary, MAX_KEY_SLOTS, NewKey};
pub use sweep::{SweepBegun, SweepEnded, SweepOptions, SweepReport};
pub use verify::{
    DamageKind, DamagedObject, HurtDisk, HurtPoint, MAX_RANGES, RepairReport, VerifyMode, VerifyOptions, VerifyReport,
};
pub use writer::{Writer, WriterOptions};
// Part of our signatures, so that an embedding program needs no further crate.
pub use xenvault_block::ByteRange;
pub use xenvault_store_format::{
    BlobRef, ChunkId, ChunkKind, DiskMapRef, FormatError, Immutability, KdfParams, KeyAccess, Level, LockMode,
    MAX_LABEL_BYTES, PackId, ParseIdError, ParseImmutabilityError, PointDisk, PointId, PointManifest, RecoveryKey,
    RecoveryKeyError, RepositoryId, Secret, SlotKind,
};
