//! What a service of objects really does, looked at in the very folder of the repository; and whether that folder is free.
//!
//! Some services accept a condition and ignore it (Garage; Ceph where a bucket keeps versions), so an answer that says yes
//! proves nothing. The safety of a repository leans on none of that, but on objects that can be read and listed once they
//! were written: a service that does not keep this is refused.

use std::io;

use bytes::Bytes;
use futures::future::join_all;
use uuid::Uuid;
use xenvault_store_format::{Config, FormatError, Immutability, StoredConfig};

use crate::StoreError;
use crate::backend::{Backend, get, put};
use crate::names;
use crate::repository::{MAX_CONFIG_BYTES, is_absent};

/// Writers that make the same object at once, of which one must succeed.
const RACERS: u8 = 8;

/// What was found out about the place of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlaceFacts {
    /// The service and folder that it was found out of; `None` for a folder of a file system.
    pub service: Option<String>,
    /// Whether an object can be made on the condition that there is none, and the service keeps to it. Helpful, and
    /// nothing depends on it.
    pub conditional_put: bool,
    /// Whether what is overwritten or removed is kept as an older version.
    pub versioned: bool,
    /// What protects objects from being changed and removed.
    pub immutability: Immutability,
}

impl PlaceFacts {
    pub(crate) fn of(config: &Config) -> Self {
        Self {
            service: (!config.service.is_empty()).then(|| config.service.clone()),
            conditional_put: config.conditional_put,
            versioned: config.versioned,
            immutability: config.immutability,
        }
    }
}

/// Looks at the service, and puts what it finds into the config. What was found out elsewhere counts no more.
pub(crate) async fn find_out(backend: &dyn Backend, config: &mut Config) -> Result<(), StoreError> {
    let folder = format!("{}/probe-{}", names::TEMPORARY, Uuid::new_v4().simple());
    let found = Probe { backend, folder }.run().await;
    let (conditional_put, versioned) = found?;
    config.conditional_put = conditional_put;
    config.versioned = versioned;
    config.service = backend.service().unwrap_or_default();
    tracing::info!(service = config.service, conditional_put, versioned, "found out what the object store does");
    Ok(())
}

struct Probe<'a> {
    backend: &'a dyn Backend,
    /// Of this probe alone.
    folder: String,
}

impl Probe<'_> {
    /// Whether conditions are kept, and versions.
    async fn run(&self) -> Result<(bool, bool), StoreError> {
        let result = self.look().await;
        // Whatever was found: nothing of it is left, where that is allowed.
        for name in [self.name("one"), self.name("race")] {
            match self.backend.remove(&name).await {
                Err(error) if !is_refused(&error) && result.is_ok() => {
                    return Err(StoreError::io("remove", &name, error));
                }
                _ => {}
            }
        }
        result
    }

    async fn look(&self) -> Result<(bool, bool), StoreError> {
        let (one, race) = (self.name("one"), self.name("race"));
        let first = Bytes::from_static(b"what is written first");
        let second = Bytes::from_static(b"what is written second, and longer");

        let written = self.backend.put_new(&one, first.clone()).await;
        written.map_err(|error| StoreError::io("write", &one, error))?;
        self.must_hold(&one, &first).await?;
        let since = self.backend.modified(&one).await.map_err(|error| StoreError::io("read", &one, error))?;
        let keeps_condition = match self.backend.put_new(&one, second.clone()).await {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.must_hold(&one, &first).await?;
                true
            }
            Ok(()) => false,
            Err(error) => return Err(StoreError::io("write", &one, error)),
        };
        put(self.backend, &one, second.clone()).await.map_err(|error| StoreError::io("write", &one, error))?;
        self.must_hold(&one, &second).await?;

        let tries = (0..RACERS).map(|number| self.backend.put_new(&race, Bytes::from(vec![number; 64])));
        let mut winners = 0;
        for tried in join_all(tries).await {
            match tried {
                Ok(()) => winners += 1,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(StoreError::io("write", &race, error)),
            }
        }
        let listed = self.backend.list(&self.folder).await;
        let listed = listed.map_err(|error| StoreError::io("list", &self.folder, error))?;
        if listed != [one.clone(), race.clone()] {
            return Err(self.unfit("a listing does not hold exactly what was written just before"));
        }
        let versioned = self.backend.keeps_versions().await.map_err(|error| StoreError::io("write", &one, error))?;
        let until = self.backend.now().await.map_err(|error| StoreError::io("read", &one, error))?;
        if until < since {
            return Err(self.unfit("its time stamps go backwards"));
        }
        self.must_forget(&one).await?;
        Ok((keeps_condition && winners == 1, versioned))
    }

    fn name(&self, last: &str) -> String {
        format!("{}/{last}", self.folder)
    }

    /// What was written is read, as a whole and in part, and no more than that.
    async fn must_hold(&self, name: &str, content: &Bytes) -> Result<(), StoreError> {
        let unfit = || self.unfit("an object that was written just before does not read as it was written");
        let read = match get(self.backend, name, content.len() + 1024).await {
            Err(error) if is_absent(&error) => return Err(unfit()),
            read => read.map_err(|error| StoreError::io("read", name, error))?,
        };
        let part = self.backend.read(name, 5, 6).await.map_err(|error| StoreError::io("read", name, error))?;
        let beyond = self.backend.read(name, 5, content.len()).await;
        let is_refused = beyond.is_err_and(|error| error.kind() == io::ErrorKind::UnexpectedEof);
        if read == *content && part == content.slice(5..11) && is_refused { Ok(()) } else { Err(unfit()) }
    }

    /// What was removed is gone, unless it may not be removed.
    async fn must_forget(&self, name: &str) -> Result<(), StoreError> {
        match self.backend.remove(name).await {
            Err(error) if is_refused(&error) => return Ok(()),
            removed => removed.map_err(|error| StoreError::io("remove", name, error))?,
        }
        let listed = self.backend.list(&self.folder).await;
        let listed = listed.map_err(|error| StoreError::io("list", &self.folder, error))?;
        match self.backend.length(name).await {
            Err(error) if is_absent(&error) && !listed.iter().any(|found| found == name) => Ok(()),
            Err(error) if !is_absent(&error) => Err(StoreError::io("look for", name, error)),
            _ => Err(self.unfit("an object that was removed is still there")),
        }
    }

    fn unfit(&self, what: &'static str) -> StoreError {
        StoreError::Unfit { place: self.backend.location(), what }
    }
}

