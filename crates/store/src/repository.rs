//! An open repository.

use std::path::Path;

use xenvault_store_format::{BlobRef, DiskMapRef, PointId, RepositoryId, Secret};

use crate::{DiskReader, Point, PointFilter, PointListing, StoreError, Writer, WriterOptions};

/// How a repository is made.
#[derive(Clone, Debug, Default)]
pub struct InitOptions {}

/// An open repository. Clones share everything; all methods may run at the same time.
#[derive(Clone, Debug)]
pub struct Repository {}

impl Repository {
    /// Makes a repository in a folder that is empty or does not exist yet, and opens it.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`]; [`StoreError::Full`] and [`StoreError::Backend`] if the folder can not be written.
    pub async fn init(path: &Path, passphrase: &Secret, options: InitOptions) -> Result<Self, StoreError> {
        todo!()
    }

    /// Opens the repository in a folder.
    ///
    /// Deriving the key takes a few tenths of a second and 64 MiB, which are given back.
    ///
    /// # Errors
    /// [`StoreError::NotARepository`], [`StoreError::WrongPassphrase`], [`StoreError::NewerFormat`],
    /// [`StoreError::Damaged`] are told apart; [`StoreError::Backend`] if the folder can not be read.
    pub async fn open(path: &Path, passphrase: &Secret) -> Result<Self, StoreError> {
        todo!()
    }

    /// Identity of the repository.
    pub fn id(&self) -> RepositoryId {
        todo!()
    }

    /// The points that fit, and those that can not be read. Cost: one small read per point.
    ///
    /// # Errors
    /// [`StoreError::Backend`] if the folder can not be listed. A point that can not be read is part of the answer.
    pub async fn points(&self, filter: &PointFilter) -> Result<PointListing, StoreError> {
        todo!()
    }

    /// One point.
    ///
    /// # Errors
    /// [`StoreError::UnknownPoint`]; [`StoreError::Damaged`] or [`StoreError::NewerFormat`] if it can not be read.
    pub async fn point(&self, id: &PointId) -> Result<Point, StoreError> {
        todo!()
    }

    /// The bytes of a blob.
    ///
    /// # Errors
    /// [`StoreError::ChunkMissing`], [`StoreError::Damaged`], [`StoreError::Backend`].
    pub async fn blob(&self, blob: &BlobRef) -> Result<Vec<u8>, StoreError> {
        todo!()
    }

    /// A reader of one disk of a point. Reads nothing yet.
    pub fn disk(&self, map: &DiskMapRef) -> DiskReader {
        todo!()
    }

    /// Begins a run that writes. Nothing in the repository changes what existing points say, whatever happens to it.
    ///
    /// # Errors
    /// [`StoreError::Backend`] or [`StoreError::Damaged`] if the index can not be read.
    pub async fn writer(&self, options: WriterOptions) -> Result<Writer, StoreError> {
        todo!()
    }
}
