//! Why a workflow ended without its result: for the operator (text with a remedy) and for the scheduler (retry class).

use std::path::PathBuf;

use xenvault_block::ByteRange;

/// Why a workflow failed. What was made in the pool for it has been removed, unless the text says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The folder with our identity, journal and leases is not usable.
    #[error("the state folder {path} can not be used: check that it exists and that this user may write to it", path = path.display())]
    State {
        /// File or folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The identity in the state folder is damaged.
    #[error("{path} does not hold the identity of an installation: restore the file, or remove it to begin as a new installation (what the old one left in the pool is then not ours any more)", path = path.display())]
    Identity {
        /// The file.
        path: PathBuf,
    },
    /// Another run of this installation works on the same VM.
    #[error("another run of this installation is working on VM {vm}: wait for its end")]
    Busy {
        /// UUID of the VM.
        vm: String,
    },
    /// No VM of that name or UUID.
    #[error("the pool has no VM with the name or UUID {wanted:?}: names are compared exactly, `xe vm-list` shows them")]
    UnknownVm {
        /// As given.
        wanted: String,
    },
    /// Several VMs of one name.
    #[error("{count} VMs have the name {name:?}: use one of the UUIDs {uuids}", count = uuids.len(), uuids = uuids.join(", "))]
    AmbiguousVm {
        /// The name.
        name: String,
        /// Their UUIDs.
        uuids: Vec<String>,
    },
    /// A snapshot, a template or a control domain.
    #[error("{name:?} ({uuid}) is {what}, which is not backed up: name a VM")]
    NotAVm {
        /// Its name.
        name: String,
        /// Its UUID.
        uuid: String,
        /// `a snapshot`, `a template`, `a control domain`.
        what: &'static str,
    },
    /// The VM has no disk that could be backed up.
    #[error("VM {name:?} ({uuid}) has no disk: there is nothing to back up ({skipped})")]
    NoDisks {
        /// Its name.
        name: String,
        /// Its UUID.
        uuid: String,
        /// What it has instead, such as `1 CD drive`.
        skipped: String,
    },
    /// A prerequisite is missing; nothing was touched.
    #[error("{finding}")]
    Prerequisite {
        /// The finding, with its remedy.
        finding: crate::backup::Finding,
    },
    /// The snapshot has another number of disks than the VM.
    #[error("the snapshot has {snapshot} disks and the VM {vm}: the VM was changed meanwhile, try again")]
    DiskCount {
        /// Disks of the VM.
        vm: usize,
        /// Disks of its snapshot.
        snapshot: usize,
    },
    /// The pool does not end a snapshot.
    #[error(
        "the pool has been at work on a snapshot of VM {vm:?} for {} s: `xe task-list` shows it; the next run or sweep removes what comes of it", .waited.as_secs()
    )]
    SnapshotUnderWay {
        /// The VM's name.
        vm: String,
        /// For how long it was watched.
        waited: std::time::Duration,
    },
    /// The host that the VM runs on by the pool's records is down, so nobody can take its snapshot.
    #[error(
        "host {host:?}, on which the VM runs by the pool's records, is down: bring it back, or, if it is down for sure, `xe vm-reset-powerstate --force` on the VM and start it elsewhere; then try again"
    )]
    HostDown {
        /// The host's name.
        host: String,
        /// What the pool said.
        source: Box<xenvault_xenapi::XenApiError>,
    },
    /// The server names a VM by something that is no UUID.
    #[error("the server names a VM by {uuid:?}, which is no UUID: this is not a pool that can be worked with")]
    NoUuid {
        /// As the server gave it.
        uuid: String,
    },
    /// A call to the pool failed.
    #[error("the pool failed to {action}")]
    Pool {
        /// What was asked of it: `take the snapshot`.
        action: String,
        /// What the pool says.
        source: Box<xenvault_xenapi::XenApiError>,
    },
    /// The SR is full.
    #[error(
        "SR {sr:?} has no space left to {action}: free space on it (a snapshot on a thick SR needs the full size of the disk), then try again"
    )]
    SrFull {
        /// Name of the SR.
        sr: String,
        /// What needs the space.
        action: String,
        /// What the pool says.
        source: Box<xenvault_xenapi::XenApiError>,
    },
    /// A disk could not be read over NBD.
    #[error("disk {device} ({vdi}) could not be read over NBD")]
    Read {
        /// Position.
        device: String,
        /// UUID.
        vdi: String,
        /// The cause.
        source: Box<xenvault_nbd::NbdError>,
    },
    /// The export has another size than the record of the disk.
    #[error("disk {device} ({vdi}) has {export} bytes over NBD and {record} bytes in the pool's database")]
    SizeDiffers {
        /// Position.
        device: String,
        /// UUID.
        vdi: String,
        /// Size of the export in bytes.
        export: u64,
        /// `virtual_size` in bytes.
        record: u64,
    },
    /// No address of the pool serves the disk.
    #[error(
        "no host of the pool offers disk {device} over NBD, although a network has the purpose: check that a host with a plugged PBD of the SR has an IP address on that network"
    )]
    NoNbdAddress {
        /// Position.
        device: String,
    },
    /// No host has the disk's SR any more.
    #[error(
        "no host of the pool has the SR of disk {device} plugged any more: `xe pbd-list` shows why, `xe pbd-plug` repairs it"
    )]
    NoHost {
        /// Position.
        device: String,
    },
    /// The re-read sample is not what the repository returns.
    #[error(
        "check sample of disk {device}: {range} read again differ from what was stored, the point was not written; run a full backup and look at the storage of the host"
    )]
    SampleDiffers {
        /// Position.
        device: String,
        /// Where.
        range: ByteRange,
    },
    /// The re-read sample of a restored disk is not what was sent.
    #[error(
        "check sample of restored disk {device}: {range} read from the pool differ from the repository, so the new VM was removed; look at the storage of the host, and restore to another SR"
    )]
    RestoreDiffers {
        /// Position.
        device: String,
        /// Where.
        range: ByteRange,
    },
    /// The repository failed.
    #[error("the repository failed to {action}")]
    Repository {
        /// What was asked of it.
        action: String,
        /// The cause.
        source: Box<xenvault_store::StoreError>,
    },
    /// A workflow needs a repository and the engine has none.
    #[error("this needs a repository, and none was opened")]
    NoRepository,
    /// The point's VM configuration is not readable.
    #[error("the VM configuration of point {point} is not readable")]
    Configuration {
        /// The point.
        point: String,
        /// The cause.
        source: serde_json::Error,
    },
    /// No SR of that name or UUID.
    #[error("the pool has no SR with the name or UUID {wanted:?} that can hold disks: `xe sr-list` shows them")]
    UnknownSr {
        /// As given.
        wanted: String,
    },
    /// Several SRs of one name.
    #[error("{count} SRs have the name {name:?}: use one of the UUIDs {uuids}", count = uuids.len(), uuids = uuids.join(", "))]
    AmbiguousSr {
        /// The name.
        name: String,
        /// Their UUIDs.
        uuids: Vec<String>,
    },
    /// No network of that name or UUID.
    #[error(
        "the pool has no network with the name or UUID {wanted:?}, which the network map names: `xe network-list` shows them"
    )]
    UnknownNetwork {
        /// As given.
        wanted: String,
    },
    /// The target SR has too little space.
    #[error("SR {sr:?} has {free} bytes free and the disks need {needed}: choose another SR or free space")]
    TargetSpace {
        /// Name of the SR.
        sr: String,
        /// Free bytes.
        free: u64,
        /// Needed bytes.
        needed: u64,
    },
    /// The point has no such disk.
    #[error("the point has no disk {wanted:?}: it has {available}", available = available.join(", "))]
    UnknownDisk {
        /// As given.
        wanted: String,
        /// Positions of the disks that there are.
        available: Vec<String>,
    },
    /// A local file could not be written or read.
    #[error("{path} can not be written", path = path.display())]
    LocalFile {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A part of the engine ended without a result.
    #[error("an internal task ended early: {what}")]
    Internal {
        /// Which one.
        what: String,
    },
}

