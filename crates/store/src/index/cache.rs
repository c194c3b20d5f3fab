//! Copies of index segments on this machine, where the repository itself has no files to map.
//!
//! Names of segments are never used twice, so a copy that is whole is right for ever; whether it is whole, the check of
//! every segment that is loaded tells. Nothing here can fail a run: what can not be kept is fetched again another time.
//! Least recently used copies go when there are too many bytes; one that is mapped stays readable without its name.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use xenvault_store_format::RepositoryId;

/// Where copies lie, and how many bytes of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexCacheOptions {
    /// A folder that only this user can write to; each repository has a folder of its own in it.
    pub folder: PathBuf,
    /// Bytes of one repository's copies.
    pub limit_bytes: u64,
}

/// The copies of one repository.
#[derive(Clone, Debug)]
pub(crate) struct IndexCache {
    folder: PathBuf,
    limit_bytes: u64,
}

impl IndexCache {
    pub(crate) fn new(options: IndexCacheOptions, repository: RepositoryId) -> Self {
        let folder = options.folder.join(repository.to_string()).join("index");
        Self { folder, limit_bytes: options.limit_bytes }
    }

    /// The copy of a segment. Being used, it is the last to go.
    pub(super) fn open(&self, name: &str) -> Option<File> {
        let file = File::options().read(true).write(true).open(self.path(name)?).ok()?;
        // Only the order in which copies go depends on it.
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    /// Keeps a segment, and gives its copy.
    pub(super) fn keep(&self, name: &str, bytes: &[u8]) -> Option<File> {
        let path = self.path(name).filter(|_| bytes.len() as u64 <= self.limit_bytes)?;
        let kept = self.write(&path, bytes).and_then(|()| self.tidy(&path));
        if let Err(error) = &kept {
            tracing::debug!(error = %error, folder = %self.folder.display(), "an index segment is not kept here");
        }
        self.open(name)
    }

    /// Forgets a copy that is not whole.
    pub(super) fn discard(&self, name: &str) {
        if let Some(path) = self.path(name) {
            let _ = fs::remove_file(path);
        }
    }

    /// Nothing that a listing names leads out of the folder.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let last = crate::names::last_segment(name, crate::names::INDEX)?;
        let is_plain = !last.is_empty() && last.len() <= 64 && last.bytes().all(|byte| byte.is_ascii_alphanumeric());
        is_plain.then(|| self.folder.join(last))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    }

    /// Makes room, sparing the copy that has just been made.
    fn tidy(&self, newest: &Path) -> io::Result<()> {
        let mut copies = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let Ok(about) = entry.metadata() else { continue };
            copies.push((about.modified()?, about.len(), entry.path()));
        }
        copies.sort();
        let mut bytes: u64 = copies.iter().map(|(_, length, _)| length).sum();
        for (_, length, path) in copies {
            if bytes <= self.limit_bytes {
                return Ok(());
            }
            if path != newest {
                fs::remove_file(path)?;
                bytes -= length;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn cache(folder: &Path, limit_bytes: u64) -> IndexCache {
        let options = IndexCacheOptions { folder: folder.to_owned(), limit_bytes };
        IndexCache::new(options, RepositoryId::from_bytes([3; 16]))
    }

    #[test]
    fn what_was_used_last_stays_and_there_is_never_more_than_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path(), 250);
        for name in ["index/a", "index/b"] {
            assert!(cache.keep(name, &[0; 100]).is_some());
        }
        // Older than any clock's step.
        for (name, age) in [("a", 200), ("b", 100)] {
            let file = File::options().write(true).open(cache.folder.join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        assert!(cache.open("index/a").is_some());
        assert!(cache.keep("index/c", &[0; 100]).is_some());
        assert!(cache.open("index/a").is_some() && cache.open("index/c").is_some());
        assert!(cache.open("index/b").is_none());
        assert!(cache.keep("index/d", &[0; 300]).is_none(), "more than all of them together may be");
        cache.discard("index/a");
        assert!(cache.open("index/a").is_none());
    }

    #[test]
    fn nothing_leads_out_of_the_folder_and_a_folder_that_can_not_be_written_to_is_no_failure() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["index/../x", "index/", "packs/a", "index/a/b", "index/.."] {
            assert!(cache(folder.path(), 100).keep(name, b"x").is_none(), "{name}");
        }
        fs::write(folder.path().join("file"), "x").unwrap();
        assert!(cache(&folder.path().join("file"), 100).keep("index/a", b"x").is_none());
    }
}
