//! Progress of maintenance: sweeps, verifications, repairs.

use std::fmt;
use std::sync::Arc;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MaintenanceStage {
    /// Points are listed and compared with their receipts.
    List,
    /// Map pages of points are read, and what they refer to is marked.
    Mark,
    /// What is still needed of packs that go is stored again.
    Carry,
    /// Points, packs and records are removed.
    Remove,
    /// Index segments are replaced.
    Index,
    /// Locks are asked for, and made longer.
    Keep,
    /// Packs are checked.
    Packs,
    /// Points are walked.
    Points,
}

impl fmt::Display for MaintenanceStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::List => "listing points",
            Self::Mark => "reading the maps of points",
            Self::Carry => "storing again what is needed",
            Self::Remove => "removing",
            Self::Index => "writing index segments",
            Self::Keep => "keeping locks",
            Self::Packs => "checking packs",
            Self::Points => "walking points",
        })
    }
}

/// How far maintenance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MaintenanceProgress {
    /// What is being done.
    pub stage: MaintenanceStage,
    /// Objects (points, packs, records) of this stage that are done.
    pub done: u64,
    /// Objects of this stage; 0 where that is not known.
    pub planned: u64,
    /// Bytes that this stage has read.
    pub read_bytes: u64,
}

/// Is told of progress; called often, so it must be quick. The default tells nobody.
#[derive(Clone, Default)]
pub struct MaintenanceMonitor(Option<Arc<dyn Fn(MaintenanceProgress) + Send + Sync>>);

impl MaintenanceMonitor {
    /// Calls `tell` with every progress.
    pub fn new(tell: impl Fn(MaintenanceProgress) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    pub(crate) fn tell(&self, stage: MaintenanceStage, done: u64, planned: u64, read_bytes: u64) {
        if let Some(tell) = &self.0 {
            tell(MaintenanceProgress { stage, done, planned, read_bytes });
        }
    }
}

impl fmt::Debug for MaintenanceMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "MaintenanceMonitor(set)" } else { "MaintenanceMonitor(none)" })
    }
}
