//! Writing a run: disks and blobs, then the point.

use std::sync::Arc;

use bytes::Bytes;
use xenvault_block::ByteRange;
use xenvault_store_format::{BlobRef, DiskMapRef, PointId, PointManifest};

use crate::{StoreError, WriteCounters};

/// Bounds of a writer.
#[derive(Clone, Copy, Debug)]
pub struct WriterOptions {
    /// Worker threads; 0 means one per core, at most 8.
    pub threads: usize,
    /// Plain bytes that may be on their way through the writer at once.
    pub memory_bytes: u64,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { threads: 0, memory_bytes: 32 * 1024 * 1024 }
    }
}

/// How a disk is written.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// The map of the base point. With it, what is never written keeps the base's content; without, it is zero.
    /// The base may be smaller than the disk (bytes beyond it were zero), never larger.
    pub base: Option<DiskMapRef>,
}

/// One run that writes. Packs and index segments appear as it goes; nothing refers to them before the point.
///
/// Dropping it at any moment leaves a readable repository; the next run finds and uses the packs that were completed.
#[derive(Debug)]
pub struct Writer {}

/// What one disk cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskStats {
    /// Bytes handed in, zeros that were declared included.
    pub read_bytes: u64,
    /// Bytes in all-zero blocks.
    pub zero_bytes: u64,
    /// Bytes of chunks that the repository knew already.
    pub dedup_bytes: u64,
    /// Plain bytes of new chunks.
    pub new_bytes: u64,
    /// Unchanged bytes read back from the repository.
    pub base_bytes: u64,
    /// New map pages.
    pub new_pages: u64,
}

/// A disk that was written to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskResult {
    /// The content, for the point's manifest.
    pub map: DiskMapRef,
    /// What it cost.
    pub stats: DiskStats,
}

/// Writes one disk in ascending order. Several disks of one [`Writer`] may be written at the same time.
#[derive(Debug)]
pub struct DiskWriter {}

impl Writer {
    /// Live counters.
    pub fn counters(&self) -> Arc<WriteCounters> {
        todo!()
    }

    /// Begins a disk.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the base is larger than the disk; what reading the base's root may return.
    pub async fn disk(&self, options: DiskOptions) -> Result<DiskWriter, StoreError> {
        todo!()
    }

    /// Stores bytes that are no disk. Cheap if they are known.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Backend`], [`StoreError::WriterFailed`].
    pub async fn put_blob(&self, bytes: &[u8]) -> Result<BlobRef, StoreError> {
        todo!()
    }

    /// Completes the open packs, so that the disks that are finished can be read with `Repository::disk` before there
    /// is a point: the check sample of a backup is compared with what the repository really returns.
    ///
    /// # Errors
    /// As [`Self::put_blob`].
    pub async fn flush(&self) -> Result<(), StoreError> {
        todo!()
    }

    /// Makes everything durable, packs before index before point, and writes the point last.
    /// When it returns, the point is complete and survives a power cut.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Backend`], [`StoreError::WriterFailed`]: there is no point then.
    /// [`StoreError::Misuse`] if `pool_uuid` or `vm_uuid` can not be part of an object's name.
    pub async fn publish(self, manifest: PointManifest) -> Result<PointId, StoreError> {
        todo!()
    }
}

impl DiskWriter {
    /// Hands in the content of the bytes at `offset`. Waits while too much is on its way.
    ///
    /// Calls come in ascending order and do not overlap; any alignment works, whole 4 KiB blocks are cheapest.
    /// Whether the call is dropped half way or fails, the disk can not be finished afterwards.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the order is broken or the disk's end passed; [`StoreError::Full`],
    /// [`StoreError::Backend`], [`StoreError::WriterFailed`]; [`StoreError::DiskRange`] if the base can not be read.
    pub async fn write(&mut self, offset: u64, data: Bytes) -> Result<(), StoreError> {
        todo!()
    }

    /// Declares that `range` is zero. As [`Self::write`] with zeros, at no cost for whole blocks.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn zero(&mut self, range: ByteRange) -> Result<(), StoreError> {
        todo!()
    }

    /// Completes the map. The content is durable only after [`Writer::publish`].
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn finish(self) -> Result<DiskResult, StoreError> {
        todo!()
    }
}
