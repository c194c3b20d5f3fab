//! What a pool is made of when it starts.

use std::path::PathBuf;
use std::time::Duration;

use crate::storage::SrKind;

/// Makes a pool: hosts, SRs, VMs and manners. `SimOptions::default()` is one host, one VHD SR of 1 TiB, one halted
/// VM with one disk of 64 MiB, NBD over TLS enabled, no delays.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Number of hosts, each on its own loopback address; the first is the coordinator. 1 to 64.
    pub hosts: usize,
    /// The SRs, all shared by all hosts unless `local_to` says otherwise. The first is the pool's default SR.
    pub srs: Vec<SrSpec>,
    /// The VMs.
    pub vms: Vec<VmSpec>,
    /// Time that plugging a disk into a control domain takes.
    pub attach_delay: Duration,
    /// Time that unplugging one takes.
    pub detach_delay: Duration,
    /// Time that each background task takes at least.
    pub task_delay: Duration,
    /// Serve the XenAPI port without TLS.
    pub plain_http: bool,
    /// Password of `root`.
    pub password: String,
    /// Purpose of the first network.
    pub nbd: NbdAccess,
    /// Every host has an IPv6 address too, which `VDI.get_nbd_info` lists and nobody serves.
    pub ipv6: bool,
    /// Limit of sessions per originator, 500 in a real pool.
    pub session_limit: usize,
    /// Features that the licence leaves out: keys of `restrictions` such as `restrict_cbt`.
    pub restrictions: Vec<String>,
    /// Answers like a server from before changed block tracking: `VDI.enable_cbt` and its relatives are unknown.
    pub older_server: bool,
    /// Accounts beside `root`, each with a role.
    pub accounts: Vec<AccountSpec>,
    /// Time after which a session that makes no call ends; 24 hours in a real pool.
    pub session_timeout: Duration,
    /// Hosts have hardware virtualisation; without it they can not start the VMs of this pool.
    pub hardware_virtualisation: bool,
    /// Delay before a wrong password is refused (over 2 s in a real pool).
    pub wrong_password_delay: Duration,
    /// Time that an operation of the storage manager takes (make, delete, snapshot or grow a disk, scan, attach or
    /// detach an SR, change tracking), while it stands in `current_operations` of the SR and keeps others out.
    pub sr_delay: Duration,
    /// When base copies that nothing needs are merged or removed.
    pub garbage_collection: GarbageCollection,
    /// Time between a restored database dump and the reboot into it (30 s in a real pool).
    pub restore_fuse: Duration,
}

/// When the storage manager's garbage collector works: base copies without a use are removed, and ones below a single
/// child are merged with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GarbageCollection {
    /// All at once, as part of the call that deletes a disk. No real server does that; tests are fast by it.
    #[default]
    AtOnce,
    /// As on a real server: some time after a disk was deleted or the SR was scanned, one merge after the other.
    Timed {
        /// Time before the first one (5 minutes on a real server).
        quiet: Duration,
        /// Time that each one takes at least.
        merge: Duration,
        /// Speed of the copying; none for as fast as can be.
        bytes_per_second: Option<u64>,
    },
    /// Only as ordered by [`crate::SimPool::step_coalesce`] and [`crate::SimPool::coalesce_all`].
    OnOrder,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            hosts: 1,
            srs: vec![SrSpec::new("Local storage", SrKind::Ext)],
            vms: vec![VmSpec::new("vm-1").disk(DiskSpec::new(64 << 20))],
            attach_delay: Duration::ZERO,
            detach_delay: Duration::ZERO,
            task_delay: Duration::ZERO,
            plain_http: false,
            password: "secret of the simulated pool".to_owned(),
            nbd: NbdAccess::Tls,
            ipv6: false,
            session_limit: 500,
            restrictions: Vec::new(),
            older_server: false,
            accounts: Vec::new(),
            session_timeout: Duration::from_secs(86_400),
            hardware_virtualisation: true,
            wrong_password_delay: Duration::from_millis(20),
            sr_delay: Duration::ZERO,
            garbage_collection: GarbageCollection::AtOnce,
            restore_fuse: Duration::from_secs(30),
        }
    }
}

/// An account of the directory that the pool asks.
#[derive(Clone, Debug)]
pub struct AccountSpec {
    /// Its name.
    pub name: String,
    /// Its password.
    pub password: String,
    /// What it may do.
    pub role: Role,
}

impl AccountSpec {
    /// An account with a role.
    pub fn new(name: &str, password: &str, role: Role) -> Self {
        Self { name: name.to_owned(), password: password.to_owned(), role }
    }
}

