//! A bucket that keeps versions, and locks them where the repository promises that.
//!
//! Of each name the oldest version is the object, whatever came later: objects of a repository are written once, so a
//! younger version or the marker of a deletion is nothing but an attempt to harm. Names come from the list of versions
//! for the same reason. Versions are named by the service and never change, so what was found once holds.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use object_store::path::Path;
use uuid::Uuid;
use xenvault_store_format::LockMode;

use super::signed::{Retention, Signed, Version};
use super::{Backend, Bucket, BucketOptions, Disturbed, MAX_OBJECT_BYTES, Protection, Upload};

/// Objects whose versions are remembered: some ten megabytes.
const REMEMBERED: usize = 64 * 1024;
/// So many more than the promised time a new object is locked for, as a part of it: what a point of the next days uses
/// again is then covered from the first moment.
const MARGIN: u32 = 4;
/// How long the objects of a probe are locked.
const PROBE: Duration = Duration::from_secs(60);

/// Opens a bucket: with the semantics of versions if it keeps them.
///
/// # Errors
/// What the service says; [`io::ErrorKind::PermissionDenied`] if it keeps versions and does not let them be listed, since
/// then nobody can tell what was overwritten.
pub async fn open_bucket(options: &BucketOptions) -> io::Result<Arc<dyn Backend>> {
    let versioned = VersionedBucket::new(options)?;
    let plain = || Ok(Arc::new(Bucket::s3(options)?) as Arc<dyn Backend>);
    let listed = versioned.signed.versions(&versioned.key(super::super::names::CONFIG), None).await;
    let listed = listed.map_err(io::Error::from);
    match listed {
        Ok(page) if page.versions.iter().any(|version| version.id != "null") => Ok(Arc::new(versioned)),
        Ok(page) if !page.versions.is_empty() => plain(),
        // Nothing is there yet, or nothing that may be seen.
        listed => match versioned.signed.versioning().await {
            Ok(false) => plain(),
            Ok(true) => match listed {
                Ok(_) => Ok(Arc::new(versioned)),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    let text = "the bucket keeps versions, and this credential may not list them \
                                (s3:ListBucketVersions): what was overwritten could not be told";
                    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
                }
                Err(error) => Err(error),
            },
            // A service that knows no versions, or a credential that may not ask: the first request says more.
            Err(_) => plain(),
        },
    }
}

/// A folder of a bucket that keeps versions.
#[derive(Clone, Debug)]
pub struct VersionedBucket {
    signed: Arc<Signed>,
    /// Without slashes at its ends.
    folder: String,
    location: String,
    lock: Arc<OnceLock<(LockMode, Duration)>>,
    remembered: Arc<Mutex<HashMap<String, Known>>>,
}

/// The version that is the object.
#[derive(Clone, Debug)]
struct Known {
    id: String,
    length: u64,
    modified: SystemTime,
}

impl VersionedBucket {
    /// Nothing is asked of the service yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the options can not be used.
    pub fn new(options: &BucketOptions) -> io::Result<Self> {
        let location = format!("s3://{}/{}", options.bucket, options.folder);
        Ok(Self {
            signed: Arc::new(Signed::new(options)?),
            // As the other backend encodes it.
            folder: Path::from(options.folder.trim_matches('/')).as_ref().to_owned(),
            location: location.trim_end_matches('/').to_owned(),
            lock: Arc::default(),
            remembered: Arc::default(),
        })
    }

    fn key(&self, name: &str) -> String {
        if self.folder.is_empty() { name.to_owned() } else { format!("{}/{name}", self.folder) }
    }

