//! Faults that can be ordered from the NBD servers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;
use xenvault_block::ByteRange;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// A connection is closed as soon as it is accepted.
    Refuse,
    /// A connection is accepted, and nothing is ever said on it (a host whose xapi does not answer).
    Silence,
    /// An export name is answered by a silent close.
    RefuseOpen,
    /// Opening an export takes that much longer.
    OpenDelay(Duration),
    /// Every `READ` waits that long before its header.
    ReadDelay(Duration),
    /// After that many disk bytes of a connection it breaks (TCP reset, no `close_notify`), in the middle of a read.
    DropAfter(u64),
    /// After that many disk bytes of a connection nothing more comes, and it stays open.
    StallAfter(u64),
    /// The device can not read these bytes of a disk: success header, whole 512 KiB pieces before, close.
    MediaError(ByteRange),
}

/// A fault, where it strikes, and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultOrder {
    /// What goes wrong.
    pub fault: Fault,
    /// On this host only; `None` is any.
    pub host: Option<Uuid>,
    /// On this disk only; `None` is any. Without meaning for [`Fault::Refuse`] and [`Fault::Silence`].
    pub vdi: Option<Uuid>,
    /// Occasions that pass untouched before the first one that is met.
    pub skip: u64,
    /// On so many occasions (connections, opens or reads); `None` is always.
    pub times: Option<u64>,
}

/// Names an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FaultId(pub u64);

/// The faults that are ordered. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct NbdFaults {
    book: Arc<Mutex<Book>>,
}

#[derive(Debug, Default)]
struct Book {
    next: u64,
    orders: Vec<(FaultId, FaultOrder)>,
}

impl NbdFaults {
    /// Orders a fault. Older orders strike first.
    pub fn order(&self, order: FaultOrder) -> FaultId {
        let mut book = self.lock();
        let id = FaultId(book.next);
        book.next += 1;
        book.orders.push((id, order));
        id
    }

    /// Takes an order back.
    pub fn withdraw(&self, id: FaultId) {
        self.lock().orders.retain(|(other, _)| *other != id);
    }

    /// Takes all orders back.
    pub fn clear(&self) {
        self.lock().orders.clear();
    }

    /// What is ordered and not used up.
    pub fn orders(&self) -> Vec<(FaultId, FaultOrder)> {
        self.lock().orders.clone()
    }

    /// The first order that `pick` takes for this place, counted as one occasion.
    pub(super) fn strike<R>(&self, host: Uuid, vdi: Option<Uuid>, pick: impl Fn(&Fault) -> Option<R>) -> Option<R> {
        let mut book = self.lock();
        let mut found = None;
        for (_, order) in &mut book.orders {
            let here = order.host.is_none_or(|wanted| wanted == host) && (order.vdi.is_none() || order.vdi == vdi);
            let Some(picked) = here.then(|| pick(&order.fault)).flatten() else { continue };
            if order.skip > 0 {
                order.skip -= 1;
                continue;
            }
            if let Some(times) = &mut order.times {
                *times = times.saturating_sub(1);
            }
            found = Some(picked);
            break;
        }
        book.orders.retain(|(_, order)| order.times != Some(0));
        found
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
