//! What the check knows of a pool: records as they were read, and what connecting showed. No judgement.

use std::collections::BTreeMap;

use xenvault_xenapi::{host, network, pbd, pif, pool, session, sm, sr, vdi, vm};

use crate::backup::SkippedDevice;
use crate::backup::prerequisites::LiveDisk;
use crate::sweep::SweepPlan;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    pub(super) instance: String,
    pub(super) pool: pool::Record,
    pub(super) session: session::Record,
    /// Address that was configured, and the one that calls go to.
    pub(super) configured: String,
    pub(super) coordinator: String,
    pub(super) hosts: BTreeMap<host::Ref, HostFacts>,
    pub(super) networks: BTreeMap<network::Ref, network::Record>,
    pub(super) pifs: BTreeMap<pif::Ref, pif::Record>,
    pub(super) srs: BTreeMap<sr::Ref, sr::Record>,
    pub(super) pbds: BTreeMap<pbd::Ref, pbd::Record>,
    pub(super) managers: BTreeMap<sm::Ref, sm::Record>,
    pub(super) vdis: BTreeMap<vdi::Ref, vdi::Record>,
    pub(super) vms: Vec<VmFacts>,
    pub(super) nbd: Vec<NbdFacts>,
    /// Why disks are read over HTTP: what a server says that has no NBD. `None` where it has.
    pub(super) without_nbd: Option<String>,
    pub(super) sweep: SweepPlan,
}

/// One host.
#[derive(Clone, Debug, Default)]
pub(super) struct HostFacts {
    pub(super) record: host::Record,
    /// What its metrics say.
    pub(super) live: bool,
    /// Why its API port can not be reached; `None` if it can, or was not tried.
    pub(super) unreachable: Option<String>,
    /// Its clock minus ours, in seconds.
    pub(super) clock_ahead: Option<i64>,
}

/// One VM that is checked.
#[derive(Clone, Debug, Default)]
pub(super) struct VmFacts {
    pub(super) record: vm::Record,
    pub(super) disks: Vec<LiveDisk>,
    pub(super) skipped: Vec<SkippedDevice>,
    /// The first disk of an SR for which the pool gives no address, although a network has the purpose.
    pub(super) without_address: Option<usize>,
}

/// One address at which disks are served, and how the handshake with it went.
#[derive(Clone, Debug)]
pub(super) struct NbdFacts {
    pub(super) address: std::net::SocketAddr,
    /// Why it can not be used.
    pub(super) failure: Option<String>,
}
