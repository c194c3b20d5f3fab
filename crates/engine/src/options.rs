//! What the embedding program decides about a workflow, apart from the single request.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::monitor::{JobMonitor, NoMonitor};

/// Settings of an [`Engine`](crate::Engine). `EngineOptions::new(state_dir)` gives safe defaults.
#[derive(Clone)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Folder for the identity of this installation, the journal of intents and the leases. It is made if missing.
    /// One folder belongs to one installation; it may be shared by several processes of one machine.
    pub state_dir: PathBuf,
    /// Receives progress and warnings.
    pub monitor: Arc<dyn JobMonitor>,
    /// NBD connections per disk; each costs the host a VBD. Default 2.
    pub connections_per_disk: usize,
    /// NBD connections to one host, over all disks. Default 8, the half of what the host serves to everybody.
    pub connections_per_host: usize,
    /// Upper bound for disk data in memory, in bytes, over all stages. Default 64 MiB.
    pub memory_bytes: u64,
    /// Worker threads for hashing, compression and sealing; 0 = as many as there are processors.
    pub worker_threads: usize,
    /// Blocks that are read again after a disk was stored, and compared. Default (and maximum) 16 per disk.
    pub sample_blocks: usize,
    /// Whether disks may travel in clear text when the pool offers only that.
    pub clear_text: ClearText,
    /// How long a snapshot of a run that was killed is kept for a second attempt. Default 6 hours.
    pub resume_window: Duration,
    /// How long to wait for the hosts to detach a disk after NBD was closed. Default 90 s.
    pub detach_timeout: Duration,
    /// How long to wait for the end of what goes on with the VM (a migration) before its snapshot. Default 10 minutes.
    pub operation_wait: Duration,
    /// How long a task of the pool may show no progress. Default 1 hour.
    pub task_progress_deadline: Duration,
}

/// Consent to NBD without TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClearText {
    /// Disks are only read over TLS.
    #[default]
    Refuse,
    /// The operator accepts that anybody on the network can read the disks.
    Accept,
}

impl EngineOptions {
    /// Defaults, with the state kept in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            monitor: Arc::new(NoMonitor),
            connections_per_disk: 2,
            connections_per_host: 8,
            memory_bytes: 64 * 1024 * 1024,
            worker_threads: 0,
            sample_blocks: MAX_SAMPLE_BLOCKS,
            clear_text: ClearText::Refuse,
            resume_window: Duration::from_secs(6 * 3600),
            detach_timeout: Duration::from_secs(90),
            operation_wait: Duration::from_secs(600),
            task_progress_deadline: Duration::from_secs(3600),
        }
    }

    /// The same options with another monitor.
    #[must_use]
    pub fn with_monitor(mut self, monitor: Arc<dyn JobMonitor>) -> Self {
        self.monitor = monitor;
        self
    }
}

/// More blocks than this are never read for a check sample.
pub const MAX_SAMPLE_BLOCKS: usize = 16;

impl std::fmt::Debug for EngineOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineOptions")
            .field("state_dir", &self.state_dir)
            .field("connections_per_disk", &self.connections_per_disk)
            .field("connections_per_host", &self.connections_per_host)
            .field("memory_bytes", &self.memory_bytes)
            .field("worker_threads", &self.worker_threads)
            .field("sample_blocks", &self.sample_blocks)
            .field("clear_text", &self.clear_text)
            .field("resume_window", &self.resume_window)
            .finish_non_exhaustive()
    }
}
