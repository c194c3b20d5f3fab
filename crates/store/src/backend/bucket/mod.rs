//! A bucket of an S3 service, or whatever else [`object_store`] speaks to.
//!
//! An object is collected in memory and goes up in one request: services drop locks on what comes in parts, and a
//! request that breaks leaves nothing. Objects of a repository are therefore at most [`MAX_OBJECT_BYTES`] long here.
//!
//! A PUT that was given up can arrive later. Names of objects are never used twice for other bytes, so that does no harm
//! but for objects that have been removed meanwhile: those come back as garbage, which the next sweep finds.

pub(super) mod courier;
pub(super) mod fault;
mod options;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions};
use object_store::{PutPayload, PutResult};
use tokio::sync::Semaphore;

use self::courier::HEARD;
use self::fault::Heard;
use super::{Backend, NamePage, PAGE_NAMES, Upload};

pub use fault::{Answer, BucketFault};
pub use options::{BucketOptions, Patience};

/// The longest object: an index segment of the greatest size fits, and one request carries it.
pub const MAX_OBJECT_BYTES: usize = 128 * 1024 * 1024;

/// Requests at the same time: enough to hide the way there and back, few enough for a small gateway.
const REQUESTS_AT_ONCE: usize = 16;

/// Bytes that are handed to a connection at once: a slow line shows that it moves at least this often.
const PIECE_BYTES: usize = 64 * 1024;

/// The first pause between two attempts; the longest one.
pub(super) const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// A folder of a bucket as a place for objects.
#[derive(Clone, Debug)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    folder: String,
    location: String,
    requests: Arc<Semaphore>,
    patience: Patience,
}

impl Bucket {
    /// A folder of any object store; `location` is for messages.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the folder can not be part of a name.
    pub fn on(store: Arc<dyn ObjectStore>, folder: &str, location: &str) -> io::Result<Self> {
        let folder = folder.trim_matches('/').to_owned();
        parse(&folder)?;
        Ok(Self {
            store,
            folder,
            location: location.to_owned(),
            requests: Arc::new(Semaphore::new(REQUESTS_AT_ONCE)),
            patience: Patience::default(),
        })
    }

    /// The same place, with another patience.
    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    fn path(&self, name: &str) -> io::Result<Path> {
        match (self.folder.is_empty(), name.is_empty()) {
            (true, _) => parse(name),
            (false, true) => parse(&self.folder),
            (false, false) => parse(&format!("{}/{name}", self.folder)),
        }
    }

    /// The name below our folder.
    fn name(&self, path: &Path) -> Option<String> {
        let name = path.as_ref().strip_prefix(&self.folder)?;
        if self.folder.is_empty() { Some(name.to_owned()) } else { name.strip_prefix('/').map(str::to_owned) }
    }

