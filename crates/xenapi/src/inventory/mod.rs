//! The inventory: a live copy of the pool's objects, kept current by events.
//!
//! One task per inventory lists everything once (`event.from` without a token, which gives objects and the token of the
//! same moment) and then asks for what changed. Everything is listed again, and compared with what was known, when the
//! token is lost, when the session was renewed (the coordinator may be another one), when the pool names other numbers
//! of objects than are known, and now and then.
//!
//! - An object disappears because the pool said so: by an event, or by a listing that is complete. A listing that
//!   failed or was cut short removes nothing.
//! - While the pool can not be asked, what is known stays, marked as [`Freshness::Stale`]; it comes back by itself.
//! - Memory: one typed record per object. Changes that nobody has fetched are kept up to
//!   [`InventoryOptions::kept_changes`], then a subscriber is told that it missed some.
//!
//! Nothing here decides what a change means.

mod classes;
mod follow;
mod shared;
mod snapshot;
mod state;

pub use classes::{Cached, Change, Delta, ObjectClass};
use shared::Shared;
pub use snapshot::{Freshness, Snapshot, Status, Table};

use crate::error::XenApiError;
use crate::session_handle::Session;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;

/// What to follow and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InventoryOptions {
    /// Classes whose objects are held.
    pub classes: Vec<ObjectClass>,
    /// How long one question waits at the pool for news. A pool that is silent for 15 s longer is away.
    pub wait: Duration,
    /// The pause after news, so that a burst of changes comes as a few answers.
    pub pace: Duration,
    /// The pause before the first repetition after a failure; it grows to 30 s (5 min where a repetition cures nothing).
    pub retry_pause: Duration,
    /// How often everything is listed again, in case that events were lost without a sign.
    pub list_every: Duration,
    /// How many changes are kept for a subscriber that is slow.
    pub kept_changes: usize,
}

impl Default for InventoryOptions {
    fn default() -> Self {
        Self {
            classes: ObjectClass::ALL.to_vec(),
            wait: Duration::from_secs(15),
            pace: Duration::from_millis(50),
            retry_pause: Duration::from_secs(1),
            list_every: Duration::from_secs(600),
            kept_changes: 4096,
        }
    }
}

impl InventoryOptions {
    /// Defaults, for these classes only.
    pub fn of(classes: &[ObjectClass]) -> Self {
        Self { classes: classes.to_vec(), ..Self::default() }
    }
}

/// A live copy of a pool's objects.
///
/// It uses the session until it is dropped or the session is logged out; while it exists it keeps the session open.
pub struct Inventory {
    shared: Arc<Shared>,
    follower: AbortHandle,
}

impl Inventory {
    /// Starts to follow the pool. Returns at once; see [`Inventory::ready`].
    pub fn start(session: &Session, options: InventoryOptions) -> Self {
        let mut classes = options.classes.clone();
        classes.sort_unstable();
        classes.dedup();
        let shared = Arc::new(Shared::new(classes, options.kept_changes));
        let follower = session.spawn(follow::follow(session.clone(), Arc::clone(&shared), options));
        Self { shared, follower }
    }

    /// Waits for the first listing, however long that takes: failures are in [`Inventory::status`] meanwhile.
    ///
    /// # Errors
    /// [`XenApiError::LoggedOut`].
    pub async fn ready(&self) -> Result<Snapshot, XenApiError> {
        self.wait_until(|snapshot| (snapshot.status().loads > 0).then(|| snapshot.clone())).await
    }

    /// What is known now; all objects of the same moment. Costs nothing that grows with the pool, but the tables that
    /// change while it is held are copied once.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.snapshot()
    }

    /// How it is doing.
    pub fn status(&self) -> Status {
        self.shared.watch().borrow().clone()
    }

    /// Its status, to be waited on; changes with every answer of the pool.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.shared.watch()
    }

    /// What changes from now on. To miss nothing, subscribe first and take a snapshot then: changes that the snapshot
    /// holds already are told again.
    pub fn subscribe(&self) -> Changes {
        Changes { receiver: self.shared.subscribe() }
    }

    /// Waits until `look` finds what it looks for. It sees every state that stays, but not each of those that follow
    /// each other quickly.
    ///
    /// # Errors
    /// [`XenApiError::LoggedOut`] if the session was logged out meanwhile. There is no time limit of its own.
    pub async fn wait_until<T>(&self, mut look: impl FnMut(&Snapshot) -> Option<T>) -> Result<T, XenApiError> {
        let mut status = self.shared.watch();
        loop {
            status.borrow_and_update();
            let snapshot = self.snapshot();
            if let Some(found) = look(&snapshot) {
                return Ok(found);
            }
            let ended = matches!(snapshot.status().freshness, Freshness::Ended);
            // Held across the wait it would make the next change copy the tables.
            drop(snapshot);
            if ended || status.changed().await.is_err() {
                return Err(XenApiError::LoggedOut { operation: "following the pool".to_owned() });
            }
        }
    }
}

impl Drop for Inventory {
    fn drop(&mut self) {
        // Dropping the follower closes its connection and gives its handle of the session back.
        self.follower.abort();
        self.shared.end();
    }
}

impl std::fmt::Debug for Inventory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inventory").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// What a subscriber is told.
#[derive(Clone, Debug)]
pub enum Update {
    /// One object changed.
    Change(Change),
    /// So many changes were not kept, because the subscriber was slow: take a snapshot.
    Missed(u64),
}

/// Changes from the moment of [`Inventory::subscribe`] on, in order.
#[derive(Debug)]
pub struct Changes {
    receiver: broadcast::Receiver<Change>,
}

impl Changes {
    /// The next one; `None` when the inventory was dropped and everything was told. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Update> {
        match self.receiver.recv().await {
            Ok(change) => Some(Update::Change(change)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Update::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
