//! Reading points without a pool: list, show, and one disk into a local file.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt as _;
use xenvault_block::ByteRange;
use xenvault_store::{Point, PointFilter, PointId, PointListing, ReadOptions, Repository};

use crate::EngineError;
use crate::config::VmConfig;
use crate::meter::{Direction, Meter};
use crate::monitor::{JobMonitor, Stage};
use crate::pool::DoingInRepository as _;
use crate::restore::data_bytes;

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
    repository.points(filter).await.doing("list the points")
}

/// One point in detail.
///
/// # Errors
/// [`EngineError::Repository`], [`EngineError::Configuration`].
pub async fn show(repository: &Repository, point: &PointId) -> Result<PointDetails, EngineError> {
    let point = repository.point(point).await.doing("read the point")?;
    let bytes = repository.blob(&point.vm_config).await.doing("read the VM's configuration")?;
    let id = point.id.to_string();
    let config = VmConfig::from_bytes(&id, &bytes)?;
    let vm = config.vm(&id)?;
    let disks = point
        .disks
        .iter()
        .map(|disk| PointDiskDetails {
            device: disk.device.clone(),
            name: disk.name.clone(),
            vdi_uuid: disk.vdi_uuid.clone(),
            virtual_size: disk.virtual_size,
            level: disk.level.to_string(),
            reason: disk.reason.clone(),
            changed_bytes: disk.changed_bytes,
        })
        .collect();
    Ok(PointDetails {
        disks,
        skipped: config.skipped().map(|(device, reason)| (device.to_owned(), reason.to_owned())).collect(),
        networks: config.interfaces(&id)?.into_iter().map(|interface| interface.network_name).collect(),
        vcpus: vm.vcpus_at_startup,
        memory_bytes: u64::try_from(vm.memory_static_max).unwrap_or(0),
        point,
    })
}

/// Writes the disk at position `device` of a point as a raw, sparse file.
///
/// Every chunk is authenticated while it is read, and the file is synced before this returns. An existing file is never
/// overwritten; on failure, or if the future is dropped, the new file is removed. `device` is the position
/// (`userdevice`) or the UUID of the disk.
///
/// # Errors
/// [`EngineError::UnknownDisk`], [`EngineError::LocalFile`], [`EngineError::Repository`].
pub async fn restore_disk(
    repository: &Repository,
    point: &PointId,
    device: &str,
    target: &Path,
    monitor: Arc<dyn JobMonitor>,
) -> Result<DiskFileReport, EngineError> {
    let point = repository.point(point).await.doing("read the point")?;
    let disk = point.disks.iter().find(|disk| disk.device == device || disk.vdi_uuid == device);
    let disk = disk.ok_or_else(|| EngineError::UnknownDisk {
        wanted: device.to_owned(),
        available: point.disks.iter().map(|disk| disk.device.clone()).collect(),
    })?;
    let meter = Meter::new(monitor, Direction::Restore);
    let reader = repository.disk(&disk.map);
    let planned_bytes = data_bytes(&reader).await?;
    meter.plan(planned_bytes);
    meter.stage(&Stage::WriteDisk { device: disk.device.clone(), planned_bytes });
    let mut file = NewFile::create(target, disk.virtual_size)?;
    let mut pieces = reader.stream(ByteRange::up_to(disk.virtual_size), ReadOptions::default());
    let mut written_bytes = 0_u64;
    loop {
        let asked = Instant::now();
        let Some(piece) = pieces.next().await else { break };
        let (offset, bytes) = piece.doing("read a disk")?;
        let came = Instant::now();
        let length = bytes.len() as u64;
        file.write(offset, bytes).await?;
        written_bytes += length;
        meter.moved(length, came.duration_since(asked), came.elapsed());
    }
    file.keep().await?;
    meter.report();
    Ok(DiskFileReport { virtual_size: disk.virtual_size, written_bytes })
}

/// A file that is removed again unless it is kept.
struct NewFile {
    path: PathBuf,
    file: Arc<File>,
    kept: bool,
}

impl NewFile {
    fn create(path: &Path, size: u64) -> Result<Self, EngineError> {
        let failed = |source| EngineError::LocalFile { path: path.to_owned(), source };
        // The content of a guest's disk is nobody's but the owner's.
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(path).map_err(failed)?;
        let new = Self { path: path.to_owned(), file: Arc::new(file), kept: false };
        new.file.set_len(size).map_err(failed)?;
        Ok(new)
    }

    async fn write(&mut self, offset: u64, bytes: Bytes) -> Result<(), EngineError> {
        let file = Arc::clone(&self.file);
        self.blocking(move || file.write_all_at(&bytes, offset)).await
    }

    async fn keep(mut self) -> Result<(), EngineError> {
        let file = Arc::clone(&self.file);
        self.blocking(move || file.sync_all()).await?;
        self.kept = true;
        Ok(())
    }

    async fn blocking(&self, act: impl FnOnce() -> std::io::Result<()> + Send + 'static) -> Result<(), EngineError> {
        let done = tokio::task::spawn_blocking(act).await;
        let done = done.map_err(|_| EngineError::Internal { what: "writing a local file".to_owned() })?;
        done.map_err(|source| EngineError::LocalFile { path: self.path.clone(), source })
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished file could not be removed");
        }
    }
}
