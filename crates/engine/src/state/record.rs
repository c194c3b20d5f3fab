//! What stands in a journal: one JSON object a line.

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "kebab-case")]
pub(crate) enum Entry {
    /// First line of every journal.
    Begin {
        /// Version of the journal's form.
        version: u32,
        /// The run.
        run: String,
        /// What it does.
        operation: Operation,
    },
    /// An object is going to be made; its name carries the run.
    Intend {
        /// Kind and name.
        what: Made,
        /// Its name.
        name: String,
    },
    /// An object was made by us.
    Created {
        /// Kind.
        what: Made,
        /// UUID; of a task its reference.
        id: String,
    },
    /// An object of ours is gone.
    Removed {
        /// Kind.
        what: Made,
        /// As in [`Entry::Created`].
        id: String,
    },
    /// The point is going to be written.
    Publishing,
    /// The repository refused the point: there is none.
    Withdrawn,
    /// The point is complete and durable.
    Published {
        /// Its id.
        point: String,
    },
}

/// What a run does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Operation {
    /// `backup` or `restore`.
    pub(crate) kind: String,
    /// UUID of the pool.
    pub(crate) pool: String,
    /// UUID of the VM that is backed up, or of the VM that the point is of.
    pub(crate) vm: String,
    /// Repository.
    pub(crate) repository: Option<String>,
    /// Start, seconds since 1970.
    pub(crate) started: u64,
}

/// Kinds of objects that runs make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Made {
    /// A VM or the record of a snapshot.
    Vm,
    /// A disk.
    Vdi,
    /// A task.
    Task,
}
