//! Sweeping: removing what no point refers to, while others go on writing.
//!
//! A sweep has two halves with a grace period between them (`docs/repository-format.md` says why that is safe). A call
//! does what is due: the second half of the open sweep if its time has come, then the first half of the next one. It
//! never waits, and may be interrupted anywhere: the next call takes it up.

mod begin;
mod carry;
mod survey;

use std::time::Duration;

use xenvault_store_format::{PointId, SweepIntent};

use crate::{MaintenanceMonitor, Repository, StoreError, WriterOptions, names};

/// How a sweep goes about.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SweepOptions {
    /// How long writers have to notice what is condemned before it is removed: longer than the longest backup. Whole
    /// seconds count. Two days if nothing is said.
    pub grace: Duration,
    /// Bytes of chunks that may be stored again so that packs can go that are mostly dead. 1 GiB if nothing is said.
    pub rewrite_budget_bytes: u64,
    /// A pack is mostly dead if less than this share of it is needed, in percent; 50 if nothing is said.
    pub rewrite_below_percent: u8,
    /// Whether more than a fifth of all points may go at once.
    pub confirm_many: bool,
    /// Whether to go on without points that are gone though nobody has forgotten them.
    pub accept_lost_points: bool,
    /// Only report what would be done.
    pub dry_run: bool,
    /// Bounds of what is stored again.
    pub writer: WriterOptions,
    /// Is told of progress.
    pub monitor: MaintenanceMonitor,
}

impl Default for SweepOptions {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(2 * 24 * 3600),
            rewrite_budget_bytes: 1 << 30,
            rewrite_below_percent: 50,
            confirm_many: false,
            accept_lost_points: false,
            dry_run: false,
            writer: WriterOptions::default(),
            monitor: MaintenanceMonitor::default(),
        }
    }
}

/// What a call of [`Repository::sweep`] has done, or with `dry_run` would do.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SweepReport {
    /// The sweep that was brought to its end.
    pub ended: Option<SweepEnded>,
    /// The sweep that was begun. It has ended too if the grace period is nothing.
    pub begun: Option<SweepBegun>,
    /// A sweep that is open, and how long it will be until it can be carried out; the next one begins after it.
    pub waiting: Option<(u64, Duration)>,
    /// Points whose runs nobody saw to their end, and that are complete.
    pub released: Vec<PointId>,
    /// Such points that are not complete: nothing but forgetting them helps.
    pub quarantined: Vec<PointId>,
    /// Points that stay.
    pub points: u64,
    /// Points that were forgotten and stay since they are immutable: they go when their promise has ended.
    pub promised: Vec<PointId>,
    /// Index segments that were replaced.
    pub replaced_segments: u64,
    /// Whether nothing was done.
    pub dry_run: bool,
}

/// What the second half of a sweep has removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweepEnded {
    /// Number of the sweep.
    pub number: u64,
    /// Points that were removed.
    pub removed_points: Vec<PointId>,
    /// Points whose forgetting was taken back meanwhile.
    pub spared_points: Vec<PointId>,
    /// Packs that were removed.
    pub removed_packs: u64,
    /// Bytes of the chunks in them.
    pub removed_bytes: u64,
    /// Bytes of chunks that were needed and were stored again, as they were sealed.
    pub carried_bytes: u64,
    /// Condemned packs that stay since something in them is needed and can not be read.
    pub kept_packs: u64,
    /// Objects that stay since they are locked: a later sweep removes them.
    pub held_objects: u64,
}

/// What the first half of a sweep has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweepBegun {
    /// Number of the sweep.
    pub number: u64,
    /// Points that go.
    pub points: Vec<PointId>,
    /// Packs that go.
    pub packs: u64,
    /// Bytes of the chunks in them.
    pub bytes: u64,
    /// Of these, bytes of chunks that are needed and will be stored again.
    pub carry_bytes: u64,
    /// Records that have become pointless.
    pub records: u64,
}

impl Repository {
    /// Removes what was forgotten, and everything that no point refers to, in two halves: this call carries out what was
    /// announced at least the grace period ago, and announces what goes next.
    ///
    /// Cost: every map page of the points that stay is read once for each half. Memory: one bit per chunk, and what a
    /// writer takes. Dropping the future at any moment is harmless.
    ///
    /// # Errors
    /// Whatever makes it doubtful that all points are known ends it before anything is removed:
    /// [`StoreError::IncompleteListing`], [`StoreError::PointGone`], [`StoreError::TooManyPoints`], and every object of
    /// a point that can not be read. [`StoreError::SweepTaken`] if another process sweeps.
    pub async fn sweep(&self, options: SweepOptions) -> Result<SweepReport, StoreError> {
        if !options.dry_run {
            // What is still needed of packs that go is stored again, and so has to be read.
            self.full("sweep")?;
        }
        let repository = &self.inner;
        repository.writable()?;
        let mut report = SweepReport { dry_run: options.dry_run, ..SweepReport::default() };
        let state = repository.look_at_sweeps().await?;
        if let Some(intent) = &state.open {
            if let Some(rest) = self.time_left(intent).await? {
                report.waiting = Some((intent.number, rest));
                return Ok(report);
            }
            if options.dry_run {
                report.waiting = Some((intent.number, Duration::ZERO));
                return Ok(report);
            }
            carry::out(repository, &state, &options, &mut report).await?;
        }
        let state = repository.look_at_sweeps().await?;
        if state.open.is_some() {
            return Err(StoreError::SweepTaken { number: state.number });
        }
        if !begin::first_half(repository, &state, &options, &mut report).await? {
            return Ok(report);
        }
        let state = repository.look_at_sweeps().await?;
        if let Some(intent) = &state.open {
            match self.time_left(intent).await? {
                Some(rest) => report.waiting = Some((intent.number, rest)),
                None => carry::out(repository, &state, &options, &mut report).await?,
            }
        }
        Ok(report)
    }

    /// How long it is until a sweep can be carried out, by the store's own clock.
    async fn time_left(&self, intent: &SweepIntent) -> Result<Option<Duration>, StoreError> {
        let (backend, name) = (&self.inner.backend, names::intent(intent.number));
        let appeared =
            backend.modified(&name).await.map_err(|error| StoreError::io("ask for the time of", &name, error))?;
        let now = backend.now().await.map_err(|error| StoreError::io("ask for the time of", "the store", error))?;
        // A clock that was set back only makes it wait longer.
        let passed = now.duration_since(appeared).unwrap_or_default();
        Ok(Duration::from_secs(intent.grace_seconds).checked_sub(passed).filter(|rest| !rest.is_zero()))
    }
}
