//! A bucket of an S3 service, or whatever else [`object_store`] speaks to.
//!
//! An object is collected in memory and goes up in one request: services drop locks on what comes in parts, and a
//! request that breaks leaves nothing. Objects of a repository are therefore at most [`MAX_OBJECT_BYTES`] long here.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, TryStreamExt as _};
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions,
    PutPayload, RetryConfig,
};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::{Backend, Upload};

/// The longest object: an index segment of the greatest size fits, and one request carries it.
pub const MAX_OBJECT_BYTES: usize = 128 * 1024 * 1024;

/// Requests at the same time: enough to hide the way there and back, few enough for a small gateway.
const REQUESTS_AT_ONCE: usize = 16;

/// A request that moves no byte for this long is given up and tried again.
const SILENCE: Duration = Duration::from_secs(60);

/// So long a request is tried again in all. Above the usual restart of a gateway.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where a bucket is and what opens it.
#[derive(Clone)]
pub struct BucketOptions {
    /// Name of the bucket.
    pub bucket: String,
    /// Folder within the bucket, without slashes at its ends; empty for the bucket itself. Several repositories can
    /// share a bucket under different folders.
    pub folder: String,
    /// `https://s3.example.com:7480`; `None` for Amazon's own.
    pub endpoint: Option<String>,
    /// Region as the service wants it signed.
    pub region: String,
    /// Access key.
    pub access_key: String,
    /// Secret key.
    pub secret_key: Zeroizing<String>,
    /// A certificate authority of the service beside those of the system, in PEM.
    pub authority: Option<Vec<u8>>,
    /// Whether data may travel without TLS.
    pub clear_text: bool,
}

impl std::fmt::Debug for BucketOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BucketOptions")
            .field("bucket", &self.bucket)
            .field("folder", &self.folder)
            .field("endpoint", &self.endpoint)
            .field("access_key", &self.access_key)
            .finish_non_exhaustive()
    }
}

/// A folder of a bucket as a place for objects.
#[derive(Clone, Debug)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    folder: String,
    location: String,
    requests: Arc<Semaphore>,
}

impl Bucket {
    /// A bucket of an S3 service. Nothing is asked of the service yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the options can not be used.
    pub fn s3(options: &BucketOptions) -> io::Result<Self> {
        // The provider of this process may have been chosen by somebody else: that is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let invalid = |error: object_store::Error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let mut client = ClientOptions::new()
            .with_allow_http(options.clear_text)
            .with_connect_timeout(Duration::from_secs(10))
            .with_read_timeout(SILENCE)
            .with_timeout_disabled();
        if let Some(authority) = &options.authority {
            let certificates = object_store::Certificate::from_pem_bundle(authority).map_err(invalid)?;
            client = certificates.into_iter().fold(client, ClientOptions::with_root_certificate);
        }
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&options.bucket)
            .with_region(&options.region)
            .with_access_key_id(&options.access_key)
            .with_secret_access_key(options.secret_key.as_str())
            .with_allow_http(options.clear_text)
            .with_client_options(client)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_retry(RetryConfig {
                backoff: BackoffConfig {
                    init_backoff: Duration::from_millis(100),
                    max_backoff: Duration::from_secs(15),
                    base: 2.,
                },
                max_retries: 30,
                retry_timeout: PATIENCE,
            });
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(endpoint).with_virtual_hosted_style_request(false);
        }
        let store = builder.build().map_err(invalid)?;
        let location = format!("s3://{}/{}", options.bucket, options.folder);
        Ok(Self::on(Arc::new(store), &options.folder, location.trim_end_matches('/')))
    }

    /// A folder of any object store; `location` is for messages.
    pub fn on(store: Arc<dyn ObjectStore>, folder: &str, location: &str) -> Self {
        Self {
            store,
            folder: folder.trim_matches('/').to_owned(),
            location: location.to_owned(),
            requests: Arc::new(Semaphore::new(REQUESTS_AT_ONCE)),
        }
    }

    fn path(&self, name: &str) -> Path {
        if self.folder.is_empty() { Path::from(name) } else { Path::from(format!("{}/{name}", self.folder)) }
    }

    async fn turn(&self) -> io::Result<tokio::sync::OwnedSemaphorePermit> {
        Arc::clone(&self.requests).acquire_owned().await.map_err(io::Error::other)
    }

    async fn put(&self, path: &Path, parts: Vec<Bytes>, mode: PutMode) -> io::Result<()> {
        let _turn = self.turn().await?;
        let payload = PutPayload::from_iter(parts);
        self.store.put_opts(path, payload, PutOptions::from(mode)).await.map(drop).map_err(failed)
    }
}

