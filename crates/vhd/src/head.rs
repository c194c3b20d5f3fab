//! The head of a dynamic VHD stream to an allocation map.

use xenvault_block::ExtentSet;

use crate::VhdError;

/// Which bytes of a disk are allocated in its VHD; the rest reads as zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocationMap {
    /// Virtual size in bytes (the footer's current size).
    pub virtual_size: u64,
    /// Size of a block in bytes.
    pub block_bytes: u64,
    /// The allocated bytes in whole blocks, in virtual order, cut at the virtual size.
    pub allocated: ExtentSet,
}

/// How far the head has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadProgress {
    /// At least this many bytes more are needed.
    Needs(u64),
    /// All is there: [`HeadParser::finish`] gives the map, the stream can be closed.
    Complete,
}

/// Reads the head of a dynamic VHD stream from pieces of any size. Memory is bounded by the table (at most 4 MiB).
#[derive(Debug, Default)]
pub struct HeadParser {}

impl HeadParser {
    /// Begins at the front of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the stream. Bytes behind the head are ignored.
    ///
    /// # Errors
    /// Everything that makes the head unusable, as soon as it is seen.
    pub fn push(&mut self, _bytes: &[u8]) -> Result<HeadProgress, VhdError> {
        todo!()
    }

    /// Gives the map.
    ///
    /// # Errors
    /// An error that says so if the stream ended too early.
    pub fn finish(self) -> Result<AllocationMap, VhdError> {
        todo!()
    }
}
