//! The levers of a test: faults to order, counters to read, and both over HTTP beside the XenAPI port.

mod counters;
mod fault;
mod server;
mod storage;

pub(crate) use counters::CounterBook;
pub use counters::{Counters, NbdDiskCounters};
pub(crate) use fault::FaultBook;
pub use fault::{Fault, FaultEffect};
pub(crate) use server::{WeakPool, serve};
