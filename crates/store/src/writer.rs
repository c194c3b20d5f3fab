//! Writing a run: disks and blobs, then the point.

use std::sync::Arc;

use bytes::Bytes;
use xenvault_store_format::{
    BLOB_PIECE_BYTES, BlobRef, ChunkKind, MAX_BLOB_BYTES, PointId, PointManifest, encode_piece_list, encode_point,
};

use crate::backend::put;
use crate::counters::add;
use crate::packs::Sink;
use crate::pool::WorkerPool;
use crate::repository::{Inner, is_absent};
use crate::{DiskOptions, DiskWriter, StoreError, WriteCounters, names};

/// Bounds of a writer.
#[derive(Clone, Copy, Debug)]
pub struct WriterOptions {
    /// Worker threads; 0 means one per core, at most 8.
    pub threads: usize,
    /// Plain bytes that may be on their way through the writer at once; at least 4 MiB.
    pub memory_bytes: u64,
    /// Level of zstd. Any level can be read.
    pub compression_level: i32,
    /// Plain bytes of new chunks that are compressed together, at most 1 MiB; 0 compresses each chunk for itself.
    pub frame_bytes: usize,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { threads: 0, memory_bytes: 16 * 1024 * 1024, compression_level: 1, frame_bytes: 256 * 1024 }
    }
}

/// One run that writes. Packs and index segments appear as it goes; nothing refers to them before the point.
///
/// Dropping it at any moment leaves a readable repository; the next run finds and uses the packs that were completed.
#[derive(Debug)]
pub struct Writer {
    sink: Arc<Sink>,
}

impl Writer {
    pub(crate) async fn begin(repository: Arc<Inner>, options: WriterOptions) -> Result<Self, StoreError> {
        let Inner { index, backend, keys, .. } = &*repository;
        if let Err(error) = backend.clean().await {
            tracing::warn!(error = %error, "left-over temporary files can not be removed");
        }
        index.refresh(&**backend, keys).await?;
        // What a killed run has left becomes part of the index now, or of every later start the cost of reading it.
        let stored = index.publish_learned(&**backend, keys).await?;
        let pool = WorkerPool::start(options.threads);
        let pool = pool.map_err(|error| StoreError::io("start threads for", "this process", error))?;
        let sink = Sink::start(repository, pool, options);
        add(&sink.counters.stored_bytes, stored);
        Ok(Self { sink })
    }

    /// Live counters.
    pub fn counters(&self) -> Arc<WriteCounters> {
        Arc::clone(&self.sink.counters)
    }

    /// Begins a disk.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the base is larger than the disk; what reading the base's root may return.
    pub async fn disk(&self, options: DiskOptions) -> Result<DiskWriter, StoreError> {
        DiskWriter::begin(Arc::clone(&self.sink), options).await
    }

    /// Stores bytes that are no disk. Cheap if they are known.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] beyond 32 GiB; [`StoreError::Full`], [`StoreError::Backend`],
    /// [`StoreError::WriterFailed`].
    pub async fn put_blob(&self, bytes: &[u8]) -> Result<BlobRef, StoreError> {
        let length = bytes.len() as u64;
        if length > MAX_BLOB_BYTES {
            let what = format!("a blob of {length} bytes is too long, the limit is {MAX_BLOB_BYTES}");
            return Err(StoreError::Misuse { what });
        }
        if bytes.len() <= BLOB_PIECE_BYTES {
            let (id, _) = self.sink.offer_whole(ChunkKind::Blob, bytes).await?;
            return Ok(BlobRef { id, length });
        }
        let mut pieces = Vec::new();
        for piece in bytes.chunks(BLOB_PIECE_BYTES) {
            pieces.push(self.sink.offer_whole(ChunkKind::Blob, piece).await?.0);
        }
        let (id, _) = self.sink.offer_whole(ChunkKind::Blob, &encode_piece_list(&pieces)).await?;
        Ok(BlobRef { id, length })
    }

    /// Completes the open packs, so that the disks that are finished can be read with `Repository::disk` before there
    /// is a point: the check sample of a backup is compared with what the repository really returns. Other disks may
    /// be written meanwhile; a call that is dropped has no effect but the packs that it ended.
    ///
    /// # Errors
    /// As [`Self::put_blob`].
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.sink.flush().await
    }

    /// Makes everything durable, packs before index before point, and writes the point last.
    /// When it returns, the point is complete and survives a power cut.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Backend`], [`StoreError::WriterFailed`]: there is no point then.
    /// [`StoreError::Misuse`] if `pool_uuid` or `vm_uuid` can not be part of an object's name, or the point exists.
    pub async fn publish(self, manifest: PointManifest) -> Result<PointId, StoreError> {
        // No sweep exists in this version of the format, so none was seen.
        let manifest = PointManifest { newest_sweep_seen: 0, ..manifest };
        let name = names::point(&manifest.pool_uuid, &manifest.vm_uuid, &manifest.id)?;
        let repository = &self.sink.repository;
        let bytes = encode_point(&repository.keys, &manifest).map_err(|error| StoreError::format(&name, error))?;
        self.sink.flush().await?;
        self.sink.settle().await?;
        match repository.backend.length(&name).await {
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(StoreError::io("look for", &name, error)),
            Ok(_) => {
                let what = format!("restore point {} exists already, and a point is never replaced", manifest.id);
                return Err(StoreError::Misuse { what });
            }
        }
        let length = bytes.len() as u64;
        put(&*repository.backend, &name, Bytes::from(bytes))
            .await
            .map_err(|error| StoreError::io("write", &name, error))?;
        add(&self.sink.counters.stored_bytes, length);
        Ok(manifest.id)
    }
}
