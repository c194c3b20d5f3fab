//! A folder of a local file system.
//!
//! An object is written to a file of its own under `tmp/`, which is locked while its writer lives; then the file is
//! synced, renamed to its name, and the folder synced, as are the folders that had to be made. So an object is either
//! complete and durable, or not there. (`object_store`'s local file system can sync too since its option of that name
//! exists, but gives no file to map and no way to tell a dead writer's temporary file from a living one's.)

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{Backend, Protection, Upload, seal};

const TEMPORARY: &str = "tmp";

/// A folder as a place for objects.
#[derive(Clone, Debug)]
pub struct LocalFolder {
    root: PathBuf,
    /// Folders whose entry in the one above was synced since this was made. That a folder is there is not enough:
    /// somebody else may have made it, and not have got to syncing it.
    synced: Arc<Mutex<HashSet<PathBuf>>>,
    /// Bounds the threads that wait for the medium, and with them the memory that their allocator arenas keep.
    reads: Arc<Semaphore>,
}

/// Reads at the same time: enough to keep any disk busy.
const READS_AT_ONCE: usize = 16;

impl LocalFolder {
    /// The folder at `root`, which need not exist before the first object is written.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), synced: Arc::default(), reads: Arc::new(Semaphore::new(READS_AT_ONCE)) }
    }

    /// Makes a folder of the repository, and those above it, each of them durable.
    fn make(&self, folder: &Path) -> io::Result<()> {
        let known = || self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if known().contains(folder) && folder.is_dir() {
            return Ok(());
        }
        match folder.parent().filter(|_| folder.starts_with(&self.root) && folder != self.root) {
            None => make_folder(folder)?,
            Some(parent) => {
                self.make(parent)?;
                create_unless_there(folder)?;
                sync_folder(parent)?;
            }
        }
        known().insert(folder.to_owned());
        Ok(())
    }
}

impl Backend for LocalFolder {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        let (place, target) = (self.clone(), self.root.join(name));
        blocking(move || {
            let folder = place.root.join(TEMPORARY);
            place.make(&folder)?;
            let (file, temporary) = create_locked(&folder)?;
            Ok(Box::new(LocalUpload { place, file: Some(file), temporary, target }) as Box<dyn Upload>)
        })
        .boxed()
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        let path = self.root.join(name);
        let work = move || {
            let file = File::open(path)?;
            // The length may come from a damaged object; the file's own length bounds what is allocated.
            let room = file.metadata()?.len().saturating_sub(offset);
            if room < length as u64 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        };
        let reads = Arc::clone(&self.reads);
        async move {
            let turn = reads.acquire_owned().await.map_err(io::Error::other)?;
            // With the work, which goes on if whoever waits for it goes away.
            blocking(move || {
                let _turn = turn;
                work()
            })
            .await
        }
        .boxed()
    }

    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>> {
        let path = self.root.join(name);
        blocking(move || fs::metadata(path).map(|metadata| metadata.len())).boxed()
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>> {
        let (root, folder) = (self.root.clone(), folder.to_owned());
        blocking(move || {
            let mut names = Vec::new();
            walk(&root, &folder, &mut names)?;
            names.sort_unstable();
            Ok(names)
        })
        .boxed()
    }

    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>> {
        let folder = self.root.join(TEMPORARY);
        blocking(move || remove_abandoned(&folder)).boxed()
    }

    fn settle<'a>(&'a self, folders: &'a [String]) -> BoxFuture<'a, io::Result<()>> {
        let (place, folders) = (self.clone(), folders.to_vec());
        blocking(move || {
            for folder in folders {
                let folder = place.root.join(folder);
                // Its own entry first, which another writer may have made only just now.
                place.make(&folder)?;
                sync_folder(&folder)?;
            }
            Ok(())
        })
        .boxed()
    }

    fn put_new<'a>(&'a self, name: &'a str, data: Bytes) -> BoxFuture<'a, io::Result<()>> {
        let (place, target) = (self.clone(), self.root.join(name));
        blocking(move || {
            let folder = place.root.join(TEMPORARY);
            place.make(&folder)?;
            let (mut file, temporary) = create_locked(&folder)?;
            let mut written = || {
                file.write_all(&data)?;
                file.sync_all()?;
                let folder = target.parent().unwrap_or(Path::new("/"));
                place.make(folder)?;
                match fs::hard_link(&temporary, &target) {
                    Err(error) if has_no_links(&error) && !target.try_exists()? => fs::rename(&temporary, &target)?,
                    Err(error) if has_no_links(&error) => return Err(io::ErrorKind::AlreadyExists.into()),
                    linked => linked?,
                }
                sync_folder(folder)
            };
            let written = written();
            // Another name of the same file, or what was not written; the next writer's clean-up finds what stays.
            let _ = fs::remove_file(&temporary);
            written
        })
        .boxed()
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<()>> {
        let path = self.root.join(name);
        blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            // The broker has made it immutable, and root may lift that.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && seal::lift(&path) => fs::remove_file(path),
            removed => removed,
        })
        .boxed()
    }

    fn modified<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<SystemTime>> {
        let path = self.root.join(name);
        blocking(move || fs::metadata(path)?.modified()).boxed()
    }

    fn now<'a>(&'a self) -> BoxFuture<'a, io::Result<SystemTime>> {
        let place = self.clone();
        blocking(move || {
            let folder = place.root.join(TEMPORARY);
            place.make(&folder)?;
            // A file server stamps its files with its own clock.
            let (file, temporary) = create_locked(&folder)?;
            let now = file.metadata().and_then(|metadata| metadata.modified());
            fs::remove_file(temporary)?;
            now
        })
        .boxed()
    }

    fn local_path(&self, name: &str) -> Option<PathBuf> {
        Some(self.root.join(name))
    }

    fn location(&self) -> PathBuf {
        self.root.clone()
    }

    fn takes_broker(&self) -> bool {
        true
    }

    fn protection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Protection>> {
        let (root, path) = (self.root.clone(), self.root.join(name));
        blocking(move || seal::protection(&root, &path)).boxed()
    }
}

