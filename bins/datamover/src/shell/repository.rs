//! The repository of a command line: where it is, and the passphrase that opens it.

use super::secrets::{PASSPHRASE, SecretError};
use std::path::PathBuf;
use xenvault_store::{Repository, Secret, StoreError};

/// Options that name a repository.
#[derive(Clone, Debug, clap::Args)]
pub struct RepositoryArguments {
    /// Folder of the repository
    #[arg(long, value_name = "DIR")]
    pub repository: PathBuf,
    /// File whose first line is the passphrase or recovery key; `-` is standard input. Otherwise XENVAULT_PASSPHRASE is used
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

/// Why a repository did not open.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no passphrase.
    #[error(transparent)]
    Secret(#[from] SecretError),
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
    /// [`OpenError::Open`].
    pub async fn open_with(&self, passphrase: &Secret) -> Result<Repository, OpenError> {
        Repository::open(&self.repository, passphrase)
            .await
            .map_err(|source| OpenError::Open { path: self.repository.clone(), source })
    }
}
