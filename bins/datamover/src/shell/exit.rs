//! Exit codes: what a script needs to know about the end of a program. The table in `--help` is made here.

use super::pool::PoolFailure;
use super::repository::OpenError;
use super::secrets::SecretError;
use std::error::Error;
use std::process::ExitCode;
use xenvault_engine::{EngineError, ErrorKind};
use xenvault_store::StoreError;
use xenvault_store::backend::BucketFault;
use xenvault_xenapi::{Retry, XenApiError};

/// How a program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It did what was asked; warnings may have been printed.
    Success,
    /// None of the others.
    Failed,
    /// Bad arguments, or a secret that can not be read.
    Usage,
    /// The pool refused user or password.
    Credentials,
    /// The certificate is not the one that is trusted.
    Trust,
    /// What was named does not exist, or several things have that name.
    NotFound,
    /// Something must be set up or freed first.
    Prerequisite,
    /// The passphrase does not open the repository.
    Passphrase,
    /// The folder is no usable repository.
    Repository,
    /// The repository is damaged, or data did not pass a check.
    Damaged,
    /// Out of reach or busy.
    Later,
    /// Ctrl-C; cleaned up.
    Interrupted,
    /// SIGTERM or SIGHUP; cleaned up.
    Terminated,
}

/// Every code once, in order, with the text for `--help`.
const TABLE: [(Exit, &str); 13] = [
    (Exit::Success, "done (warnings, if any, were printed)"),
    (Exit::Failed, "failed for another reason than those below"),
    (Exit::Usage, "bad arguments, or a password or passphrase that can not be read"),
    (Exit::Credentials, "the pool refused user or password, or the object store the keys"),
    (Exit::Trust, "a certificate (of the pool or the object store) is not the trusted one, or TLS failed"),
    (Exit::NotFound, "VM, point, disk, SR or network not found, or the name is not unique"),
    (Exit::Prerequisite, "something must be set up first: NBD, space on an SR, the clock, ..."),
    (Exit::Passphrase, "the passphrase does not open the repository"),
    (Exit::Repository, "no repository or bucket, one of a newer format, or not writable (full, no permission)"),
    (Exit::Damaged, "the repository is damaged, or data did not pass a check"),
    (Exit::Later, "the pool or the object store is out of reach or busy: the same command can succeed later"),
    (Exit::Interrupted, "stopped by Ctrl-C, and cleaned up"),
    (Exit::Terminated, "stopped by SIGTERM or SIGHUP, and cleaned up"),
];

