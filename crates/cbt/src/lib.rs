//! Changed-block bitmaps of XenAPI, and the decision whether a base can be used. Pure: no I/O, no clock.
//!
//! Floor 1. [`ChangedBlocks`] reads the bitmap of `VDI.list_changed_blocks` (highest bit first, 64 KiB a bit), unites
//! bitmaps and turns them into extents. [`decide`] looks at evidence that it is handed and says whether the changes
//! since the base may be believed, or why the whole disk has to be read. Whatever is unknown counts as suspect.

mod base;
mod bitmap;
mod reason;

pub use base::{
    BaseDecision, BaseEvidence, BaseRecord, BaseState, DiskNow, Level, PoolMessage, Power, RunEnd, Tracking, VmRun,
    decide,
};
pub use bitmap::{CbtError, ChangedBlocks};
pub use reason::{FullReason, SuspectCause};
