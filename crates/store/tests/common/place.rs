//! Where a test keeps its repository: a folder of its own, or, where `XENVAULT_TEST_S3` names a bucket, a folder there.
//!
//! `cargo xtask test` runs the tests of this crate twice, the second time with a bucket of Ceph's gateway. A path that
//! begins with `s3:` names an object there, and `fs` does with it what `std::fs` does with a file: so a test that hurts
//! what is stored is the same one for both.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use xenvault_store::backend::{Backend, Bucket, BucketOptions, LocalFolder, Patience};

/// `ENDPOINT BUCKET ACCESS-KEY SECRET-KEY`, separated by spaces.
const VARIABLE: &str = "XENVAULT_TEST_S3";

/// A place that is gone when it is dropped.
#[derive(Debug)]
pub enum Place {
    Folder(tempfile::TempDir),
    Bucket(PathBuf),
}

/// An empty place.
pub fn tempdir() -> Place {
    match service() {
        None => Place::Folder(tempfile::tempdir().unwrap()),
        Some(options) => {
            Place::Bucket(PathBuf::from(format!("s3://{}/{}", options.bucket, uuid::Uuid::new_v4().simple())))
        }
    }
}

/// Whether tests run in a bucket.
pub fn in_bucket() -> bool {
    service().is_some()
}

/// How often something is to be done: less often where each time takes a hundred requests.
pub fn times(count: u64) -> u64 {
    if in_bucket() { count / 10 } else { count }
}

impl Place {
    pub fn path(&self) -> &Path {
        match self {
            Self::Folder(folder) => folder.path(),
            Self::Bucket(path) => path,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The whole bucket is gone in the end; until then the gateway holds everything in memory.
        if let Self::Bucket(path) = self
            && !std::thread::panicking()
        {
            let _ = fs::remove_dir_all(&*path);
        }
    }
}

/// The place that a path names.
pub fn local(path: &Path) -> Arc<dyn Backend> {
    match object(path) {
        None => Arc::new(LocalFolder::new(path)),
        Some(folder) => Arc::new(bucket(&folder)),
    }
}

fn service() -> Option<BucketOptions> {
    let told = std::env::var(VARIABLE).ok()?;
    let [endpoint, bucket, access_key, secret_key] = told.split(' ').collect::<Vec<_>>().try_into().unwrap();
    Some(BucketOptions {
        bucket: bucket.to_owned(),
        folder: String::new(),
        endpoint: Some(endpoint.to_owned()),
        region: "us-east-1".to_owned(),
        access_key: access_key.to_owned(),
        secret_key: secret_key.to_owned().into(),
        session_token: None,
        authority: None,
        clear_text: true,
        patience: Patience::default(),
    })
}

fn bucket(folder: &str) -> Bucket {
    Bucket::s3(&BucketOptions { folder: folder.to_owned(), ..service().unwrap() }).unwrap()
}

/// The name of the object in the bucket; `None` for a file.
fn object(path: &Path) -> Option<String> {
    let (_, name) = path.to_str()?.strip_prefix("s3:")?.trim_start_matches('/').split_once('/')?;
    Some(name.to_owned())
}

/// Does what has to wait on a thread of its own, so that it can be asked for from anywhere.
fn wait<T: Send>(work: impl Future<Output = T> + Send) -> T {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    let runtime = RUNTIME
        .get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());
    std::thread::scope(|scope| scope.spawn(|| runtime.block_on(work)).join().unwrap())
}

/// The bucket as seen from outside of any repository.
fn outside() -> &'static Bucket {
    static OUTSIDE: OnceLock<Bucket> = OnceLock::new();
    OUTSIDE.get_or_init(|| bucket(""))
}

/// All objects below a path, or the one at it; ascending.
pub fn below(path: &Path) -> Vec<PathBuf> {
    let Some(name) = object(path) else { return files_below(path) };
    let root = format!("s3://{}", service().unwrap().bucket);
    let name = name.trim_end_matches('/').to_owned();
    let mut found = wait(outside().list(&name)).unwrap();
    if found.is_empty() && wait(outside().length(&name)).is_ok() {
        found.push(name);
    }
    found.into_iter().map(|name| PathBuf::from(format!("{root}/{name}"))).collect()
}

fn files_below(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        if folder.is_file() {
            found.push(folder);
            continue;
        }
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        folders.extend(entries.map(|entry| entry.unwrap().path()));
    }
    found.sort();
    found
}

/// What `std::fs` does, here and there.
pub mod fs {
    use std::io;
    use std::path::Path;

    use bytes::Bytes;
    use xenvault_store::backend::Backend as _;

    use super::{below, object, outside, wait};

    pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let Some(name) = object(path.as_ref()) else { return std::fs::read(path) };
        wait(async {
            let length = outside().length(&name).await?;
            outside().read(&name, 0, usize::try_from(length).unwrap()).await
        })
    }

    pub fn write(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        let Some(name) = object(path.as_ref()) else { return std::fs::write(path, bytes) };
        let bytes = Bytes::copy_from_slice(bytes.as_ref());
        wait(async {
            let mut upload = outside().create(&name).await?;
            upload.write(bytes).await?;
            upload.finish().await
        })
    }

    pub fn remove_file(path: impl AsRef<Path>) -> io::Result<()> {
        let Some(name) = object(path.as_ref()) else { return std::fs::remove_file(path) };
        wait(outside().remove(&name))
    }

    pub fn copy(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
        write(to, read(from)?)
    }

    pub fn length(path: impl AsRef<Path>) -> io::Result<u64> {
        match object(path.as_ref()) {
            None => std::fs::metadata(path).map(|metadata| metadata.len()),
            Some(name) => wait(outside().length(&name)),
        }
    }

    pub fn exists(path: impl AsRef<Path>) -> bool {
        length(path).is_ok()
    }

    pub fn create_dir(path: impl AsRef<Path>) -> io::Result<()> {
        if object(path.as_ref()).is_some() { Ok(()) } else { std::fs::create_dir(path) }
    }

    pub fn remove_dir_all(path: impl AsRef<Path>) -> io::Result<()> {
        if object(path.as_ref()).is_none() {
            return std::fs::remove_dir_all(path);
        }
        below(path.as_ref()).into_iter().try_for_each(remove_file)
    }

    /// An object that is longer than any of its kind: as long as a file or a request can be.
    pub fn write_monster(path: &Path) -> io::Result<()> {
        if object(path).is_none() {
            return std::fs::File::create(path)?.set_len(1 << 40);
        }
        write(path, vec![0; xenvault_store::backend::MAX_OBJECT_BYTES])
    }

    /// Copies everything below a path, wherever the two are.
    pub fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
        for path in below(from) {
            let target = to.join(path.strip_prefix(from).unwrap());
            if object(&target).is_none() {
                std::fs::create_dir_all(target.parent().unwrap())?;
            }
            copy(path, target)?;
        }
        Ok(())
    }
}
