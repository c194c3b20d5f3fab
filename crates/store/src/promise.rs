//! What a repository promises about its objects: given after it was tried out, held against everything that forgets.

use std::sync::Arc;
use std::time::Duration;

use xenvault_store_format::Immutability;

use crate::backend::Backend;
use crate::keep::now;
use crate::repository::Inner;
use crate::{Repository, StoreError};

/// Tries whether the place keeps what is to be promised; from then on it does so.
pub(crate) async fn try_out(backend: &dyn Backend, promise: Immutability) -> Result<(), StoreError> {
    match promise {
        Immutability::None => {}
        Immutability::Broker if backend.takes_broker() => {}
        Immutability::Broker => {
            let text = "a broker takes over files of a local folder; in a bucket, locks protect objects";
            let source = std::io::Error::new(std::io::ErrorKind::Unsupported, text);
            return Err(StoreError::LockNotKept { source });
        }
        Immutability::ObjectLock { mode, .. } => {
            match backend.probe_lock(mode).await {
                Err(source) if source.kind() == std::io::ErrorKind::Unsupported => {
                    return Err(StoreError::LockNotKept { source });
                }
                tried => tried.map_err(|error| StoreError::io("try locks in", "the store", error))?,
            }
            keep(backend, promise);
        }
    }
    Ok(())
}

/// Tells the place what is promised. Says whether what is written there is as promised.
pub(crate) fn keep(backend: &dyn Backend, promise: Immutability) -> bool {
    match promise {
        Immutability::ObjectLock { mode, seconds } => backend.lock(mode, Duration::from_secs(seconds)),
        Immutability::None | Immutability::Broker => true,
    }
}

impl Repository {
    /// What the repository promises about its objects.
    pub fn immutability(&self) -> Immutability {
        self.inner.config.immutability
    }

    /// The same repository as if nobody had ever forgotten or swept anything in it: every point that is there is listed
    /// as one. What is in the packs is read from the packs. For reading only. Whoever has a datamover's key can write tombstones and sweeps, and hide points so.
    ///
    /// # Errors
    /// [`StoreError::Backend`] if no thread can be started.
    pub fn without_deletions(&self) -> Result<Self, StoreError> {
        let (keys, slot) = (Arc::clone(&self.inner.keys), Arc::clone(&self.inner.slot));
        let mut opened = Self::assemble(Arc::clone(&self.inner.backend), keys, slot, self.inner.config.clone())?;
        if let Some(inner) = Arc::get_mut(&mut opened.inner) {
            inner.ignore_deletions = true;
            inner.index.believe_packs_only();
        }
        Ok(opened)
    }
}

impl Inner {
    /// Whether this may be written to.
    pub(crate) fn writable(&self) -> Result<(), StoreError> {
        if self.ignore_deletions {
            let what = "a repository that is read as if nothing was ever forgotten can only be read".to_owned();
            return Err(StoreError::Misuse { what });
        }
        if !self.is_locking {
            let promise = self.config.immutability;
            let what = format!(
                "the repository promises {promise}, and nothing is locked where it lies now: it can only be read here"
            );
            return Err(StoreError::Misuse { what });
        }
        Ok(())
    }
}

/// Whether a point can not be removed yet: its promise has not ended, by the store's clock. Tombstones wait for it.
pub(crate) async fn is_promised(repository: &Inner, name: &str) -> Result<bool, StoreError> {
    let Some(period) = repository.config.immutability.period() else { return Ok(false) };
    match repository.backend.modified(name).await {
        Ok(appeared) => Ok(appeared + period > now(repository).await?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("ask for the time of", name, error)),
    }
}

/// Whether an object is locked and can not be removed yet, by what the store says of its lock.
pub(crate) async fn is_held(repository: &Inner, name: &str) -> Result<bool, StoreError> {
    let held = crate::backend::is_held(&*repository.backend, name).await;
    held.map_err(|error| StoreError::io("ask for the lock of", name, error))
}
