//! What can go wrong with a repository, told for the operator and for the scheduler.

use std::path::PathBuf;

use xenvault_block::ByteRange;
use xenvault_store_format::{ChunkId, FormatError, PointId, RecoveryKeyError};

use crate::backend::BucketFault;

/// Whether trying again can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Retry {
    /// Not before somebody has done something.
    Never,
    /// The same call may succeed later.
    Later,
}

/// Why the repository could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is nothing that looks like a repository.
    #[error("{path} is no Xenvault repository: it has no file \"config\"; check the path, or make a repository there with init-repository", path = path.display())]
    NotARepository {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// There is something already.
    #[error("{path} can not become a repository: the folder is not empty", path = path.display())]
    NotEmpty {
        /// Where the repository should have been made.
        path: PathBuf,
    },
    /// The folder is part of another repository.
    #[error("{path} can not become a repository: it lies within the repository at {repository}", path = path.display(), repository = repository.display())]
    Within {
        /// Where the repository should have been made.
        path: PathBuf,
        /// The repository that is there.
        repository: PathBuf,
    },
    /// The service does not do what every repository needs.
    #[error("{place} can not hold a repository: {what}", place = place.display())]
    Unfit {
        /// Where it was tried.
        place: PathBuf,
        /// What it does not do.
        what: &'static str,
    },
    /// The key slots are intact, and none opens.
    #[error("the passphrase does not open this repository")]
    WrongPassphrase,
    /// The text of a recovery key is mistyped; the source names the group.
    #[error("this is not the recovery key as it was printed")]
    RecoveryKey {
        /// What is wrong with the text.
        source: RecoveryKeyError,
    },
    /// Some key slots can not be read, and none of the others opens.
    #[error(
        "no key slot opens: if the passphrase or recovery key is right, it is that of a slot that is damaged ({slots})"
    )]
    NoSlotOpens {
        /// Names of the damaged slots.
        slots: String,
        /// What is wrong with the last of them.
        source: Box<StoreError>,
    },
    /// There is no key slot of this name.
    #[error("there is no key slot {name} in this repository")]
    UnknownKeySlot {
        /// What was asked for.
        name: String,
    },
    /// The key slot that opened the repository is not removed.
    #[error(
        "key slot {name} is the one that the repository was opened with: open it with another passphrase or recovery key, so that one is known to be left that opens"
    )]
    KeySlotInUse {
        /// The slot.
        name: String,
    },
    /// The store keeps a key slot until its lock ends.
    #[error(
        "key slot {name} is locked in the store, and goes on opening the repository until the lock ends: remove it then with `key remove`"
    )]
    KeySlotLocked {
        /// The slot.
        name: String,
        /// What the store said.
        source: std::io::Error,
    },
    /// The key that the repository was opened with does not allow it.
    #[error("this key only writes, and can not {action}: open the repository with a key that gives everything")]
    WriteOnly {
        /// What was tried.
        action: &'static str,
    },
    /// Written by a later release.
    #[error("{object} has format version {found}, this release reads up to version {supported}: use a newer release")]
    NewerFormat {
        /// Name of the object.
        object: String,
        /// Version that it has.
        found: u16,
        /// Newest version that this release reads.
        supported: u16,
    },
    /// An object's bytes are not what was written.
    #[error("the repository's object {object} is damaged")]
    Damaged {
        /// Name of the object.
        object: String,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A chunk that a point needs is in no pack.
    #[error("chunk {id} is in no readable pack of the repository")]
    ChunkMissing {
        /// The chunk.
        id: ChunkId,
    },
    /// A part of a disk can not be read; the cause is in the source.
    #[error("{range} of the disk can not be read from the repository")]
    DiskRange {
        /// The bytes of the disk that are hurt.
        range: ByteRange,
        /// Why.
        source: Box<StoreError>,
    },
    /// The medium is full. What was published before is intact.
    #[error(
        "the repository's file system is full: free space there, then run the job again; what is published is intact"
    )]
    Full {
        /// What was being written.
        object: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The medium failed.
    #[error("can not {action} {object} in the repository")]
    Backend {
        /// What was tried.
        action: &'static str,
        /// Name of the object.
        object: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is no such point.
    #[error("there is no restore point {id} in this repository")]
    UnknownPoint {
        /// What was asked for.
        id: PointId,
    },
    /// A listing did not hold what is there, so nothing is concluded from it.
    #[error("the listing of {folder} is not complete: {object} is missing in it, and exists; nothing was removed")]
    IncompleteListing {
        /// What was listed.
        folder: String,
        /// One object that was missing.
        object: String,
    },
    /// A point that was complete is gone, and nobody has forgotten it.
    #[error(
        "restore point {object} is gone, and nobody has forgotten it: find out why before anything is removed (a sweep that accepts the loss goes on without it)"
    )]
    PointGone {
        /// Name of its object.
        object: String,
    },
    /// A sweep would remove more points at once than is usual.
    #[error("{going} of {total} restore points would go at once: confirm that this is meant")]
    TooManyPoints {
        /// Points that would go.
        going: usize,
        /// Points that there are.
        total: usize,
    },
    /// Somebody else has begun a sweep at the same time.
    #[error("another process has begun sweep {number} at the same time; nothing was done")]
    SweepTaken {
        /// Its number.
        number: u64,
    },
    /// While a run wrote, a sweep removed what the run relied on.
    #[error(
        "sweep {sweep} has removed what this run relied on, so its restore point is withdrawn: run the job again, and keep the sweep's grace period longer than the longest backup"
    )]
    Overtaken {
        /// The sweep.
        sweep: u64,
        /// What is missing.
        source: Box<StoreError>,
    },
    /// A sweep has taken the point up already.
    #[error("restore point {id} can not be taken back any more: a sweep is removing it")]
    TooLate {
        /// The point.
        id: PointId,
    },
    /// The store does not keep what the repository is to promise.
    #[error("the store does not keep the promise of immutability, so it is not given")]
    LockNotKept {
        /// What was seen.
        source: std::io::Error,
    },
    /// The caller broke a rule of the call.
    #[error("{what}")]
    Misuse {
        /// Which rule, with numbers.
        what: String,
    },
    /// This writer failed before; the first failure was reported then.
    #[error("the repository writer has failed before: {reason}")]
    WriterFailed {
        /// Text of the first failure.
        reason: String,
    },
}

