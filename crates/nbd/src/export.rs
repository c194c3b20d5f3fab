//! A pool of connections over one export.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::Stream;
use xenvault_block::{ByteRange, ExtentSet};

use crate::budget::HostBudget;
use crate::connection::Timeouts;
use crate::endpoint::EndpointSource;
use crate::error::NbdError;

/// How an export is read.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Connections at most (each costs the host a VBD). Default 4.
    pub connections: usize,
    /// Requests in flight on each connection. Default 4.
    pub in_flight: usize,
    /// Longest request in bytes, rounded to 4096, at most 32 MiB. Default 1 MiB.
    pub request_bytes: u64,
    /// Shared limit of connections for each host.
    pub budget: HostBudget,
    /// Time limits.
    pub timeouts: Timeouts,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            connections: 4,
            in_flight: 4,
            request_bytes: 1024 * 1024,
            budget: HostBudget::default(),
            timeouts: Timeouts::default(),
        }
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
#[derive(Clone, Debug)]
pub struct Export {}

impl Export {
    /// Opens the first connection; more are opened one by one while reads want them.
    ///
    /// # Errors
    /// What hindered the last address that was tried.
    pub async fn open(_source: Arc<dyn EndpointSource>, _options: ExportOptions) -> Result<Self, NbdError> {
        todo!()
    }

    /// Size in bytes; a multiple of 512.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// Reads one range, of any alignment.
    ///
    /// # Errors
    /// [`NbdError::MediaError`] names the exact place; others mean that the export can not be reached any more.
    pub async fn read(&self, _range: ByteRange) -> Result<Bytes, NbdError> {
        todo!()
    }

    /// Reads all bytes of `extents` in ascending order, in pieces of at most one request.
    ///
    /// At most `window_bytes` are asked for or waiting at any time. The stream ends after its first error. Dropping it
    /// stops the reading.
    pub fn read_extents(&self, _extents: ExtentSet, _options: ReadOptions) -> ExtentStream {
        todo!()
    }

    /// What was done so far.
    pub fn counters(&self) -> ExportCounters {
        todo!()
    }

    /// Closes all connections properly: DISC, then the end of file, which says that the host has detached the disk.
    ///
    /// # Errors
    /// The first connection that could not be closed in time; all others are closed all the same.
    pub async fn close(&self) -> Result<(), NbdError> {
        todo!()
    }
}

/// Pieces of disk in ascending order: offset and bytes.
#[derive(Debug)]
pub struct ExtentStream {}

impl Stream for ExtentStream {
    type Item = Result<(u64, Bytes), NbdError>;

    fn poll_next(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        todo!()
    }
}
