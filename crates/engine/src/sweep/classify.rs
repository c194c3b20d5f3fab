//! From what the pool holds and what the journals say to a plan. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use xenvault_xenapi::{task, vdi, vm};

use super::inventory::{Inventory, RunFacts};
use super::plan::{ObjectKind, SweepAction, SweepItem, SweepPlan};
use crate::marks::{NotOurs, Owned, Role};
use crate::state::{Made, Publication};

/// What a plan is made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Everything, except what is kept for a second attempt.
    Everything,
    /// What dead runs left of one VM: its next run is about to begin.
    Vm(String),
    /// Everything of one run, which failed.
    Run(String),
}

/// One object with what is done to it.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) item: SweepItem,
    pub(crate) target: Target,
    pub(crate) run: String,
}

/// The object of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Vm(vm::Ref),
    Vdi(vdi::Ref),
    Task(task::Ref),
}

/// What becomes of an object of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// It is no business of this plan.
    Outside,
    Keep(String),
    /// The point of its run is complete: what the run did not do any more is done.
    Finish(String),
    Destroy(String),
}

/// Everything that a plan depends on.
pub(crate) struct Question<'a> {
    pub(crate) inventory: &'a Inventory,
    pub(crate) instance: &'a str,
    pub(crate) runs: &'a BTreeMap<String, RunFacts>,
    pub(crate) scope: &'a Scope,
}

/// All steps, those that change something in the order in which they are done: records before their disks.
pub(crate) fn steps(question: &Question<'_>) -> Vec<Step> {
    let mut steps = Vec::new();
    let inventory = question.inventory;
    for (reference, record) in &inventory.vms {
        steps.extend(question.vm_step(reference, record));
    }
    let bases = question.newest_bases();
    for (reference, record) in &inventory.vdis {
        steps.extend(question.vdi_step(reference, record, &bases));
    }
    for (run, facts) in question.runs.iter().filter(|(run, facts)| !facts.alive && question.covers_run(run, facts)) {
        for (_, id) in facts.created.iter().filter(|(what, _)| *what == Made::Task) {
            let item = SweepItem {
                kind: ObjectKind::Task,
                uuid: id.clone(),
                name: String::new(),
                age: None,
                size_bytes: 0,
                action: SweepAction::Destroy,
                reason: format!("run {run} began it and did not see its end"),
            };
            steps.push(Step { item, target: Target::Task(task::Ref::new(id)), run: run.clone() });
        }
    }
    steps
}

/// The plan that people see.
pub(crate) fn plan(steps: &[Step]) -> SweepPlan {
    let mut plan = SweepPlan::default();
    for step in steps {
        match step.item.action {
            SweepAction::Keep => plan.keep.push(step.item.clone()),
            _ => plan.remove.push(step.item.clone()),
        }
    }
    plan
}

type BaseGroup = (Option<String>, Option<String>);