    /// Does one request, again and again where that can help.
    async fn ask<'a, T>(
        &self,
        request: impl Fn() -> BoxFuture<'a, object_store::Result<T>> + Send + Sync,
    ) -> Result<T, BucketFault> {
        let begun = Instant::now();
        let mut pause = PAUSES.0;
        loop {
            let heard = Heard::default();
            let tried = {
                // Whoever waits for better times takes nobody's turn.
                let turn = self.requests.acquire().await;
                let _turn = turn.map_err(|error| BucketFault::Strange { said: error.to_string() })?;
                HEARD.scope(heard.clone(), request()).await
            };
            let fault = match tried {
                Ok(done) => return Ok(done),
                Err(error) => BucketFault::of(error, &heard),
            };
            if !fault.may_pass() || begun.elapsed() + pause >= self.patience.total {
                return Err(fault);
            }
            tracing::debug!(fault = %fault, pause_ms = pause.as_millis(), "a request to the object store is repeated");
            tokio::time::sleep(pause).await;
            // Never in step with others that failed at the same moment.
            pause = (PAUSES.0 + (pause * 3).saturating_sub(PAUSES.0).mul_f64(random_share())).min(PAUSES.1);
        }
    }

    async fn put(&self, path: &Path, payload: &PutPayload, mode: PutMode) -> Result<PutResult, BucketFault> {
        self.ask(|| self.store.put_opts(path, payload.clone(), PutOptions::from(mode.clone()))).await
    }

    /// What is known of an object.
    async fn head(&self, name: &str) -> io::Result<ObjectMeta> {
        let path = self.path(name)?;
        match self.ask(|| async { self.store.head(&path).await }.boxed()).await {
            // The answer to this request has no text, so it does not tell a wrong key from one that may not do this.
            Err(denied @ BucketFault::Denied { .. }) => {
                let first = GetOptions { range: Some(GetRange::Bounded(0..1)), ..GetOptions::default() };
                match self.ask(|| self.store.get_opts(&path, first.clone())).await {
                    Err(
                        fault @ (BucketFault::UnknownKey { .. }
                        | BucketFault::WrongSecret { .. }
                        | BucketFault::Clock { .. }),
                    ) => Err(fault.into()),
                    _ => Err(denied.into()),
                }
            }
            // Nor an object from a whole bucket that is gone.
            Err(BucketFault::NoObject { .. }) => {
                let first = GetOptions { range: Some(GetRange::Bounded(0..1)), ..GetOptions::default() };
                match self.ask(|| self.store.get_opts(&path, first.clone())).await {
                    Ok(found) => Ok(found.meta),
                    Err(fault) => Err(fault.into()),
                }
            }
            other => Ok(other?),
        }
    }

    async fn get(&self, path: &Path, offset: u64, end: u64) -> Result<Bytes, BucketFault> {
        let options = GetOptions { range: Some(GetRange::Bounded(offset..end)), ..GetOptions::default() };
        self.ask(|| {
            let asked = self.store.get_opts(path, options.clone());
            async move { asked.await?.bytes().await }.boxed()
        })
        .await
    }

    /// Writes an object, and says what the service calls this version of it, if it keeps versions.
    async fn put_whole(&self, name: &str, parts: Vec<Bytes>, mode: PutMode) -> Result<Option<String>, io::Error> {
        let path = self.path(name)?;
        Ok(self.put(&path, &payload(parts), mode).await?.version)
    }

    /// Objects whose names come after `after`; at most a page of them.
    async fn page_of(&self, path: &Path, after: Option<&Path>) -> Result<Vec<Path>, BucketFault> {
        self.ask(|| {
            let listed = match after {
                Some(after) => self.store.list_with_offset(Some(path), after),
                None => self.store.list(Some(path)),
            };
            listed.take(PAGE_NAMES).map_ok(|object| object.location).try_collect().boxed()
        })
        .await
    }
}

/// From 0 to 1.
pub(super) fn random_share() -> f64 {
    let [first, second, ..] = *uuid::Uuid::new_v4().as_bytes();
    f64::from(u16::from_le_bytes([first, second])) / f64::from(u16::MAX)
}

