//! Where objects live. Narrow on purpose: an object appears at once and for good, is read in parts, and is listed.
//!
//! Nothing here knows what is in an object. Names are relative, with `/` between segments.

mod bucket;
mod local;
mod seal;
pub mod signed;
mod versioned;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use xenvault_store_format::LockMode;

pub use bucket::{Answer, Bucket, BucketFault, BucketOptions, MAX_OBJECT_BYTES, Patience};
pub use local::LocalFolder;
pub(crate) use local::lock_folder;
pub use seal::{SealReport, seal_folder};
pub use versioned::{VersionedBucket, open_bucket};

/// Names of one page of a listing.
pub const PAGE_NAMES: usize = 1000;

/// A part of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamePage {
    /// Names, in ascending order.
    pub names: Vec<String>,
    /// Whether there can be names after the last of them.
    pub more: bool,
}

/// A place for objects.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Begins an object. It does not exist before [`Upload::finish`] has returned.
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>>;

    /// The `length` bytes at `offset` of an object; [`io::ErrorKind::UnexpectedEof`] if it has fewer.
    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>>;

    /// Length of an object in bytes.
    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>>;

    /// Names of all objects below a folder, in ascending order; none if there is no such folder.
    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>>;

    /// The names below a folder that come after `after`, in ascending order, a page at a time: a listing that does not have
    /// to fit into memory. Where the place gives no pages, there is only one.
    fn page<'a>(&'a self, folder: &'a str, after: Option<&'a str>) -> BoxFuture<'a, io::Result<NamePage>> {
        async move {
            let mut names = self.list(folder).await?;
            names.retain(|name| after.is_none_or(|after| name.as_str() > after));
            Ok(NamePage { names, more: false })
        }
        .boxed()
    }

    /// Removes what uploads that died have left behind. Never touches an upload that lives, nor an object.
    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>>;

    /// Makes durable what is visible in these folders, whoever has put it there: between a name's appearance and its
    /// durability lies a moment in which others see it already. Nothing to do where there is no such moment.
    fn settle<'a>(&'a self, _folders: &'a [String]) -> BoxFuture<'a, io::Result<()>> {
        std::future::ready(Ok(())).boxed()
    }

    /// Writes a whole object unless there is one of this name, which is [`io::ErrorKind::AlreadyExists`].
    ///
    /// Where the service can not do both in one step (as here, if it is not implemented) somebody else may come in
    /// between; the caller reads back what is there.
    fn put_new<'a>(&'a self, name: &'a str, data: Bytes) -> BoxFuture<'a, io::Result<()>> {
        async move {
            match self.length(name).await {
                Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let mut upload = self.create(name).await?;
            upload.write(data).await?;
            upload.finish().await
        }
        .boxed()
    }

    /// Removes an object; one that is gone already is no error. Only sweeps and repairs do that.
    /// [`io::ErrorKind::Unsupported`] where nothing can be removed.
    fn remove<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, io::Result<()>> {
        std::future::ready(Err(io::ErrorKind::Unsupported.into())).boxed()
    }

    /// When an object appeared, by the store's own clock. [`io::ErrorKind::Unsupported`] where that is not known.
    fn modified<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, io::Result<SystemTime>> {
        std::future::ready(Err(io::ErrorKind::Unsupported.into())).boxed()
    }

    /// The store's own clock: what [`Self::modified`] would say of an object that appears now.
    fn now<'a>(&'a self) -> BoxFuture<'a, io::Result<SystemTime>> {
        std::future::ready(Err(io::ErrorKind::Unsupported.into())).boxed()
    }

    /// Whether the place keeps what was overwritten and removed. Writes a small object to find out where needed.
    fn keeps_versions<'a>(&'a self) -> BoxFuture<'a, io::Result<bool>> {
        std::future::ready(Ok(false)).boxed()
    }

    /// What the place is called, if it is of a service whose promises have to be looked at before they are believed.
    fn service(&self) -> Option<String> {
        None
    }

    /// The folders of the same service that this one lies in.
    fn above(&self) -> Vec<std::sync::Arc<dyn Backend>> {
        Vec::new()
    }

    /// The file that holds an object, where there is one; it may be mapped into memory.
    fn local_path(&self, name: &str) -> Option<PathBuf>;

    /// Where this is, for messages.
    fn location(&self) -> PathBuf;

    /// Whether of each name what was written first counts, whatever somebody has put over it.
    fn oldest_counts(&self) -> bool {
        false
    }

    /// From now on every object is locked when it is written, for this time and a quarter of it. Says whether this is a
    /// place that does so.
    fn lock(&self, _mode: LockMode, _period: Duration) -> bool {
        false
    }

    /// Whether a broker can take objects over here.
    fn takes_broker(&self) -> bool {
        false
    }

    /// Proves by trying that locks are kept here; [`io::ErrorKind::Unsupported`] with the reason if they are not.
    fn probe_lock<'a>(&'a self, _mode: LockMode) -> BoxFuture<'a, io::Result<()>> {
        let text = "objects can not be locked here: that takes a bucket with object lock";
        std::future::ready(Err(io::Error::new(io::ErrorKind::Unsupported, text))).boxed()
    }

    /// A version of an object that came after the one that counts: 1 is the next one. `None` if there is none, or if it
    /// is longer than `limit`. For names that somebody else can have taken first.
    fn later_version<'a>(
        &'a self,
        _name: &'a str,
        _number: usize,
        _limit: usize,
    ) -> BoxFuture<'a, io::Result<Option<Vec<u8>>>> {
        std::future::ready(Ok(None)).boxed()
    }

    /// What protects an object, read back from the store.
    fn protection<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, io::Result<Protection>> {
        std::future::ready(Ok(Protection::None)).boxed()
    }

    /// Locks an object until then, or longer if it is locked already.
    fn extend<'a>(&'a self, _name: &'a str, _mode: LockMode, _until: SystemTime) -> BoxFuture<'a, io::Result<()>> {
        std::future::ready(Err(io::ErrorKind::Unsupported.into())).boxed()
    }

    /// Objects below a folder (all of them for an empty name) that somebody has overwritten or deleted and that are read all the same.
    fn disturbed<'a>(&'a self, _folder: &'a str) -> BoxFuture<'a, io::Result<Vec<Disturbed>>> {
        std::future::ready(Ok(Vec::new())).boxed()
    }
}

