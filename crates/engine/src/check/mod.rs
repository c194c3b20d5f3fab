//! The prerequisite check: looks at a pool as a backup would and names everything that stands in its way, with the
//! remedy. Reads only: nothing in the pool is changed.
//!
//! Facts are gathered first (`gather`, `reach`), then judged (`judge_pool`, `judge_vm`), so that the judgement can be
//! tested without a pool.

mod facts;
mod finding;
mod gather;
mod judge_pool;
mod judge_vm;
mod reach;
mod rights;
#[cfg(test)]
mod tests;

pub use finding::{CheckFinding, CheckedObject, Severity};

use crate::{Engine, EngineError, VmSelector};

/// What is checked.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CheckRequest {
    /// These VMs; all of the pool if none is named.
    pub vms: Vec<VmSelector>,
}

impl CheckRequest {
    /// Checks the pool and these VMs, or all if the list is empty.
    pub fn new(vms: Vec<VmSelector>) -> Self {
        Self { vms }
    }
}

/// What was found.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CheckReport {
    /// Name of the pool.
    pub pool: String,
    /// Product, version and edition of the coordinator.
    pub product: String,
    /// Number of hosts.
    pub hosts: usize,
    /// UUID and name of every VM that was checked.
    pub vms: Vec<(String, String)>,
    /// The worst first.
    pub findings: Vec<CheckFinding>,
}

impl CheckReport {
    /// How many findings are of this severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

pub(crate) async fn run(engine: &Engine, request: &CheckRequest) -> Result<CheckReport, EngineError> {
    let mut facts = gather::gather(engine, request).await?;
    reach::connect(engine, &mut facts).await;
    let mut findings = judge_pool::judge(&facts, engine.options().clear_text);
    for vm in &facts.vms {
        findings.extend(judge_vm::judge(&facts, vm));
    }
    findings
        .sort_by(|one, other| (one.severity, one.code, &one.object).cmp(&(other.severity, other.code, &other.object)));
    findings.dedup();
    Ok(CheckReport {
        pool: facts.pool.name_label.clone(),
        product: judge_pool::product(&facts),
        hosts: facts.hosts.len(),
        vms: facts.vms.iter().map(|vm| (vm.record.uuid.clone(), vm.record.name_label.clone())).collect(),
        findings,
    })
}
