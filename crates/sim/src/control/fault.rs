//! Faults that a test orders: which calls they meet and what happens to them.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One order. It meets calls whose name equals `call`: a XenAPI method with or without `Async.` (`VDI.data_destroy`),
/// an HTTP handler (`http/export_raw_vdi`, `http/import_raw_vdi`) or `nbd/open`, `nbd/read`, `nbd/accept`.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Name of the calls that it meets; `*` means every XenAPI method.
    pub call: String,
    /// Calls that pass untouched before the first one that is met.
    pub skip: u64,
    /// How many calls are met; `u64::MAX` for all.
    pub count: u64,
    /// What happens.
    pub effect: FaultEffect,
}

impl Fault {
    /// Meets the next call of that name, once.
    pub fn once(call: &str, effect: FaultEffect) -> Self {
        Self { call: call.to_owned(), skip: 0, count: 1, effect }
    }

    /// Meets every call of that name.
    pub fn always(call: &str, effect: FaultEffect) -> Self {
        Self { call: call.to_owned(), skip: 0, count: u64::MAX, effect }
    }

    /// Lets `skip` calls pass first.
    #[must_use]
    pub fn after(mut self, skip: u64) -> Self {
        self.skip = skip;
        self
    }
}

/// What a fault does.
#[derive(Clone, Debug)]
pub enum FaultEffect {
    /// The call fails with this code and parameters and has no effect. In an `Async.` form the task fails; a transfer
    /// fails after its `200`, with a second response in the body.
    Error {
        /// XenAPI error code.
        code: String,
        /// Its parameters.
        params: Vec<String>,
    },
    /// The call is done, but its answer is this failure (an effect that the caller does not hear of).
    ErrorAfter {
        /// XenAPI error code.
        code: String,
        /// Its parameters.
        params: Vec<String>,
    },
    /// The call is done, but its answer (in an `Async.` form the task's result) is this text. No transfers.
    TextAfter(String),
    /// The call waits first.
    Delay(Duration),
    /// The connection is closed before the call is done.
    Drop,
    /// The call is done, then the connection is closed without an answer.
    DropAfter,
    /// A transfer ends after so many bytes of the body (HTTP), or an NBD connection after so many bytes of data.
    Truncate(u64),
    /// No answer at all while the connection stays open.
    Hang,
}

/// The faults that are ordered and not used up.
#[derive(Debug, Default)]
pub(crate) struct FaultBook {
    orders: Mutex<Vec<Fault>>,
}

impl FaultBook {
    fn lock(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, fault: Fault) {
        self.lock().push(fault);
    }

    pub(crate) fn clear(&self) {
        self.lock().clear();
    }

    /// The effect of the first order that meets this call, which counts as one occasion.
    pub(crate) fn strike(&self, call: &str) -> Option<FaultEffect> {
        let mut orders = self.lock();
        let mut effect = None;
        for order in orders.iter_mut() {
            let any = order.call == "*" && !call.contains('/');
            if order.call != call && !any {
                continue;
            }
            if order.skip > 0 {
                order.skip -= 1;
                continue;
            }
            if order.count > 0 {
                order.count = if order.count == u64::MAX { u64::MAX } else { order.count - 1 };
                effect = Some(order.effect.clone());
                break;
            }
        }
        orders.retain(|order| order.count > 0);
        effect
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_meets_the_call_that_it_names_and_is_used_up() {
        let book = FaultBook::default();
        book.add(Fault::once("VM.snapshot", FaultEffect::Drop).after(1));
        assert!(book.strike("VM.destroy").is_none());
        assert!(book.strike("VM.snapshot").is_none());
        assert!(matches!(book.strike("VM.snapshot"), Some(FaultEffect::Drop)));
        assert!(book.strike("VM.snapshot").is_none());
    }
}
