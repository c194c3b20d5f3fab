//! The journal of one run: appended and synced before each act. Its lock is the run's lease.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::record::{Entry, Made, Operation};
use crate::EngineError;

/// Version of the lines.
const VERSION: u32 = 1;
/// A journal longer than this is not one of ours, in bytes.
const MAX_JOURNAL_BYTES: u64 = 16 * 1024 * 1024;

/// The journal of a living run. Clones write to the same file; the lease ends with the last one.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    run: Arc<str>,
    path: Arc<Path>,
    file: Arc<Mutex<File>>,
}

impl Journal {
    pub(super) fn begin(path: &Path, run: &str, operation: Operation) -> Result<Self, EngineError> {
        let failed = |source| EngineError::State { path: path.to_owned(), source };
        // Locked under another name first: nobody may meet the journal unlocked and take the run for a dead one.
        let draft = path.with_extension("new");
        let file = File::create_new(&draft).map_err(failed)?;
        file.lock().and_then(|()| fs::rename(&draft, path)).map_err(failed)?;
        let journal = Self { run: run.into(), path: path.into(), file: Arc::new(Mutex::new(file)) };
        journal.write(&Entry::Begin { version: VERSION, run: run.to_owned(), operation })?;
        if let Some(folder) = path.parent() {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
        }
        Ok(journal)
    }

    /// The run.
    pub(crate) fn run(&self) -> &str {
        &self.run
    }

    /// Appends one line and syncs it. Returns only when the line is durable.
    pub(crate) fn write(&self, entry: &Entry) -> Result<(), EngineError> {
        let failed = |source| EngineError::State { path: self.path.to_path_buf(), source };
        let mut line = serde_json::to_vec(entry).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line).and_then(|()| file.sync_data()).map_err(failed)
    }

    /// Ends the run and forgets it: nothing of it is left in the pool but what stays on purpose.
    pub(crate) fn close(self) -> Result<(), EngineError> {
        fs::remove_file(&self.path).map_err(|source| EngineError::State { path: self.path.to_path_buf(), source })
    }
}

/// What a run did, from its journal.
#[derive(Debug)]
pub(crate) struct RunHistory {
    pub(crate) run: String,
    /// `None`: the run died before its first line was complete, and so before it made anything.
    pub(crate) operation: Option<Operation>,
    /// Objects that were made and not removed.
    pub(crate) alive: BTreeSet<(Made, String)>,
    /// Names of objects that were going to be made.
    pub(crate) intended: BTreeSet<(Made, String)>,
    /// How many intents nobody saw the result of.
    pub(crate) unseen: usize,
    /// Whether the point is complete, or may be.
    pub(crate) publication: Publication,
    path: PathBuf,
    /// Keeps the run's lock, so that nobody else cleans up after it at the same time. `None`: the run is alive.
    lock: Option<File>,
}

/// How far the point of a run came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Publication {
    /// It was not begun.
    No,
    /// It was begun; only the repository knows.
    Perhaps,
    /// The point is complete.
    Yes,
}

impl RunHistory {
    /// Reads and locks the journal of a dead run; `None` if the run is alive, or was cleaned up meanwhile.
    pub(super) fn take(path: &Path, run: &str) -> Result<Option<Self>, EngineError> {
        let failed = |source| EngineError::State { path: path.to_owned(), source };
        let mut file = match OpenOptions::new().read(true).append(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let text = read_all(&mut file).map_err(failed)?;
        // A crash can leave an incomplete last line: its act never began. What is appended must not continue it.
        if text.last().is_some_and(|&byte| byte != b'\n') {
            file.write_all(b"\n").map_err(failed)?;
        }
        Ok(Some(Self::replay(run, &text, path.to_owned(), Some(file))))
    }

    /// Reads the journal of a run that is alive.
    pub(super) fn peek(path: &Path, run: &str) -> Result<Self, EngineError> {
        let failed = |source| EngineError::State { path: path.to_owned(), source };
        let text = File::open(path).and_then(|mut file| read_all(&mut file)).map_err(failed)?;
        Ok(Self::replay(run, &text, path.to_owned(), None))
    }

    /// The state after all complete lines.
    fn replay(run: &str, text: &[u8], path: PathBuf, lock: Option<File>) -> Self {
        let mut history = Self {
            run: run.to_owned(),
            operation: None,
            alive: BTreeSet::new(),
            intended: BTreeSet::new(),
            unseen: 0,
            publication: Publication::No,
            path,
            lock,
        };
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let Some(line) = line.strip_suffix(b"\n") else { break };
            let Ok(entry) = serde_json::from_slice::<Entry>(line) else { continue };
            history.apply(entry);
        }
        history
    }

    fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Begin { operation, .. } => self.operation = Some(operation),
            Entry::Intend { what, name } => {
                self.intended.insert((what, name));
                self.unseen += 1;
            }
            Entry::Created { what, id } => {
                // What came of an intent; the disks of a snapshot come along without one of their own.
                if what != Made::Task && self.intended.iter().any(|(intended, _)| *intended == what) {
                    self.unseen = self.unseen.saturating_sub(1);
                }
                self.alive.insert((what, id));
            }
            Entry::Removed { what, id } => {
                self.alive.remove(&(what, id));
            }
            Entry::Publishing => self.publication = Publication::Perhaps,
            Entry::Withdrawn => self.publication = Publication::No,
            Entry::Published { .. } => self.publication = Publication::Yes,
        }
    }

    /// Notes what is learned while a dead run is cleaned up.
    pub(crate) fn note(&mut self, entry: Entry) -> Result<(), EngineError> {
        let failed = |source| EngineError::State { path: self.path.clone(), source };
        if let Some(file) = &mut self.lock {
            let mut line = serde_json::to_vec(&entry).map_err(|error| failed(error.into()))?;
            line.push(b'\n');
            file.write_all(&line).and_then(|()| file.sync_data()).map_err(failed)?;
        }
        self.apply(entry);
        Ok(())
    }

    /// Whether the journal says that this run created the object.
    #[cfg(test)]
    pub(crate) fn created(&self, what: Made, id: &str) -> bool {
        self.alive.contains(&(what, id.to_owned()))
    }

    /// Whether the run made a VM from a point.
    pub(crate) fn is_restore(&self) -> bool {
        self.operation.as_ref().is_some_and(|operation| operation.kind == "restore")
    }

    /// Forgets a dead run: nothing of it is left but what stays on purpose.
    pub(crate) fn forget(self) -> Result<(), EngineError> {
        if self.lock.is_none() {
            return Ok(());
        }
        fs::remove_file(&self.path).map_err(|source| EngineError::State { path: self.path.clone(), source })
    }
}

fn read_all(file: &mut File) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(MAX_JOURNAL_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn operation() -> Operation {
        Operation { kind: "backup".into(), pool: "p".into(), vm: "v".into(), repository: None, started: 1 }
    }

    fn created(id: &str) -> Entry {
        Entry::Created { what: Made::Vdi, id: id.into() }
    }

    #[test]
    fn a_living_run_is_not_dead_and_a_dropped_one_is() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let journal = state.begin("r1", operation()).unwrap();
        journal.write(&created("a")).unwrap();
        journal.write(&created("b")).unwrap();
        journal.write(&Entry::Removed { what: Made::Vdi, id: "a".into() }).unwrap();
        journal.write(&Entry::Publishing).unwrap();
        assert!(state.is_alive("r1"));
        assert!(state.dead_runs().unwrap().is_empty());
        drop(journal);
        assert!(!state.is_alive("r1"));
        let dead = state.dead_runs().unwrap();
        assert_eq!(dead.len(), 1);
        assert!(dead[0].created(Made::Vdi, "b") && !dead[0].created(Made::Vdi, "a"));
        assert_eq!(dead[0].publication, Publication::Perhaps);
        assert_eq!(dead[0].operation, Some(operation()));
    }

    #[test]
    fn a_cut_last_line_is_ignored_at_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        let journal = state.begin("r1", operation()).unwrap();
        journal.write(&created("a")).unwrap();
        drop(journal);
        let path = folder.path().join("runs/r1.journal");
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let dead = state.dead_runs().unwrap();
            assert!(!dead[0].created(Made::Vdi, "a"), "cut at {length}");
        }
        fs::write(&path, &whole).unwrap();
        assert!(state.dead_runs().unwrap()[0].created(Made::Vdi, "a"));
    }

    #[test]
    fn a_closed_journal_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::open(folder.path()).unwrap();
        state.begin("r1", operation()).unwrap().close().unwrap();
        assert!(state.dead_runs().unwrap().is_empty());
    }
}
