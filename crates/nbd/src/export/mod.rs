//! A pool of connections over one export.
//!
//! Reads become jobs in one queue; each connection's task takes jobs from it, keeps several in flight, and puts back
//! what a lost connection did not answer. Who asked decides what a failure of its own range means (`fetch`).

mod dialer;
mod fetch;
mod pool;
mod queue;
mod stream;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use xenvault_block::{ByteRange, ExtentSet};

use crate::budget::HostBudget;
use crate::connection::{Connection, Timeouts};
use crate::endpoint::EndpointSource;
use crate::error::NbdError;
use pool::Pool;
pub use stream::ExtentStream;

/// The unit of requests: XenServer wants whole sectors, the page of its block device is 4 KiB (X27).
const ALIGN_BYTES: u64 = 4096;

/// How an export is read.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Connections at most (each costs the host a VBD; 0 counts as 1). Default 4. More than the first are opened only
    /// while there is more to read than the open ones hold in flight.
    pub connections: usize,
    /// Full-size requests in flight on each connection (0 counts as 1); of smaller ones as many as have the same number
    /// of bytes, at most 64. Default 4.
    pub in_flight: usize,
    /// Longest request in bytes, rounded down to a multiple of 4096, from 4 KiB to 32 MiB. Default 1 MiB.
    pub request_bytes: u64,
    /// Shared limit of connections for each host.
    pub budget: HostBudget,
    /// Time limits.
    pub timeouts: Timeouts,
    /// How patiently a place is sought at hosts that are busy or away.
    pub patience: Patience,
}

/// How long, and in which steps, connections are tried again when no address takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Pause after the first round over all addresses; doubled after each further one. Default 0.5 s.
    pub first_pause: Duration,
    /// Longest pause. Default 15 s.
    pub longest_pause: Duration,
    /// Rounds over all addresses before it is given up (0 counts as 1). Default 8.
    pub rounds: u32,
}

impl Default for Patience {
    fn default() -> Self {
        Self { first_pause: Duration::from_millis(500), longest_pause: Duration::from_secs(15), rounds: 8 }
    }
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            in_flight: 4,
            request_bytes: 1024 * 1024,
            budget: HostBudget::default(),
            timeouts: Timeouts::default(),
            patience: Patience::default(),
        }
    }
}

impl ExportOptions {
    /// The options with every number in its limits.
    fn sane(mut self) -> Self {
        self.connections = self.connections.max(1);
        self.in_flight = self.in_flight.max(1);
        let request = self.request_bytes.clamp(ALIGN_BYTES, Connection::MAX_READ_BYTES);
        self.request_bytes = request - request % ALIGN_BYTES;
        self.patience.rounds = self.patience.rounds.max(1);
        self
    }
}

/// How a stream of extents is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// How many bytes may be asked for or wait for the reader at once. Default 32 MiB; at least one request.
    pub window_bytes: u64,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self { window_bytes: 32 * 1024 * 1024 }
    }
}

/// What an export did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportCounters {
    /// Bytes of disk that were received.
    pub read_bytes: u64,
    /// Requests that were answered.
    pub answered_requests: u64,
    /// Connections opened, the first ones included.
    pub opened_connections: u64,
    /// Connections lost and made up for.
    pub lost_connections: u64,
    /// Requests that were sent again.
    pub repeated_requests: u64,
}

/// One export, read over several connections. Clones share the pool.
///
/// [`Export::close`] tells whether the host has detached the disk; when the last clone is dropped without it, the
/// connections are closed properly in the background.
#[derive(Clone)]
pub struct Export {
    pool: Arc<Pool>,
}

impl Export {
    /// Opens the first connection; more are opened one by one while reads want them.
    ///
    /// Waits while the budget of every address is used up by other exports: do not hold exports open that are not read.
    ///
    /// # Errors
    /// What hindered the last address that was tried.
    pub async fn open(source: Arc<dyn EndpointSource>, options: ExportOptions) -> Result<Self, NbdError> {
        let pool = Pool::open(source, options.sane()).await?;
        Ok(Self { pool: Arc::new(pool) })
    }

    /// Size in bytes; a multiple of 512.
    pub fn size(&self) -> u64 {
        self.pool.shared.size
    }

    /// Reads one range, of any alignment. Longer ranges than one request are read in pieces at the same time; their
    /// bytes are in memory as a whole, so do not ask for more than you can hold.
    ///
    /// # Errors
    /// [`NbdError::MediaError`] names the exact place; others mean that the export can not be reached any more.
    pub async fn read(&self, range: ByteRange) -> Result<Bytes, NbdError> {
        fetch::read(&self.pool.shared, range).await
    }

    /// Reads all bytes of `extents` in ascending order, in pieces of at most one request.
    ///
    /// At most `window_bytes` are asked for or waiting at any time. The stream ends after its first error. Dropping it
    /// stops the reading. Reading goes on only while the stream is polled or the window has room.
    pub fn read_extents(&self, extents: ExtentSet, options: ReadOptions) -> ExtentStream {
        ExtentStream::new(self.pool.clone(), extents, options)
    }

    /// What was done so far.
    pub fn counters(&self) -> ExportCounters {
        self.pool.shared.counters()
    }

    /// Closes all connections properly: DISC, then the end of file, which says that the host has detached the disk.
    /// Reads that wait end with [`NbdError::Closed`]. Closing again does nothing.
    ///
    /// # Errors
    /// The first connection that could not be closed in time; all others are closed all the same.
    pub async fn close(&self) -> Result<(), NbdError> {
        self.pool.close().await
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("size", &self.size()).field("counters", &self.counters()).finish_non_exhaustive()
    }
}