/// What protects an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protection {
    /// Nothing: whoever may write may also remove.
    None,
    /// The store refuses to remove it.
    Locked {
        /// How firmly.
        mode: LockMode,
        /// Until when, by the store's clock.
        until: SystemTime,
    },
    /// It belongs to another user than the one that writes.
    Sealed {
        /// Whether the file system refuses changes to it, whoever asks.
        immutable: bool,
    },
}

/// An object that somebody has overwritten or deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Disturbed {
    /// Its name.
    pub object: String,
    /// Versions that came after the one that counts.
    pub younger: u64,
    /// Markers of deletions.
    pub deletions: u64,
}

/// An object on its way. Dropped before it is finished, it leaves nothing.
pub trait Upload: Send {
    /// Appends bytes.
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, io::Result<()>>;

    /// Makes the object durable, then visible under its name, and that durable too.
    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>>;
}

/// Writes a whole object.
pub(crate) async fn put(backend: &dyn Backend, name: &str, data: Bytes) -> io::Result<()> {
    let mut upload = backend.create(name).await?;
    upload.write(data).await?;
    upload.finish().await
}

/// Whether an object is locked and can not be removed yet.
pub(crate) async fn is_held(backend: &dyn Backend, name: &str) -> io::Result<bool> {
    if !backend.oldest_counts() {
        return Ok(false);
    }
    match backend.protection(name).await {
        Ok(Protection::Locked { until, .. }) => Ok(until > backend.now().await?),
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// All names below a folder, from its pages.
async fn list_all(backend: &dyn Backend, folder: &str) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    loop {
        let page = backend.page(folder, names.last().map(String::as_str)).await?;
        let is_end = !page.more || page.names.is_empty();
        names.extend(page.names);
        if is_end {
            return Ok(names);
        }
    }
}

/// Whether there is an object of this name.
pub(crate) async fn exists(backend: &dyn Backend, name: &str) -> io::Result<bool> {
    match backend.length(name).await {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads a whole object of at most `limit` bytes.
pub(crate) async fn get(backend: &dyn Backend, name: &str, limit: usize) -> io::Result<Vec<u8>> {
    let length = backend.length(name).await?;
    let too_long = || io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes, at most {limit} expected"));
    let length = usize::try_from(length).ok().filter(|&length| length <= limit).ok_or_else(too_long)?;
    backend.read(name, 0, length).await
}
