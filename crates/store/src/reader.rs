//! Reading the disk of a point: at random, as a stream, or only where there is data.

use bytes::Bytes;
use futures::stream::BoxStream;
use xenvault_block::{ByteRange, ExtentSet};

use crate::StoreError;

/// Bounds of a stream.
#[derive(Clone, Copy, Debug)]
pub struct ReadOptions {
    /// How many bytes may be on their way at once.
    pub window_bytes: u64,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { window_bytes: 16 * 1024 * 1024 }
    }
}

/// The content of one disk. Clones share a cache; reads may run at the same time.
///
/// Every byte that is returned was authenticated, and hashed again to the chunk id that the map names.
#[derive(Clone, Debug)]
pub struct DiskReader {}

impl DiskReader {
    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// The bytes of `range`, zeros included. Memory: the length of the range, so ask for at most some MiB.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the range passes the end of the disk; [`StoreError::DiskRange`] with the bytes that
    /// can not be read and the object that is to blame.
    pub async fn read_at(&self, range: ByteRange) -> Result<Bytes, StoreError> {
        todo!()
    }

    /// Where in `range` there is data. Reads map pages only. Granularity 4 KiB (cut at the end of the disk).
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub async fn extents(&self, range: ByteRange) -> Result<ExtentSet, StoreError> {
        todo!()
    }

    /// The data of `range` in ascending order as pieces `(offset, bytes)` of at most 256 KiB; zero blocks are left
    /// out. Read ahead in parallel within `options.window_bytes`. Ends after the first error.
    pub fn stream(
        &self,
        range: ByteRange,
        options: ReadOptions,
    ) -> BoxStream<'static, Result<(u64, Bytes), StoreError>> {
        todo!()
    }
}
