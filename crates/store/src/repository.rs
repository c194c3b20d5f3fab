//! An open repository: keys, settings, index, and the way from a chunk id to its bytes.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use xenvault_store_format::{
    BlobRef, ChunkId, ChunkKind, Config, DiskMapRef, FormatError, Immutability, IndexEntry, KdfParams, Keys, MasterKey,
    PointId, RepositoryId, Secret, StoredConfig, decode_piece_list,
};

use crate::backend::{Backend, LocalFolder, get, lock_folder, put};
use crate::cache::Cache;
use crate::fetch::OpenedFrames;
use crate::index::{Index, IndexCache, IndexCacheOptions};
use crate::pack_keys::PackKeys;
use crate::pool::WorkerPool;
use crate::slots::{SharedSlot, first_slot, unlock};
use crate::sweeps::Sweeps;
use crate::{
    DiskReader, PlaceFacts, Point, PointFilter, PointListing, StoreError, Writer, WriterOptions, names, place, points,
    promise,
};

pub(crate) const MAX_CONFIG_BYTES: usize = 128 * 1024;
/// Memory for map pages that were read last.
const PAGE_CACHE_BYTES: usize = 4 * 1024 * 1024;
/// Memory for frames of disks that were read last.
const FRAME_CACHE_BYTES: usize = 32 * 1024 * 1024;

/// How a repository is made.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct InitOptions {
    /// Cost of deriving the key from the passphrase.
    pub kdf: KdfParams,
    /// Packs are closed when they reach this size in bytes; 64 KiB to 32 MiB.
    pub pack_target_bytes: u32,
    /// What is to protect the objects; locks are tried out before they are promised.
    pub immutability: Immutability,
    /// A chunk ends after one of 2 to the power of this many blocks of 4 KiB; at most 8.
    pub cut_bits: u8,
    /// Largest chunk in blocks of 4 KiB; 1 to 256.
    pub max_chunk_blocks: u16,
}

impl Default for InitOptions {
    fn default() -> Self {
        let config = Config::new(RepositoryId::from_bytes([0; 16]), 0);
        Self {
            kdf: KdfParams::default(),
            pack_target_bytes: config.pack_target_bytes,
            cut_bits: config.cut_bits,
            max_chunk_blocks: config.max_chunk_blocks,
            immutability: Immutability::None,
        }
    }
}

/// An open repository. Clones share everything; all methods may run at the same time.
#[derive(Clone, Debug)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) keys: Arc<Keys>,
    pub(crate) slot: SharedSlot,
    pub(crate) config: Config,
    pub(crate) index: Index,
    pub(crate) pages: Cache<ChunkId, crate::map::Page>,
    pub(crate) opened_frames: OpenedFrames,
    pub(crate) sweeps: Sweeps,
    pub(crate) pack_keys: Arc<PackKeys>,
    /// Tombstones and sweeps are not looked at.
    pub(crate) ignore_deletions: bool,
    /// Whether objects are locked as promised when they are written here.
    pub(crate) is_locking: bool,
    pub(crate) pool: Arc<WorkerPool>,
}