impl Question<'_> {
    fn facts(&self, run: &str) -> RunFacts {
        self.runs.get(run).cloned().unwrap_or_else(RunFacts::unknown)
    }

    fn covers_run(&self, run: &str, facts: &RunFacts) -> bool {
        match self.scope {
            Scope::Everything => true,
            Scope::Vm(vm) => facts.vm.as_deref() == Some(vm),
            Scope::Run(wanted) => run == wanted,
        }
    }

    fn covers(&self, owned: &Owned) -> bool {
        match self.scope {
            Scope::Everything => true,
            Scope::Vm(vm) => {
                owned.vm.as_deref() == Some(vm) || self.facts(&owned.run).vm.as_deref() == Some(vm.as_str())
            }
            Scope::Run(run) => owned.run == *run,
        }
    }

    fn fate(&self, owned: &Owned) -> Fate {
        let facts = self.facts(&owned.run);
        if !self.covers(owned) {
            return Fate::Outside;
        }
        if facts.alive {
            return Fate::Keep(format!("run {} is alive", owned.run));
        }
        match facts.publication {
            Publication::No => {}
            Publication::Yes if facts.restore => return Fate::Keep("its restore is complete".to_owned()),
            Publication::Perhaps | Publication::Yes => {
                return Fate::Finish(format!("run {} wrote its point and did not clean up", owned.run));
            }
        }
        match owned.resume_until {
            Some(until) if until > self.inventory.now && *self.scope == Scope::Everything => {
                Fate::Keep(format!("kept for a second attempt, for {} minutes", (until - self.inventory.now) / 60 + 1))
            }
            _ => Fate::Destroy(format!("run {} did not end well and left it", owned.run)),
        }
    }

    fn vm_step(&self, reference: &vm::Ref, record: &vm::Record) -> Option<Step> {
        let item = |action, reason: String| SweepItem {
            kind: ObjectKind::Vm,
            uuid: record.uuid.clone(),
            name: record.name_label.clone(),
            age: self.age(record.snapshot_time.unix_seconds()),
            size_bytes: 0,
            action,
            reason,
        };
        let target = Target::Vm(reference.clone());
        match self.inventory.judge_vm(record, self.instance, self.runs) {
            Ok(owned) => {
                let (action, reason) = match self.fate(&owned) {
                    Fate::Outside => return None,
                    Fate::Keep(reason) => (SweepAction::Keep, reason),
                    Fate::Finish(reason) | Fate::Destroy(reason) => (SweepAction::Destroy, reason),
                };
                Some(Step { item: item(action, reason), target, run: owned.run })
            }
            Err(why) => {
                self.noted(why).map(|reason| Step { item: item(SweepAction::Keep, reason), target, run: String::new() })
            }
        }
    }

    fn vdi_step(
        &self,
        reference: &vdi::Ref,
        record: &vdi::Record,
        bases: &BTreeMap<BaseGroup, String>,
    ) -> Option<Step> {
        let item = |action, reason: String| SweepItem {
            kind: ObjectKind::Vdi,
            uuid: record.uuid.clone(),
            name: record.name_label.clone(),
            age: self.age(record.snapshot_time.unix_seconds()),
            size_bytes: u64::try_from(record.physical_utilisation).unwrap_or(0),
            action,
            reason,
        };
        let target = Target::Vdi(reference.clone());
        match self.inventory.judge_vdi(record, self.instance, self.runs) {
            Ok(owned) => {
                let (action, reason) = self.vdi_action(record, &owned, bases)?;
                Some(Step { item: item(action, reason), target, run: owned.run })
            }
            Err(why) => {
                self.noted(why).map(|reason| Step { item: item(SweepAction::Keep, reason), target, run: String::new() })
            }
        }
    }

    fn vdi_action(
        &self,
        record: &vdi::Record,
        owned: &Owned,
        bases: &BTreeMap<BaseGroup, String>,
    ) -> Option<(SweepAction, String)> {
        let reason = match self.fate(owned) {
            Fate::Outside => return None,
            Fate::Keep(reason) => return Some((SweepAction::Keep, reason)),
            Fate::Destroy(reason) if owned.role != Some(Role::Base) => return Some((SweepAction::Destroy, reason)),
            // A base is written into the marks only after its point was.
            Fate::Finish(reason) | Fate::Destroy(reason) => reason,
        };
        if bases.get(&group(owned)) != Some(&owned.run) {
            return Some((SweepAction::Destroy, "a newer base has replaced it".to_owned()));
        }
        let has_data = record.type_ != vdi::Type::CbtMetadata;
        Some(match (has_data, record.cbt_enabled) {
            (false, _) => (SweepAction::Keep, "it is the base of the next incremental".to_owned()),
            (true, true) => (SweepAction::DestroyData, reason),
            (true, false) => (SweepAction::Destroy, format!("{reason}; without change information it is no base")),
        })
    }

    /// The run whose snapshot is the current base, for each VM and repository.
    fn newest_bases(&self) -> BTreeMap<BaseGroup, String> {
        let mut newest: BTreeMap<BaseGroup, (i64, String)> = BTreeMap::new();
        for record in self.inventory.vdis.values() {
            let Ok(owned) = self.inventory.judge_vdi(record, self.instance, self.runs) else { continue };
            let finished = matches!(self.facts(&owned.run).publication, Publication::Yes | Publication::Perhaps);
            if owned.role != Some(Role::Base) && !(finished && owned.role == Some(Role::Snapshot)) {
                continue;
            }
            let candidate = (record.snapshot_time.unix_seconds(), owned.run.clone());
            let slot = newest.entry(group(&owned)).or_insert_with(|| candidate.clone());
            if candidate.0 > slot.0 {
                *slot = candidate;
            }
        }
        newest.into_iter().map(|(group, (_, run))| (group, run)).collect()
    }

    /// Objects that look like ours and are not are shown, in a plan for everything.
    fn noted(&self, why: NotOurs) -> Option<String> {
        let shown = why != NotOurs::Unmarked && *self.scope == Scope::Everything;
        shown.then(|| why.reason().to_owned())
    }

    fn age(&self, made: i64) -> Option<Duration> {
        let made = u64::try_from(made).ok().filter(|&made| made > 0)?;
        Some(Duration::from_secs(self.inventory.now.saturating_sub(made)))
    }
}

fn group(owned: &Owned) -> BaseGroup {
    (owned.vm.clone(), owned.repository.clone())
}
