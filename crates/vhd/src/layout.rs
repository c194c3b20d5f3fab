//! A dynamic VHD with blocks of 2 MiB, encoded front to back, all of its length known ahead.
//!
//! Order of the stream: [`DynamicLayout::head`], then for each of [`DynamicLayout::blocks`] the
//! [`DynamicLayout::block_bitmap`] and 2 MiB of data (also the last block of a disk that ends inside it), then
//! [`DynamicLayout::footer`]. It is the order of XenServer's own export.

use uuid::Uuid;
use xenvault_block::{SECTOR_BYTES, VHD_BLOCK_BYTES, VHD_MAX_DISK_BYTES};

use crate::VhdError;
use crate::footer::{FOOTER_BYTES, Footer};
use crate::header::Header;

/// Footer copy, header, and one empty sector.
const TABLE_OFFSET: u64 = 2048;
const HEADER_OFFSET: u64 = 512;
/// A bitmap of one sector, then the data.
const PLACE_SECTORS: u64 = 1 + VHD_BLOCK_BYTES / SECTOR_BYTES;

/// What is free to choose in a VHD.
#[derive(Clone, Debug)]
pub struct LayoutOptions {
    /// Unique id of the file.
    pub uuid: Uuid,
    /// Seconds since 2000-01-01 UTC.
    pub timestamp: u32,
    /// Creator application (`caml` is what XenServer's own export writes; qemu-img then cuts the disk at its geometry).
    pub creator: [u8; 4],
}

/// The lay-out of one dynamic VHD.
///
/// Invariant: the blocks ascend and lie inside the disk.
#[derive(Clone, Debug)]
pub struct DynamicLayout {
    footer: Footer,
    entries: u32,
    blocks: Vec<u32>,
}

impl DynamicLayout {
    /// Plans a VHD that holds the given blocks (numbers of 2 MiB blocks, ascending).
    ///
    /// # Errors
    /// [`VhdError::VirtualSize`], [`VhdError::TooLarge`] over 2040 GiB, [`VhdError::BlockOrder`].
    pub fn new(virtual_size: u64, blocks: Vec<u32>, options: &LayoutOptions) -> Result<Self, VhdError> {
        if virtual_size == 0 || !virtual_size.is_multiple_of(SECTOR_BYTES) {
            return Err(VhdError::VirtualSize { found: virtual_size });
        }
        let too_large = VhdError::TooLarge { wanted: virtual_size, limit: VHD_MAX_DISK_BYTES };
        if virtual_size > VHD_MAX_DISK_BYTES {
            return Err(too_large);
        }
        let entries = u32::try_from(virtual_size.div_ceil(VHD_BLOCK_BYTES)).map_err(|_| too_large)?;
        let mut next = 0;
        for &block in &blocks {
            if block < next || block >= entries {
                return Err(VhdError::BlockOrder { block });
            }
            next = block + 1;
        }
        let footer = Footer {
            data_offset: HEADER_OFFSET,
            current_size: virtual_size,
            timestamp: options.timestamp,
            creator: options.creator,
            uuid: options.uuid,
        };
        Ok(Self { footer, entries, blocks })
    }

    /// Footer copy, header, one empty sector, block allocation table in whole sectors.
    pub fn head(&self) -> Vec<u8> {
        let header = Header {
            table_offset: TABLE_OFFSET,
            table_entries: self.entries,
            // 2 MiB fits.
            block_bytes: u32::try_from(VHD_BLOCK_BYTES).unwrap_or(u32::MAX),
        };
        let mut head = Vec::with_capacity(usize::try_from(self.data_offset()).unwrap_or(0));
        head.extend_from_slice(&self.footer.encode());
        head.extend_from_slice(&header.encode());
        head.resize(usize::try_from(TABLE_OFFSET).unwrap_or(0), 0);
        let mut allocated = self.blocks.iter().copied().peekable();
        let mut sector = self.data_offset() / SECTOR_BYTES;
        for block in 0..self.entries {
            let entry = if allocated.next_if_eq(&block).is_some() {
                // 2040 GiB of blocks end below sector 2^32.
                let here = u32::try_from(sector).unwrap_or(u32::MAX);
                sector += PLACE_SECTORS;
                here
            } else {
                u32::MAX
            };
            head.extend_from_slice(&entry.to_be_bytes());
        }
        head.resize(head.len().next_multiple_of(512), 0xFF);
        head
    }

    /// The blocks in the order in which they are to be sent.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// The sector bitmap in front of every block's data: all ones.
    pub fn block_bitmap(&self) -> [u8; 512] {
        [0xFF; 512]
    }

    /// The footer at the end.
    pub fn footer(&self) -> [u8; 512] {
        self.footer.encode()
    }

    /// Length of the whole stream in bytes.
    pub fn stream_bytes(&self) -> u64 {
        self.data_offset() + self.blocks.len() as u64 * PLACE_SECTORS * SECTOR_BYTES + FOOTER_BYTES as u64
    }

    /// Where the first block begins, in bytes.
    fn data_offset(&self) -> u64 {
        TABLE_OFFSET + (u64::from(self.entries) * 4).next_multiple_of(SECTOR_BYTES)
    }
}
