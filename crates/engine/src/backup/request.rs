//! What a caller asks of a backup, and what it is told afterwards.

use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

use xenvault_block::ByteRange;
use xenvault_store::PointId;

use crate::monitor::{Progress, Warning};

/// Which VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmSelector {
    /// By its UUID.
    Uuid(String),
    /// By its exact name; it is an error if several VMs have it.
    Name(String),
    /// By its UUID if a VM has it, else by its name.
    UuidOrName(String),
}

impl VmSelector {
    /// The text that the caller gave.
    pub fn text(&self) -> &str {
        match self {
            Self::Uuid(text) | Self::Name(text) | Self::UuidOrName(text) => text,
        }
    }
}

/// How much is to be read. What is stored is a complete point in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LevelRequest {
    /// Read every disk as a whole.
    Full,
    /// Read what changed since the last point, where that can be known; else the whole disk.
    Incremental,
}

/// How much was read, of a disk or of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The whole disk; of a VM: at least one disk as a whole.
    Full,
    /// Only what changed.
    Incremental,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "FULL",
            Self::Incremental => "INC",
        })
    }
}

/// One backup of one VM.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackupRequest {
    /// The VM.
    pub vm: VmSelector,
    /// How much to read.
    pub level: LevelRequest,
    /// After how many runs that believed the pool's list of changes the whole disk is read and compared, the checking
    /// run included: 1 checks every time. `None`: never.
    pub verify_every: Option<NonZeroU32>,
}

impl BackupRequest {
    /// The same, checking the pool's lists of changes every `runs` runs.
    #[must_use]
    pub fn verified_every(mut self, runs: Option<NonZeroU32>) -> Self {
        self.verify_every = runs;
        self
    }

    /// A backup of `vm` that reads what changed.
    pub fn incremental(vm: VmSelector) -> Self {
        Self { vm, level: LevelRequest::Incremental, verify_every: None }
    }

    /// A backup of `vm` that reads everything.
    pub fn full(vm: VmSelector) -> Self {
        Self { vm, level: LevelRequest::Full, verify_every: None }
    }
}

/// What a good backup did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackupReport {
    /// The point that was written.
    pub point: PointId,
    /// This execution.
    pub run_id: String,
    /// UUID of the VM.
    pub vm_uuid: String,
    /// Name of the VM at the time of the snapshot.
    pub vm_name: String,
    /// [`Level::Full`] if any disk was read as a whole.
    pub level: Level,
    /// The reasons of the disks in one line.
    pub reason: String,
    /// Disks, by position.
    pub disks: Vec<DiskReport>,
    /// Devices that are no part of a backup, each with the reason.
    pub skipped: Vec<SkippedDevice>,
    /// Totals.
    pub totals: Progress,
    /// What an operator should know although the point is good.
    pub warnings: Vec<Warning>,
    /// From the call to its end.
    pub elapsed: Duration,
    /// Part of `elapsed` that went into opening and closing exports, which the hosts do at their own pace.
    pub attach_elapsed: Duration,
}

/// What happened to one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskReport {
    /// Position (`userdevice`).
    pub device: String,
    /// UUID of the VM's disk.
    pub vdi_uuid: String,
    /// Name of the disk.
    pub name: String,
    /// Size in bytes.
    pub virtual_size: u64,
    /// How much was read.
    pub level: Level,
    /// Why: `changed-blocks`, `first-backup`, `base-gone`, `cbt-unsupported` and so on.
    pub reason: String,
    /// Bytes that the bitmap names as changed; of a disk without one, the bytes that were read.
    pub changed_bytes: u64,
    /// Bytes read from the pool, without the sample.
    pub read_bytes: u64,
    /// Bytes of the check sample.
    pub sample_bytes: u64,
    /// What a check of the pool's list of changes found, if this run made one.
    pub verification: Option<Verification>,
}

/// Whether the pool had listed everything that changed. The point is right in any case: it holds what was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verification {
    /// Bytes of the disk that were compared with the last point.
    pub compared_bytes: u64,
    /// Bytes that had changed and were not listed, in whole blocks of 64 KiB.
    pub unlisted_bytes: u64,
    /// Where, ascending: the first [`Verification::MAX_RANGES`] ranges.
    pub unlisted: Vec<ByteRange>,
}

impl Verification {
    /// More ranges than this are counted and not named.
    pub const MAX_RANGES: usize = 1000;
}

/// A device that a backup leaves out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SkippedDevice {
    /// Position (`userdevice`).
    pub device: String,
    /// Why, for people: `CD drive`, ...
    pub reason: String,
}
