//! How a workflow tells its caller where it stands. The engine never prints: it calls a [`JobMonitor`].
//!
//! All methods have empty bodies, so that a caller implements only what it shows. They are called from asynchronous
//! code and must return at once.

use std::fmt;
use std::time::Duration;

use crate::sweep::SweepPlan;

/// Receives what happens during one workflow.
pub trait JobMonitor: Send + Sync {
    /// A new stage began. Stages of several disks may alternate.
    fn stage(&self, _stage: &Stage) {}

    /// Counters changed. Called at most a few times a second, and once at the end of a transfer.
    fn progress(&self, _progress: &Progress) {}

    /// Something went wrong that does not spoil the result.
    fn warning(&self, _warning: &Warning) {}

    /// What a sweep is going to remove and keep; called before the first removal and in a dry run too.
    fn sweep_plan(&self, _plan: &SweepPlan) {}
}

/// A monitor that ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMonitor;

impl JobMonitor for NoMonitor {}

/// What a workflow is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Looks for what a dead run of this installation left behind for the same VM.
    CleanLeftovers,
    /// Checks everything that can be checked before the pool is touched.
    Prerequisites,
    /// Switches changed block tracking on.
    EnableTracking,
    /// Takes the snapshot.
    Snapshot,
    /// Decides how a disk is read, and asks the pool which blocks changed.
    PlanDisk {
        /// Position of the disk (`userdevice`).
        device: String,
    },
    /// Reads a disk and stores what is new.
    ReadDisk {
        /// Position of the disk (`userdevice`).
        device: String,
        /// Why it is read the way it is.
        reason: String,
        /// How many bytes are going to be read.
        planned_bytes: u64,
    },
    /// Reads a sample of blocks again and compares.
    Verify {
        /// Position of the disk (`userdevice`).
        device: String,
    },
    /// Makes everything durable and writes the point.
    Publish,
    /// Removes from the pool what is not needed any more.
    CleanUp,
    /// Makes the VM, its devices and empty disks.
    CreateVm,
    /// Fills a disk from the repository.
    WriteDisk {
        /// Position of the disk (`userdevice`).
        device: String,
        /// How many bytes of data are going to be sent.
        planned_bytes: u64,
    },
    /// Gives the restored VM its final name and settings.
    Finish,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CleanLeftovers => f.write_str("looking for left-overs"),
            Self::Prerequisites => f.write_str("checking prerequisites"),
            Self::EnableTracking => f.write_str("enabling changed block tracking"),
            Self::Snapshot => f.write_str("taking the snapshot"),
            Self::PlanDisk { device } => write!(f, "disk {device}: asking what changed"),
            Self::ReadDisk { device, reason, .. } => write!(f, "disk {device}: reading ({reason})"),
            Self::Verify { device } => write!(f, "disk {device}: checking a sample"),
            Self::Publish => f.write_str("writing the restore point"),
            Self::CleanUp => f.write_str("cleaning up in the pool"),
            Self::CreateVm => f.write_str("creating the VM"),
            Self::WriteDisk { device, .. } => write!(f, "disk {device}: writing"),
            Self::Finish => f.write_str("finishing the VM"),
        }
    }
}

/// Counters of a whole workflow (all disks together), with the figures that follow from them.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes that are going to be moved, as far as that is known by now.
    pub planned_bytes: u64,
    /// Bytes of `planned_bytes` that were moved (read from the pool, or written to it).
    pub done_bytes: u64,
    /// Bytes read from the pool, without the check sample.
    pub read_bytes: u64,
    /// Bytes of the check sample, read from the pool.
    pub sample_bytes: u64,
    /// Bytes that were all zero and are not stored.
    pub zero_bytes: u64,
    /// Bytes whose content the repository already held.
    pub dedup_bytes: u64,
    /// Bytes of content that is new to the repository, before compression.
    pub new_bytes: u64,
    /// Bytes that new content takes in the repository.
    pub stored_bytes: u64,
    /// Time since the workflow began.
    pub elapsed: Duration,
    /// Moved bytes per second, over the last seconds.
    pub rate_bytes_per_second: u64,
    /// Time until all planned bytes are moved at that rate.
    pub time_left: Option<Duration>,
    /// The part that the others wait for.
    pub bottleneck: Option<Bottleneck>,
}

impl Progress {
    /// New content divided by what it takes in the repository; `None` while nothing was stored.
    pub fn compression_ratio(&self) -> Option<f64> {
        ratio(self.new_bytes, self.stored_bytes)
    }

    /// Share of the content (zeros left out) that the repository already held, between 0 and 1.
    pub fn dedup_share(&self) -> Option<f64> {
        ratio(self.dedup_bytes, self.dedup_bytes.saturating_add(self.new_bytes))
    }
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// The part of the line that limits its speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bottleneck {
    /// The pool does not deliver (or take) data faster.
    Pool,
    /// Hashing, compressing and sealing.
    Processor,
    /// Writing to (or reading from) the repository.
    Repository,
}

impl fmt::Display for Bottleneck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pool => "pool",
            Self::Processor => "processor",
            Self::Repository => "repository",
        })
    }
}

/// Something that an operator should know, beside a good result.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Warning {
    /// A fixed word for machines, such as `foreign-cbt-metadata`.
    pub code: &'static str,
    /// What happened and what to do, for people.
    pub text: String,
}

impl Warning {
    pub(crate) fn new(code: &'static str, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.text)
    }
}
