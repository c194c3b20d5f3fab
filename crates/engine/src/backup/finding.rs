//! Named findings of the check before a backup, each with its remedy.

use std::fmt;

/// What is missing, or worth knowing, before a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// Which one.
    pub kind: FindingKind,
    /// What was found.
    pub text: String,
    /// What to do, with the command where there is one.
    pub remedy: String,
}

/// Kinds of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// No network of the pool has the purpose `nbd`.
    NbdNotEnabled,
    /// A network has the purpose, but no host of the disk's SR can be reached through it.
    NbdNoAddress,
    /// The pool offers NBD in clear text only, and nobody consented.
    NbdClearText,
    /// Both purposes are set: the hosts refuse every connection.
    NbdMixed,
    /// The server is from before NBD.
    NbdUnsupported,
    /// The SR has too little space for a snapshot.
    SrSpace,
    /// The VM does not allow a snapshot at the moment.
    SnapshotNotAllowed,
    /// A disk can not be snapshotted at all.
    SnapshotUnsupported,
    /// The SR of a disk is not plugged on any host.
    SrUnplugged,
    /// The chain of the disk is long.
    ChainDepth,
    /// The disk can not be tracked, so it is read as a whole each time.
    CbtUnsupported,
    /// The licence of the pool does not include changed block tracking.
    CbtRestricted,
    /// Another product keeps change information of this disk.
    ForeignCbt,
}

impl FindingKind {
    /// A fixed word for machines.
    pub const fn code(self) -> &'static str {
        match self {
            Self::NbdNotEnabled => "nbd-not-enabled",
            Self::NbdNoAddress => "nbd-no-address",
            Self::NbdClearText => "nbd-clear-text",
            Self::NbdMixed => "nbd-mixed",
            Self::NbdUnsupported => "nbd-unsupported",
            Self::SrSpace => "sr-space",
            Self::SnapshotNotAllowed => "snapshot-not-allowed",
            Self::SnapshotUnsupported => "snapshot-unsupported",
            Self::SrUnplugged => "sr-unplugged",
            Self::ChainDepth => "chain-depth",
            Self::CbtUnsupported => "cbt-unsupported",
            Self::CbtRestricted => "cbt-restricted",
            Self::ForeignCbt => "foreign-cbt",
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.kind.code(), self.text, self.remedy)
    }
}
