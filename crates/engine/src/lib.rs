//! The workflows of Xenvault: back up one VM, restore one, sweep what dead runs left behind.
//!
//! Floor 3. Owns the order of steps, the ownership marks on objects of the pool, and the journal of intents. Owns no
//! protocol and no format: it talks to a pool through `xenapi` and `nbd`, and to a repository through `store`.
//!
//! A library to embed: it never prints, exits, or installs anything global. It reports through [`JobMonitor`].
//! Dropping the future of a workflow cancels it; what it made in the pool is then removed by a task that is spawned on
//! the current tokio runtime. If the runtime goes away first, the next run of the same installation, or a sweep, does it.

mod backup;
mod check;
mod config;
mod error;
mod gaps;
mod marks;
mod meter;
mod monitor;
mod options;
pub mod points;
mod pool;
mod restore;
mod run;
mod state;
mod sweep;

use std::sync::Arc;

use xenvault_nbd::HostBudget;
use xenvault_store::Repository;
use xenvault_xenapi::Session;

use state::State;
use tokio_util::task::TaskTracker;

pub use backup::{
    BackupReport, BackupRequest, DiskReport, Finding, FindingKind, Level, LevelRequest, SkippedDevice, Verification,
    VmSelector,
};
pub use check::{CheckFinding, CheckReport, CheckRequest, CheckedObject, Severity};
pub use error::{EngineError, ErrorKind, Retry};
pub use monitor::{Bottleneck, JobMonitor, NoMonitor, Progress, Stage, Warning};
pub use options::{ClearText, EngineOptions, MAX_SAMPLE_BLOCKS};
pub use restore::{MacPolicy, NotRestored, RestoreReport, RestoreRequest, RestoredDisk, RestoredVif, SrSelector};
pub use sweep::{ObjectKind, SweepAction, SweepItem, SweepMode, SweepOptions, SweepPlan, SweepReport};

/// Runs workflows against one pool and one repository. A clone is a handle to the same.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    session: Session,
    repository: Option<Repository>,
    options: EngineOptions,
    state: State,
    budget: HostBudget,
    background: TaskTracker,
}

impl Engine {
    /// Opens (or makes) the state folder and ties the parts together. The session stays the caller's to log out.
    ///
    /// A sweep works without a repository; the other workflows then fail with [`EngineError::NoRepository`].
    ///
    /// # Errors
    /// [`EngineError::State`], [`EngineError::Identity`].
    pub fn open(session: Session, repository: Option<Repository>, options: EngineOptions) -> Result<Self, EngineError> {
        let state = State::open(&options.state_dir)?;
        let budget = HostBudget::new(options.connections_per_host);
        Ok(Self {
            inner: Arc::new(Inner { session, repository, options, state, budget, background: TaskTracker::new() }),
        })
    }

    /// The identity of this installation, as it stands in the marks on objects of the pool.
    pub fn instance(&self) -> &str {
        self.inner.state.instance()
    }

    pub(crate) fn session(&self) -> &Session {
        &self.inner.session
    }

    pub(crate) fn repository(&self) -> Result<&Repository, EngineError> {
        self.inner.repository.as_ref().ok_or(EngineError::NoRepository)
    }

    pub(crate) fn any_repository(&self) -> Option<&Repository> {
        self.inner.repository.as_ref()
    }

    pub(crate) fn options(&self) -> &EngineOptions {
        &self.inner.options
    }

    pub(crate) fn state(&self) -> &State {
        &self.inner.state
    }

    pub(crate) fn background(&self) -> &TaskTracker {
        &self.inner.background
    }

    pub(crate) fn budget(&self) -> HostBudget {
        self.inner.budget.clone()
    }

    /// Backs up one VM.
    ///
    /// When this returns a report, the point is complete and durable. On failure no point was written and what was
    /// made in the pool has been removed.
    ///
    /// # Errors
    /// Any of [`EngineError`].
    pub async fn backup(&self, request: BackupRequest) -> Result<BackupReport, EngineError> {
        Box::pin(backup::run(self, request)).await
    }

    /// Restores one VM as a new, halted VM.
    ///
    /// # Errors
    /// Any of [`EngineError`]; what was made has been removed then.
    pub async fn restore(&self, request: RestoreRequest) -> Result<RestoreReport, EngineError> {
        Box::pin(restore::run(self, request)).await
    }

    /// Checks whether VMs of the pool can be backed up, and how well. Changes nothing in the pool.
    ///
    /// # Errors
    /// [`EngineError::Pool`] if the pool can not be read; [`EngineError::UnknownVm`] and its like for a VM that is
    /// named. What stands in the way of backups is no error, but a finding.
    pub async fn check(&self, request: &CheckRequest) -> Result<CheckReport, EngineError> {
        Box::pin(check::run(self, request)).await
    }

    /// Removes what dead runs of this installation left in the pool.
    ///
    /// # Errors
    /// [`EngineError::Pool`] if the pool can not be listed completely; nothing was removed then.
    pub async fn sweep(&self, options: SweepOptions) -> Result<SweepReport, EngineError> {
        Box::pin(sweep::run(self, options)).await
    }

    /// Waits until what cancelled workflows (dropped futures) of this engine made in the pool has been removed.
    ///
    /// A program calls it after a signal, before it logs the session out and ends; it returns at once if nothing was
    /// cancelled.
    pub async fn settled(&self) {
        let background = &self.inner.background;
        background.close();
        background.wait().await;
        background.reopen();
    }
}
