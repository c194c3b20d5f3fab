//! What the pool counted since it started: for tests of cost and of leaks.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::nbd::NbdCounters;

/// A copy of all counters at one moment.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Counters {
    /// Calls per XenAPI method (an `Async.` form counts under its plain name too) and per HTTP handler.
    pub calls: BTreeMap<String, u64>,
    /// Body bytes that HTTP disk exports sent, per VDI uuid.
    pub http_sent_bytes: BTreeMap<String, u64>,
    /// Body bytes that HTTP disk imports received, per VDI uuid.
    pub http_received_bytes: BTreeMap<String, u64>,
    /// What NBD did, per VDI uuid.
    pub nbd: BTreeMap<String, NbdDiskCounters>,
}

/// What NBD did for one VDI.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct NbdDiskCounters {
    /// Exports opened.
    pub opens: u64,
    /// Exports closed again.
    pub closes: u64,
    /// READ requests served.
    pub reads: u64,
    /// Data bytes sent.
    pub sent_bytes: u64,
}

impl Counters {
    /// Data bytes that NBD sent for all disks together.
    pub fn nbd_sent_bytes(&self) -> u64 {
        self.nbd.values().map(|disk| disk.sent_bytes).sum()
    }
}

/// Live counters.
#[derive(Debug, Default)]
pub(crate) struct CounterBook {
    counts: Mutex<Counters>,
    sequence: Mutex<Vec<String>>,
}

/// The names of so many calls are kept in their order.
const SEQUENCE: usize = 10_000;

impl CounterBook {
    fn lock(&self) -> MutexGuard<'_, Counters> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calls in their order, the first ones of the pool's life.
    pub(crate) fn sequence(&self) -> Vec<String> {
        self.sequence.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a call.
    pub(crate) fn call(&self, name: &str) {
        let mut sequence = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
        if sequence.len() < SEQUENCE {
            sequence.push(name.to_owned());
        }
        drop(sequence);
        *self.lock().calls.entry(name.to_owned()).or_default() += 1;
    }

    /// Counts body bytes of an export.
    pub(crate) fn sent(&self, vdi: &str, bytes: u64) {
        *self.lock().http_sent_bytes.entry(vdi.to_owned()).or_default() += bytes;
    }

    /// Counts body bytes of an import.
    pub(crate) fn received(&self, vdi: &str, bytes: u64) {
        *self.lock().http_received_bytes.entry(vdi.to_owned()).or_default() += bytes;
    }

    /// A copy, with what NBD counted.
    pub(crate) fn snapshot(&self, nbd: &NbdCounters) -> Counters {
        let mut counters = self.lock().clone();
        for (vdi, counts) in nbd.snapshot().vdis {
            let disk = NbdDiskCounters {
                opens: counts.opens,
                closes: counts.closes,
                reads: counts.reads,
                sent_bytes: counts.sent_bytes,
            };
            counters.nbd.insert(vdi.to_string(), disk);
        }
        counters
    }
}
