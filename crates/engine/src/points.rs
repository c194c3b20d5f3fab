//! Reading points without a pool: list, show, and one disk into a local file.

use std::collections::BTreeMap;
use std::path::Path;

use xenvault_store::{Point, PointFilter, PointId, PointListing, Repository};

use crate::EngineError;
use crate::monitor::JobMonitor;

/// A point as people want to see it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PointDetails {
    /// The whole manifest.
    pub point: Point,
    /// Disks, by position.
    pub disks: Vec<PointDiskDetails>,
    /// Devices that were left out: position to reason.
    pub skipped: BTreeMap<String, String>,
    /// Names of the networks of the VM.
    pub networks: Vec<String>,
    /// Virtual processors at start, and memory in bytes.
    pub vcpus: i64,
    /// Largest memory in bytes.
    pub memory_bytes: u64,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PointDiskDetails {
    /// Position (`userdevice`).
    pub device: String,
    /// Name of the disk.
    pub name: String,
    /// UUID of the disk that was backed up.
    pub vdi_uuid: String,
    /// Size in bytes.
    pub virtual_size: u64,
    /// `FULL` or `INC`.
    pub level: String,
    /// Why it was read the way it was.
    pub reason: String,
    /// Bytes that had changed.
    pub changed_bytes: u64,
}

/// What [`restore_disk`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskFileReport {
    /// Size of the file in bytes.
    pub virtual_size: u64,
    /// Bytes written; the rest are holes that read as zeros.
    pub written_bytes: u64,
}

/// Points of a repository, newest last, and those that can not be read.
///
/// # Errors
/// [`EngineError::Repository`].
pub async fn list(repository: &Repository, filter: &PointFilter) -> Result<PointListing, EngineError> {
    let _ = (repository, filter);
    todo!()
}

/// One point in detail.
///
/// # Errors
/// [`EngineError::Repository`], [`EngineError::Configuration`].
pub async fn show(repository: &Repository, point: &PointId) -> Result<PointDetails, EngineError> {
    let _ = (repository, point);
    todo!()
}

/// Writes the disk at position `device` of a point as a raw, sparse file.
///
/// Every chunk is authenticated while it is read, and the file is synced before this returns. An existing file is never
/// overwritten; on failure the new file is removed. `device` is the position (`userdevice`) or the UUID of the disk.
///
/// # Errors
/// [`EngineError::UnknownDisk`], [`EngineError::LocalFile`], [`EngineError::Repository`].
pub async fn restore_disk(
    repository: &Repository,
    point: &PointId,
    device: &str,
    target: &Path,
    monitor: &dyn JobMonitor,
) -> Result<DiskFileReport, EngineError> {
    let _ = (repository, point, device, target, monitor);
    todo!()
}