/// A role of an account; each may all that the ones before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Looks, and logs in.
    ReadOnly,
    /// Starts and stops VMs.
    VmOperator,
    /// Makes VMs and disks, exports and imports.
    VmAdmin,
    /// Takes snapshots, migrates.
    VmPowerAdmin,
    /// Hosts, storage, networks.
    PoolOperator,
    /// Everything.
    PoolAdmin,
}

impl Role {
    /// All of them, the least first.
    pub const ALL: &'static [Self] =
        &[Self::ReadOnly, Self::VmOperator, Self::VmAdmin, Self::VmPowerAdmin, Self::PoolOperator, Self::PoolAdmin];

    /// The name, such as `vm-power-admin`.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only",
            Self::VmOperator => "vm-operator",
            Self::VmAdmin => "vm-admin",
            Self::VmPowerAdmin => "vm-power-admin",
            Self::PoolOperator => "pool-operator",
            Self::PoolAdmin => "pool-admin",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|role| role.name() == name)
    }

    pub(crate) fn description(self) -> &'static str {
        match self {
            Self::ReadOnly => "Looks at the pool and changes nothing",
            Self::VmOperator => "Uses VMs",
            Self::VmAdmin => "Manages VMs and templates",
            Self::VmPowerAdmin => "Manages VMs, and where they run",
            Self::PoolOperator => "Manages the resources of hosts and pool",
            Self::PoolAdmin => "Manages everything, accounts too",
        }
    }
}

/// Purpose of the pool's first network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NbdAccess {
    /// No purpose: NBD is off, as on a new pool.
    Off,
    /// Purpose `nbd`: TLS forced.
    Tls,
    /// Purpose `insecure_nbd`: no TLS.
    Insecure,
}

/// One storage repository.
#[derive(Clone, Debug)]
pub struct SrSpec {
    /// `name_label`.
    pub name: String,
    /// Its behaviour.
    pub kind: SrKind,
    /// Physical size in bytes.
    pub size: u64,
    /// Index of the only host that has a PBD for it; `None` means shared.
    pub local_to: Option<usize>,
    /// Indexes of the hosts that have a PBD for a shared one; empty means all.
    pub seen_by: Vec<usize>,
}

impl SrSpec {
    /// A shared SR of 16 TiB.
    pub fn new(name: &str, kind: SrKind) -> Self {
        Self { name: name.to_owned(), kind, size: 16 << 40, local_to: None, seen_by: Vec::new() }
    }

    /// Shares it between some hosts only, by their indexes. Without the coordinator among them nothing can be done
    /// with it.
    #[must_use]
    pub fn seen_by(mut self, hosts: &[usize]) -> Self {
        self.seen_by = hosts.to_vec();
        self
    }
}

/// One VM.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// `name_label`.
    pub name: String,
    /// Its disks, `userdevice` 0, 1, ... in this order.
    pub disks: Vec<DiskSpec>,
    /// Started before the pool is ready.
    pub running: bool,
    /// Adds a CD drive with a disc of an ISO SR as the last device.
    pub cd: bool,
    /// Number of network interfaces on the first network.
    pub vifs: usize,
}

impl VmSpec {
    /// A halted VM without disks and with one network interface.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), disks: Vec::new(), running: false, cd: false, vifs: 1 }
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// Starts it before the pool is ready.
    #[must_use]
    pub fn running(mut self) -> Self {
        self.running = true;
        self
    }
}

/// One disk of a VM.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Virtual size in bytes; for a file 0 means its length, rounded up to 2 MiB.
    pub size: u64,
    /// Name of the SR (`SrSpec::name`); `None` means the first.
    pub sr: Option<String>,
    /// What it holds at the start.
    pub content: DiskContent,
    /// Changed block tracking is on from the start.
    pub cbt: bool,
}

impl DiskSpec {
    /// A disk of zeros on the first SR.
    pub fn new(size: u64) -> Self {
        Self { size, sr: None, content: DiskContent::Zeros, cbt: false }
    }

    /// A disk with the content of a file.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { size: 0, sr: None, content: DiskContent::File(path.into()), cbt: false }
    }

    /// Puts it on the SR of that name.
    #[must_use]
    pub fn on(mut self, sr: &str) -> Self {
        self.sr = Some(sr.to_owned());
        self
    }

    /// Gives it content.
    #[must_use]
    pub fn content(mut self, content: DiskContent) -> Self {
        self.content = content;
        self
    }
}

/// What a disk holds when the pool starts.
#[derive(Clone, Debug)]
pub enum DiskContent {
    /// Nothing was ever written.
    Zeros,
    /// The bytes of a file; holes of the file stay unallocated.
    File(PathBuf),
    /// Pseudo-random bytes that do not compress, the same for the same seed, from offset 0 on.
    Random {
        /// Any number.
        seed: u64,
        /// How many bytes.
        bytes: u64,
    },
}
