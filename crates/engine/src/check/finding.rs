//! What the prerequisite check finds: severity, reason, consequence and remedy, each about one object.

use std::fmt;

use crate::backup::finding::{Finding, FindingKind};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Backups fail until it is put right.
    Error,
    /// Backups work, but slower, or something is going wrong.
    Warning,
    /// Worth knowing.
    Note,
}

impl Severity {
    /// A fixed word for machines.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The object that a finding is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct CheckedObject {
    /// Its class: `pool`, `host`, `network`, `SR`, `VM`, `VDI`, `session`, ...
    pub class: String,
    /// Its UUID; empty where it has none that matters.
    pub uuid: String,
    /// Its name.
    pub name: String,
}

impl CheckedObject {
    pub(super) fn new(class: &str, uuid: &str, name: &str) -> Self {
        Self { class: class.to_owned(), uuid: uuid.to_owned(), name: name.to_owned() }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckFinding {
    /// How bad it is.
    pub severity: Severity,
    /// A fixed word for machines, such as `sr-space`.
    pub code: &'static str,
    /// What it is about.
    pub object: CheckedObject,
    /// What was found.
    pub reason: String,
    /// What follows from it.
    pub consequence: String,
    /// What to do, with the exact command where there is one.
    pub remedy: String,
}

impl CheckFinding {
    pub(super) fn new(
        severity: Severity,
        code: &'static str,
        object: CheckedObject,
        reason: impl Into<String>,
        consequence: &str,
        remedy: impl Into<String>,
    ) -> Self {
        let (reason, remedy) = (reason.into(), remedy.into());
        Self { severity, code, object, reason, consequence: consequence.to_owned(), remedy }
    }

    /// What stops a backup, as the backup itself would say it.
    pub(super) fn stopping(finding: Finding, object: CheckedObject) -> Self {
        let consequence = match finding.kind {
            FindingKind::NbdNotEnabled | FindingKind::NbdMixed | FindingKind::NbdClearText => {
                "no disk of the pool can be read over NBD"
            }
            FindingKind::NbdNoAddress => "the disk can not be read over NBD",
            _ => "no backup of the VM can be made",
        };
        Self::new(Severity::Error, finding.kind.code(), object, finding.text, consequence, finding.remedy)
    }
}
