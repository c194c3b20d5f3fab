//! How many connections we hold to one host, over all exports (X25: a host serves 16 to everybody), and that they are
//! opened one by one (X26: each makes and plugs a VBD).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Counts our connections per address. Clones share the count: one budget for the whole process.
#[derive(Clone, Debug)]
pub struct HostBudget {
    per_host: usize,
    hosts: Arc<Mutex<HashMap<SocketAddr, Host>>>,
}

#[derive(Clone, Debug)]
struct Host {
    places: Arc<Semaphore>,
    opening: Arc<Semaphore>,
}

/// The right to one connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
}

impl HostBudget {
    /// At most `per_host` connections (0 counts as 1) to each address.
    pub fn new(per_host: usize) -> Self {
        Self { per_host: per_host.max(1), hosts: Arc::default() }
    }

    /// The limit for each address.
    pub fn per_host(&self) -> usize {
        self.per_host
    }

    /// A place at this address if one is free.
    pub(crate) fn try_place(&self, address: SocketAddr) -> Option<Place> {
        let permit = self.host(address).places.try_acquire_owned().ok()?;
        Some(Place { _permit: permit })
    }

    /// A place at this address, as soon as one is free.
    pub(crate) async fn place(&self, address: SocketAddr) -> Option<Place> {
        // The semaphore is never closed.
        let permit = self.host(address).places.acquire_owned().await.ok()?;
        Some(Place { _permit: permit })
    }

    /// The turn to open a connection there; the next one comes when this is dropped.
    pub(crate) async fn turn(&self, address: SocketAddr) -> Option<OwnedSemaphorePermit> {
        self.host(address).opening.acquire_owned().await.ok()
    }

    fn host(&self, address: SocketAddr) -> Host {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Host { places: Arc::new(Semaphore::new(self.per_host)), opening: Arc::new(Semaphore::new(1)) };
        hosts.entry(address).or_insert_with(new).clone()
    }
}

impl Default for HostBudget {
    /// 8, half of what a host allows to all its clients together.
    fn default() -> Self {
        Self::new(8)
    }
}
