//! Keeping locks long enough, and proving them: what a point needs is locked at least until the point's promise ends.
//!
//! The keeper's work. It reads points and their maps as a sweep does, and asks the store about each pack once; what is
//! locked for too short a time is locked for a quarter of the period longer than needed, so that a pack that every new
//! point uses again costs one request a quarter. Nothing that a writer has put into the repository can make a lock
//! shorter, and damage marks, intents and tombstones only ever add to what is kept.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::{StreamExt as _, stream};
use xenvault_store_format::{Immutability, LockMode, PackId, PointId};

use crate::backend::Protection;
use crate::forget::tombstones;
use crate::mark::Marks;
use crate::monitor::MaintenanceStage;
use crate::points::{self, Point};
use crate::repository::Inner;
use crate::{MaintenanceMonitor, Repository, StoreError, names, records};

/// Ends of promises are taken together within this part of the period.
const GROUPS: u32 = 16;
/// The period is extended in this part of it.
const STEP: u32 = 4;
/// Objects that are named in a report.
const MAX_NAMED: usize = 1000;

/// How locks are kept.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct KeepOptions {
    /// Only report what would be done.
    pub dry_run: bool,
    /// Is told of progress.
    pub monitor: MaintenanceMonitor,
}

/// What a call of [`Repository::keep`] has done, or with `dry_run` would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeepReport {
    /// Points whose objects are kept.
    pub points: u64,
    /// Packs that they need.
    pub packs: u64,
    /// Objects that were asked for, packs included.
    pub objects: u64,
    /// Objects whose lock was made longer.
    pub extended: u64,
    /// Of these, objects that were not locked at all, at most a thousand.
    pub unlocked: Vec<String>,
    /// Objects that should be there and are not, at most a thousand.
    pub missing: Vec<String>,
    /// Points that can not be read as a whole: what can be read of them is kept.
    pub hurt: Vec<PointId>,
    /// The earliest end of a lock among these objects, afterwards.
    pub earliest: Option<SystemTime>,
    /// Whether nothing was done.
    pub dry_run: bool,
}

/// What the store says of the objects of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PointProtection {
    /// What the repository promises.
    pub immutability: Immutability,
    /// Until when the point can not be removed by its promise, by the store's clock.
    pub promised_until: Option<SystemTime>,
    /// The store's clock when it was asked.
    pub asked_at: SystemTime,
    /// Packs that the point needs.
    pub packs: u64,
    /// Objects that were asked for: packs, the point, its receipt, the config and the key slots.
    pub objects: u64,
    /// How many of them are protected, by what protects them.
    pub governance: u64,
    /// As `governance`.
    pub compliance: u64,
    /// Files that belong to another user.
    pub sealed: u64,
    /// Objects that nothing protects now, at most a thousand.
    pub unprotected: Vec<String>,
    /// Objects that are not there, at most a thousand.
    pub missing: Vec<String>,
    /// The object whose lock ends first, and when.
    pub earliest: Option<(String, SystemTime)>,
}

impl PointProtection {
    /// Whether every object is protected, and for as long as promised.
    pub fn holds(&self) -> bool {
        let long_enough = match (self.promised_until, &self.earliest) {
            (Some(promised), Some((_, earliest))) => *earliest >= promised || promised <= self.asked_at,
            (Some(_), None) => false,
            (None, _) => true,
        };
        self.immutability != Immutability::None && self.unprotected.is_empty() && self.missing.is_empty() && long_enough
    }
}

impl Repository {
    /// Keeps every object that a living point needs locked until the point's promise ends, and what points beyond their
    /// promise need for at least a quarter of the period from now on: it must run more often than that.
    ///
    /// Cost: every map page once, and one request for each pack. Memory: one bit per chunk, a few dozen bytes per pack.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if the repository promises no lock; [`StoreError::Backend`] if the store refuses: then some
    /// locks are longer, and the call can be repeated.
    pub async fn keep(&self, options: KeepOptions) -> Result<KeepReport, StoreError> {
        let Immutability::ObjectLock { mode, seconds } = self.inner.config.immutability else {
            let what = format!("this repository promises {}: there is no lock to keep", self.immutability());
            return Err(StoreError::Misuse { what });
        };
        self.inner.writable()?;
        let period = Duration::from_secs(seconds);
        let mut report = KeepReport { dry_run: options.dry_run, ..KeepReport::default() };
        let now = now(&self.inner).await?;
        // Somebody new, whom no damage mark and no intent keeps from seeing every copy of a chunk.
        let fresh = self.reopen_on(Arc::clone(&self.inner.backend))?.inner;
        let groups = living(&fresh, period, now, &options.monitor, &mut report).await?;
        fresh.index.refresh(&*fresh.backend, &fresh.keys).await?;
        let (wanted, packs) = wanted(&fresh, groups, now + period / STEP, &options, &mut report).await?;
        report.packs = packs;
        let keeper = Keeper { repository: &fresh, mode, step: period / STEP, dry_run: options.dry_run };
        let planned = wanted.len() as u64;
        let mut kept = stream::iter(wanted.into_iter().map(|(name, until)| keeper.keep(name, until)))
            .buffer_unordered(records::PARALLEL);
        while let Some(kept) = kept.next().await {
            report.take(kept?);
            options.monitor.tell(MaintenanceStage::Keep, report.objects, planned, 0);
        }
        Ok(report)
    }

