//! Writing a run: disks and blobs, then the point.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use xenvault_store_format::{
    BLOB_PIECE_BYTES, BlobRef, ChunkId, ChunkKind, MAX_BLOB_BYTES, PointId, PointManifest, encode_piece_list,
};

use crate::counters::add;
use crate::packs::Sink;
use crate::pool::WorkerPool;
use crate::repository::Inner;
use crate::sweeps::SweepState;
use crate::{DiskOptions, DiskWriter, StoreError, WriteCounters, publish};

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
    pub(crate) sink: Arc<Sink>,
    /// The sweeps when the run began: what it refers to without looking again is right as far as these are concerned.
    pub(crate) sweeps: Arc<SweepState>,
    /// Roots of the maps that were taken as bases.
    pub(crate) bases: Mutex<BTreeSet<ChunkId>>,
}

impl Writer {
    pub(crate) async fn begin(repository: Arc<Inner>, options: WriterOptions) -> Result<Self, StoreError> {
        let Inner { index, backend, keys, .. } = &*repository;
        if let Err(error) = backend.clean().await {
            tracing::warn!(error = %error, "left-over temporary files can not be removed");
        }
        // Before the index: what is condemned later is noticed when the point is published.
        let sweeps = repository.look_at_sweeps().await?;
        repository.bar_copies(&sweeps).await?;
        index.refresh(&**backend, keys).await?;
        // What a killed run has left becomes part of the index now, or of every later start the cost of reading it.
        let stored = index.publish_learned(&**backend, keys).await?;
        let pool = WorkerPool::start(options.threads);
        let pool = pool.map_err(|error| StoreError::io("start threads for", "this process", error))?;
        let sink = Sink::start(repository, pool, options);
        add(&sink.counters.stored_bytes, stored);
        Ok(Self { sink, sweeps, bases: Mutex::default() })
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
        if let Some(root) = options.base.and_then(|base| base.root) {
            self.bases.lock().unwrap_or_else(PoisonError::into_inner).insert(root);
        }
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
    /// When it returns, the point is complete and survives a power cut, and no sweep will take anything from it.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Backend`], [`StoreError::WriterFailed`]: there is no point then, unless it was
    /// the medium's answer that was lost. [`StoreError::Overtaken`] if a sweep has removed what the run relied on: a
    /// point that was written is forgotten then. [`StoreError::Misuse`] if `pool_uuid` or `vm_uuid` can not be part of
    /// an object's name, or the point exists.
    pub async fn publish(self, manifest: PointManifest) -> Result<PointId, StoreError> {
        publish::publish(&self, manifest).await
    }
}