impl Repository {
    /// Makes a repository in a folder that is empty or does not exist yet, and opens it.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`]; [`StoreError::Full`] and [`StoreError::Backend`] if the folder can not be written.
    pub async fn init(path: &Path, passphrase: &Secret, options: InitOptions) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io("make", &path.to_string_lossy(), error);
        // Held until the end: of two who make a repository at once, the second one finds that of the first.
        let _alone = lock_folder(path).await.map_err(failed)?;
        if !is_free(path).map_err(failed)? {
            return Err(StoreError::NotEmpty { path: path.to_owned() });
        }
        Self::init_on(Arc::new(LocalFolder::new(path)), passphrase, options).await
    }

    /// As [`Self::init`], on any backend. At a service, what it really does is found out in the folder and written down;
    /// of a folder, what is there is the caller's business.
    ///
    /// # Errors
    /// [`StoreError::Full`] and [`StoreError::Backend`]; [`StoreError::LockNotKept`] if the store does not keep what is
    /// to be promised; at a service also [`StoreError::NotEmpty`], [`StoreError::Within`], and [`StoreError::Unfit`] if it
    /// does not keep what every repository needs.
    pub async fn init_on(
        backend: Arc<dyn Backend>,
        passphrase: &Secret,
        options: InitOptions,
    ) -> Result<Self, StoreError> {
        Self::make(backend, passphrase, options, None).await
    }

    /// As [`Self::init_on`]; equal content has equal ids in both repositories then, and is cut alike, so that points can be
    /// copied between them by what is missing. Whoever can read both sees what they have in common; keys of content are
    /// not shared.
    ///
    /// # Errors
    /// As [`Self::init_on`].
    pub async fn init_sharing_ids(
        backend: Arc<dyn Backend>,
        passphrase: &Secret,
        options: InitOptions,
        with: &Self,
    ) -> Result<Self, StoreError> {
        let Config { cut_bits, max_chunk_blocks, .. } = with.inner.config;
        let options = InitOptions { cut_bits, max_chunk_blocks, ..options };
        Self::make(backend, passphrase, options, Some(&with.inner.keys)).await
    }

    /// Whether equal content has equal ids in both.
    pub fn shares_ids_with(&self, other: &Self) -> bool {
        self.inner.keys.shares_ids_with(&other.inner.keys)
    }

    async fn make(
        backend: Arc<dyn Backend>,
        passphrase: &Secret,
        options: InitOptions,
        sharing: Option<&Keys>,
    ) -> Result<Self, StoreError> {
        if backend.service().is_some() || backend.oldest_counts() {
            place::must_be_free(&*backend).await?;
        }
        promise::try_out(&*backend, options.immutability).await?;
        let repository = RepositoryId::random();
        let made = |error| StoreError::format(names::FIRST_KEY, error);
        let mut master = MasterKey::random().map_err(made)?;
        if let Some(other) = sharing {
            master = master.sharing_ids_with(other);
        }
        let keys = Keys::derive(master, repository).map_err(made)?;
        let slot = first_slot(&keys, passphrase, options.kdf).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut config = Config::new(repository, u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        config.pack_target_bytes = options.pack_target_bytes;
        config.immutability = options.immutability;
        config.versioned = backend.oldest_counts();
        config.cut_bits = options.cut_bits;
        config.max_chunk_blocks = options.max_chunk_blocks;
        if backend.service().is_some() {
            place::find_out(&*backend, &mut config).await?;
        }
        let encoded = config.encode(&keys).map_err(|error| StoreError::format(names::CONFIG, error))?;
        // The config makes it a repository, so it comes last.
        place::make(&*backend, slot.slot.encode(), encoded).await?;
        Self::assemble(backend, Arc::new(keys), Arc::new(slot), config)
    }

    /// Opens the repository in a folder, with a passphrase or the text of a recovery key.
    ///
    /// Deriving the key takes a few tenths of a second and 64 MiB, which are given back.
    ///
    /// # Errors
    /// [`StoreError::NotARepository`], [`StoreError::WrongPassphrase`], [`StoreError::RecoveryKey`],
    /// [`StoreError::NoSlotOpens`], [`StoreError::NewerFormat`], [`StoreError::Damaged`] are told apart;
    /// [`StoreError::Backend`] if the folder can not be read.
    pub async fn open(path: &Path, passphrase: &Secret) -> Result<Self, StoreError> {
        Self::open_on(Arc::new(LocalFolder::new(path)), passphrase).await
    }

    /// As [`Self::open`], on any backend.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_on(backend: Arc<dyn Backend>, passphrase: &Secret) -> Result<Self, StoreError> {
        let nothing = || StoreError::NotARepository { path: backend.location() };
        let stored = match get(&*backend, names::CONFIG, MAX_CONFIG_BYTES).await {
            Err(error) if is_absent(&error) => return Err(nothing()),
            bytes => bytes.map_err(|error| StoreError::io("read", names::CONFIG, error))?,
        };
        let stored = match StoredConfig::decode(&stored) {
            // Other programs have files of this name too.
            Err(FormatError::Magic { .. }) => return Err(nothing()),
            decoded => decoded.map_err(|error| StoreError::format(names::CONFIG, error))?,
        };
        let (keys, slot) = unlock(&*backend, stored.repository(), passphrase).await?;
        let mut config = stored.verify(&keys).map_err(|error| StoreError::format(names::CONFIG, error))?;
        if backend.service().is_some_and(|service| service != config.service) {
            // It has moved here, by a copy of its objects.
            Self::arrive(&*backend, &keys, &mut config).await?;
        }
        Self::assemble(backend, Arc::new(keys), Arc::new(slot), config)
    }

    /// Finds out what the service does that the repository is at now for the first time, and writes it down.
    async fn arrive(backend: &dyn Backend, keys: &Keys, config: &mut Config) -> Result<(), StoreError> {
        let mut found = config.clone();
        let written = match place::find_out(backend, &mut found).await {
            Ok(()) => {
                let encoded = found.encode(keys).map_err(|error| StoreError::format(names::CONFIG, error))?;
                put(backend, names::CONFIG, encoded.into()).await
            }
            Err(StoreError::Backend { source, .. }) => Err(source),
            Err(error) => return Err(error),
        };
        match written {
            Ok(()) => *config = found,
            // Keys that may only read.
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                tracing::warn!("these keys may not find out what the object store does: nothing is promised");
                (config.conditional_put, config.versioned) = (false, false);
            }
            Err(error) => return Err(StoreError::io("write", names::CONFIG, error)),
        }
        Ok(())
    }

    /// Keeps copies of index segments on this machine from now on. Only of use where the repository has no files of its own
    /// that can be mapped; whatever happens to the copies, it costs time and nothing else. Only the first call counts.
    pub fn cache_index(&self, options: IndexCacheOptions) {
        self.inner.index.cache(IndexCache::new(options, self.id()));
    }

    /// What was found out about the place that the repository is at.
    pub fn place(&self) -> PlaceFacts {
        PlaceFacts::of(&self.inner.config)
    }

    /// The same repository, opened anew on a backend without deriving the key again. Nothing is shared but the keys.
    ///
    /// # Errors
    /// [`StoreError::Backend`] if no thread can be started.
    pub fn reopen_on(&self, backend: Arc<dyn Backend>) -> Result<Self, StoreError> {
        Self::assemble(backend, Arc::clone(&self.inner.keys), Arc::clone(&self.inner.slot), self.inner.config.clone())
    }

    pub(crate) fn assemble(
        backend: Arc<dyn Backend>,
        keys: Arc<Keys>,
        slot: SharedSlot,
        config: Config,
    ) -> Result<Self, StoreError> {
        let is_locking = promise::keep(&*backend, config.immutability);
        let pool = WorkerPool::start(0).map_err(|error| StoreError::io("start threads for", "this process", error))?;
        let (pages, opened_frames) = (Cache::new(PAGE_CACHE_BYTES), Cache::new(FRAME_CACHE_BYTES));
        Ok(Self {
            inner: Arc::new(Inner {
                backend,
                keys,
                slot,
                config,
                index: Index::default(),
                pages,
                opened_frames,
                sweeps: Sweeps::default(),
                pack_keys: Arc::default(),
                ignore_deletions: false,
                is_locking,
                pool: Arc::new(pool),
            }),
        })
    }

    /// Identity of the repository.
    pub fn id(&self) -> RepositoryId {
        self.inner.keys.repository()
    }

    /// Where the repository is, for messages.
    pub fn location(&self) -> std::path::PathBuf {
        self.inner.backend.location()
    }

    /// The points that fit, and those that can not be read. Cost: one small read per point.
    ///
    /// # Errors
    /// [`StoreError::Backend`] if the folder can not be listed. A point that can not be read is part of the answer.
    pub async fn points(&self, filter: &PointFilter) -> Result<PointListing, StoreError> {
        points::list(&self.inner, filter).await
    }

    /// One point.
    ///
    /// # Errors
    /// [`StoreError::UnknownPoint`]; [`StoreError::Damaged`] or [`StoreError::NewerFormat`] if it can not be read.
    pub async fn point(&self, id: &PointId) -> Result<Point, StoreError> {
        points::find(&self.inner, id).await
    }

    /// The bytes of a blob.
    ///
    /// # Errors
    /// [`StoreError::ChunkMissing`], [`StoreError::Damaged`], [`StoreError::Backend`].
    pub async fn blob(&self, blob: &BlobRef) -> Result<Vec<u8>, StoreError> {
        let object = || format!("blob {}", blob.id);
        let first = self.inner.chunk(&blob.id, blob.kind()).await?;
        let mut bytes = Vec::new();
        if blob.kind() == ChunkKind::Blob {
            bytes.extend_from_slice(&first);
        } else {
            let pieces =
                decode_piece_list(&first, blob.length).map_err(|error| StoreError::format(&object(), error))?;
            for piece in pieces {
                bytes.extend_from_slice(&self.inner.chunk(&piece, ChunkKind::Blob).await?);
            }
        }
        if bytes.len() as u64 != blob.length {
            let source = format!("{} bytes instead of {}", bytes.len(), blob.length).into();
            return Err(StoreError::Damaged { object: object(), source });
        }
        Ok(bytes)
    }

    /// Whether the index, as it was loaded last, knows a sound copy of this chunk.
    pub fn knows(&self, id: &ChunkId, kind: ChunkKind) -> bool {
        self.inner.index.find(id, kind).is_some()
    }

    /// A reader of one disk of a point. Reads nothing yet.
    pub fn disk(&self, map: &DiskMapRef) -> DiskReader {
        DiskReader::new(Arc::clone(&self.inner), *map)
    }

    /// Begins a run that writes. Nothing in the repository changes what existing points say, whatever happens to it.
    ///
    /// # Errors
    /// [`StoreError::Backend`] if the index can not be read.
    pub async fn writer(&self, options: WriterOptions) -> Result<Writer, StoreError> {
        self.inner.writable()?;
        Writer::begin(Arc::clone(&self.inner), options).await
    }
}