/// Names are taken as they are: the library would escape what it finds strange, and then not find it again.
fn parse(name: &str) -> io::Result<Path> {
    Path::parse(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

pub(super) fn payload(parts: Vec<Bytes>) -> PutPayload {
    let pieces = parts.into_iter().flat_map(|part| {
        let count = part.len().div_ceil(PIECE_BYTES);
        (0..count).map(move |at| part.slice(at * PIECE_BYTES..part.len().min((at + 1) * PIECE_BYTES)))
    });
    PutPayload::from_iter(pieces)
}

impl Backend for Bucket {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        let upload = BucketUpload { place: self.clone(), name: name.to_owned(), parts: Vec::new(), length: 0 };
        std::future::ready(Ok(Box::new(upload) as Box<dyn Upload>)).boxed()
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        async move {
            if length == 0 {
                // A range of nothing can not be asked for.
                let found = self.length(name).await?;
                return if offset <= found { Ok(Vec::new()) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            let end = offset.checked_add(length as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
            let path = self.path(name)?;
            match self.get(&path, offset, end).await {
                Ok(bytes) if bytes.len() == length => Ok(bytes.into()),
                Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(fault @ BucketFault::Strange { .. }) => {
                    // The library does not say in a form of its own that less came than was asked for.
                    let short = self.head(name).await.is_ok_and(|found| found.size < end);
                    Err(if short { io::ErrorKind::UnexpectedEof.into() } else { fault.into() })
                }
                Err(fault) => Err(fault.into()),
            }
        }
        .boxed()
    }

    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>> {
        async move { Ok(self.head(name).await?.size) }.boxed()
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>> {
        super::list_all(self, folder).boxed()
    }

    fn page<'a>(&'a self, folder: &'a str, after: Option<&'a str>) -> BoxFuture<'a, io::Result<NamePage>> {
        async move {
            let path = self.path(folder)?;
            let after = after.map(|after| self.path(after)).transpose()?;
            let found = self.page_of(&path, after.as_ref()).await?;
            let more = found.len() == PAGE_NAMES;
            let mut names: Vec<String> = found.iter().filter_map(|path| self.name(path)).collect();
            // A list that changes while its pages come can show an object twice.
            names.sort_unstable();
            names.dedup();
            Ok(NamePage { names, more })
        }
        .boxed()
    }

    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>> {
        std::future::ready(Ok(())).boxed()
    }

    fn put_new<'a>(&'a self, name: &'a str, data: Bytes) -> BoxFuture<'a, io::Result<()>> {
        async move {
            match self.put_whole(name, vec![data.clone()], PutMode::Create).await {
                // A service without conditions.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    match self.length(name).await {
                        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                    self.put_whole(name, vec![data], PutMode::Overwrite).await.map(drop)
                }
                // An attempt of ours whose answer was lost can have been the one that won.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    match super::get(self, name, data.len()).await {
                        Ok(found) if found == data => Ok(()),
                        _ => Err(error),
                    }
                }
                other => other.map(drop),
            }
        }
        .boxed()
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<()>> {
        async move {
            let path = self.path(name)?;
            match self.ask(|| async { self.store.delete(&path).await }.boxed()).await {
                Err(BucketFault::NoObject { .. }) => Ok(()),
                other => Ok(other?),
            }
        }
        .boxed()
    }

    fn modified<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<SystemTime>> {
        async move { Ok(self.head(name).await?.last_modified.into()) }.boxed()
    }

    fn now<'a>(&'a self) -> BoxFuture<'a, io::Result<SystemTime>> {
        // The head of an answer can be of something in between: an object that appears now has the store's own time.
        async move {
            self.put_whole(CLOCK, vec![Bytes::from_static(b"clock")], PutMode::Overwrite).await?;
            self.modified(CLOCK).await
        }
        .boxed()
    }

    fn keeps_versions<'a>(&'a self) -> BoxFuture<'a, io::Result<bool>> {
        async move {
            let version = self.put_whole(CLOCK, vec![Bytes::from_static(b"clock")], PutMode::Overwrite).await?;
            // The version of that name is what a bucket gives that keeps versions no more.
            Ok(version.is_some_and(|version| version != "null"))
        }
        .boxed()
    }

    fn local_path(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    fn location(&self) -> PathBuf {
        PathBuf::from(&self.location)
    }

    fn above(&self) -> Vec<Arc<dyn Backend>> {
        let mut found: Vec<Arc<dyn Backend>> = Vec::new();
        let (mut folder, mut location) = (self.folder.as_str(), self.location.as_str());
        while !folder.is_empty() {
            folder = folder.rsplit_once('/').map_or("", |(above, _)| above);
            location = location.rsplit_once('/').map_or(location, |(above, _)| above);
            found.push(Arc::new(Self { folder: folder.to_owned(), location: location.to_owned(), ..self.clone() }));
        }
        found
    }

    fn service(&self) -> Option<String> {
        Some(self.location.clone())
    }
}

/// The object that is written anew to learn the store's time.
const CLOCK: &str = "tmp/clock";

struct BucketUpload {
    place: Bucket,
    name: String,
    parts: Vec<Bytes>,
    length: usize,
}

impl Upload for BucketUpload {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        let length = self.length.saturating_add(data.len());
        if length > MAX_OBJECT_BYTES {
            let text = format!("an object of more than {MAX_OBJECT_BYTES} bytes does not fit into one request");
            return std::future::ready(Err(io::Error::new(io::ErrorKind::FileTooLarge, text))).boxed();
        }
        self.length = length;
        self.parts.push(data);
        std::future::ready(Ok(())).boxed()
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        async move { self.place.put_whole(&self.name, self.parts, PutMode::Overwrite).await.map(drop) }.boxed()
    }
}
