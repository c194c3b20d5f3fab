//! Why a disk is read as a whole. The texts are stable: points, reports and metrics carry them.

use std::fmt;

/// Why the whole disk is read although less might have changed.
///
/// `Display` gives the stable name that a point records (`first-backup`, `cbt-disabled`, `suspect:host-rebooted`, ...).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FullReason {
    /// No point of this disk exists yet.
    FirstBackup,
    /// The caller asked for a full read.
    Requested,
    /// What the pool lists as changed is checked this time against the whole disk.
    Verification,
    /// Changed block tracking is off on the live disk or was off when its snapshot was taken.
    CbtDisabled,
    /// The pool's licence, the SR's type or the disk's kind has no changed block tracking.
    CbtUnsupported,
    /// The base snapshot, or its tracking data, is no more.
    BaseGone,
    /// The bitmap can not be trusted.
    Suspect(SuspectCause),
    /// Another VDI is at this place of the VM now.
    DiskReplaced,
    /// The disk is smaller than it was.
    Shrunk,
    /// The disk is on another SR than it was.
    Migrated,
    /// Tracking was switched off and on again since the base (the chain nonces differ).
    ChainBroken,
    /// The pool says that the two snapshots have no common history.
    Unrelated,
    /// The pool's bitmap has the wrong length, is no base64, or the pool calls it inconsistent.
    BitmapInvalid,
    /// The pool refused or failed to list the changes for another reason.
    ListingFailed,
}

/// What makes a base suspect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SuspectCause {
    /// A piece of the evidence is missing, then or now.
    Unknown,
    /// The run of the VM ended without a clean shutdown.
    UncleanShutdown,
    /// The host on which the VM ran was booted since.
    HostRebooted,
    /// The pool reported trouble with the tracking data of this disk.
    CbtMessage,
    /// The pool reported that high availability acted on the VM or its host.
    HaMessage,
}

impl FullReason {
    /// The reason for a failure of `list_changed_blocks` (or of another use of the base), from XenAPI's error code.
    ///
    /// Every failure means reading the whole disk; none fails the backup (X09, X12, X18, X19).
    pub fn from_failure(code: &str) -> Self {
        match code {
            "SR_BACKEND_FAILURE_460" => Self::Unrelated,
            "SR_BACKEND_FAILURE_459" => Self::BitmapInvalid,
            "VDI_NO_CBT_METADATA" | "HANDLE_INVALID" | "UUID_INVALID" => Self::BaseGone,
            "SR_OPERATION_NOT_SUPPORTED"
            | "LICENSE_RESTRICTION"
            | "FEATURE_RESTRICTED"
            | "MESSAGE_METHOD_UNKNOWN"
            | "MESSAGE_REMOVED" => Self::CbtUnsupported,
            _ => Self::ListingFailed,
        }
    }
}

impl fmt::Display for FullReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::FirstBackup => "first-backup",
            Self::Requested => "requested",
            Self::Verification => "verification",
            Self::CbtDisabled => "cbt-disabled",
            Self::CbtUnsupported => "cbt-unsupported",
            Self::BaseGone => "base-gone",
            Self::Suspect(SuspectCause::Unknown) => "suspect:unknown",
            Self::Suspect(SuspectCause::UncleanShutdown) => "suspect:unclean-shutdown",
            Self::Suspect(SuspectCause::HostRebooted) => "suspect:host-rebooted",
            Self::Suspect(SuspectCause::CbtMessage) => "suspect:cbt-message",
            Self::Suspect(SuspectCause::HaMessage) => "suspect:ha-message",
            Self::DiskReplaced => "disk-replaced",
            Self::Shrunk => "shrunk",
            Self::Migrated => "migrated",
            Self::ChainBroken => "chain-broken",
            Self::Unrelated => "unrelated",
            Self::BitmapInvalid => "bitmap-invalid",
            Self::ListingFailed => "listing-failed",
        })
    }
}
