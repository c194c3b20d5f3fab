//! The sweep: removes what dead runs of this installation left in the pool.

mod classify;
mod execute;
mod inventory;
mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use xenvault_store::PointFilter;
use xenvault_xenapi::task;

pub use plan::{ObjectKind, SweepAction, SweepItem, SweepPlan};

use crate::marks;
use crate::monitor::Warning;
use crate::pool::{Doing as _, is_gone};
use crate::state::{Made, Publication, RunHistory};
use crate::{Engine, EngineError};
use classify::{Question, Scope, Step};
use execute::{Done, Executor};
use inventory::{Inventory, RunFacts};

/// So many of a VM's newest points are asked whether a dead run wrote one of them.
const POINTS_TO_ASK: usize = 8;
/// For so long the journal of a restore is kept that never learned what came of a call, seconds.
const UNSEEN_SECONDS: u64 = 24 * 3600;
/// How long to wait for the end of a task of a run that was given up.
const TASK_END_LIMIT: Duration = Duration::from_secs(60);

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

pub(crate) async fn run(engine: &Engine, options: SweepOptions) -> Result<SweepReport, EngineError> {
    let (mut executor, steps) = prepare(engine, &Scope::Everything).await?;
    let plan = classify::plan(&steps);
    engine.options().monitor.sweep_plan(&plan);
    let mut report = SweepReport { plan, ..SweepReport::default() };
    if options.mode == SweepMode::Execute {
        let done = executor.execute(&steps).await;
        for warning in &done.warnings {
            engine.options().monitor.warning(warning);
        }
        forget(executor, &steps, &done)?;
        report.removed = done.removed;
        report.warnings = done.warnings;
    }
    Ok(report)
}

/// What a sweep would remove; touches nothing and shows it to nobody.
pub(crate) async fn plan(engine: &Engine) -> Result<SweepPlan, EngineError> {
    let (_, steps) = prepare(engine, &Scope::Everything).await?;
    Ok(classify::plan(&steps))
}

/// Removes what dead runs left of one VM, since its next run is about to begin.
pub(crate) async fn clean_vm(engine: &Engine, vm: &str) -> Result<(), EngineError> {
    let (mut executor, steps) = prepare(engine, &Scope::Vm(vm.to_owned())).await?;
    let done = executor.execute(&steps).await;
    for warning in &done.warnings {
        tracing::warn!(%warning, "left-overs");
        engine.options().monitor.warning(warning);
    }
    forget(executor, &steps, &done)
}

/// How a run came to its early end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A step failed, and every call has had its answer.
    Answered,
    /// Its future was dropped, or an answer was lost: the pool may still be at work for us.
    Open,
}

/// Removes everything of one run, which still holds its lease. Returns whether nothing is left.
pub(crate) async fn clean_run(engine: &Engine, run: &str, ending: Ending) -> Result<bool, EngineError> {
    let history = engine.state().history(run)?;
    // Something was asked for whose answer nobody saw: it can appear a moment later.
    let unseen = ending == Ending::Open && history.unseen > 0;
    let mut found = 0;
    let pauses: &[u64] = if unseen { &[0, 500, 2_000] } else { &[0] };
    let mut clean = true;
    for &pause in pauses {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let (mut executor, steps) = prepare(engine, &Scope::Run(run.to_owned())).await?;
        let done = executor.execute(&steps).await;
        for warning in &done.warnings {
            tracing::warn!(%warning, "cleaning up after a failed run");
            engine.options().monitor.warning(warning);
        }
        let open = executor.runs.get(run).is_some_and(|facts| facts.publication == Publication::Perhaps)
            && steps.iter().any(|step| step.item.action == SweepAction::DestroyData);
        clean = done.warnings.is_empty() && !open;
        if done.warnings.is_empty() {
            found += steps.iter().filter(|step| is_news(step, &history)).count();
        }
        if done.removed > 0 {
            break;
        }
    }
    // A snapshot that comes later is known by its name; of other things only the journal tells whose they are.
    Ok(clean && !(unseen && history.is_restore() && found < history.unseen))
}

/// Whether a step removes a VM or disk that the run's journal did not have: what came of an intent.
fn is_news(step: &Step, history: &RunHistory) -> bool {
    let kind = match step.item.kind {
        ObjectKind::Vm => Made::Vm,
        ObjectKind::Vdi => Made::Vdi,
        _ => return false,
    };
    step.item.action != SweepAction::Keep && !history.alive.contains(&(kind, step.item.uuid.clone()))
}

