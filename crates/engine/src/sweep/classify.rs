//! From what the pool holds and what the journals say to a plan. Pure.

use std::collections::{BTreeMap, BTreeSet};
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
    /// Nobody knows whether the point of its run is complete: what a next run could need stays.
    Spare(String),
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
            Publication::Yes => {
                return Fate::Finish(format!("run {} wrote its point and did not clean up", owned.run));
            }
            Publication::Perhaps if facts.restore => {}
            Publication::Perhaps if self.waits(owned) => {
                return Fate::Keep(format!("only the repository knows whether run {} wrote its point", owned.run));
            }
            Publication::Perhaps => {
                return Fate::Spare(format!(
                    "run {} may have written its point: its change information stays",
                    owned.run
                ));
            }
        }
        if self.waits(owned) {
            let left = owned.resume_until.unwrap_or(0).saturating_sub(self.inventory.now);
            return Fate::Keep(format!("kept for a second attempt, for {} minutes", left / 60 + 1));
        }
        Fate::Destroy(format!("run {} did not end well and left it", owned.run))
    }

    /// Whether a sweep leaves it to a second attempt for now.
    fn waits(&self, owned: &Owned) -> bool {
        *self.scope == Scope::Everything && owned.resume_until.is_some_and(|until| until > self.inventory.now)
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
                    Fate::Finish(reason) | Fate::Spare(reason) | Fate::Destroy(reason) => {
                        (SweepAction::Destroy, reason)
                    }
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
        bases: &BTreeMap<BaseGroup, BTreeSet<String>>,
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
        bases: &BTreeMap<BaseGroup, BTreeSet<String>>,
    ) -> Option<(SweepAction, String)> {
        let reason = match self.fate(owned) {
            Fate::Outside => return None,
            Fate::Keep(reason) => return Some((SweepAction::Keep, reason)),
            Fate::Destroy(reason) if owned.role != Some(Role::Base) => return Some((SweepAction::Destroy, reason)),
            Fate::Spare(reason) => {
                return Some(self.reduced(record, reason, "it may be the base of the next incremental"));
            }
            // The clean-up took its VM's record away and marked it; the run itself never saw it, so no point counts from it.
            Fate::Finish(reason) if owned.role == Some(Role::Snapshot) && owned.repository.is_none() => {
                return Some((SweepAction::Destroy, reason));
            }
            // A base is written into the marks only after its point was.
            Fate::Finish(reason) | Fate::Destroy(reason) => reason,
        };
        if !bases.get(&group(owned)).is_some_and(|runs| runs.contains(&owned.run)) {
            return Some((SweepAction::Destroy, "a newer base has replaced it".to_owned()));
        }
        if owned.role != Some(Role::Base) && record.cbt_enabled {
            // Its marks have to say so, also where its data is gone already: the journal goes.
            return Some((SweepAction::DestroyData, reason));
        }
        Some(self.reduced(record, reason, "it is the base of the next incremental"))
    }

    /// Data goes, change information stays.
    fn reduced(&self, record: &vdi::Record, reason: String, kept: &str) -> (SweepAction, String) {
        let has_data = record.type_ != vdi::Type::CbtMetadata;
        match (has_data, record.cbt_enabled) {
            (false, _) => (SweepAction::Keep, kept.to_owned()),
            (true, true) => (SweepAction::DestroyData, reason),
            (true, false) => (SweepAction::Destroy, format!("{reason}; without change information it is no base")),
        }
    }

    /// The run whose snapshot is the current base, for each VM and repository. The pool's time has whole seconds: of
    /// several runs in the newest one all count, since the right one must not go.
    fn newest_bases(&self) -> BTreeMap<BaseGroup, BTreeSet<String>> {
        let mut newest: BTreeMap<BaseGroup, (i64, BTreeSet<String>)> = BTreeMap::new();
        for record in self.inventory.vdis.values() {
            let Ok(owned) = self.inventory.judge_vdi(record, self.instance, self.runs) else { continue };
            let finished = self.facts(&owned.run).publication == Publication::Yes;
            if owned.role != Some(Role::Base) && !(finished && owned.role == Some(Role::Snapshot)) {
                continue;
            }
            let taken = record.snapshot_time.unix_seconds();
            let (newest_taken, runs) = newest.entry(group(&owned)).or_insert_with(|| (taken, BTreeSet::new()));
            if taken > *newest_taken {
                *newest_taken = taken;
                runs.clear();
            }
            if taken == *newest_taken {
                runs.insert(owned.run);
            }
        }
        newest.into_iter().map(|(group, (_, runs))| (group, runs)).collect()
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::marks::{Marks, operation_name};

    const ME: &str = "11111111-1111-4111-8111-111111111111";
    const OTHER: &str = "22222222-2222-4222-8222-222222222222";
    const OLD: &str = "33333333-3333-4333-8333-333333333333";
    const NEW: &str = "44444444-4444-4444-8444-444444444444";
    const NOW: u64 = 1_000_000;

    #[derive(Default)]
    struct Pool {
        inventory: Inventory,
        runs: BTreeMap<String, RunFacts>,
    }

    impl Pool {
        fn new() -> Self {
            let mut pool = Self::default();
            pool.inventory.now = NOW;
            pool
        }

        fn run(&mut self, run: &str, publication: Publication) -> &mut RunFacts {
            let facts = RunFacts { publication, vm: Some("vm".into()), ..RunFacts::unknown() };
            self.runs.entry(run.to_owned()).or_insert(facts)
        }

        /// A disk with marks of its own, made at a moment.
        fn disk(&mut self, uuid: &str, run: &str, role: Role, made: i64) -> &mut vdi::Record {
            let marks = Marks {
                instance: ME.into(),
                run: run.into(),
                role,
                vm: "vm".into(),
                repository: Some("repository".into()),
                resume_until: None,
            };
            let record = vdi::Record {
                uuid: uuid.into(),
                is_a_snapshot: true,
                cbt_enabled: true,
                type_: if role == Role::Base { vdi::Type::CbtMetadata } else { vdi::Type::User },
                other_config: marks.entries(uuid),
                snapshot_time: xenvault_xenapi::DateTime::from_unix_seconds(made),
                ..Default::default()
            };
            self.inventory.vdis.entry(vdi::Ref::new(uuid)).or_insert(record)
        }

        /// Steps as `uuid: action`, in order.
        fn steps(&self, scope: &Scope) -> Vec<String> {
            let question = Question { inventory: &self.inventory, instance: ME, runs: &self.runs, scope };
            steps(&question).iter().map(|step| format!("{}: {}", step.item.uuid, step.item.action)).collect()
        }
    }

    #[test]
    fn the_newest_base_stays_and_older_ones_go() {
        let mut pool = Pool::new();
        pool.disk("a", OLD, Role::Base, 100);
        pool.disk("b", NEW, Role::Base, 200);
        assert_eq!(pool.steps(&Scope::Everything), ["a: remove", "b: keep"]);
        // Two in one second: which is the newer one is not known, so both stay until there is a newer one.
        let older = pool.inventory.vdis.get_mut(&vdi::Ref::new("a")).unwrap();
        older.snapshot_time = xenvault_xenapi::DateTime::from_unix_seconds(200);
        assert_eq!(pool.steps(&Scope::Everything), ["a: keep", "b: keep"]);
        pool.inventory.vdis.get_mut(&vdi::Ref::new("a")).unwrap().snapshot_time =
            xenvault_xenapi::DateTime::from_unix_seconds(100);
        // Of another repository it is the newest one.
        let other = pool.inventory.vdis.get_mut(&vdi::Ref::new("a")).unwrap();
        other.other_config.insert(crate::marks::REPOSITORY.into(), "another".into());
        assert_eq!(pool.steps(&Scope::Everything), ["a: keep", "b: keep"]);
    }

    #[test]
    fn a_base_with_data_is_finished_and_one_without_tracking_is_none() {
        let mut pool = Pool::new();
        pool.disk("a", NEW, Role::Base, 100).type_ = vdi::Type::User;
        assert_eq!(pool.steps(&Scope::Everything), ["a: remove data"]);
        pool.inventory.vdis.get_mut(&vdi::Ref::new("a")).unwrap().cbt_enabled = false;
        assert_eq!(pool.steps(&Scope::Everything), ["a: remove"]);
    }

    #[test]
    fn what_a_run_left_depends_on_its_point() {
        for (publication, everything, next_run) in [
            (Publication::No, "a: remove", "a: remove"),
            (Publication::Perhaps, "a: remove data", "a: remove data"),
            (Publication::Yes, "a: remove data", "a: remove data"),
        ] {
            let mut pool = Pool::new();
            pool.run(NEW, publication);
            pool.disk("a", NEW, Role::Snapshot, 100);
            assert_eq!(pool.steps(&Scope::Everything), [everything], "{publication:?}");
            assert_eq!(pool.steps(&Scope::Vm("vm".into())), [next_run], "{publication:?}");
            assert_eq!(pool.steps(&Scope::Vm("another".into())), [""; 0], "{publication:?}");
        }
    }

    #[test]
    fn a_base_that_lost_its_data_before_it_was_marked_as_one_is_finished() {
        let mut pool = Pool::new();
        pool.run(NEW, Publication::Yes);
        pool.disk("a", NEW, Role::Snapshot, 100).type_ = vdi::Type::CbtMetadata;
        assert_eq!(pool.steps(&Scope::Everything), ["a: remove data"]);
    }

    #[test]
    fn a_point_that_may_not_exist_replaces_no_base() {
        let mut pool = Pool::new();
        pool.run(NEW, Publication::Perhaps);
        pool.disk("a", OLD, Role::Base, 100);
        pool.disk("b", NEW, Role::Snapshot, 200);
        assert_eq!(pool.steps(&Scope::Everything), ["a: keep", "b: remove data"]);
        pool.run(NEW, Publication::Yes).publication = Publication::Yes;
        assert_eq!(pool.steps(&Scope::Everything), ["a: remove", "b: remove data"]);
    }

    #[test]
    fn a_living_run_and_a_second_attempt_are_waited_for() {
        let mut pool = Pool::new();
        pool.run(NEW, Publication::No).alive = true;
        pool.disk("a", NEW, Role::Snapshot, 100);
        assert_eq!(pool.steps(&Scope::Everything), ["a: keep"]);
        assert_eq!(pool.steps(&Scope::Vm("vm".into())), ["a: keep"]);

        let mut pool = Pool::new();
        let until = (NOW + 60).to_string();
        pool.disk("a", NEW, Role::Snapshot, 100).other_config.insert(crate::marks::RESUME_UNTIL.into(), until);
        assert_eq!(pool.steps(&Scope::Everything), ["a: keep"]);
        assert_eq!(pool.steps(&Scope::Vm("vm".into())), ["a: remove"]);
        pool.inventory.now = NOW + 61;
        assert_eq!(pool.steps(&Scope::Everything), ["a: remove"]);
    }

    #[test]
    fn foreign_and_copied_marks_are_shown_and_kept() {
        let mut pool = Pool::new();
        pool.disk("a", NEW, Role::Snapshot, 100).other_config.insert(crate::marks::INSTANCE.into(), OTHER.into());
        let copied = pool.disk("b", NEW, Role::Snapshot, 100);
        copied.other_config.insert(crate::marks::SELF.into(), "c".into());
        copied.is_a_snapshot = false;
        assert_eq!(pool.steps(&Scope::Everything), ["a: keep", "b: keep"]);
        assert!(pool.steps(&Scope::Vm("vm".into())).is_empty());
    }

    #[test]
    fn a_used_disk_is_never_removed() {
        use xenvault_xenapi::vbd;
        let mut pool = Pool::new();
        pool.disk("a", NEW, Role::Snapshot, 100).vbds = vec![vbd::Ref::new("vbd")];
        let user = vm::Record { uuid: "v".into(), name_label: "production".into(), ..Default::default() };
        pool.inventory.vms.insert(vm::Ref::new("v"), user);
        let vbd = vbd::Record { vm: vm::Ref::new("v"), vdi: vdi::Ref::new("a"), ..Default::default() };
        pool.inventory.vbds.insert(vbd::Ref::new("vbd"), vbd);
        assert_eq!(pool.steps(&Scope::Everything), ["a: keep"]);
        // A control domain that has it attached is no owner.
        pool.inventory.vms.get_mut(&vm::Ref::new("v")).unwrap().is_control_domain = true;
        assert_eq!(pool.steps(&Scope::Everything), ["a: remove"]);
    }

    #[test]
    fn x30_unmarked_snapshots_go_with_their_disks_records_first() {
        use xenvault_xenapi::vbd;
        let mut pool = Pool::new();
        let snapshot = vm::Record {
            uuid: "s".into(),
            name_label: operation_name("Xenvault backup", ME, NEW),
            is_a_snapshot: true,
            ..Default::default()
        };
        pool.inventory.vms.insert(vm::Ref::new("s"), snapshot);
        let vbd = vbd::Record { vm: vm::Ref::new("s"), vdi: vdi::Ref::new("a"), ..Default::default() };
        pool.inventory.vbds.insert(vbd::Ref::new("vbd"), vbd);
        let disk = vdi::Record {
            uuid: "a".into(),
            is_a_snapshot: true,
            vbds: vec![vbd::Ref::new("vbd")],
            ..Default::default()
        };
        pool.inventory.vdis.insert(vdi::Ref::new("a"), disk);
        assert_eq!(pool.steps(&Scope::Everything), ["s: remove", "a: remove"]);
    }

    #[test]
    fn a_vm_that_somebody_made_from_our_snapshot_under_its_name_stays() {
        let mut pool = Pool::new();
        let name = operation_name("Xenvault backup", ME, NEW);
        pool.run(NEW, Publication::No).intended = BTreeSet::from([(Made::Vm, name.clone())]);
        let vm = vm::Record { uuid: "v".into(), name_label: name, ..Default::default() };
        pool.inventory.vms.insert(vm::Ref::new("v"), vm);
        assert_eq!(pool.steps(&Scope::Everything), ["v: keep"]);
    }

    #[test]
    fn a_half_restored_vm_goes_and_a_whole_one_stays() {
        let mut pool = Pool::new();
        let name = operation_name("Xenvault restore of web", ME, NEW);
        pool.inventory
            .vms
            .insert(vm::Ref::new("v"), vm::Record { uuid: "v".into(), name_label: name.clone(), ..Default::default() });
        // Without a journal nobody knows that we made it: it is no snapshot.
        assert_eq!(pool.steps(&Scope::Everything), ["v: keep"]);
        let facts = pool.run(NEW, Publication::No);
        facts.restore = true;
        facts.intended = BTreeSet::from([(Made::Vm, name)]);
        assert_eq!(pool.steps(&Scope::Everything), ["v: remove"]);
        pool.run(NEW, Publication::Yes).publication = Publication::Yes;
        assert_eq!(pool.steps(&Scope::Everything), ["v: keep"]);
    }
}