/// When the same call can succeed.
pub use xenvault_xenapi::Retry;

/// Rough kind of an error, for exit codes and reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was asked for does not exist or is ambiguous: the caller has to change the request.
    Request,
    /// A prerequisite is missing: somebody has to change the pool or the machine. Nothing was touched.
    Prerequisite,
    /// The pool failed.
    Pool,
    /// The repository failed.
    Repository,
    /// Data did not pass a check.
    Verification,
    /// Somebody else works on it.
    Busy,
    /// The local machine (state folder, local file) or the engine itself.
    Local,
}

impl EngineError {
    /// When the same call can succeed.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Pool { source, .. } => source.retry(),
            // A place on the medium that can not be read stays so; whatever hindered the connection may pass.
            Self::Read { source, .. } => match source.retry() {
                xenvault_nbd::Retry::Never => Retry::Never,
                _ => Retry::Later,
            },
            Self::Busy { .. } | Self::DiskCount { .. } | Self::SnapshotUnderWay { .. } => Retry::Later,
            Self::HostDown { .. } | Self::Internal { .. } => Retry::Later,
            Self::Repository { .. } | Self::SrFull { .. } | Self::NoHost { .. } => Retry::Later,
            _ => Retry::Never,
        }
    }

    /// Whether nobody knows what the pool made of the last call: it may still come.
    pub(crate) fn is_lost_answer(&self) -> bool {
        matches!(self, Self::Pool { source, .. } if source.is_lost_answer())
    }

    /// Rough kind, for exit codes and reports.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownVm { .. }
            | Self::AmbiguousVm { .. }
            | Self::NotAVm { .. }
            | Self::NoDisks { .. }
            | Self::UnknownSr { .. }
            | Self::AmbiguousSr { .. }
            | Self::UnknownNetwork { .. }
            | Self::UnknownDisk { .. }
            | Self::NoRepository => ErrorKind::Request,
            Self::Prerequisite { .. } | Self::TargetSpace { .. } => ErrorKind::Prerequisite,
            Self::Pool { .. }
            | Self::SrFull { .. }
            | Self::DiskCount { .. }
            | Self::SnapshotUnderWay { .. }
            | Self::HostDown { .. }
            | Self::NoUuid { .. }
            | Self::Read { .. }
            | Self::SizeDiffers { .. }
            | Self::NoHost { .. }
            | Self::NoNbdAddress { .. } => ErrorKind::Pool,
            Self::Repository { .. } | Self::Configuration { .. } => ErrorKind::Repository,
            Self::SampleDiffers { .. } | Self::RestoreDiffers { .. } => ErrorKind::Verification,
            Self::Busy { .. } => ErrorKind::Busy,
            Self::State { .. } | Self::Identity { .. } | Self::LocalFile { .. } | Self::Internal { .. } => {
                ErrorKind::Local
            }
        }
    }
}
