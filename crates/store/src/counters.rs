//! Live counters of a writer, shared with whoever shows progress.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters of one writer; all grow only. Shared by `Arc`; reading them costs nothing and stops nobody.
#[derive(Debug, Default)]
pub struct WriteCounters {
    pub(crate) read_bytes: AtomicU64,
    pub(crate) zero_bytes: AtomicU64,
    pub(crate) dedup_bytes: AtomicU64,
    pub(crate) new_bytes: AtomicU64,
    pub(crate) stored_bytes: AtomicU64,
    pub(crate) base_bytes: AtomicU64,
    pub(crate) chunks: AtomicU64,
    pub(crate) new_chunks: AtomicU64,
    pub(crate) packs: AtomicU64,
    pub(crate) cut_nanos: AtomicU64,
    pub(crate) compress_nanos: AtomicU64,
    pub(crate) seal_nanos: AtomicU64,
    pub(crate) write_nanos: AtomicU64,
    pub(crate) base_nanos: AtomicU64,
    pub(crate) throttled_nanos: AtomicU64,
    pub(crate) threads: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriteProgress {
    /// Disk bytes handed to the disk writers, zeros that were declared included.
    pub read_bytes: u64,
    /// Of these, bytes in all-zero blocks; never stored.
    pub zero_bytes: u64,
    /// Bytes of chunks that the repository knew already (unchanged bytes around a change included).
    pub dedup_bytes: u64,
    /// Plain bytes of chunks that were new.
    pub new_bytes: u64,
    /// Bytes written to the repository, everything included: sealed chunks, map pages, directories, index, point.
    pub stored_bytes: u64,
    /// Unchanged bytes that an incremental read back from the repository.
    pub base_bytes: u64,
    /// Chunks of disk data that were cut.
    pub chunks: u64,
    /// Of these, new ones.
    pub new_chunks: u64,
    /// Packs completed.
    pub packs: u64,
    /// Busy time of each stage, summed over its threads.
    pub busy: [(Stage, Duration); 5],
    /// Time that callers waited for room, since the store was slower than they.
    pub throttled: Duration,
    /// Worker threads that share `Cut`, `Compress` and `Seal`.
    pub threads: u64,
}

/// What the store spends time on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Finding zeros and cut points, hashing, looking up.
    #[default]
    Cut,
    /// Compressing.
    Compress,
    /// Encrypting and checksumming.
    Seal,
    /// Writing to the repository's medium.
    Write,
    /// Reading unchanged bytes back.
    Base,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Cut => "hash",
            Self::Compress => "compress",
            Self::Seal => "encrypt",
            Self::Write => "repository write",
            Self::Base => "repository read",
        })
    }
}

impl WriteCounters {
    /// The counters now. The fields are read one after the other, so they may be a moment apart.
    pub fn progress(&self) -> WriteProgress {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let time = |counter: &AtomicU64| Duration::from_nanos(get(counter));
        WriteProgress {
            read_bytes: get(&self.read_bytes),
            zero_bytes: get(&self.zero_bytes),
            dedup_bytes: get(&self.dedup_bytes),
            new_bytes: get(&self.new_bytes),
            stored_bytes: get(&self.stored_bytes),
            base_bytes: get(&self.base_bytes),
            chunks: get(&self.chunks),
            new_chunks: get(&self.new_chunks),
            packs: get(&self.packs),
            busy: [
                (Stage::Cut, time(&self.cut_nanos)),
                (Stage::Compress, time(&self.compress_nanos)),
                (Stage::Seal, time(&self.seal_nanos)),
                (Stage::Write, time(&self.write_nanos)),
                (Stage::Base, time(&self.base_nanos)),
            ],
            throttled: time(&self.throttled_nanos),
            threads: get(&self.threads),
        }
    }
}

impl WriteProgress {
    /// The stage that took most, with the worker threads' stages shared among the threads; `None` before any work.
    pub fn busiest(&self) -> Option<Stage> {
        let threads = u32::try_from(self.threads.max(1)).unwrap_or(u32::MAX);
        let weight = |stage: Stage, busy: Duration| match stage {
            Stage::Cut | Stage::Compress | Stage::Seal => busy / threads,
            Stage::Write | Stage::Base => busy,
        };
        let busiest = self.busy.into_iter().max_by_key(|&(stage, busy)| weight(stage, busy))?;
        (!busiest.1.is_zero()).then_some(busiest.0)
    }
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

pub(crate) fn add_time(counter: &AtomicU64, time: Duration) {
    add(counter, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
}
