//! The stream that `/export_raw_vdi?format=vhd` sends: a dynamic VHD from front to back, as vhd-tool makes it.
//!
//! Footer copy, header, an empty sector, the BAT at byte 2048, then a bitmap of ones and 2 MiB of data for each block
//! in ascending order, then the footer. Encoded here and not by crate `vhd`, whose reader is to be tested with it.
//! Knows nothing of HTTP. A disk of any size costs its blocks.

use std::collections::VecDeque;
use std::io;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::Stream;
use uuid::Uuid;
use xenvault_block::{ByteRange, ReadAt as _, SECTOR_BYTES, VHD_BLOCK_BYTES, VHD_MAX_DISK_BYTES};

use crate::storage::Disk;

const HEADER_OFFSET: u64 = 512;
const LOCATOR_OFFSET: u64 = 1536;
const TABLE_OFFSET: u64 = 2048;
const UNUSED_ENTRY: u32 = u32::MAX;
/// A bitmap of one sector and the data, in sectors.
const PLACE_SECTORS: u64 = 1 + VHD_BLOCK_BYTES / SECTOR_BYTES;

const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhdExportError {
    /// A VHD ends at 2040 GiB: XenAPI's `VDI_TOO_LARGE`, after the 200.
    #[error("a VHD of {virtual_size} bytes is not possible: {maximum} bytes is the most")]
    TooLarge {
        /// Size of the disk in bytes.
        virtual_size: u64,
        /// Largest size in bytes.
        maximum: u64,
    },
    /// A difference of or to a disk that is no VHD. The text is that of the real server.
    #[error("Cannot compute differences on non-VHD images")]
    NotVhd,
    /// The disk is not there any more, or can not be read.
    #[error("the allocated blocks of the disk are not known")]
    Blocks {
        /// The reason.
        source: io::Error,
    },
}

/// The base of a difference.
#[derive(Clone, Debug)]
pub struct VhdBase {
    /// The base's content.
    pub disk: Disk,
    /// Path of the base's file as it stands in the header, such as `/var/run/sr-mount/<sr>/<vdi>.vhd`. ASCII.
    pub path: String,
    /// Identity of the base's VHD, which the header names as the parent.
    pub footer_uuid: Uuid,
}

/// A VHD in pieces, in order. A piece is at most one block (2 MiB and its bitmap).
#[derive(Debug)]
pub struct VhdExport {
    disk: Disk,
    /// Size of the disk when the stream began, in bytes.
    disk_size: u64,
    length: u64,
    /// What comes before the blocks.
    head: Bytes,
    /// Numbers of the blocks that are still to come.
    blocks: VecDeque<u32>,
    footer: Option<Bytes>,
}

impl VhdExport {
    /// The stream of a whole disk, or of its difference to `base`. A disk that is no VHD is read once to find its
    /// blocks that are not zero, and its size counts in whole blocks; this blocks on file I/O.
    ///
    /// # Errors
    /// See [`VhdExportError`].
    pub fn new(disk: Disk, base: Option<&VhdBase>) -> Result<Self, VhdExportError> {
        let broken = |source| VhdExportError::Blocks { source };
        let is_vhd = disk.kind().map_err(broken)?.is_vhd();
        let disk_size = disk.size();
        let size = if is_vhd { disk_size } else { disk_size.next_multiple_of(VHD_BLOCK_BYTES) };
        if size > VHD_MAX_DISK_BYTES {
            return Err(VhdExportError::TooLarge { virtual_size: disk_size, maximum: VHD_MAX_DISK_BYTES });
        }
        let extents = match base {
            None if is_vhd => disk.allocated_blocks().map_err(broken)?,
            None => disk.written_extents().map_err(broken)?,
            Some(base) => {
                if !is_vhd || !base.disk.kind().map_err(broken)?.is_vhd() {
                    return Err(VhdExportError::NotVhd);
                }
                disk.difference_blocks(&base.disk).map_err(broken)?
            }
        };
        let mut blocks = VecDeque::new();
        for range in
            extents.align_outward(VHD_BLOCK_BYTES, size).runs().iter().flat_map(|run| run.pieces(VHD_BLOCK_BYTES))
        {
            let keep = is_vhd || read_block(&disk, disk_size, range).map_err(broken)?.iter().any(|&byte| byte != 0);
            let number = u32::try_from(range.start() / VHD_BLOCK_BYTES).unwrap_or(UNUSED_ENTRY);
            blocks.extend(keep.then_some(number));
        }
        let footer = footer(size, if base.is_some() { DIFFERENCING } else { DYNAMIC });
        let mut head = BytesMut::from(footer.as_ref());
        head.extend_from_slice(&header(size, base));
        head.put_bytes(0, 512);
        head.extend_from_slice(&table(size, &blocks));
        let length = (head.len() + footer.len()) as u64 + blocks.len() as u64 * PLACE_SECTORS * SECTOR_BYTES;
        Ok(Self { disk, disk_size, length, head: head.freeze(), blocks, footer: Some(footer) })
    }