struct LocalUpload {
    place: LocalFolder,
    /// Gone while a write is under way; a write that was dropped half way so spoils the upload.
    file: Option<File>,
    temporary: PathBuf,
    target: PathBuf,
}

impl LocalUpload {
    fn take_file(&mut self) -> io::Result<File> {
        self.file.take().ok_or_else(|| io::Error::other("an earlier write of this object did not end"))
    }
}

impl Upload for LocalUpload {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        async move {
            let mut file = self.take_file()?;
            self.file = Some(blocking(move || file.write_all(&data).map(|()| file)).await?);
            Ok(())
        }
        .boxed()
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        async move {
            let file = self.take_file()?;
            blocking(move || {
                let folder = self.target.parent().unwrap_or(Path::new("/"));
                file.sync_all()?;
                self.place.make(folder)?;
                fs::rename(&self.temporary, &self.target)?;
                sync_folder(folder)
            })
            .await
        }
        .boxed()
    }
}

impl Drop for LocalUpload {
    fn drop(&mut self) {
        // After a rename there is nothing under this name. A file that can not be removed is swept by the next writer.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Runs what may block off the async threads. If the runtime ends first, that is an error and not a panic.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn create_locked(folder: &Path) -> io::Result<(File, PathBuf)> {
    loop {
        let path = folder.join(Uuid::new_v4().simple().to_string());
        let file = File::options().write(true).create_new(true).open(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            // Somebody's clean-up was faster and is about to remove the file.
            Err(fs::TryLockError::WouldBlock) => continue,
            // A file system without locks: others can not tell that we live, and neither remove.
            Err(fs::TryLockError::Error(_)) => return Ok((file, path)),
        }
        if path.try_exists()? {
            return Ok((file, path));
        }
    }
}

fn remove_abandoned(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let Ok(file) = File::open(&path) else { continue };
        if file.try_lock().is_ok() {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Makes a folder and those above it, each of them durable.
fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_folder(parent)?;
    }
    create_unless_there(folder)?;
    match folder.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => sync_folder(Path::new(".")),
    }
}

/// Whether the file system can not give a file two names.
fn has_no_links(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied)
}

