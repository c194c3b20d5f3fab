//! One connection to one export.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use xenvault_block::ByteRange;

use crate::endpoint::Endpoint;
use crate::error::NbdError;

/// Time limits of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connect. Default 5 s.
    pub connect: Duration,
    /// Greeting, options and TLS. Default 30 s.
    pub handshake: Duration,
    /// From the export name to its answer: the host attaches the disk, which can take minutes (X26). Default 5 min.
    pub open: Duration,
    /// Without a byte of the answer that is due. Default 60 s (X29).
    pub progress: Duration,
    /// From DISC to the close, in which the host detaches the disk. Default 2 min.
    pub disconnect: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(30),
            open: Duration::from_secs(300),
            progress: Duration::from_secs(60),
            disconnect: Duration::from_secs(120),
        }
    }
}

/// An open export over one socket. Reads may be made at the same time; they are sent at once and answered by handle.
#[derive(Debug)]
pub struct Connection {
    address: SocketAddr,
    size: u64,
}

impl Connection {
    /// Longest read in one request, in bytes.
    pub const MAX_READ_BYTES: u64 = 32 * 1024 * 1024;

    /// Connects, secures the connection if asked to, and opens the export.
    ///
    /// # Errors
    /// [`NbdError`] by the moment at which the peer fails.
    pub async fn open(_endpoint: &Endpoint, _timeouts: &Timeouts) -> Result<Self, NbdError> {
        todo!()
    }

    /// Where it leads.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Size of the export in bytes; a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads one range (start and end multiples of 512, at most [`Connection::MAX_READ_BYTES`]).
    ///
    /// # Errors
    /// After any error but [`NbdError::OutOfRange`] and [`NbdError::BadRequest`] the connection is over.
    pub async fn read(&self, _range: ByteRange) -> Result<Bytes, NbdError> {
        todo!()
    }

    /// Says DISC and waits until the host has closed: only then has it detached the disk.
    ///
    /// # Errors
    /// [`NbdError::Timeout`] if the close does not come; the connection is gone in any case.
    pub async fn disconnect(self) -> Result<(), NbdError> {
        todo!()
    }
}