impl Exit {
    /// The number that the process ends with.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Credentials => 3,
            Self::Trust => 4,
            Self::NotFound => 5,
            Self::Prerequisite => 6,
            Self::Passphrase => 7,
            Self::Repository => 8,
            Self::Damaged => 9,
            Self::Later => 10,
            Self::Interrupted => 130,
            Self::Terminated => 143,
        }
    }

    /// A fixed word for machines.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::Credentials => "credentials",
            Self::Trust => "trust",
            Self::NotFound => "not-found",
            Self::Prerequisite => "prerequisite",
            Self::Passphrase => "passphrase",
            Self::Repository => "repository",
            Self::Damaged => "damaged",
            Self::Later => "later",
            Self::Interrupted => "interrupted",
            Self::Terminated => "terminated",
        }
    }

    /// The code that an error stands for: the first one of its chain that is one of ours decides.
    pub fn of(error: &(dyn Error + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(exit) = Self::of_one(error) {
                return exit;
            }
            next = error.source();
        }
        Self::Failed
    }

    fn of_one(error: &(dyn Error + 'static)) -> Option<Self> {
        if is::<SecretError>(error).is_some() {
            return Some(Self::Usage);
        }
        if let Some(OpenError::Bucket(_) | OpenError::Secret(_)) = is::<OpenError>(error) {
            return Some(Self::Usage);
        }
        if let Some(refusal) = is::<Refusal>(error) {
            return Some(refusal.exit);
        }
        if let Some(failure) = is::<PoolFailure>(error) {
            return failure.exit();
        }
        if let Some(error) = is::<EngineError>(error) {
            return Self::of_engine(error);
        }
        if let Some(error) = is::<StoreError>(error) {
            return Some(Self::of_store(error));
        }
        is::<XenApiError>(error).map(Self::of_xenapi)
    }

    /// `None` where the cause tells more.
    fn of_engine(error: &EngineError) -> Option<Self> {
        match error {
            EngineError::SrFull { .. } | EngineError::NoDisks { .. } => Some(Self::Prerequisite),
            EngineError::NoNbdAddress { .. } => Some(Self::Prerequisite),
            EngineError::DiskCount { .. } | EngineError::NoHost { .. } => Some(Self::Later),
            EngineError::SnapshotUnderWay { .. } | EngineError::HostDown { .. } => Some(Self::Later),
            EngineError::Read { .. } if error.retry() == Retry::Later => Some(Self::Later),
            EngineError::Configuration { .. } => Some(Self::Damaged),
            EngineError::Pool { .. } | EngineError::Repository { .. } => None,
            _ => match error.kind() {
                ErrorKind::Request => Some(Self::NotFound),
                ErrorKind::Prerequisite => Some(Self::Prerequisite),
                ErrorKind::Verification => Some(Self::Damaged),
                ErrorKind::Busy => Some(Self::Later),
                _ => None,
            },
        }
    }

    fn of_store(error: &StoreError) -> Self {
        if let Some(fault) = error.bucket_fault() {
            return Self::of_bucket(fault);
        }
        match error {
            StoreError::WrongPassphrase | StoreError::RecoveryKey { .. } | StoreError::NoSlotOpens { .. } => {
                Self::Passphrase
            }
            StoreError::KeySlotInUse { .. } | StoreError::WriteOnly { .. } => Self::Prerequisite,
            StoreError::UnknownPoint { .. } | StoreError::UnknownKeySlot { .. } => Self::NotFound,
            StoreError::Damaged { .. } | StoreError::ChunkMissing { .. } | StoreError::PointGone { .. } => {
                Self::Damaged
            }
            StoreError::TooManyPoints { .. } => Self::Prerequisite,
            StoreError::KeySlotLocked { .. } => Self::Later,
            StoreError::IncompleteListing { .. } | StoreError::SweepTaken { .. } | StoreError::Overtaken { .. } => {
                Self::Later
            }
            StoreError::DiskRange { source, .. } => Self::of_store(source),
            StoreError::NotARepository { .. }
            | StoreError::NotEmpty { .. }
            | StoreError::Within { .. }
            | StoreError::Unfit { .. }
            | StoreError::LockNotKept { .. }
            | StoreError::NewerFormat { .. }
            | StoreError::Full { .. }
            | StoreError::Backend { .. } => Self::Repository,
            _ => Self::Failed,
        }
    }

    fn of_bucket(fault: &BucketFault) -> Self {
        match fault {
            BucketFault::UnknownKey { .. } | BucketFault::WrongSecret { .. } | BucketFault::Denied { .. } => {
                Self::Credentials
            }
            BucketFault::Tls { .. } => Self::Trust,
            BucketFault::Clock { .. } => Self::Prerequisite,
            BucketFault::Unreachable { .. } | BucketFault::Broken { .. } | BucketFault::Busy { .. } => Self::Later,
            _ => Self::Repository,
        }
    }

    fn of_xenapi(error: &XenApiError) -> Self {
        match error {
            XenApiError::LoginRefused { .. } => Self::Credentials,
            XenApiError::Certificate { .. }
            | XenApiError::Tls { .. }
            | XenApiError::TlsTooOld { .. }
            | XenApiError::UnknownHost { .. }
            | XenApiError::HostIsSlave { .. }
            | XenApiError::WrongPool { .. } => Self::Trust,
            XenApiError::Url { .. } | XenApiError::Trust { .. } => Self::Usage,
            XenApiError::NotSupported(_) => Self::Prerequisite,
            _ if error.retry() != Retry::Never => Self::Later,
            _ => Self::Failed,
        }
    }
}

/// The error as a `T`, also where it is boxed inside its outer error.
fn is<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    error.downcast_ref::<T>().or_else(|| error.downcast_ref::<Box<T>>().map(AsRef::as_ref))
}

/// What a program itself refuses, with the code that it stands for.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// How the program ends.
    pub exit: Exit,
    /// What is wrong and what to do.
    pub text: String,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// The table of exit codes, for the end of `--help`.
pub fn help() -> String {
    let mut text = String::from("Exit codes:\n");
    for (exit, meaning) in TABLE {
        text.push_str(&format!("  {:>3}  {meaning}\n", exit.code()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_in_the_table_once() {
        let mut codes: Vec<u8> = TABLE.iter().map(|(exit, _)| exit.code()).collect();
        let listed = codes.len();
        codes.dedup();
        assert_eq!(codes.len(), listed);
        assert!(codes.is_sorted());
        assert!(help().contains("  130  stopped by Ctrl-C"));
    }

    #[test]
    fn the_cause_decides_where_the_outer_error_says_little() {
        let error =
            EngineError::Repository { action: "read".to_owned(), source: Box::new(StoreError::WrongPassphrase) };
        assert_eq!(Exit::of(&error), Exit::Passphrase);
        assert_eq!(
            Exit::of(&StoreError::NewerFormat { object: "config".to_owned(), found: 9, supported: 1 }),
            Exit::Repository
        );
        assert_eq!(Exit::of(&EngineError::UnknownVm { wanted: "web".to_owned() }), Exit::NotFound);
        assert_eq!(Exit::of(&EngineError::DiskCount { vm: 2, snapshot: 1 }), Exit::Later);
        assert_eq!(Exit::of(&EngineError::NoNbdAddress { device: "0".to_owned() }), Exit::Prerequisite);
        assert_eq!(Exit::of(&std::io::Error::other("anything")), Exit::Failed);
    }
}
