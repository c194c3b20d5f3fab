//! The manifest of a restore point: one VM at one moment.
//!
//! It names a disk map per disk and the VM's configuration, and carries the evidence that the next backup's choice of
//! a base needs. Fields that this crate has no opinion about are texts in `attributes`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{BlobRef, DiskMapRef, PointId};

/// What a backup read. What it stored is a complete point at every level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Level {
    /// Everything.
    Full,
    /// What changed since the last full.
    Diff,
    /// What changed since the last backup.
    Inc,
    /// Everything, outside of every chain.
    Copy,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Full => "FULL",
            Self::Diff => "DIFF",
            Self::Inc => "INC",
            Self::Copy => "COPY",
        })
    }
}

/// One VM at one moment. Complete in itself: no other point is needed to restore it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointManifest {
    /// Identity of the point, drawn by whoever makes it.
    pub id: PointId,
    /// The run that made it.
    pub run_id: Uuid,
    /// Fencing number of that run's lease; of two points of one run the higher one counts.
    pub fencing: u64,
    /// The installation that made it.
    pub instance: String,
    /// UUID of the pool, as XenAPI writes it; one segment of the object's name.
    pub pool_uuid: String,
    /// UUID of the VM, as XenAPI writes it; one segment of the object's name.
    pub vm_uuid: String,
    /// The VM's name at that moment.
    pub vm_name: String,
    /// What was read, over all disks: `Full` if any disk was read as a whole.
    pub level: Level,
    /// Why that level, in one line for people.
    pub reason: String,
    /// The moment of the snapshot, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// The point that the bases came from.
    pub parent: Option<PointId>,
    /// Number of the newest sweep that the writer had seen; the writer fills it in when it publishes.
    pub newest_sweep_seen: u64,
    /// The disks, in the order of their device numbers.
    pub disks: Vec<PointDisk>,
    /// The VM's configuration, in whatever form the engine chose.
    pub vm_config: BlobRef,
    /// Further facts by name.
    pub attributes: BTreeMap<String, String>,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// UUID of the VDI that was backed up.
    pub vdi_uuid: String,
    /// UUID of the snapshot that was read; the base of the next incremental.
    pub snapshot_vdi_uuid: String,
    /// The VDI's name at that moment.
    pub name: String,
    /// XenAPI's `userdevice` of the VBD.
    pub device: String,
    /// Size of the disk in bytes; equal to the map's.
    pub virtual_size: u64,
    /// The content.
    pub map: DiskMapRef,
    /// What was read of this disk.
    pub level: Level,
    /// Why that level, as a short token such as `changed-blocks` or `cbt-disabled`.
    pub reason: String,
    /// Bytes that counted as changed.
    pub changed_bytes: u64,
    /// The bitmap of this step, as XenAPI gave it.
    pub bitmap: Option<BlobRef>,
    /// Nonce of the unbroken chain of changed-block tracking that the snapshot belongs to.
    pub chain_nonce: Option<String>,
    /// Evidence for the next choice of a base, and further facts, by name.
    pub attributes: BTreeMap<String, String>,
}