impl StoreError {
    /// What the medium said about an object.
    pub(crate) fn io(action: &'static str, object: &str, source: std::io::Error) -> Self {
        use std::io::ErrorKind;
        let object = object.to_owned();
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::Full { object, source },
            // What should be there, or be longer, was lost; what can not be reached was not.
            ErrorKind::NotFound | ErrorKind::UnexpectedEof | ErrorKind::InvalidData if action == "read" => {
                Self::Damaged { object, source: Box::new(source) }
            }
            _ => Self::Backend { action, object, source },
        }
    }

    /// What the format said about an object.
    pub(crate) fn format(object: &str, error: FormatError) -> Self {
        let object = object.to_owned();
        match error {
            FormatError::NewerVersion { found, supported, .. } => Self::NewerFormat { object, found, supported },
            FormatError::WriteOnly => Self::WriteOnly { action: "read what disks hold" },
            error => Self::Damaged { object, source: Box::new(error) },
        }
    }

    /// Whether an object that should be read is not there (any more).
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Self::Damaged { source, .. } => {
                let error = source.downcast_ref::<std::io::Error>();
                error.is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
            }
            _ => false,
        }
    }

    /// Whether it says that bytes are gone or wrong for good, and not that they are out of reach.
    pub(crate) fn is_loss(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::ChunkMissing { .. } | Self::NewerFormat { .. } => true,
            Self::DiskRange { source, .. } => source.is_loss(),
            _ => false,
        }
    }

    /// Whether it is only that the key does not read content.
    pub(crate) fn is_write_only(&self) -> bool {
        match self {
            Self::WriteOnly { .. } => true,
            Self::DiskRange { source, .. } => source.is_write_only(),
            _ => false,
        }
    }

    /// What the service of objects has answered, if it is that which failed.
    pub fn bucket_fault(&self) -> Option<&BucketFault> {
        match self {
            Self::Backend { source, .. } | Self::Full { source, .. } => source.get_ref()?.downcast_ref(),
            Self::DiskRange { source, .. } | Self::Overtaken { source, .. } => source.bucket_fault(),
            _ => None,
        }
    }

    /// Whether trying again can help.
    pub fn retry(&self) -> Retry {
        if self.bucket_fault().is_some_and(BucketFault::is_lasting) {
            return Retry::Never;
        }
        match self {
            Self::Full { .. }
            | Self::Backend { .. }
            | Self::WriterFailed { .. }
            | Self::IncompleteListing { .. }
            | Self::KeySlotLocked { .. }
            | Self::SweepTaken { .. }
            | Self::Overtaken { .. } => Retry::Later,
            Self::DiskRange { source, .. } => source.retry(),
            _ => Retry::Never,
        }
    }
}
