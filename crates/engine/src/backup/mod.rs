//! Backup of one VM, in the order in which nothing can be lost: check, snapshot, decide, read, verify, publish, clean up.

mod base;
mod bases;
pub(crate) mod endpoints;
mod evidence;
pub(crate) mod finding;
mod finish;
mod http_read;
pub(crate) mod prerequisites;
mod read;
mod request;
mod sample;
pub(crate) mod select;
mod snapshot;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;

use xenvault_store::{Level as StoredLevel, Point, PointId, PointManifest, Repository, WriterOptions};
use xenvault_xenapi::vm;

pub(crate) use endpoints::{Access, access, source};
pub use finding::{Finding, FindingKind};
pub(crate) use read::known_places;
pub use request::{
    BackupReport, BackupRequest, DiskReport, Level, LevelRequest, SkippedDevice, Verification, VmSelector,
};
pub(crate) use sample::{Dice, Field, choose};

use crate::config::VmConfig;
use crate::meter::{Direction, Meter};
use crate::monitor::Stage;
use crate::pool::{Doing as _, DoingInRepository as _, server_time};
use crate::run::Run;
use crate::state::{Entry, Operation};
use crate::{Engine, EngineError, sweep};
use base::Kinship;
use prerequisites::Ground;
use read::{Job, Stored};
use snapshot::Snapshot;

/// A published point with what is needed to clean up and to report.
struct Published {
    point: PointId,
    snapshot: Snapshot,
    disks: Vec<DiskReport>,
    /// Of each disk of the snapshot.
    kinship: Vec<Kinship>,
    level: Level,
    reason: String,
}

pub(crate) async fn run(engine: &Engine, request: BackupRequest) -> Result<BackupReport, EngineError> {
    let repository = engine.repository()?.clone();
    let meter = Arc::new(Meter::new(Arc::clone(&engine.options().monitor), Direction::Backup));
    let (reference, record) = select::find(engine.session(), &request.vm).await?;
    let lease = engine.state().lease_vm(&record.uuid)?;
    meter.stage(&Stage::CleanLeftovers);
    if let Err(error) = Box::pin(sweep::clean_vm(engine, &record.uuid)).await {
        meter.warn("leftovers", format!("what an earlier run left could not be removed: {error}"));
    }
    meter.stage(&Stage::Prerequisites);
    let ground = Box::pin(prerequisites::check(engine, &meter, (&reference, &record))).await?;
    let operation = Operation {
        kind: "backup".to_owned(),
        pool: ground.pool.uuid.clone(),
        vm: record.uuid.clone(),
        repository: Some(repository.id().to_string()),
        started: server_time(engine.session(), &ground.pool).await?,
    };
    let run = Run::begin(engine, Arc::clone(&meter), Some(lease), operation)?;
    let run_id = run.id().to_owned();
    // Boxed, here and below: the states of nested futures would not fit the stack of a worker thread.
    match Box::pin(publish(&run, &repository, &request, &ground, (&reference, &record))).await {
        Ok(published) => {
            meter.stage(&Stage::CleanUp);
            if Box::pin(finish::clean_up(&run, &record.uuid, &published.snapshot, &published.kinship)).await {
                run.complete(&meter);
            } else {
                run.leave_to_sweep();
            }
            meter.report();
            Ok(report(&meter, run_id, &record, ground, published))
        }
        Err(error) => {
            meter.stage(&Stage::CleanUp);
            Box::pin(run.abandon(&error)).await;
            Err(error)
        }
    }
}

fn report(meter: &Meter, run_id: String, vm: &vm::Record, ground: Ground, published: Published) -> BackupReport {
    BackupReport {
        point: published.point,
        run_id,
        vm_uuid: vm.uuid.clone(),
        vm_name: vm.name_label.clone(),
        level: published.level,
        reason: published.reason,
        disks: published.disks,
        skipped: ground.skipped,
        totals: meter.progress(),
        warnings: meter.warnings(),
        elapsed: meter.elapsed(),
        attach_elapsed: meter.attach_elapsed(),
    }
}

