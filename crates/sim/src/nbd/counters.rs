//! What the NBD servers count, for tests that ask how much a backup really read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use uuid::Uuid;

/// Counters of one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HostCounts {
    /// Connections taken.
    pub accepted_connections: u64,
    /// Connections closed because 16 were there, or by a fault.
    pub refused_connections: u64,
    /// Connections there now, in the handshake too.
    pub open_connections: u64,
    /// The most there ever were at once.
    pub peak_connections: u64,
    /// Exports opened.
    pub opens: u64,
    /// Exports refused.
    pub failed_opens: u64,
    /// Exports open now.
    pub open_exports: u64,
    /// `READ` requests answered with a success header.
    pub reads: u64,
    /// Disk bytes sent.
    pub sent_bytes: u64,
}

/// Counters of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VdiCounts {
    /// Exports opened.
    pub opens: u64,
    /// Exports closed again, VBD gone.
    pub closes: u64,
    /// `READ` requests answered with a success header.
    pub reads: u64,
    /// Disk bytes sent.
    pub sent_bytes: u64,
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NbdCounts {
    /// By host.
    pub hosts: BTreeMap<Uuid, HostCounts>,
    /// By disk.
    pub vdis: BTreeMap<Uuid, VdiCounts>,
}

impl NbdCounts {
    /// Disk bytes sent by all hosts.
    pub fn sent_bytes(&self) -> u64 {
        self.hosts.values().map(|host| host.sent_bytes).sum()
    }

    /// `READ` requests answered by all hosts.
    pub fn reads(&self) -> u64 {
        self.hosts.values().map(|host| host.reads).sum()
    }
}

/// Live counters. Clones count into the same place.
#[derive(Clone, Debug, Default)]
pub struct NbdCounters {
    counts: Arc<Mutex<NbdCounts>>,
}

impl NbdCounters {
    /// The counts of now.
    pub fn snapshot(&self) -> NbdCounts {
        self.lock().clone()
    }

    /// Sets reads, bytes and opens back to zero; what is open now stays counted as open.
    pub fn reset(&self) {
        let mut counts = self.lock();
        counts.vdis.clear();
        for host in counts.hosts.values_mut() {
            *host = HostCounts {
                open_connections: host.open_connections,
                peak_connections: host.open_connections,
                open_exports: host.open_exports,
                ..HostCounts::default()
            };
        }
    }

    pub(super) fn host<R>(&self, host: Uuid, change: impl FnOnce(&mut HostCounts) -> R) -> R {
        change(self.lock().hosts.entry(host).or_default())
    }

    pub(super) fn disk(&self, host: Uuid, vdi: Uuid, change: impl FnOnce(&mut HostCounts, &mut VdiCounts)) {
        let mut counts = self.lock();
        let NbdCounts { hosts, vdis } = &mut *counts;
        change(hosts.entry(host).or_default(), vdis.entry(vdi).or_default());
    }

    fn lock(&self) -> MutexGuard<'_, NbdCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
