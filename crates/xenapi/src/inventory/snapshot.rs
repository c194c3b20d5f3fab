//! What an inventory shows: tables of typed records as they were at one moment, and how fresh they are.

use super::classes::{Cached, Tables};
use crate::model::Class;
use crate::reference::Ref;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// Objects of one class by reference; cloning shares them.
pub struct Table<T> {
    pub(super) objects: Arc<BTreeMap<Ref<T>, Arc<T>>>,
    /// Objects that exist and whose record could never be read.
    pub(super) hidden: Arc<BTreeSet<Ref<T>>>,
}

impl<T> Table<T> {
    /// The object's record.
    pub fn get(&self, reference: &Ref<T>) -> Option<&Arc<T>> {
        self.objects.get(reference)
    }

    /// All objects, in the order of their references.
    pub fn iter(&self) -> impl Iterator<Item = (&Ref<T>, &Arc<T>)> {
        self.objects.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}

impl<T: Cached> Table<T> {
    /// The object of that uuid; looks at all of them.
    pub fn by_uuid(&self, uuid: &str) -> Option<(&Ref<T>, &Arc<T>)> {
        self.objects.iter().find(|(_, record)| record.uuid() == uuid)
    }
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self { objects: Arc::clone(&self.objects), hidden: Arc::clone(&self.hidden) }
    }
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { objects: Arc::default(), hidden: Arc::default() }
    }
}

impl<T: Class + fmt::Debug> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.objects.iter()).finish()
    }
}

/// Whether what is shown follows the pool.
#[derive(Clone, Debug)]
pub enum Freshness {
    /// Nothing was loaded yet. The last failure, if there was one.
    Loading {
        /// What went wrong.
        trouble: Option<Arc<str>>,
    },
    /// It follows the pool.
    Live,
    /// The pool does not answer. What is shown is what it last said.
    Stale {
        /// The pool's last answer.
        since: Instant,
        /// What went wrong.
        trouble: Arc<str>,
    },
    /// The session was logged out, or the inventory was dropped: nothing will change any more.
    Ended,
}

impl Freshness {
    /// Whether it is [`Freshness::Live`].
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Live)
    }
}

/// How an inventory is doing.
#[derive(Clone, Debug)]
pub struct Status {
    /// Whether what is shown follows the pool.
    pub freshness: Freshness,
    /// Grows with every answer that changed something that is shown.
    pub revision: u64,
    /// Complete listings that were taken over, the first one included.
    pub loads: u64,
    /// Events that were taken over, those of listings not counted.
    pub events: u64,
    /// Whether the numbers of objects were those that the pool named, at its last answer. While it is `false` the
    /// objects that are shown exist or existed, and a new listing is under way.
    pub complete: bool,
    /// Objects that exist and are not shown, because their records can not be read.
    pub unreadable: usize,
}

/// The objects of a pool at one moment; cheap to clone and to keep.
#[derive(Clone)]
pub struct Snapshot {
    pub(super) tables: Tables,
    pub(super) status: Status,
}

impl Snapshot {
    /// The objects of one class (`snapshot.all::<vm::Record>()`); empty for a class that is not followed.
    pub fn all<T: Cached>(&self) -> &Table<T> {
        T::table(&self.tables)
    }

    /// One object's record. `None` means that the object was not there when the inventory last heard of the pool; look
    /// at [`Snapshot::status`] for when that was.
    pub fn get<T: Cached>(&self, reference: &Ref<T>) -> Option<&Arc<T>> {
        self.all::<T>().get(reference)
    }

    /// How the inventory was doing.
    pub fn status(&self) -> &Status {
        &self.status
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("status", &self.status).finish_non_exhaustive()
    }
}