    /// Asks the store what protects the objects of a point. Reads the point's map, and one answer per pack.
    ///
    /// # Errors
    /// As [`Self::point`]; [`StoreError::Damaged`] if the map can not be read.
    pub async fn protection(&self, id: &PointId) -> Result<PointProtection, StoreError> {
        let repository = &self.inner;
        let point = points::find(repository, id).await?;
        let name = names::point(&point.pool_uuid, &point.vm_uuid, &point.id)?;
        let asked_at = now(repository).await?;
        let appeared = repository.backend.modified(&name).await;
        let appeared = appeared.map_err(|error| StoreError::io("ask for the time of", &name, error))?;
        let immutability = repository.config.immutability;
        let mut found = PointProtection {
            immutability,
            promised_until: immutability.period().map(|period| appeared + period),
            asked_at,
            packs: 0,
            objects: 0,
            governance: 0,
            compliance: 0,
            sealed: 0,
            unprotected: Vec::new(),
            missing: Vec::new(),
            earliest: None,
        };
        repository.index.refresh(&*repository.backend, &repository.keys).await?;
        let mut marks = Marks::new(repository.index.snapshot());
        marks.point(repository, &point).await?;
        let needed = marks.tallies().into_iter().filter(|(_, tally)| tally.live_bytes > 0);
        let mut objects: Vec<String> = needed.map(|(pack, _)| names::pack(&pack)).collect();
        found.packs = objects.len() as u64;
        objects.extend([name, names::receipt(id), names::CONFIG.to_owned()]);
        objects.extend(records::list(repository, names::KEYS).await?);
        let ask = |name: String| async move {
            let protection = repository.backend.protection(&name).await;
            (name, protection)
        };
        let mut answers = stream::iter(objects.into_iter().map(ask)).buffer_unordered(records::PARALLEL);
        while let Some((name, protection)) = answers.next().await {
            found.objects += 1;
            match protection {
                Ok(Protection::Locked { mode, until }) => {
                    let count = match mode {
                        LockMode::Governance => &mut found.governance,
                        LockMode::Compliance => &mut found.compliance,
                    };
                    *count += 1;
                    if until <= asked_at {
                        push(&mut found.unprotected, name.clone());
                    }
                    let is_earlier = |(other, earliest): &(String, SystemTime)| (until, &name) < (*earliest, other);
                    if found.earliest.as_ref().is_none_or(is_earlier) {
                        found.earliest = Some((name, until));
                    }
                }
                Ok(Protection::Sealed { .. }) => found.sealed += 1,
                Ok(Protection::None) => push(&mut found.unprotected, name),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => push(&mut found.missing, name),
                Err(error) => return Err(StoreError::io("ask for the lock of", &name, error)),
            }
        }
        Ok(found)
    }
}

pub(crate) async fn now(repository: &Inner) -> Result<SystemTime, StoreError> {
    let now = repository.backend.now().await;
    now.map_err(|error| StoreError::io("ask for the time of", "the store", error))
}

fn push(names: &mut Vec<String>, name: String) {
    if names.len() < MAX_NAMED {
        names.push(name);
    }
}

/// Points by the moment until which what they need has to be locked.
type Groups = BTreeMap<SystemTime, Vec<(String, Point)>>;

/// The points that live: they have no tombstone, or are promised all the same.
async fn living(
    repository: &Arc<Inner>,
    period: Duration,
    now: SystemTime,
    monitor: &MaintenanceMonitor,
    report: &mut KeepReport,
) -> Result<Groups, StoreError> {
    let grain = (period / GROUPS).max(Duration::from_secs(1));
    let forgotten = tombstones(repository).await?.of_points();
    let mut groups = Groups::new();
    let listed = records::list(repository, names::POINTS).await?;
    let planned = listed.len() as u64;
    let read = |name: String| async move {
        let appeared = repository.backend.modified(&name).await;
        let point = points::read(repository, &name).await;
        (name, appeared, point)
    };
    let named = listed.into_iter().filter(|name| names::point_parts(name).is_some());
    let mut reads = stream::iter(named.map(read)).buffer_unordered(records::PARALLEL);
    let mut done = 0;
    while let Some((name, appeared, point)) = reads.next().await {
        done += 1;
        monitor.tell(MaintenanceStage::List, done, planned, 0);
        let id = names::point_parts(&name).map(|(_, _, id)| id);
        let point = match point {
            Ok(point) => point,
            Err(error) if error.is_gone() => continue,
            Err(error) if error.is_loss() => {
                tracing::warn!(object = name, error = %error, "a point can not be read, and nothing is kept for it");
                report.hurt.extend(id);
                continue;
            }
            Err(error) => return Err(error),
        };
        let appeared = appeared.map_err(|error| StoreError::io("ask for the time of", &name, error))?;
        let promised = appeared + period;
        let until = match forgotten.contains_key(&point.id) {
            true if promised <= now => continue,
            true => promised,
            false => promised.max(now + period / STEP),
        };
        report.points += 1;
        groups.entry(rounded_up(until, grain)).or_default().push((name, point));
    }
    Ok(groups)
}