/// Keys of writers may not remove anything.
fn is_refused(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported)
}

/// Refuses a folder of a service that holds something already, or that lies within another repository.
pub(crate) async fn must_be_free(backend: &dyn Backend) -> Result<(), StoreError> {
    let page = backend.page("", None).await.map_err(|error| StoreError::io("list", "", error))?;
    // What an interrupted attempt to make one has left is of no value: there is no config, so nothing was stored.
    let is_ours = |name: &String| [names::KEYS, names::TEMPORARY].iter().any(|folder| is_below(name, folder));
    if !page.names.iter().all(is_ours) {
        return Err(StoreError::NotEmpty { path: backend.location() });
    }
    if page.more {
        let rest = page.names.last().map(String::as_str);
        let page = backend.page("", rest).await.map_err(|error| StoreError::io("list", "", error))?;
        if page.more || !page.names.iter().all(is_ours) {
            return Err(StoreError::NotEmpty { path: backend.location() });
        }
    }
    for above in backend.above() {
        let found = match get(&*above, names::CONFIG, MAX_CONFIG_BYTES).await {
            Err(error) if is_absent(&error) || error.kind() == io::ErrorKind::InvalidData => continue,
            // Whoever may see this folder only has to be believed that it is the right one.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            found => found.map_err(|error| StoreError::io("read", names::CONFIG, error))?,
        };
        if !matches!(StoredConfig::decode(&found), Err(FormatError::Magic { .. })) {
            return Err(StoreError::Within { path: backend.location(), repository: above.location() });
        }
    }
    Ok(())
}

fn is_below(name: &str, folder: &str) -> bool {
    name.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

/// Writes the objects that make a repository, the one that makes it one last. Of several who do so at the same time at most
/// one succeeds; where the service keeps to no condition, they can undo each other's work, and mostly notice it.
pub(crate) async fn make(backend: &dyn Backend, key: Vec<u8>, config: Vec<u8>) -> Result<(), StoreError> {
    let taken = || StoreError::NotEmpty { path: backend.location() };
    let key_name = place_key(backend, &key).await?;
    let made = match backend.put_new(names::CONFIG, config.clone().into()).await {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        made => made.map(|()| true).map_err(|error| StoreError::io("write", names::CONFIG, error))?,
    };
    let config_is_mine = made && holds(backend, names::CONFIG, &config).await?;
    if config_is_mine && holds(backend, &key_name, &key).await? {
        return Ok(());
    }
    // With a key that does not fit it would be a repository that nobody can open; a key without it is of no use.
    for (name, is_mine) in [(names::CONFIG, config_is_mine), (&key_name, holds(backend, &key_name, &key).await?)] {
        if is_mine {
            backend.remove(name).await.map_err(|error| StoreError::io("remove", name, error))?;
        }
    }
    Err(taken())
}

/// Writes a key slot under the first number that is free: those of others, who died or are just as far, stay as they are.
async fn place_key(backend: &dyn Backend, key: &[u8]) -> Result<String, StoreError> {
    const SLOTS: u32 = 1000;
    if backend.service().is_none() && !backend.oldest_counts() {
        // Nobody else is at it: whoever makes one holds the folder's lock.
        put(backend, names::FIRST_KEY, Bytes::copy_from_slice(key))
            .await
            .map_err(|error| StoreError::io("write", names::FIRST_KEY, error))?;
        return Ok(names::FIRST_KEY.to_owned());
    }
    for number in 1..SLOTS {
        let name = names::key(&number.to_string());
        match backend.put_new(&name, Bytes::copy_from_slice(key)).await {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            written => return written.map(|()| name.clone()).map_err(|error| StoreError::io("write", &name, error)),
        }
    }
    Err(StoreError::NotEmpty { path: backend.location() })
}

async fn holds(backend: &dyn Backend, name: &str, bytes: &[u8]) -> Result<bool, StoreError> {
    match get(backend, name, MAX_CONFIG_BYTES).await {
        Err(error) if is_absent(&error) => Ok(false),
        found => found.map(|found| found == bytes).map_err(|error| StoreError::io("read", name, error)),
    }
}
