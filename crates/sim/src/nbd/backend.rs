//! What the NBD server asks of the pool.

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use uuid::Uuid;

use crate::storage::Disk;

/// The purposes of all networks of the pool together, as far as NBD goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purposes {
    /// Some network has the purpose `nbd`.
    pub nbd: bool,
    /// Some network has the purpose `insecure_nbd`.
    pub insecure_nbd: bool,
}

/// What a client named in `EXPORT_NAME`. Without a `session_id` the server hangs up by itself.
#[derive(Clone, PartialEq, Eq)]
pub struct ExportRequest {
    /// The path without its first character, percent-decoded: to be looked up as the uuid of a disk, letter by letter.
    pub vdi_uuid: String,
    /// The session that the client claims. A secret.
    pub session: String,
}

impl fmt::Debug for ExportRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExportRequest").field("vdi_uuid", &self.vdi_uuid).finish_non_exhaustive()
    }
}

/// The block device behind an export. Called on threads for blocking work.
pub trait BlockDevice: Send + Sync + fmt::Debug {
    /// Reads `length` bytes at `offset`; the range lies within the size.
    ///
    /// # Errors
    /// Ends the connection, as a medium's error does.
    fn read(&self, offset: u64, length: usize) -> io::Result<Bytes>;
}

impl BlockDevice for Disk {
    fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let range = xenvault_block::ByteRange::with_length(offset, length as u64).map_err(io::Error::other)?;
        Self::read(self, range)
    }
}

/// An export that is open: a VBD of the disk is plugged into the host's control domain.
#[derive(Debug)]
pub struct OpenDisk {
    /// The disk, for counting and for faults.
    pub vdi: Uuid,
    /// Its size in bytes, fixed for the time it is open.
    pub size: u64,
    /// Where its content comes from.
    pub device: Arc<dyn BlockDevice>,
    /// The backend's own (the VBD's reference, for example), untouched by the server.
    pub ticket: Box<dyn Any + Send>,
}

/// Why an export was not opened. The client never hears it; a real host writes it to its log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// The pool as the NBD servers see it.
pub trait NbdBackend: Send + Sync + 'static {
    /// The purposes of the networks, asked for each connection.
    fn purposes(&self) -> BoxFuture<'_, Purposes>;

    /// Checks the session, makes and plugs a VBD in the control domain of `host`, and opens the device. Takes as long
    /// as that takes; what was made is taken back before a refusal is returned. Is always run to its end.
    fn open(&self, host: Uuid, request: ExportRequest) -> BoxFuture<'_, Result<OpenDisk, Refusal>>;

    /// Unplugs and destroys the VBD; the server closes the connection only after that. Runs under the server's own
    /// session: the client's may be gone. Is always run to its end, once for each open disk, except on a kill.
    fn close(&self, host: Uuid, disk: OpenDisk) -> BoxFuture<'_, ()>;
}
