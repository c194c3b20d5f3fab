//! x
use crate::error::XenApiError;
use crate::session_handle::Session;
use crate::{host, vdi};
use bytes::Bytes;

/// The form that a disk is exported in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// Every byte; the length is the disk's.
    Raw {
        /// The disk's virtual size: the transfer must have exactly this length.
        virtual_size: u64,
    },
    /// A dynamic VHD stream; with a base, only what differs from it.
    Vhd {
        /// The older disk.
        base: Option<vdi::Ref>,
    },
}

/// A disk that is being exported.
///
/// Dropping it, or [`ExportBody::close`], ends the transfer early; its task then fails at the host, which is expected,
/// and is destroyed.
#[derive(Debug)]
pub struct ExportBody {
    session: Session,
}

impl ExportBody {
    /// The next bytes, or `None` at the end. The end of the bytes is no success: ask [`ExportBody::finish`].
    ///
    /// # Errors
    /// [`XenApiError::Connection`], [`XenApiError::Timeout`]. The real reason may be the task's: ask
    /// [`ExportBody::finish`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, XenApiError> {
        let _ = &self.session;
        todo!()
    }

    /// Bytes that [`ExportBody::next`] gave so far.
    pub fn received_bytes(&self) -> u64 {
        todo!()
    }

    /// Waits for the task and checks the length; only then the bytes are good.
    ///
    /// # Errors
    /// [`XenApiError::Api`] with the task's failure, [`XenApiError::Length`], [`XenApiError::TaskVanished`].
    pub async fn finish(self) -> Result<(), XenApiError> {
        todo!()
    }

    /// Ends the transfer early: closes the connection, waits until the task has ended and destroys it.
    ///
    /// # Errors
    /// Those of calls; the task's failure is expected and none.
    pub async fn close(self) -> Result<(), XenApiError> {
        todo!()
    }
}

/// Starts `/export_raw_vdi` at `host`, which must have the disk's SR attached.
///
/// # Errors
/// [`XenApiError::Api`] (unknown disk), [`XenApiError::UnknownHost`] (sent elsewhere), [`XenApiError::Status`], and
/// those of connections.
pub async fn export_raw_vdi(
    _session: &Session,
    _host: &host::Ref,
    _vdi: &vdi::Ref,
    _format: ExportFormat,
) -> Result<ExportBody, XenApiError> {
    todo!()
}

/// A disk that is being written with xapi's chunk protocol: places may be left out, and keep their content.
#[derive(Debug)]
pub struct ChunkedImport {
    session: Session,
}

impl ChunkedImport {
    /// Writes `data` at `offset` (bytes). Returns when the network has taken it.
    ///
    /// # Errors
    /// The task's failure where the host gave up, else [`XenApiError::Connection`] or [`XenApiError::Timeout`].
    pub async fn write(&mut self, _offset: u64, _data: Bytes) -> Result<(), XenApiError> {
        let _ = &self.session;
        todo!()
    }

    /// Ends the stream and waits for the task: only its success says that the data is on the disk.
    ///
    /// # Errors
    /// As [`ChunkedImport::write`], [`XenApiError::TaskVanished`].
    pub async fn finish(self) -> Result<(), XenApiError> {
        todo!()
    }
}

/// Starts writing to `vdi` over `host`, which must have the disk's SR attached.
///
/// # Errors
/// As [`export_raw_vdi`].
pub async fn import_raw_vdi_chunked(
    _session: &Session,
    _host: &host::Ref,
    _vdi: &vdi::Ref,
) -> Result<ChunkedImport, XenApiError> {
    todo!()
}

/// A disk that is being written from its start, without gaps.
#[derive(Debug)]
pub struct RawImport {
    session: Session,
}

impl RawImport {
    /// Writes the next bytes. Returns when the network has taken them.
    ///
    /// # Errors
    /// As [`ChunkedImport::write`]; [`XenApiError::Length`] for more than was announced.
    pub async fn write(&mut self, _data: Bytes) -> Result<(), XenApiError> {
        let _ = &self.session;
        todo!()
    }

    /// Waits for the task.
    ///
    /// # Errors
    /// As [`RawImport::write`]; [`XenApiError::Length`] for less than was announced.
    pub async fn finish(self) -> Result<(), XenApiError> {
        todo!()
    }
}

/// Starts writing exactly `length` bytes to `vdi`, which should be its size: the host does not compare them.
///
/// # Errors
/// As [`export_raw_vdi`].
pub async fn import_raw_vdi(
    _session: &Session,
    _host: &host::Ref,
    _vdi: &vdi::Ref,
    _length: u64,
) -> Result<RawImport, XenApiError> {
    todo!()
}