fn rounded_up(moment: SystemTime, grain: Duration) -> SystemTime {
    let grain = grain.as_secs().max(1);
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.div_ceil(grain).saturating_mul(grain))
}

/// Each object with the moment until which it has to be locked, and how many packs are among them.
async fn wanted(
    repository: &Arc<Inner>,
    groups: Groups,
    least: SystemTime,
    options: &KeepOptions,
    report: &mut KeepReport,
) -> Result<(Vec<(String, SystemTime)>, u64), StoreError> {
    let latest = groups.keys().next_back().copied().unwrap_or(least).max(least);
    let mut packs: HashMap<PackId, SystemTime> = HashMap::new();
    let mut objects = Vec::new();
    let mut marks = Marks::new(repository.index.snapshot());
    let mut done = 0;
    // From the latest on, so that the first moment of a pack is the one that counts.
    for (until, points) in groups.into_iter().rev() {
        for (name, point) in points {
            match marks.point(repository, &point).await {
                Ok(()) => {}
                Err(error) if error.is_loss() => {
                    tracing::warn!(point = %point.id, error = %error, "a point can not be read as a whole");
                    report.hurt.push(point.id);
                }
                Err(error) => return Err(error),
            }
            objects.extend([(name, until), (names::receipt(&point.id), until)]);
            done += 1;
            options.monitor.tell(MaintenanceStage::Mark, done, report.points, marks.read_bytes);
        }
        for (pack, _) in marks.tallies().into_iter().filter(|(_, tally)| tally.live_bytes > 0) {
            packs.entry(pack).or_insert(until);
        }
    }
    let count = packs.len() as u64;
    objects.extend(packs.into_iter().map(|(pack, until)| (names::pack(&pack), until)));
    objects.push((names::CONFIG.to_owned(), latest));
    for folder in [names::KEYS, names::UNDONE, names::SWEEPS] {
        objects.extend(records::list(repository, folder).await?.into_iter().map(|name| (name, latest)));
    }
    let mut seen = HashSet::new();
    objects.retain(|(name, _)| seen.insert(name.clone()));
    Ok((objects, count))
}

struct Keeper<'a> {
    repository: &'a Inner,
    mode: LockMode,
    step: Duration,
    dry_run: bool,
}

enum Kept {
    Missing(String),
    Before(SystemTime),
    Longer(SystemTime),
    Unlocked(String, SystemTime),
}

impl Keeper<'_> {
    async fn keep(&self, name: String, until: SystemTime) -> Result<Kept, StoreError> {
        let failed = |error| StoreError::io("lengthen the lock of", &name, error);
        let found = match self.repository.backend.protection(&name).await {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Kept::Missing(name)),
            found => found.map_err(failed)?,
        };
        let (mode, before) = match found {
            Protection::Locked { until: kept, .. } if kept >= until => return Ok(Kept::Before(kept)),
            // A firmer lock can not be made a weaker one.
            Protection::Locked { mode: LockMode::Compliance, until } => (LockMode::Compliance, Some(until)),
            Protection::Locked { until, .. } => (self.mode, Some(until)),
            _ => (self.mode, None),
        };
        let target = until + self.step;
        if !self.dry_run {
            self.repository.backend.extend(&name, mode, target).await.map_err(failed)?;
        }
        Ok(if before.is_some() { Kept::Longer(target) } else { Kept::Unlocked(name, target) })
    }
}

impl KeepReport {
    fn take(&mut self, kept: Kept) {
        self.objects += 1;
        let until = match kept {
            Kept::Missing(name) => return push(&mut self.missing, name),
            Kept::Before(until) => until,
            Kept::Longer(until) => {
                self.extended += 1;
                until
            }
            Kept::Unlocked(name, until) => {
                self.extended += 1;
                push(&mut self.unlocked, name);
                until
            }
        };
        self.earliest = Some(self.earliest.map_or(until, |earliest| earliest.min(until)));
    }
}