/// What the service said, as the kinds that the repository tells apart.
fn failed(error: object_store::Error) -> io::Error {
    use object_store::Error;
    let kind = match &error {
        Error::NotFound { .. } => io::ErrorKind::NotFound,
        Error::AlreadyExists { .. } | Error::Precondition { .. } => io::ErrorKind::AlreadyExists,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        Error::NotSupported { .. } | Error::NotImplemented { .. } => io::ErrorKind::Unsupported,
        Error::InvalidPath { .. } => io::ErrorKind::InvalidInput,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

impl Backend for Bucket {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        let upload = BucketUpload { place: self.clone(), path: self.path(name), parts: Vec::new(), length: 0 };
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
            let _turn = self.turn().await?;
            let options = GetOptions { range: Some(GetRange::Bounded(offset..end)), ..GetOptions::default() };
            let answer = match self.store.get_opts(&self.path(name), options).await {
                Ok(answer) => answer,
                // Beyond its end services answer 416, which the library does not tell from other refusals.
                Err(error) => {
                    let short = self.store.head(&self.path(name)).await.is_ok_and(|found| found.size < end);
                    return Err(if short { io::ErrorKind::UnexpectedEof.into() } else { failed(error) });
                }
            };
            // Known before a byte is kept: a length that a damaged object named allocates nothing.
            if answer.meta.size < end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let bytes = answer.bytes().await.map_err(failed)?;
            if bytes.len() == length { Ok(bytes.into()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
        }
        .boxed()
    }

    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>> {
        async move {
            let _turn = self.turn().await?;
            Ok(self.store.head(&self.path(name)).await.map_err(failed)?.size)
        }
        .boxed()
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>> {
        async move {
            let _turn = self.turn().await?;
            let skip = if self.folder.is_empty() { 0 } else { self.folder.len() + 1 };
            let path = self.path(folder);
            let mut names = Vec::new();
            let mut listed = self.store.list(Some(&path));
            while let Some(object) = listed.try_next().await.map_err(failed)? {
                if let Some(name) = object.location.as_ref().get(skip..) {
                    names.push(name.to_owned());
                }
            }
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
        async move {
            match self.put(&self.path(name), vec![data.clone()], PutMode::Create).await {
                // A service without conditions.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    match self.length(name).await {
                        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                    self.put(&self.path(name), vec![data], PutMode::Overwrite).await
                }
                // An attempt of ours whose answer was lost can have been the one that won.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    match super::get(self, name, data.len()).await {
                        Ok(found) if found == data => Ok(()),
                        _ => Err(error),
                    }
                }
                other => other,
            }
        }
        .boxed()
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<()>> {
        async move {
            let _turn = self.turn().await?;
            match self.store.delete(&self.path(name)).await.map_err(failed) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        }
        .boxed()
    }

    fn modified<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<SystemTime>> {
        async move {
            let _turn = self.turn().await?;
            Ok(self.store.head(&self.path(name)).await.map_err(failed)?.last_modified.into())
        }
        .boxed()
    }

    fn now<'a>(&'a self) -> BoxFuture<'a, io::Result<SystemTime>> {
        // No library tells the head of an answer: an object that appears now has the store's own time.
        async move {
            let name = CLOCK;
            self.put(&self.path(name), vec![Bytes::from_static(b"clock")], PutMode::Overwrite).await?;
            self.modified(name).await
        }
        .boxed()
    }

    fn local_path(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    fn location(&self) -> PathBuf {
        PathBuf::from(&self.location)
    }
}

/// The object that is written anew to learn the store's time.
const CLOCK: &str = "tmp/clock";

struct BucketUpload {
    place: Bucket,
    path: Path,
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
        async move { self.place.put(&self.path, self.parts, PutMode::Overwrite).await }.boxed()
    }
}
