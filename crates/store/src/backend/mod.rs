//! Where objects live. Narrow on purpose: an object appears at once and for good, is read in parts, and is listed.
//!
//! Nothing here knows what is in an object. Names are relative, with `/` between segments.

mod local;

use std::fmt;
use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;

pub use local::LocalFolder;
pub(crate) use local::lock_folder;

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

    /// Removes what uploads that died have left behind. Never touches an upload that lives, nor an object.
    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>>;

    /// Makes durable what is visible in these folders, whoever has put it there: between a name's appearance and its
    /// durability lies a moment in which others see it already. Nothing to do where there is no such moment.
    fn settle<'a>(&'a self, _folders: &'a [String]) -> BoxFuture<'a, io::Result<()>> {
        std::future::ready(Ok(())).boxed()
    }

    /// The file that holds an object, where there is one; it may be mapped into memory.
    fn local_path(&self, name: &str) -> Option<PathBuf>;

    /// Where this is, for messages.
    fn location(&self) -> PathBuf;
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

/// Reads a whole object of at most `limit` bytes.
pub(crate) async fn get(backend: &dyn Backend, name: &str, limit: usize) -> io::Result<Vec<u8>> {
    let length = backend.length(name).await?;
    let too_long = || io::Error::new(io::ErrorKind::InvalidData, format!("{length} bytes, at most {limit} expected"));
    let length = usize::try_from(length).ok().filter(|&length| length <= limit).ok_or_else(too_long)?;
    backend.read(name, 0, length).await
}
