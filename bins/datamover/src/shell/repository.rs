//! The repository of a command line: where it is, and the passphrase that opens it.

use super::bucket::{BucketArguments, BucketError, address, meet};
use super::secrets::{PASSPHRASE, SecretError};
use std::path::PathBuf;
use xenvault_store::backend::{Bucket, BucketOptions};
use xenvault_store::{Repository, Secret, StoreError};

/// Options that name a repository.
#[derive(Clone, Debug, clap::Args)]
pub struct RepositoryArguments {
    /// Folder of the repository, or s3://BUCKET/FOLDER
    #[arg(long, value_name = "REPOSITORY")]
    pub repository: PathBuf,
    /// File whose first line is the passphrase or recovery key; `-` is standard input. Otherwise XENVAULT_PASSPHRASE is used
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    #[command(flatten)]
    pub bucket: BucketArguments,
}

/// Why a repository did not open.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no passphrase.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// What is said about the object store can not be used.
    #[error(transparent)]
    Bucket(#[from] BucketError),
    /// There is one, and the repository does not open.
    #[error("the repository at {path} can not be opened", path = path.display())]
    Open {
        /// Its folder.
        path: PathBuf,
        /// Why.
        source: StoreError,
    },
}

impl RepositoryArguments {
    /// Reads the passphrase.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn passphrase(&self) -> Result<Secret, SecretError> {
        let passphrase = PASSPHRASE.read(self.passphrase_file.as_deref())?;
        Ok(Secret::new(passphrase.as_str()))
    }

    /// Opens the repository with a passphrase that was read before.
    ///
    /// # Errors
    /// [`OpenError::Bucket`], [`OpenError::Open`].
    pub async fn open_with(&self, passphrase: &Secret) -> Result<Repository, OpenError> {
        let opened = match self.place()? {
            None => Repository::open(&self.repository, passphrase).await,
            Some(place) => match meet(&place).await {
                Ok(place) => Repository::open_on(place, passphrase).await,
                Err(error) => Err(error),
            },
        };
        let repository = opened.map_err(|source| self.failed(source))?;
        if let Some(cache) = self.bucket.index_cache() {
            repository.cache_index(cache);
        }
        Ok(repository)
    }

    /// The bucket, if it is in one.
    ///
    /// # Errors
    /// [`BucketError`].
    pub fn place(&self) -> Result<Option<BucketOptions>, BucketError> {
        let Some(address) = address(&self.repository) else { return Ok(None) };
        let (bucket, folder) = address?;
        let options = self.bucket.options(bucket, folder)?;
        // What can not be used is told before anything is asked.
        Bucket::s3(&options).map_err(|source| BucketError::Options { source })?;
        Ok(Some(options))
    }

    /// What did not succeed with it.
    pub fn failed(&self, source: StoreError) -> OpenError {
        OpenError::Open { path: self.repository.clone(), source }
    }
}