    /// Length of the whole stream in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The next piece, `None` at the end. Blocks on file I/O.
    ///
    /// # Errors
    /// The disk's reading error; the stream is over then.
    pub fn next_piece(&mut self) -> io::Result<Option<Bytes>> {
        if !self.head.is_empty() {
            let length = self.head.len().min(1 << 20);
            return Ok(Some(self.head.split_to(length)));
        }
        let Some(block) = self.blocks.pop_front() else { return Ok(self.footer.take()) };
        let start = u64::from(block) * VHD_BLOCK_BYTES;
        let range = ByteRange::with_length(start, VHD_BLOCK_BYTES).map_err(io::Error::other)?;
        let data = read_block(&self.disk, self.disk_size, range).inspect_err(|_| {
            self.blocks.clear();
            self.footer = None;
        })?;
        // The last block of a disk that ends within it is sent whole.
        let mut piece = BytesMut::with_capacity(data.len() + 512);
        piece.put_bytes(0xff, 512);
        piece.extend_from_slice(&data);
        let whole = usize::try_from(PLACE_SECTORS * SECTOR_BYTES).unwrap_or_default();
        piece.put_bytes(0, whole.saturating_sub(piece.len()));
        Ok(Some(piece.freeze()))
    }

    /// The pieces as a stream that reads on a thread for blocking work, one piece for each poll: back-pressure by
    /// not asking.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        futures::stream::try_unfold(self, |mut export| async move {
            let read = tokio::task::spawn_blocking(move || export.next_piece().map(|piece| (piece, export)));
            let (piece, export) = read.await.map_err(io::Error::other)??;
            Ok(piece.map(|piece| (piece, export)))
        })
    }
}

/// What of a block lies inside the disk.
fn read_block(disk: &Disk, disk_size: u64, range: ByteRange) -> io::Result<Bytes> {
    let inside = range.intersect(ByteRange::up_to(disk_size));
    inside.map_or_else(|| Ok(Bytes::new()), |inside| disk.read(inside))
}

/// Adds up a structure whose checksum field is still zero.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(0_u32, |sum, &byte| sum.wrapping_add(u32::from(byte)))
}

/// Puts the checksum of `bytes` into them.
fn seal(mut bytes: BytesMut, at: usize) -> Bytes {
    let sum = checksum(&bytes);
    if let Some(field) = bytes.get_mut(at..at + 4) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
    bytes.freeze()
}

fn footer(size: u64, disk_type: u32) -> Bytes {
    let mut footer = BytesMut::with_capacity(512);
    footer.put_slice(b"conectix");
    footer.put_u32(2); // features: the reserved bit
    footer.put_u32(0x0001_0000);
    footer.put_u64(HEADER_OFFSET);
    footer.put_u32(0); // no time
    footer.put_slice(b"caml");
    footer.put_u32(1); // its version
    footer.put_u32(0); // no host system
    footer.put_u64(size);
    footer.put_u64(size);
    footer.put_slice(&geometry(size));
    footer.put_u32(disk_type);
    footer.put_u32(0);
    footer.put_slice(Uuid::new_v4().as_bytes());
    footer.put_bytes(0, 512 - footer.len());
    seal(footer, 64)
}