/// Waits for the end of a task that was cancelled or left: what it makes can be removed only then.
async fn task_ended(engine: &Engine, id: &str) -> Result<(), EngineError> {
    let reference = task::Ref::new(id);
    let deadline = Instant::now() + TASK_END_LIMIT;
    while Instant::now() < deadline {
        match task::get_status(engine.session(), &reference).await {
            Ok(task::StatusType::Pending | task::StatusType::Cancelling) => {}
            Ok(_) => break,
            Err(error) if is_gone(&error) => break,
            Err(error) => return Err(error).doing("look at a task"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Reads everything that a plan depends on, and makes its steps.
async fn prepare<'a>(engine: &'a Engine, scope: &Scope) -> Result<(Executor<'a>, Vec<Step>), EngineError> {
    // Leases first: a run that ends after that is taken for alive, which is harmless; the other way round is not.
    let mut histories: BTreeMap<String, RunHistory> =
        engine.state().dead_runs()?.into_iter().map(|history| (history.run.clone(), history)).collect();
    let living = engine.state().living_runs(&histories)?;
    if let Scope::Run(run) = scope {
        histories.insert(run.clone(), engine.state().history(run)?);
    }
    for history in histories.values() {
        let covered = match scope {
            // A sweep does not wait: what appears later is for the next one.
            Scope::Everything => false,
            Scope::Vm(vm) => history.operation.as_ref().is_some_and(|operation| operation.vm == *vm),
            Scope::Run(run) => history.run == *run,
        };
        for (_, id) in history.alive.iter().filter(|(what, _)| covered && *what == Made::Task) {
            task_ended(engine, id).await?;
        }
    }
    let inventory = Inventory::read(engine.session()).await?;
    histories.retain(|_, history| history.operation.as_ref().is_none_or(|operation| operation.pool == inventory.pool));
    let mut runs: BTreeMap<String, RunFacts> =
        histories.iter().map(|(run, history)| (run.clone(), RunFacts::from(history))).collect();
    settle_publications(engine, &histories, &mut runs).await;
    for run in mentioned(&inventory) {
        // One that ended since then has other marks by now than the inventory says.
        if !runs.contains_key(&run) && (living.contains(&run) || engine.state().is_alive(&run)) {
            runs.insert(run, RunFacts::living());
        }
    }
    claim_tasks(engine, &inventory, &mut runs);
    let question = Question { inventory: &inventory, instance: engine.instance(), runs: &runs, scope };
    let steps = classify::steps(&question);
    Ok((Executor { engine, inventory, runs, histories }, steps))
}

/// Tasks of transfers bear their run in their description; a dead run has no use for them.
fn claim_tasks(engine: &Engine, inventory: &Inventory, runs: &mut BTreeMap<String, RunFacts>) {
    for (reference, record) in &inventory.tasks {
        let Some((owner, run)) = marks::parse_operation_name(&record.name_description) else { continue };
        if owner != engine.instance() {
            continue;
        }
        let unknown = || if engine.state().is_alive(run) { RunFacts::living() } else { RunFacts::unknown() };
        let facts = runs.entry(run.to_owned()).or_insert_with(unknown);
        if !facts.alive {
            facts.created.insert((Made::Task, reference.as_str().to_owned()));
        }
    }
}

/// Where a run died while it wrote its point, the repository knows whether the point is there.
async fn settle_publications(
    engine: &Engine,
    histories: &BTreeMap<String, RunHistory>,
    runs: &mut BTreeMap<String, RunFacts>,
) {
    let Some(repository) = engine.any_repository() else { return };
    for (run, facts) in runs.iter_mut().filter(|(_, facts)| facts.publication == Publication::Perhaps) {
        let operation = histories.get(run).and_then(|history| history.operation.as_ref());
        let Some(operation) = operation.filter(|op| op.repository == Some(repository.id().to_string())) else {
            continue;
        };
        let filter = PointFilter { vm_uuid: Some(operation.vm.clone()), ..PointFilter::default() };
        // What can not be read leaves the question open, and an open question keeps the base.
        let Ok(listing) = repository.points(&filter).await else { continue };
        let mut found = false;
        let mut complete = listing.damaged.is_empty();
        for summary in listing.points.iter().rev().take(POINTS_TO_ASK) {
            match repository.point(&summary.id).await {
                Ok(point) => found |= point.run_id.to_string() == *run,
                Err(_) => complete = false,
            }
        }
        if found {
            facts.publication = Publication::Yes;
        } else if complete {
            facts.publication = Publication::No;
        }
    }
}

/// All runs that are named by marks or names of objects.
fn mentioned(inventory: &Inventory) -> BTreeSet<String> {
    let vms = inventory.vms.values().map(|record| (&record.name_label, &record.other_config));
    let vdis = inventory.vdis.values().map(|record| (&record.name_label, &record.other_config));
    vms.chain(vdis)
        .flat_map(|(name, other_config)| {
            let by_mark = other_config.get(marks::RUN).cloned();
            let by_name = marks::parse_operation_name(name).map(|(_, run)| run.to_owned());
            by_mark.into_iter().chain(by_name)
        })
        .collect()
}

/// Forgets the dead runs of which nothing is left that a later sweep would have to look at.
fn forget(executor: Executor<'_>, steps: &[Step], done: &Done) -> Result<(), EngineError> {
    for (run, history) in executor.histories {
        let waits = steps.iter().any(|step| {
            step.run == run
                && step.item.action == SweepAction::Keep
                && executor.runs.get(&run).is_some_and(|facts| facts.publication != Publication::Yes)
        });
        // Its snapshot is what the next incremental may need, and only this journal says so until the repository is asked.
        let open = executor.runs.get(&run).is_some_and(|facts| facts.publication == Publication::Perhaps)
            && steps.iter().any(|step| step.run == run && step.item.action == SweepAction::DestroyData);
        // What it asked for and never saw may still come.
        let young = history
            .operation
            .as_ref()
            .is_some_and(|operation| executor.inventory.now < operation.started.saturating_add(UNSEEN_SECONDS));
        let awaited = history.is_restore() && history.unseen > 0 && young;
        let exists = |id: &String| {
            executor.inventory.vms.values().any(|record| record.uuid == *id)
                || executor.inventory.vdis.values().any(|record| record.uuid == *id)
        };
        let untouched = !steps.iter().any(|step| step.run == run) && history.alive.iter().any(|(_, id)| exists(id));
        if done.warnings.is_empty() && !waits && !open && !untouched && !awaited {
            history.forget()?;
        }
    }
    Ok(())
}