impl Inner {
    /// The plain bytes of a chunk: found, read, authenticated, unpacked, and hashed again to its id.
    pub(crate) async fn chunk(self: &Arc<Self>, id: &ChunkId, kind: ChunkKind) -> Result<Bytes, StoreError> {
        let mut copies = self.index.copies(id, kind);
        if copies.is_empty() {
            // Another writer may have published it since the index was read.
            copies = self.index.fresh_copies(&*self.backend, &self.keys, id, kind).await?;
        }
        // Before something is called lost: the packs themselves say what is in them.
        if copies.is_empty() && self.index.distrust().await {
            tracing::warn!(chunk = %id, "the index does not know a chunk, so the directories of all packs are read");
            copies = self.index.fresh_copies(&*self.backend, &self.keys, id, kind).await?;
        }
        let mut error = match self.first_copy(&copies).await {
            Ok(Some(bytes)) => return Ok(bytes),
            Ok(None) => return Err(StoreError::ChunkMissing { id: *id }),
            Err(error) => error,
        };
        if error.is_gone() {
            // A sweep may have put it into another pack since the index was read.
            let mut fresh = self.index.fresh_copies(&*self.backend, &self.keys, id, kind).await?;
            fresh.retain(|entry| !copies.contains(entry));
            match self.first_copy(&fresh).await {
                Ok(Some(bytes)) => return Ok(bytes),
                Ok(None) => {}
                Err(other) => error = other,
            }
        }
        Err(error)
    }

    /// The first copy that can be read; the first error if none can.
    async fn first_copy(self: &Arc<Self>, copies: &[IndexEntry]) -> Result<Option<Bytes>, StoreError> {
        let mut first_error = None;
        for entry in copies {
            match self.copy(*entry).await {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(None), Err)
    }

    /// Runs what costs processor time on the worker threads.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        self.pool.run(work).await.map_err(|gone| StoreError::Backend {
            action: "open",
            object: names::PACKS.to_owned(),
            source: std::io::Error::other(gone),
        })
    }
}

/// Whether nothing of value is there: nothing at all, or what an interrupted `init` has left.
fn is_free(path: &Path) -> std::io::Result<bool> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        if ![names::KEYS, "tmp", "lost+found"].iter().any(|known| name == *known) {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(crate) fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
}
