//! Vocabulary of disks: byte offsets, ranges, extent sets, units, and positional read and write traits.
//!
//! Floor 0. Owns the words in which all other crates talk about disks, and nothing else: no async, no I/O of its own.
//! Positions and lengths are bytes unless a name says otherwise; ranges are half open.

mod extents;
mod range;
mod size;
mod traits;

pub use extents::ExtentSet;
pub use range::{ByteRange, RangeError};
pub use size::{ByteSize, ParseByteSizeError};
pub use traits::{ReadAt, WriteAt};

/// One sector, the unit of addressing of VHD and of XenServer's NBD server, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// One block of changed block tracking, in bytes.
pub const CBT_BLOCK_BYTES: u64 = 64 * 1024;

/// One data block of the VHD files that XenServer writes, in bytes.
pub const VHD_BLOCK_BYTES: u64 = 2 * 1024 * 1024;

/// The largest disk that a VHD file of XenServer holds, in bytes (2040 GiB).
pub const VHD_MAX_DISK_BYTES: u64 = 2040 * 1024 * 1024 * 1024;
