//! The bitmap that XenAPI hands out: one bit for 64 KiB, the highest bit of each byte first.

use xenvault_block::ExtentSet;

/// The blocks of 64 KiB of one disk that changed between two snapshots.
///
/// Invariant: the bitmap has exactly as many bytes as the virtual size needs; spare bits at its end are clear.
#[derive(Clone, PartialEq, Eq)]
pub struct ChangedBlocks {
    bitmap: Vec<u8>,
    virtual_size: u64,
}

/// Why a bitmap can not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CbtError {
    /// The bitmap is too long or too short for the disk.
    #[error("the changed-block bitmap has {found} bytes, a disk of {virtual_size} bytes needs {expected}")]
    WrongLength {
        /// Bytes that came.
        found: usize,
        /// Bytes that the virtual size asks for.
        expected: u64,
        /// Virtual size of the disk, in bytes.
        virtual_size: u64,
    },
    /// The text is not standard base64 with padding.
    #[error("the changed-block bitmap is not valid base64")]
    Base64 {
        /// What the decoder says.
        source: base64::DecodeError,
    },
    /// The newer bitmap is of a smaller disk.
    #[error("the disk shrank from {older} to {newer} bytes, so the two bitmaps can not be joined")]
    Shrunk {
        /// Virtual size of the older bitmap, in bytes.
        older: u64,
        /// Virtual size of the newer bitmap, in bytes.
        newer: u64,
    },
    /// A disk so large that its bitmap does not fit the memory of this machine.
    #[error("a disk of {virtual_size} bytes is too large for a changed-block bitmap on this machine")]
    TooLarge {
        /// Virtual size, in bytes.
        virtual_size: u64,
    },
}

impl ChangedBlocks {
    /// Takes a bitmap in XenAPI's order. Spare bits after the last block are ignored.
    ///
    /// # Errors
    /// [`CbtError::WrongLength`]: a bitmap is never padded or cut.
    pub fn parse(_bitmap: &[u8], _virtual_size: u64) -> Result<Self, CbtError> {
        todo!()
    }

    /// Takes the text that `VDI.list_changed_blocks` answers with.
    ///
    /// # Errors
    /// [`CbtError::Base64`], and as [`ChangedBlocks::parse`].
    pub fn parse_base64(_text: &str, _virtual_size: u64) -> Result<Self, CbtError> {
        todo!()
    }

    /// Nothing changed.
    ///
    /// # Errors
    /// [`CbtError::TooLarge`]
    pub fn none(_virtual_size: u64) -> Result<Self, CbtError> {
        todo!()
    }

    /// Everything changed.
    ///
    /// # Errors
    /// [`CbtError::TooLarge`]
    pub fn all(_virtual_size: u64) -> Result<Self, CbtError> {
        todo!()
    }

    /// The changed bytes, neighbours merged, cut at the virtual size.
    pub fn extents(&self) -> ExtentSet {
        todo!()
    }

    /// What changed in this step or in the `newer` one.
    ///
    /// A disk that grew in between: everything beyond the old size counts as changed.
    ///
    /// # Errors
    /// [`CbtError::Shrunk`] if `newer` is of a smaller disk.
    pub fn union(&self, _newer: &Self) -> Result<Self, CbtError> {
        todo!()
    }

    /// The same changes, on a disk that has `virtual_size` bytes now: everything beyond the old size counts as changed.
    ///
    /// # Errors
    /// [`CbtError::Shrunk`] if the disk got smaller.
    pub fn grown_from(&self, _old_virtual_size: u64) -> Result<Self, CbtError> {
        todo!()
    }

    /// How many bytes changed, cut at the virtual size.
    pub fn changed_bytes(&self) -> u64 {
        todo!()
    }

    /// The bitmap in XenAPI's order.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bitmap
    }

    /// Size of the disk, in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }
}

impl std::fmt::Debug for ChangedBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChangedBlocks").field("virtual_size", &self.virtual_size).finish_non_exhaustive()
    }
}
