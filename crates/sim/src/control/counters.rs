//! What the pool counted since it started: for tests of cost and of leaks.

use std::collections::BTreeMap;

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
