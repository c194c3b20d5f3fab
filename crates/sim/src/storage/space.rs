//! How much space disks take, by the storage manager's own arithmetic.

use xenvault_block::{VHD_BLOCK_BYTES, VHD_MAX_DISK_BYTES};

use super::{SrError, SrKind};

/// The unit of logical volumes, also the size of a journal and of a change log's volume.
pub(super) const LVM_EXTENT_BYTES: u64 = 4 << 20;

/// The size for which the metadata of a VHD in a logical volume is laid out.
const LVM_METADATA_FOR_BYTES: u64 = 2 << 40;

/// What a block of a VHD takes: its data, and its bitmap in a page of its own.
const VHD_BLOCK_FILE_BYTES: u64 = VHD_BLOCK_BYTES + 4096;

/// The largest disk of [`SrKind::Large`].
const LARGE_MAX_BYTES: u64 = 16 << 40;

/// The size that a disk gets when this one is asked for.
pub(super) fn disk_size(kind: SrKind, wanted: u64) -> Result<u64, SrError> {
    let maximum = if kind == SrKind::Large { LARGE_MAX_BYTES } else { VHD_MAX_DISK_BYTES };
    if wanted > maximum {
        let detail = format!("VDI size must be between 1 MB and {} MB", maximum >> 20);
        return Err(SrError::bad_size(&detail));
    }
    Ok(match kind {
        SrKind::Ext | SrKind::Lvm => wanted.max(1).next_multiple_of(VHD_BLOCK_BYTES),
        // A raw volume is rounded as a VHD first, then to whole extents of the volume group.
        SrKind::LvmRaw => wanted.max(1).next_multiple_of(VHD_BLOCK_BYTES).next_multiple_of(LVM_EXTENT_BYTES),
        SrKind::Large => wanted.max(1).next_multiple_of(512),
    })
}

/// Footer, its copy, header, parent locators, BAT and batmap of a VHD laid out for `size` bytes.
fn empty_vhd_overhead(size: u64) -> u64 {
    let blocks = (size >> 20) / 2;
    let tables = (3 * 1024 + blocks * 4).next_multiple_of(512) + blocks / 8;
    tables.next_multiple_of(4096)
}

/// A VHD file with so many blocks of data. (A new one of 8 MiB has 5120 bytes on a real server.)
pub(super) fn vhd_file(size: u64, blocks: u64) -> u64 {
    let bat = (size.div_ceil(VHD_BLOCK_BYTES) * 4).next_multiple_of(512);
    4608 + bat + blocks * VHD_BLOCK_FILE_BYTES
}

/// The logical volume of a VHD that may be filled to its size.
pub(super) fn full_vhd_volume(size: u64) -> u64 {
    let bitmaps = size.div_ceil(VHD_BLOCK_BYTES) * 4096;
    (size + empty_vhd_overhead(LVM_METADATA_FOR_BYTES) + bitmaps).next_multiple_of(LVM_EXTENT_BYTES)
}

/// The logical volume of a VHD that holds so many blocks and no more.
pub(super) fn deflated_vhd_volume(blocks: u64) -> u64 {
    (empty_vhd_overhead(LVM_METADATA_FOR_BYTES) + blocks * VHD_BLOCK_FILE_BYTES).next_multiple_of(LVM_EXTENT_BYTES)
}

/// A qcow2 file with so many clusters of 64 KiB.
pub(super) fn cluster_file(clusters: u64) -> u64 {
    (4 + clusters) * 64 * 1024
}
