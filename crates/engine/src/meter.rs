//! Counts what one workflow moves, and tells the monitor a few times a second.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use xenvault_store::{Stage as StoreStage, WriteCounters, WriteProgress};

use crate::monitor::{Bottleneck, JobMonitor, Progress, Stage, Warning};

/// At most one report in this time.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// The rate is that of the last seconds.
const RATE_WINDOW: Duration = Duration::from_secs(10);

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the pool to the repository.
    Backup,
    /// From the repository to the pool.
    Restore,
}

/// Counters of one workflow. Shared by reference between the tasks of the workflow.
pub(crate) struct Meter {
    monitor: Arc<dyn JobMonitor>,
    direction: Direction,
    started: Instant,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    planned: u64,
    done: u64,
    read: u64,
    sample: u64,
    attach: Duration,
    waited_for_source: Duration,
    waited_for_sink: Duration,
    writer: Option<Arc<WriteCounters>>,
    history: VecDeque<(Instant, u64)>,
    last_report: Option<Instant>,
    warnings: Vec<Warning>,
}

impl Meter {
    pub(crate) fn new(monitor: Arc<dyn JobMonitor>, direction: Direction) -> Self {
        Self { monitor, direction, started: Instant::now(), counts: Mutex::default() }
    }

    pub(crate) fn stage(&self, stage: &Stage) {
        tracing::debug!(%stage, "stage");
        self.monitor.stage(stage);
    }

    pub(crate) fn warn(&self, code: &'static str, text: impl Into<String>) {
        let warning = Warning::new(code, text);
        tracing::warn!(code, text = %warning.text, "warning");
        self.monitor.warning(&warning);
        self.counts().warnings.push(warning);
    }

    pub(crate) fn warnings(&self) -> Vec<Warning> {
        self.counts().warnings.clone()
    }

    pub(crate) fn follow(&self, writer: Arc<WriteCounters>) {
        self.counts().writer = Some(writer);
    }

    pub(crate) fn plan(&self, bytes: u64) {
        self.counts().planned += bytes;
    }

    /// `bytes` were moved; the workflow had waited for them and for their way on.
    pub(crate) fn moved(&self, bytes: u64, waited_for_source: Duration, waited_for_sink: Duration) {
        let mut counts = self.counts();
        counts.done += bytes;
        if self.direction == Direction::Backup {
            counts.read += bytes;
        }
        counts.waited_for_source += waited_for_source;
        counts.waited_for_sink += waited_for_sink;
        let now = Instant::now();
        if counts.last_report.is_some_and(|last| now.duration_since(last) < REPORT_EVERY) {
            return;
        }
        counts.last_report = Some(now);
        let done = counts.done;
        counts.history.push_back((now, done));
        while counts.history.front().is_some_and(|&(at, _)| now.duration_since(at) > RATE_WINDOW) {
            counts.history.pop_front();
        }
        drop(counts);
        self.report();
    }

    /// Tells the monitor again, though nothing of the plan was moved.
    pub(crate) fn report_seldom(&self) {
        self.moved(0, Duration::ZERO, Duration::ZERO);
    }

    pub(crate) fn sampled(&self, bytes: u64) {
        self.counts().sample += bytes;
    }

    pub(crate) fn attached_for(&self, time: Duration) {
        self.counts().attach += time;
    }

    pub(crate) fn attach_elapsed(&self) -> Duration {
        self.counts().attach
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Tells the monitor how far things are.
    pub(crate) fn report(&self) {
        self.monitor.progress(&self.progress());
    }

    pub(crate) fn progress(&self) -> Progress {
        let counts = self.counts();
        let stored = counts.writer.as_ref().map(|writer| writer.progress()).unwrap_or_default();
        let rate = rate(&counts);
        let left = counts.planned.saturating_sub(counts.done);
        Progress {
            planned_bytes: counts.planned,
            done_bytes: counts.done,
            read_bytes: counts.read,
            sample_bytes: counts.sample,
            zero_bytes: stored.zero_bytes,
            dedup_bytes: stored.dedup_bytes,
            new_bytes: stored.new_bytes,
            stored_bytes: stored.stored_bytes,
            elapsed: self.started.elapsed(),
            rate_bytes_per_second: rate,
            time_left: left.checked_div(rate).map(Duration::from_secs),
            bottleneck: self.bottleneck(&counts, &stored),
        }
    }

    fn bottleneck(&self, counts: &Counts, stored: &WriteProgress) -> Option<Bottleneck> {
        if counts.waited_for_source.is_zero() && counts.waited_for_sink.is_zero() {
            return None;
        }
        let source_is_slower = counts.waited_for_source >= counts.waited_for_sink;
        Some(match (self.direction, source_is_slower) {
            (Direction::Backup, true) | (Direction::Restore, false) => Bottleneck::Pool,
            (Direction::Restore, true) => Bottleneck::Repository,
            (Direction::Backup, false) => match stored.busiest() {
                Some(StoreStage::Write | StoreStage::Base) => Bottleneck::Repository,
                _ => Bottleneck::Processor,
            },
        })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rate(counts: &Counts) -> u64 {
    let (Some(&(first, from)), Some(&(last, to))) = (counts.history.front(), counts.history.back()) else { return 0 };
    let millis = u64::try_from(last.duration_since(first).as_millis()).unwrap_or(u64::MAX);
    to.saturating_sub(from).saturating_mul(1000).checked_div(millis).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::NoMonitor;

    #[test]
    fn the_side_that_is_waited_for_is_the_bottleneck() {
        let side = |direction, source, sink| {
            let meter = Meter::new(Arc::new(NoMonitor), direction);
            meter.moved(1, Duration::from_millis(source), Duration::from_millis(sink));
            meter.progress().bottleneck
        };
        assert_eq!(side(Direction::Backup, 2, 1), Some(Bottleneck::Pool));
        assert_eq!(side(Direction::Backup, 1, 2), Some(Bottleneck::Processor));
        assert_eq!(side(Direction::Restore, 2, 1), Some(Bottleneck::Repository));
        assert_eq!(side(Direction::Restore, 1, 2), Some(Bottleneck::Pool));
        assert_eq!(side(Direction::Backup, 0, 0), None);
    }

    #[test]
    fn counts_add_up() {
        let meter = Meter::new(Arc::new(NoMonitor), Direction::Backup);
        meter.plan(10);
        meter.moved(4, Duration::ZERO, Duration::ZERO);
        meter.sampled(3);
        let progress = meter.progress();
        assert_eq!((progress.planned_bytes, progress.done_bytes, progress.read_bytes), (10, 4, 4));
        assert_eq!(progress.sample_bytes, 3);
    }
}
