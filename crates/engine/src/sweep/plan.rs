//! The plan of a sweep: which left-overs go and which objects stay, each with the reason. Pure.

use std::fmt;
use std::time::Duration;

/// What a sweep is going to do. Shown first, then executed unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweepPlan {
    /// Objects that go, in the order of removal.
    pub remove: Vec<SweepItem>,
    /// Objects with our marks that stay.
    pub keep: Vec<SweepItem>,
}

/// One object of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SweepItem {
    /// Kind of object.
    pub kind: ObjectKind,
    /// UUID, or the reference of a task.
    pub uuid: String,
    /// Name.
    pub name: String,
    /// Time since it was made, where that is known.
    pub age: Option<Duration>,
    /// Space that it holds on its SR, in bytes, as far as the pool knows.
    pub size_bytes: u64,
    /// What is done to it.
    pub action: SweepAction,
    /// Why.
    pub reason: String,
}

/// Kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ObjectKind {
    /// A VM or the record of a snapshot.
    Vm,
    /// A disk.
    Vdi,
    /// A VBD.
    Vbd,
    /// A VIF.
    Vif,
    /// A task.
    Task,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vm => "VM",
            Self::Vdi => "VDI",
            Self::Vbd => "VBD",
            Self::Vif => "VIF",
            Self::Task => "task",
        })
    }
}

/// What is done to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SweepAction {
    /// Nothing.
    Keep,
    /// It is removed.
    Destroy,
    /// Its data is removed, its change information stays as the base of the next incremental.
    DestroyData,
}

impl fmt::Display for SweepAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Destroy => "remove",
            Self::DestroyData => "remove data",
        })
    }
}
