//! Faults that a test orders: which calls they meet and what happens to them.

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
    /// The call fails with this code and parameters and has no effect. In an `Async.` form the task fails.
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