/// Cylinders (two bytes), heads and sectors of a track, by vhd-tool's own reading of the specification.
fn geometry(size: u64) -> [u8; 4] {
    let sectors = (size / SECTOR_BYTES).min(65_535 * 255 * 16);
    let (per_track, heads) = if sectors > 65_535 * 63 * 16 {
        (255, 16)
    } else {
        let heads = (sectors / 17).div_ceil(1024).max(4);
        if sectors / 17 < heads * 1024 && heads <= 16 {
            (17, heads)
        } else if sectors / 31 < 16 * 1024 {
            (31, 16)
        } else {
            (63, 16)
        }
    };
    let cylinders = u16::try_from(sectors / per_track / heads).unwrap_or(u16::MAX);
    let [high, low] = cylinders.to_be_bytes();
    [high, low, u8::try_from(heads).unwrap_or_default(), u8::try_from(per_track).unwrap_or_default()]
}

fn header(size: u64, base: Option<&VhdBase>) -> Bytes {
    let mut header = BytesMut::with_capacity(1024);
    header.put_slice(b"cxsparse");
    header.put_u64(u64::MAX);
    header.put_u64(TABLE_OFFSET);
    header.put_u32(0x0001_0000);
    header.put_u32(entries(size));
    header.put_u32(u32::try_from(VHD_BLOCK_BYTES).unwrap_or_default());
    header.put_u32(0);
    header.put_slice(base.map(|base| base.footer_uuid).unwrap_or_default().as_bytes());
    header.put_u32(0); // parent's time
    header.put_u32(0);
    let path = base.map(|base| base.path.as_str()).unwrap_or_default();
    // Each byte becomes one UTF-16 unit, whatever it was.
    path.bytes().take(256).for_each(|byte| header.put_u16(u16::from(byte)));
    header.put_bytes(0, 64 + 512 - header.len());
    if base.is_some() {
        // One locator with room and a length; its sector in the stream holds zeros all the same.
        header.put_slice(b"MacX");
        header.put_u32(1);
        header.put_u32(u32::try_from("file://".len() + path.len()).unwrap_or_default());
        header.put_u32(0);
        header.put_u64(LOCATOR_OFFSET);
    }
    header.put_bytes(0, 1024 - header.len());
    seal(header, 36)
}

fn entries(size: u64) -> u32 {
    u32::try_from(size.div_ceil(VHD_BLOCK_BYTES)).unwrap_or(u32::MAX)
}

fn table(size: u64, blocks: &VecDeque<u32>) -> Bytes {
    let entries = entries(size);
    let length = (u64::from(entries) * 4).next_multiple_of(SECTOR_BYTES);
    let mut table = BytesMut::with_capacity(usize::try_from(length).unwrap_or_default());
    let mut sector = (TABLE_OFFSET + length) / SECTOR_BYTES;
    let mut wanted = blocks.iter().copied().peekable();
    for block in 0..entries {
        if wanted.next_if_eq(&block).is_some() {
            table.put_u32(u32::try_from(sector).unwrap_or(UNUSED_ENTRY));
            sector += PLACE_SECTORS;
        } else {
            table.put_u32(UNUSED_ENTRY);
        }
    }
    let padding = usize::try_from(length).unwrap_or_default().saturating_sub(table.len());
    table.put_bytes(0xff, padding);
    table.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first 64 bytes of a recorded export of an 8 MiB disk.
    #[test]
    fn the_footer_equals_the_recorded_one() {
        let recorded: [u8; 64] = [
            0x63, 0x6f, 0x6e, 0x65, 0x63, 0x74, 0x69, 0x78, 0x00, 0x00, 0x00, 0x02, 0x00, 0x01, 0x00, 0x00, 0x00, 0x00,
            0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x63, 0x61, 0x6d, 0x6c, 0x00, 0x00, 0x00, 0x01,
            0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x80,
            0x00, 0x00, 0x00, 0xf0, 0x04, 0x11, 0x00, 0x00, 0x00, 0x03,
        ];
        assert_eq!(footer(8 << 20, DYNAMIC)[..64], recorded);
    }
}
