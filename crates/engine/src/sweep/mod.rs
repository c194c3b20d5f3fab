//! The sweep: removes what dead runs of this installation left in the pool.

mod plan;

pub use plan::{ObjectKind, SweepAction, SweepItem, SweepPlan};

use crate::monitor::Warning;
use crate::{Engine, EngineError};

/// How a sweep is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweepOptions {
    /// Whether the plan is executed.
    pub mode: SweepMode,
}

/// Whether a plan is executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SweepMode {
    /// Show the plan, then do it.
    #[default]
    Execute,
    /// Show the plan only.
    DryRun,
}

impl SweepOptions {
    /// Shows the plan and touches nothing.
    pub fn dry_run() -> Self {
        Self { mode: SweepMode::DryRun }
    }
}

/// What a sweep did.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SweepReport {
    /// The plan.
    pub plan: SweepPlan,
    /// How many items of the plan were done; 0 in a dry run.
    pub removed: usize,
    /// What could not be removed now; the next sweep tries again.
    pub warnings: Vec<Warning>,
}

pub(crate) async fn run(_engine: &Engine, _options: SweepOptions) -> Result<SweepReport, EngineError> {
    todo!()
}
