//! Whether the changes since a base may be believed. Pure: the evidence is read by the caller, just before use.

use crate::reason::FullReason;

/// What is left of the base snapshot, re-read just before use (U02, X19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseState {
    /// The snapshot still has its data; it can be read and compared with.
    WithData,
    /// Only the tracking data is left (`cbt_metadata`): good as `vdi_from`, never to be read.
    BitmapOnly,
    /// It does not exist any more, or has no tracking.
    Gone,
}

/// What the caller wants to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What changed, if that can be known.
    Changes,
    /// Everything.
    Everything,
}

/// Whether changes of the disk are recorded, as read back after it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// On.
    Enabled,
    /// Off, though it could be on.
    Disabled,
    /// The licence, SR or disk can not do it (X09).
    Unsupported,
}

/// Power state of the VM at a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Running or paused: its disks are open on the resident host.
    Running,
    /// Halted: no disk is open.
    Halted,
    /// Suspended to disk: no disk is open.
    Suspended,
}

/// Where and since when a VM ran at the time of a snapshot. `None` is "not known" and makes a base suspect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRun {
    /// Power state.
    pub power: Option<Power>,
    /// UUID of the host on which it ran; not looked at unless it ran.
    pub host_uuid: Option<String>,
    /// Boot time of that host, seconds since 1970; not looked at unless it ran.
    pub host_boot_time: Option<u64>,
    /// Start of the run, seconds since 1970 (`VM_metrics.start_time`; of the last run if it does not run now; 0 if it
    /// never ran).
    pub start_time: Option<u64>,
}

/// How the run that the base saw came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// Cleanly: shut down, rebooted or suspended through the toolstack, and nothing speaks of a crash.
    Clean,
    /// By a crash of the VM's host, an HA restart, or a forced reset of its power state.
    Unclean,
    /// The pool's messages do not tell.
    Unknown,
}

/// A message of the pool since the base that concerns the disk, the VM or its host (X10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PoolMessage {
    /// `VDI_CBT_METADATA_INCONSISTENT`, `VDI_CBT_RESIZE_FAILED` or `VDI_CBT_SNAPSHOT_FAILED` on this disk.
    Cbt,
    /// A host failed, or HA restarted the VM (`HA_...`).
    Ha,
}

/// What the last point recorded about the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseRecord {
    /// UUID of the live VDI.
    pub vdi_uuid: String,
    /// UUID of its SR.
    pub sr_uuid: String,
    /// Virtual size at that time, in bytes.
    pub virtual_size: u64,
    /// Nonce of ours that was set when tracking was enabled (X11).
    pub chain_nonce: Option<String>,
    /// The VM's run at that time.
    pub run: VmRun,
}

/// What is true now, at the new snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskNow {
    /// UUID of the live VDI.
    pub vdi_uuid: String,
    /// UUID of its SR.
    pub sr_uuid: String,
    /// Virtual size of the new snapshot, in bytes.
    pub virtual_size: u64,
    /// Tracking of the live disk.
    pub live_tracking: Tracking,
    /// Tracking of the new snapshot itself (X10: the snapshot can be older than the effect of enabling).
    pub snapshot_tracking: Tracking,
    /// Nonce of ours that the live disk carries.
    pub chain_nonce: Option<String>,
    /// State of the base snapshot.
    pub base: BaseState,
    /// UUID of the VDI that the base is a snapshot of, `None` if it names none.
    pub base_snapshot_of: Option<String>,
    /// The VM's run.
    pub run: VmRun,
    /// How the run that the base saw ended; looked at only if it did.
    pub run_end: RunEnd,
    /// Messages since the base; `None` if they could not be read.
    pub messages: Option<Vec<PoolMessage>>,
}

/// Everything that the decision needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseEvidence {
    /// What was asked for.
    pub level: Level,
    /// The last point of this disk, if there is one.
    pub base: Option<BaseRecord>,
    /// The disk now.
    pub now: DiskNow,
}

/// Whether to ask for the changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseDecision {
    /// Ask `list_changed_blocks` (base, new snapshot) and read what it names.
    UseBase,
    /// Read the whole disk.
    ReadWhole(FullReason),
}

/// Decides from evidence; whatever is unknown counts as suspect.
pub fn decide(_evidence: &BaseEvidence) -> BaseDecision {
    todo!()
}
