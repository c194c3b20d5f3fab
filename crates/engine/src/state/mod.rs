//! The state folder: identity of this installation, journals of runs, leases.
//!
//! ```text
//! instance              UUID of this installation
//! runs/<run>.journal    intents of one run; locked as long as the run lives
//! vms/<vm>.lock         locked while a run works on the VM
//! ```
//! A lock is the operating system's: it ends with the process, however that ends.

mod journal;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

pub(crate) use journal::{Journal, Publication, RunHistory};
pub(crate) use record::{Entry, Made, Operation};

use crate::EngineError;

/// The state folder of one installation.
#[derive(Clone, Debug)]
pub(crate) struct State {
    folder: PathBuf,
    instance: String,
}

impl State {
    /// Opens the folder, and makes it and the identity if missing.
    pub(crate) fn open(folder: &Path) -> Result<Self, EngineError> {
        for needed in [folder.to_owned(), folder.join("runs"), folder.join("vms")] {
            fs::create_dir_all(&needed).map_err(|source| EngineError::State { path: needed.clone(), source })?;
        }
        let path = folder.join("instance");
        let instance = match fs::read_to_string(&path) {
            Ok(text) => text.trim().to_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound => make_identity(folder, &path)?,
            Err(source) => return Err(EngineError::State { path, source }),
        };
        if uuid::Uuid::try_parse(&instance).is_err() {
            return Err(EngineError::Identity { path });
        }
        Ok(Self { folder: folder.to_owned(), instance })
    }

    /// Identity of this installation.
    pub(crate) fn instance(&self) -> &str {
        &self.instance
    }

    /// Takes the lease on a VM.
    pub(crate) fn lease_vm(&self, vm: &str) -> Result<Lease, EngineError> {
        // It becomes the name of a file.
        if uuid::Uuid::try_parse(vm).is_err() {
            return Err(EngineError::NoUuid { uuid: vm.to_owned() });
        }
        let path = self.folder.join("vms").join(format!("{vm}.lock"));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| EngineError::State { path: path.clone(), source })?;
        match file.try_lock() {
            Ok(()) => Ok(Lease { _file: file }),
            Err(TryLockError::WouldBlock) => Err(EngineError::Busy { vm: vm.to_owned() }),
            Err(TryLockError::Error(source)) => Err(EngineError::State { path, source }),
        }
    }

    /// Begins the journal of a new run, which holds the run's lease.
    pub(crate) fn begin(&self, run: &str, operation: Operation) -> Result<Journal, EngineError> {
        Journal::begin(&self.journal_path(run), run, operation)
    }

    /// The histories of all runs that are not alive. Each is locked as long as its value lives.
    pub(crate) fn dead_runs(&self) -> Result<Vec<RunHistory>, EngineError> {
        let mut dead = Vec::new();
        for run in self.runs()? {
            if let Some(history) = RunHistory::take(&self.journal_path(&run), &run)? {
                dead.push(history);
            }
        }
        Ok(dead)
    }

    /// The history of a run that is alive, such as one's own.
    pub(crate) fn history(&self, run: &str) -> Result<RunHistory, EngineError> {
        RunHistory::peek(&self.journal_path(run), run)
    }

    /// Whether a run holds its lease at this moment.
    pub(crate) fn is_alive(&self, run: &str) -> bool {
        let Ok(file) = File::open(self.journal_path(run)) else { return false };
        matches!(file.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// The runs that have a journal and are not among these dead ones: each was alive a moment ago.
    pub(crate) fn living_runs(&self, dead: &BTreeMap<String, RunHistory>) -> Result<BTreeSet<String>, EngineError> {
        Ok(self.runs()?.into_iter().filter(|run| !dead.contains_key(run)).collect())
    }

    fn runs(&self) -> Result<Vec<String>, EngineError> {
        let path = self.folder.join("runs");
        let failed = |source| EngineError::State { path: path.clone(), source };
        let mut runs = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(run) = name.to_str().and_then(|name| name.strip_suffix(".journal")) {
                runs.push(run.to_owned());
            }
        }
        runs.sort_unstable();
        Ok(runs)
    }

    fn journal_path(&self, run: &str) -> PathBuf {
        self.folder.join("runs").join(format!("{run}.journal"))
    }
}

/// Writes a new identity. Of two processes that do it at once, both use what the first one wrote.
fn make_identity(folder: &Path, path: &Path) -> Result<String, EngineError> {
    let failed = |source| EngineError::State { path: path.to_owned(), source };
    let identity = uuid::Uuid::new_v4().to_string();
    let draft = folder.join(format!("instance.{identity}"));
    let written = (|| {
        let mut file = File::create_new(&draft)?;
        file.write_all(format!("{identity}\n").as_bytes())?;
        file.sync_all()?;
        match fs::hard_link(&draft, path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
            _ => File::open(folder)?.sync_all(),
        }
    })();
    // The draft is a second name of a file that is wanted under the first only.
    let removed = fs::remove_file(&draft);
    written.and(removed).map_err(failed)?;
    fs::read_to_string(path).map(|text| text.trim().to_owned()).map_err(failed)
}

/// A held lock; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    _file: File,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_is_made_once_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let first = State::open(&folder.path().join("state")).unwrap();
        let second = State::open(&folder.path().join("state")).unwrap();
        assert_eq!(first.instance(), second.instance());
    }

    #[test]
    fn a_damaged_identity_is_never_replaced_silently() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("instance"), "nonsense").unwrap();
        assert!(matches!(State::open(folder.path()), Err(EngineError::Identity { .. })));
        assert_eq!(fs::read_to_string(folder.path().join("instance")).unwrap(), "nonsense");
    }

    #[test]
    fn a_vm_has_one_run_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let [first, second] = ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"];
        let lease = state.lease_vm(first).unwrap();
        assert!(matches!(state.lease_vm(first), Err(EngineError::Busy { .. })));
        assert!(state.lease_vm(second).is_ok());
        drop(lease);
        assert!(state.lease_vm(first).is_ok());
    }

    #[test]
    fn what_is_no_uuid_makes_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        for name in ["../instance", "", "a/b"] {
            assert!(matches!(state.lease_vm(name), Err(EngineError::NoUuid { .. })), "{name:?}");
        }
        assert_eq!(fs::read_dir(folder.path().join("vms")).unwrap().count(), 0);
    }
}