    fn name<'a>(&self, key: &'a str) -> Option<&'a str> {
        if self.folder.is_empty() { Some(key) } else { key.strip_prefix(self.folder.as_str())?.strip_prefix('/') }
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, HashMap<String, Known>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, name: &str, known: &Known) {
        let mut remembered = self.remembered();
        if remembered.len() >= REMEMBERED {
            remembered.clear();
        }
        remembered.insert(name.to_owned(), known.clone());
    }

    /// Everything that the service keeps under exactly this key, the newest first.
    async fn all(&self, name: &str) -> io::Result<Vec<Version>> {
        let key = self.key(name);
        let mut all: Vec<Version> = Vec::new();
        loop {
            let page = self.signed.versions(&key, all.last()).await?;
            let (count, truncated) = (page.versions.len(), page.truncated);
            let before = all.len();
            // The key itself is the first of all that begin with it.
            all.extend(page.versions.into_iter().filter(|version| version.key == key));
            if !truncated || all.len() - before < count || count == 0 {
                return Ok(all);
            }
        }
    }

    /// The oldest version of an object.
    async fn oldest(&self, name: &str) -> io::Result<Known> {
        if let Some(known) = self.remembered().get(name) {
            return Ok(known.clone());
        }
        let all = self.all(name).await?;
        let oldest = all.into_iter().rev().find(|version| !version.is_marker);
        let oldest = oldest.ok_or(io::ErrorKind::NotFound)?;
        let known = Known { id: oldest.id, length: oldest.length, modified: oldest.modified };
        self.remember(name, &known);
        Ok(known)
    }

    async fn get(&self, name: &str, known: &Known, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let end = offset.checked_add(length as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        // Known before a byte is kept: a length that a damaged object named allocates nothing.
        if known.length < end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if length == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.signed.get(&self.key(name), &known.id, offset, length).await?;
        if bytes.len() == length { Ok(bytes.into()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    async fn put(&self, name: &str, data: Bytes) -> io::Result<Option<String>> {
        let lock = match self.lock.get() {
            Some((mode, period)) => {
                let margin = *period / MARGIN;
                Some(Retention { mode: *mode, until: SystemTime::now() + *period + margin })
            }
            None => None,
        };
        Ok(self.signed.put(&self.key(name), data, lock).await?)
    }

    /// Calls `each` with the versions of each name below a folder, the newest first, in the order of names.
    async fn each(&self, folder: &str, mut each: impl FnMut(&str, &[Version])) -> io::Result<()> {
        let key = self.key(folder);
        let key = key.trim_end_matches('/');
        let prefix = if key.is_empty() { String::new() } else { format!("{key}/") };
        let mut group: Vec<Version> = Vec::new();
        let mut after: Option<Version> = None;
        loop {
            let page = self.signed.versions(&prefix, after.as_ref()).await?;
            after = page.versions.last().cloned();
            for version in page.versions {
                if group.first().is_some_and(|first| first.key != version.key) {
                    if let Some(name) = group.first().and_then(|first| self.name(&first.key)) {
                        each(name, &group);
                    }
                    group.clear();
                }
                group.push(version);
            }
            if !page.truncated || after.is_none() {
                if let Some(name) = group.first().and_then(|first| self.name(&first.key)) {
                    each(name, &group);
                }
                return Ok(());
            }
        }
    }

    /// Tries in this very folder whether the service keeps what it says.
    async fn try_lock(&self, mode: LockMode) -> io::Result<()> {
        let refuse = |text: String| Err(io::Error::new(io::ErrorKind::Unsupported, text));
        let name = format!("tmp/probe-{}", Uuid::new_v4().simple());
        let key = self.key(&name);
        // Whole seconds are what services keep.
        let until = self.signed.now().await? + PROBE;
        let lock = Retention { mode, until };
        let Some(locked) = self.signed.put(&key, Bytes::from_static(b"locked"), Some(lock)).await? else {
            return refuse("the bucket does not keep versions; make it with object lock".to_owned());
        };
        let kept = match self.signed.retention(&key, &locked).await? {
            Some(kept) if kept.mode == mode && kept.until >= until => kept,
            Some(kept) => {
                return refuse(format!("a lock in mode {mode} was asked for, the service keeps {}", kept.mode));
            }
            None => return refuse("the service accepts the lock of an object and does not keep it".to_owned()),
        };
        // An attack of the usual kind must leave the locked version as it is.
        let Some(over) = self.signed.put(&key, Bytes::from_static(b"overwritten"), None).await? else {
            return refuse("the bucket does not keep versions any more".to_owned());
        };
        match self.signed.delete_version(&key, &locked).await.map_err(io::Error::from) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            Err(error) => return Err(error),
            Ok(()) => return refuse("a locked version was removed before its time".to_owned()),
        }
        let earlier = Retention { until: kept.until - PROBE / 2, ..kept };
        if self.signed.extend(&key, &locked, earlier).await.is_ok() {
            return refuse("the time of a lock was made shorter".to_owned());
        }
        if self.signed.get(&key, &locked, 0, 6).await?.as_ref() != b"locked" {
            return refuse("a locked version was overwritten".to_owned());
        }
        // That it can not be removed proves the lock only if this credential can remove what is not locked.
        if self.signed.retention(&key, &over).await?.is_some() {
            return refuse(
                "the bucket has a default retention: take it away, the repository locks what it writes".to_owned(),
            );
        }
        match self.signed.delete_version(&key, &over).await.map_err(io::Error::from) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => refuse(
                "this credential may remove nothing at all, so that a locked object stayed proves nothing: make the \
                 repository with a credential that may remove versions, such as the sweeper's"
                    .to_owned(),
            ),
            Err(error) => Err(error),
        }
    }
}

impl Backend for VersionedBucket {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        let upload = VersionUpload { place: self.clone(), name: name.to_owned(), data: BytesMut::new() };
        std::future::ready(Ok(Box::new(upload) as Box<dyn Upload>)).boxed()
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        async move {
            let known = self.oldest(name).await?;
            match self.get(name, &known, offset, length).await {
                // Removed by a sweep, and perhaps written again since it was looked for.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.remembered().remove(name);
                    let known = self.oldest(name).await?;
                    self.get(name, &known, offset, length).await
                }
                read => read,
            }
        }
        .boxed()
    }

    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>> {
        async move {
            // Whether something is there is asked anew: a sweep may have removed it.
            self.remembered().remove(name);
            Ok(self.oldest(name).await?.length)
        }
        .boxed()
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>> {
        async move {
            let mut names = Vec::new();
            // Packs are many, and are asked for one by one when they are read.
            let few = folder != crate::names::PACKS;
            self.each(folder, |name, versions| {
                let Some(oldest) = versions.iter().rev().find(|version| !version.is_marker) else { return };
                if few {
                    let known = Known { id: oldest.id.clone(), length: oldest.length, modified: oldest.modified };
                    self.remember(name, &known);
                }
                names.push(name.to_owned());
            })
            .await?;
            names.sort_unstable();
            // A list that changes while its pages come can show an object twice.
            names.dedup();
            Ok(names)
        }
        .boxed()
    }

    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>> {
        std::future::ready(Ok(())).boxed()
    }

    fn put_new<'a>(&'a self, name: &'a str, data: Bytes) -> BoxFuture<'a, io::Result<()>> {
        // Services ignore conditions here; but of those who write at once only one has the oldest version.
        async move {
            let ours = self.put(name, data.clone()).await?;
            self.remembered().remove(name);
            let oldest = self.oldest(name).await?;
            if ours.as_deref() == Some(oldest.id.as_str()) {
                return Ok(());
            }
            // An attempt of ours whose answer was lost can have been the first.
            let is_ours = oldest.length == data.len() as u64 && self.get(name, &oldest, 0, data.len()).await? == data;
            if is_ours { Ok(()) } else { Err(io::ErrorKind::AlreadyExists.into()) }
        }
        .boxed()
    }

    /// The youngest version goes first and the oldest last, so that none of them ever takes its place.
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<()>> {
        async move {
            let key = self.key(name);
            for version in self.all(name).await? {
                let removed = self.signed.delete_version(&key, &version.id).await.map_err(io::Error::from);
                match removed {
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                        let kept = self.signed.retention(&key, &version.id).await?;
                        let is_kept = kept.is_some_and(|kept| kept.until > SystemTime::now());
                        let kind = if is_kept { io::ErrorKind::ResourceBusy } else { error.kind() };
                        return Err(io::Error::new(kind, error));
                    }
                    removed => removed?,
                }
            }
            self.remembered().remove(name);
            Ok(())
        }
        .boxed()
    }

    fn modified<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<SystemTime>> {
        async move { Ok(self.oldest(name).await?.modified) }.boxed()
    }

    fn now<'a>(&'a self) -> BoxFuture<'a, io::Result<SystemTime>> {
        async move { Ok(self.signed.now().await?) }.boxed()
    }

    fn local_path(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    fn location(&self) -> PathBuf {
        PathBuf::from(&self.location)
    }

    fn oldest_counts(&self) -> bool {
        true
    }

    fn lock(&self, mode: LockMode, period: Duration) -> bool {
        // The same promise each time: it stands in the config.
        *self.lock.get_or_init(|| (mode, period)) == (mode, period)
    }

    fn probe_lock<'a>(&'a self, mode: LockMode) -> BoxFuture<'a, io::Result<()>> {
        self.try_lock(mode).boxed()
    }

    fn later_version<'a>(
        &'a self,
        name: &'a str,
        number: usize,
        limit: usize,
    ) -> BoxFuture<'a, io::Result<Option<Vec<u8>>>> {
        async move {
            let all = self.all(name).await?;
            let version = all.into_iter().rev().filter(|version| !version.is_marker).nth(number);
            let Some(version) = version.filter(|version| version.length <= limit as u64) else { return Ok(None) };
            let length = usize::try_from(version.length).map_err(io::Error::other)?;
            let known = Known { id: version.id, length: version.length, modified: version.modified };
            self.get(name, &known, 0, length).await.map(Some)
        }
        .boxed()
    }

    fn protection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Protection>> {
        async move {
            let known = self.oldest(name).await?;
            let kept = self.signed.retention(&self.key(name), &known.id).await?;
            Ok(kept.map_or(Protection::None, |Retention { mode, until }| Protection::Locked { mode, until }))
        }
        .boxed()
    }

    fn extend<'a>(&'a self, name: &'a str, mode: LockMode, until: SystemTime) -> BoxFuture<'a, io::Result<()>> {
        async move {
            let known = self.oldest(name).await?;
            Ok(self.signed.extend(&self.key(name), &known.id, Retention { mode, until }).await?)
        }
        .boxed()
    }

    fn disturbed<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<Disturbed>>> {
        async move {
            let mut found = Vec::new();
            self.each(folder, |name, versions| {
                let deletions = versions.iter().filter(|version| version.is_marker).count() as u64;
                let Some(oldest) = versions.iter().rev().find(|version| !version.is_marker) else { return };
                // A request of ours that was repeated has left the same twice.
                let is_other = |version: &&Version| !version.is_marker && version.tag != oldest.tag;
                let younger = versions.iter().filter(is_other).count() as u64;
                if deletions > 0 || younger > 0 {
                    found.push(Disturbed { object: name.to_owned(), younger, deletions });
                }
            })
            .await?;
            Ok(found)
        }
        .boxed()
    }
}

struct VersionUpload {
    place: VersionedBucket,
    name: String,
    data: BytesMut,
}

impl Upload for VersionUpload {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        if self.data.len().saturating_add(data.len()) > MAX_OBJECT_BYTES {
            let text = format!("an object of more than {MAX_OBJECT_BYTES} bytes does not fit into one request");
            return std::future::ready(Err(io::Error::new(io::ErrorKind::FileTooLarge, text))).boxed();
        }
        self.data.extend_from_slice(&data);
        std::future::ready(Ok(())).boxed()
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        async move { self.place.put(&self.name, self.data.freeze()).await.map(drop) }.boxed()
    }
}