/// Everything up to the point.
async fn publish(
    run: &Run,
    repository: &Repository,
    request: &BackupRequest,
    ground: &Ground,
    vm: (&vm::Ref, &vm::Record),
) -> Result<Published, EngineError> {
    let session = run.session();
    let parent = base::parent(repository, run, &ground.pool.uuid, &vm.1.uuid).await?;
    let record = vm::get_record(session, vm.0).await.doing("read the VM's record")?;
    let before = base::situation(session, &ground.pool, &record, None).await?;
    run.meter.stage(&Stage::EnableTracking);
    let tracking = snapshot::enable_tracking(run, ground).await?;
    run.meter.stage(&Stage::Snapshot);
    let snapshot = Box::pin(snapshot::take(run, ground, &tracking, vm)).await?;
    let record = vm::get_record(session, vm.0).await.doing("read the VM's record")?;
    let after = base::situation(session, &ground.pool, &record, base::messages_from(parent.as_ref())).await?;
    let config = configuration(run, ground, &record).await?;

    // Every bitmap is asked for before the first disk is opened: an open disk refuses to be counted to.
    let mut plans = Vec::with_capacity(snapshot.disks.len());
    for shot in &snapshot.disks {
        run.meter.stage(&Stage::PlanDisk { device: shot.live.device.clone() });
        plans.push(base::plan(run, request, &after, parent.as_ref(), shot).await?);
    }
    let options = run.engine.options();
    let writer = repository
        .writer(WriterOptions {
            threads: options.worker_threads,
            memory_bytes: options.memory_bytes / 2,
            ..WriterOptions::default()
        })
        .await
        .doing("begin to write")?;
    run.meter.follow(writer.counters());
    let mut stored = Vec::with_capacity(plans.len());
    for (shot, plan) in snapshot.disks.iter().zip(plans) {
        let job = Job { run, repository, writer: &writer, access: ground.access, shot, situation: &before };
        stored.push(Box::pin(job.store(plan)).await?);
    }
    run.meter.stage(&Stage::Publish);
    let vm_config = writer.put_blob(&config).await.doing("store the VM's configuration")?;
    let manifest = manifest(run, ground, &record, &snapshot, parent.as_ref(), &stored, vm_config)?;
    let (level, reason) = (manifest.level, manifest.reason.clone());
    run.journal()?.write(&Entry::Publishing)?;
    let point = match Box::pin(writer.publish(manifest)).await {
        Ok(point) => point,
        Err(error) => {
            run.journal()?.write(&Entry::Withdrawn)?;
            return Err(error).doing("write the point");
        }
    };
    // From here on the point is good, whatever happens.
    if let Err(error) = run.journal()?.write(&Entry::Published { point: point.to_string() }) {
        run.meter.warn("journal", format!("the journal could not be written: {error}"));
    }
    let level = if level == StoredLevel::Inc { Level::Incremental } else { Level::Full };
    let kinship = stored.iter().map(|stored| stored.kinship).collect();
    let disks = stored.into_iter().map(|stored| stored.report).collect();
    Ok(Published { point, snapshot, disks, kinship, level, reason })
}

async fn configuration(run: &Run, ground: &Ground, vm: &vm::Record) -> Result<Vec<u8>, EngineError> {
    let disks: Vec<_> = ground.disks.iter().map(|disk| (disk.reference.clone(), disk.record.clone())).collect();
    VmConfig::read(run.session(), vm, &ground.vbds, &disks, &ground.skipped).await?.to_bytes()
}

fn manifest(
    run: &Run,
    ground: &Ground,
    vm: &vm::Record,
    snapshot: &Snapshot,
    parent: Option<&Point>,
    stored: &[Stored],
    vm_config: xenvault_store::BlobRef,
) -> Result<PointManifest, EngineError> {
    let run_id = uuid::Uuid::try_parse(run.id())
        .map_err(|_| EngineError::Internal { what: "the run's id is no UUID".to_owned() })?;
    let whole: Vec<&Stored> = stored.iter().filter(|stored| stored.report.level == Level::Full).collect();
    let level = if whole.is_empty() { StoredLevel::Inc } else { StoredLevel::Full };
    let mut reasons: Vec<&str> = if whole.is_empty() { stored.iter().collect() } else { whole }
        .into_iter()
        .map(|stored| stored.report.reason.as_str())
        .collect();
    reasons.sort_unstable();
    reasons.dedup();
    let taken = u64::try_from(snapshot.record.snapshot_time.unix_seconds()).unwrap_or(0).saturating_mul(1000);
    // The pool's clock counts whole seconds and can go back; a point is always newer than the one it follows.
    let after_parent = parent.map_or(0, |point| point.created_unix_ms.saturating_add(1));
    let mut attributes = BTreeMap::from([("engine-version".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]);
    for skip in &ground.skipped {
        attributes.insert(format!("skipped-device-{}", skip.device), skip.reason.clone());
    }
    Ok(PointManifest {
        id: PointId::random(),
        run_id,
        fencing: 0,
        instance: run.engine.instance().to_owned(),
        pool_uuid: ground.pool.uuid.clone(),
        vm_uuid: vm.uuid.clone(),
        vm_name: vm.name_label.clone(),
        level,
        reason: reasons.join("; "),
        created_unix_ms: taken.max(after_parent),
        parent: parent.map(|point| point.id),
        newest_sweep_seen: 0,
        disks: stored.iter().map(|stored| stored.disk.clone()).collect(),
        vm_config,
        attributes,
    })
}
