//! A dynamic VHD with blocks of 2 MiB, encoded front to back, all of its length known ahead.
//!
//! Order of the stream: [`DynamicLayout::head`], then for each of [`DynamicLayout::blocks`] the
//! [`DynamicLayout::block_bitmap`] and 2 MiB of data (also the last block of a disk that ends inside it), then
//! [`DynamicLayout::footer`].

use uuid::Uuid;

use crate::VhdError;

/// What is free to choose in a VHD.
#[derive(Clone, Debug)]
pub struct LayoutOptions {
    /// Unique id of the file.
    pub uuid: Uuid,
    /// Seconds since 2000-01-01 UTC.
    pub timestamp: u32,
    /// Creator application (`caml` is what XenServer's own export writes).
    pub creator: [u8; 4],
}

/// The lay-out of one dynamic VHD.
#[derive(Clone, Debug)]
pub struct DynamicLayout {
    blocks: Vec<u32>,
}

impl DynamicLayout {
    /// Plans a VHD that holds the given blocks (numbers of 2 MiB blocks, ascending).
    ///
    /// # Errors
    /// A size of 0, over 2040 GiB or no multiple of 512; blocks that do not ascend or pass the end of the disk.
    pub fn new(_virtual_size: u64, _blocks: Vec<u32>, _options: &LayoutOptions) -> Result<Self, VhdError> {
        todo!()
    }

    /// Footer copy, header, one empty sector, block allocation table.
    pub fn head(&self) -> Vec<u8> {
        todo!()
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
        todo!()
    }

    /// Length of the whole stream in bytes.
    pub fn stream_bytes(&self) -> u64 {
        todo!()
    }
}
