//! The stream that `/export_raw_vdi?format=vhd` sends: a dynamic VHD from front to back, as vhd-tool makes it.
//!
//! Knows nothing of HTTP. A disk of any size costs its blocks: the front is footer copy, header, BAT.

use std::io;

use bytes::Bytes;
use futures::Stream;
use uuid::Uuid;

use crate::storage::Disk;

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhdExportError {
    /// A VHD ends at 2040 GiB: XenAPI's `VDI_TOO_LARGE`, after the 200.
    #[error("a VHD of {virtual_size} bytes is not possible: {maximum} bytes is the most")]
    TooLarge {
        /// Size of the disk in bytes.
        virtual_size: u64,
        /// Largest size in bytes.
        maximum: u64,
    },
    /// The disk, or the base, is not a VHD or not there any more.
    #[error("the allocated blocks of the disk are not known")]
    Blocks {
        /// The reason.
        source: io::Error,
    },
}

/// A VHD in pieces, in order. A piece is at most one block (2 MiB and its bitmap).
#[derive(Debug)]
pub struct VhdExport {}

/// The base of a difference.
#[derive(Clone, Debug)]
pub struct VhdBase {
    /// The base's content.
    pub disk: Disk,
    /// Path of the base's file as it stands in the header, such as `/var/run/sr-mount/<sr>/<vdi>.vhd`.
    pub path: String,
    /// Identity of the base's VHD, which the header names as the parent.
    pub footer_uuid: Uuid,
}

#[allow(clippy::todo, unused_variables, reason = "skeleton")]
impl VhdExport {
    /// The stream of a whole disk, or of its difference to `base`.
    ///
    /// # Errors
    /// See [`VhdExportError`].
    pub fn new(disk: Disk, base: Option<&VhdBase>) -> Result<Self, VhdExportError> {
        todo!()
    }

    /// Length of the whole stream in bytes.
    pub fn length(&self) -> u64 {
        todo!()
    }

    /// The next piece, `None` at the end. Blocks on file I/O.
    ///
    /// # Errors
    /// The disk's reading error; the stream is over then.
    pub fn next_piece(&mut self) -> io::Result<Option<Bytes>> {
        todo!()
    }

    /// The pieces as a stream that reads on a thread for blocking work, one piece for each poll: back-pressure by
    /// not asking.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
        futures::stream::empty()
    }
}
