//! Doing the steps of a plan, each after one more look at its object.

use std::collections::BTreeMap;
use std::time::Duration;

use xenvault_xenapi::{ErrorCode, XenApiError, task, vbd, vdi, vm};

use super::classify::{Step, Target};
use super::inventory::{Inventory, RunFacts};
use super::plan::SweepAction;
use crate::marks::{self, Marks, Role};
use crate::monitor::Warning;
use crate::pool::{code, gone_is_fine, is_gone, wait_detached, while_busy};
use crate::state::{Entry, Made, Publication, RunHistory};
use crate::{Engine, EngineError};

/// How long a removal is tried again while the disk is in use.
const BUSY_LIMIT: Duration = Duration::from_secs(45);

/// What came of a plan.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) removed: usize,
    pub(crate) warnings: Vec<Warning>,
}

pub(crate) struct Executor<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) inventory: Inventory,
    pub(crate) runs: BTreeMap<String, RunFacts>,
    pub(crate) histories: BTreeMap<String, RunHistory>,
}

impl Executor<'_> {
    /// Does what changes something, in order. One failure does not stop the others.
    pub(crate) async fn execute(&mut self, steps: &[Step]) -> Done {
        let mut done = Done::default();
        for step in steps.iter().filter(|step| step.item.action != SweepAction::Keep) {
            match self.step(step).await {
                Ok(true) => done.removed += 1,
                Ok(false) => {
                    let text = format!("{} {} changed since the plan and stays", step.item.kind, step.item.uuid);
                    done.warnings.push(Warning::new("sweep-skipped", text));
                }
                Err(error) => {
                    let text = format!("{} {} could not be removed: {error}", step.item.kind, step.item.uuid);
                    done.warnings.push(Warning::new("sweep-failed", text));
                }
            }
        }
        done
    }

    /// `false`: the object is not what it was when the plan was made.
    async fn step(&mut self, step: &Step) -> Result<bool, StepError> {
        match &step.target {
            Target::Task(reference) => self.task(reference, &step.run).await,
            Target::Vm(reference) => self.vm(reference, &step.run).await,
            Target::Vdi(reference) => self.vdi(reference, step).await,
        }
    }

    async fn task(&mut self, reference: &task::Ref, run: &str) -> Result<bool, StepError> {
        let session = self.engine.session();
        match task::get_status(session, reference).await {
            Err(error) if is_gone(&error) => {}
            Ok(task::StatusType::Pending | task::StatusType::Cancelling) => {
                // It may end by itself; what it made is found by its name.
                let _ = task::cancel(session, reference).await;
                gone_is_fine(task::destroy(session, reference).await)?;
            }
            Ok(_) => gone_is_fine(task::destroy(session, reference).await)?,
            Err(error) => return Err(error.into()),
        }
        self.note(run, Entry::Removed { what: Made::Task, id: reference.as_str().to_owned() })?;
        Ok(true)
    }

    async fn vm(&mut self, reference: &vm::Ref, run: &str) -> Result<bool, StepError> {
        let session = self.engine.session();
        let record = match vm::get_record(session, reference).await {
            Err(error) if is_gone(&error) => return Ok(true),
            other => other?,
        };
        let ours = self.inventory.judge_vm(&record, self.engine.instance(), &self.runs);
        if !ours.is_ok_and(|owned| owned.run == run) || record.power_state != vm::PowerState::Halted {
            return Ok(false);
        }
        self.mark_disks(&record, run).await?;
        if !record.blocked_operations.is_empty() {
            vm::set_blocked_operations(session, reference, &BTreeMap::new()).await?;
        }
        gone_is_fine(vm::destroy(session, reference).await)?;
        self.note(run, Entry::Removed { what: Made::Vm, id: record.uuid })?;
        self.inventory.vms.remove(reference);
        Ok(true)
    }

    /// The disks of a snapshot may bear no marks yet, and are found by nothing but its VBDs, which are about to go.
    async fn mark_disks(&self, snapshot: &vm::Record, run: &str) -> Result<(), StepError> {
        let source = self.inventory.vms.get(&snapshot.snapshot_of).map(|vm| vm.uuid.clone());
        let marks = Marks {
            instance: self.engine.instance().to_owned(),
            run: run.to_owned(),
            role: Role::Snapshot,
            vm: source.unwrap_or_default(),
            repository: None,
            resume_until: None,
        };
        let vbds = snapshot.vbds.iter().filter_map(|vbd| self.inventory.vbds.get(vbd));
        for reference in vbds.filter(|vbd| vbd.type_ == vbd::Type::Disk).map(|vbd| &vbd.vdi) {
            let Some(disk) = self.inventory.vdis.get(reference).filter(|disk| disk.is_a_snapshot) else { continue };
            let own = disk.other_config.get(marks::SELF) == Some(&disk.uuid);
            let ours = self.inventory.judge_vdi(disk, self.engine.instance(), &self.runs);
            if !own && ours.is_ok_and(|owned| owned.run == run) {
                let other_config = marks.applied(&disk.uuid, &disk.other_config);
                gone_is_fine(vdi::set_other_config(self.engine.session(), reference, &other_config).await)?;
            }
        }
        Ok(())
    }

    async fn vdi(&mut self, reference: &vdi::Ref, step: &Step) -> Result<bool, StepError> {
        let session = self.engine.session();
        if !wait_detached(session, reference, self.engine.options().detach_timeout).await? {
            return Err(StepError::Attached);
        }
        let record = match vdi::get_record(session, reference).await {
            Err(error) if is_gone(&error) => return Ok(true),
            other => other?,
        };
        let ours = self.inventory.judge_vdi(&record, self.engine.instance(), &self.runs);
        if !ours.is_ok_and(|owned| owned.run == step.run) || self.has_user(&record).await? {
            return Ok(false);
        }
        if step.item.action == SweepAction::DestroyData && self.keep_as_base(reference, &record, &step.run).await? {
            return Ok(true);
        }
        while_busy(BUSY_LIMIT, || async { gone_is_fine(vdi::destroy(session, reference).await) }).await?;
        self.note(&step.run, Entry::Removed { what: Made::Vdi, id: record.uuid })?;
        Ok(true)
    }

    /// Whether any VM has the disk now. The records of our snapshots are gone by this time.
    async fn has_user(&self, record: &vdi::Record) -> Result<bool, StepError> {
        for reference in &record.vbds {
            match vbd::get_vm(self.engine.session(), reference).await {
                Err(error) if is_gone(&error) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }

    /// Finishes what a run with a good point did not do any more. `false`: it is no base (X18).
    async fn keep_as_base(&self, reference: &vdi::Ref, record: &vdi::Record, run: &str) -> Result<bool, StepError> {
        let session = self.engine.session();
        // Only a base whose point is complete for sure replaces others, and so is called one.
        if self.runs.get(run).is_none_or(|facts| facts.publication != Publication::Perhaps) {
            let mut other_config = record.other_config.clone();
            other_config.insert(marks::ROLE.to_owned(), Role::Base.text().to_owned());
            other_config.remove(marks::RESUME_UNTIL);
            vdi::set_other_config(session, reference, &other_config).await?;
        }
        if record.type_ == vdi::Type::CbtMetadata {
            return Ok(record.cbt_enabled);
        }
        match while_busy(BUSY_LIMIT, || vdi::data_destroy(session, reference)).await {
            Ok(()) => Ok(true),
            Err(error) => match code(&error) {
                Some(ErrorCode::VdiNoCbtMetadata | ErrorCode::OperationNotAllowed) => Ok(false),
                _ => Err(error.into()),
            },
        }
    }

    fn note(&mut self, run: &str, entry: Entry) -> Result<(), StepError> {
        if let Some(facts) = self.runs.get_mut(run) {
            match &entry {
                Entry::Created { what, id } => drop(facts.created.insert((*what, id.clone()))),
                Entry::Removed { what, id } => drop(facts.created.remove(&(*what, id.clone()))),
                _ => {}
            }
        }
        match self.histories.get_mut(run) {
            Some(history) => history.note(entry).map_err(StepError::from),
            None => Ok(()),
        }
    }
}

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    #[error("{0}")]
    Pool(#[from] XenApiError),
    #[error("{0}")]
    State(#[from] EngineError),
    #[error("a control domain still has it attached; restarting the NBD service of that host removes stale ones")]
    Attached,
}