fn create_unless_there(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Makes a folder, and waits until nobody else holds it in this way. Without a file system's help, everybody may.
pub(crate) async fn lock_folder(folder: &Path) -> io::Result<File> {
    let folder = folder.to_owned();
    blocking(move || {
        make_folder(&folder)?;
        let file = File::open(&folder)?;
        if let Err(error) = file.lock() {
            tracing::debug!(error = %error, "the folder can not be locked");
        }
        Ok(file)
    })
    .await
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn walk(root: &Path, folder: &str, names: &mut Vec<String>) -> io::Result<()> {
    let entries = match fs::read_dir(root.join(folder)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // Names that are not UTF-8 are none of ours.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let name = format!("{folder}/{name}");
        if entry.file_type()?.is_dir() {
            walk(root, &name, names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{get, put};

    #[tokio::test]
    async fn an_object_appears_only_when_it_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let backend = LocalFolder::new(folder.path().join("new"));
        let mut upload = backend.create("packs/00/a").await.unwrap();
        upload.write(Bytes::from_static(b"half")).await.unwrap();
        assert!(backend.list("packs").await.unwrap().is_empty());
        upload.write(Bytes::from_static(b" and half")).await.unwrap();
        upload.finish().await.unwrap();
        assert_eq!(backend.list("packs").await.unwrap(), ["packs/00/a"]);
        assert_eq!(get(&backend, "packs/00/a", 100).await.unwrap(), b"half and half");
        assert!(get(&backend, "packs/00/a", 10).await.is_err());
    }

    #[tokio::test]
    async fn clean_up_spares_uploads_that_live() {
        let folder = tempfile::tempdir().unwrap();
        let backend = LocalFolder::new(folder.path());
        let mut living = backend.create("b").await.unwrap();
        fs::write(folder.path().join("tmp/left-behind"), "x").unwrap();
        backend.clean().await.unwrap();
        assert_eq!(fs::read_dir(folder.path().join("tmp")).unwrap().count(), 1);
        living.write(Bytes::from_static(b"data")).await.unwrap();
        living.finish().await.unwrap();
        drop(backend.create("c").await.unwrap());
        assert_eq!(fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0);
        put(&backend, "b", Bytes::new()).await.unwrap();
    }

    #[tokio::test]
    async fn settling_needs_the_folders_to_be_there_for_good() {
        let folder = tempfile::tempdir().unwrap();
        let backend = LocalFolder::new(folder.path());
        fs::create_dir_all(folder.path().join("packs/ab")).unwrap();
        backend.settle(&["packs/ab".to_owned()]).await.unwrap();
        let synced = backend.synced.lock().unwrap().clone();
        assert!(["packs", "packs/ab"].iter().all(|name| synced.contains(&folder.path().join(name))), "{synced:?}");
        // A folder that goes away is made again, whatever was known of it.
        fs::remove_dir_all(folder.path().join("packs")).unwrap();
        put(&backend, "packs/ab/c", Bytes::from_static(b"c")).await.unwrap();
        assert_eq!(get(&backend, "packs/ab/c", 1).await.unwrap(), b"c");
    }

    #[tokio::test]
    async fn of_two_objects_of_one_name_the_first_stays() {
        let folder = tempfile::tempdir().unwrap();
        let backend = LocalFolder::new(folder.path());
        let before = backend.now().await.unwrap();
        backend.put_new("sweeps/1/intent", Bytes::from_static(b"first")).await.unwrap();
        let error = backend.put_new("sweeps/1/intent", Bytes::from_static(b"second")).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(get(&backend, "sweeps/1/intent", 10).await.unwrap(), b"first");
        assert_eq!(fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0);
        let (then, after) = (backend.modified("sweeps/1/intent").await.unwrap(), backend.now().await.unwrap());
        assert!(before <= then && then <= after, "{before:?} {then:?} {after:?}");
        backend.remove("sweeps/1/intent").await.unwrap();
        backend.remove("sweeps/1/intent").await.unwrap();
        assert!(backend.list("sweeps").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn reading_past_the_end_allocates_nothing_and_fails() {
        let folder = tempfile::tempdir().unwrap();
        let backend = LocalFolder::new(folder.path());
        put(&backend, "a", Bytes::from_static(b"abc")).await.unwrap();
        let error = backend.read("a", 1, usize::MAX / 2).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
