//! A simulated XenServer pool for tests and the demo: XenAPI over XML-RPC and JSON-RPC, HTTP disk transfers, NBD
//! with changed block tracking, and faults to order.
//!
//! Charter: behave as xapi 26.1.19 does, taken from its sources and from recordings of a real one, never from what
//! our own client happens to send. It shares no code with that client (`xenapi`, `nbd`, `cbt`, `store`, `engine`),
//! so that an error can not be invisible by being made on both sides. It is a test double: it keeps its objects in
//! memory and its disks as sparse files in a temporary folder, and is not hardened.

mod control;
mod core;
mod error;
mod http;
mod methods;
mod model;
pub mod nbd;
mod options;
mod pool;
mod rpc;
pub mod storage;
pub mod vhd_export;
mod xva;

pub use control::{Counters, Fault, FaultEffect, NbdDiskCounters};
pub use error::SimError;
pub use options::{AccountSpec, DiskContent, DiskSpec, GarbageCollection, NbdAccess, Role, SimOptions, SrSpec, VmSpec};
pub use pool::{DiskInfo, HostInfo, SimPool, SrInfo, VmInfo};
