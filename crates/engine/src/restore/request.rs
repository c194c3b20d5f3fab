//! What a caller asks of a restore, and what it is told afterwards.

use std::collections::BTreeMap;
use std::time::Duration;

use xenvault_store::PointId;

use crate::monitor::{Progress, Warning};

/// Where a restored disk goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SrSelector {
    /// By UUID.
    Uuid(String),
    /// By its exact name; it is an error if several have it.
    Name(String),
    /// By UUID if an SR has it, else by name.
    UuidOrName(String),
    /// The pool's default SR.
    Default,
}

/// Which MAC addresses the restored VM gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MacPolicy {
    /// Keep them if no other VIF of the pool uses them, else new ones. A copy beside its original must not share
    /// addresses, and a VM that comes back after a loss should be known to its network.
    #[default]
    KeepIfFree,
    /// Keep them in any case.
    Keep,
    /// New ones.
    New,
}

/// One restore of one VM as a new VM.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreRequest {
    /// The point.
    pub point: PointId,
    /// Where the disks go.
    pub target_sr: SrSelector,
    /// Name of the new VM; default: the name at the time of the backup.
    pub name: Option<String>,
    /// Network at the time of the backup (name or UUID) to network now (name or UUID). Networks that are not named
    /// here are looked up by UUID, then by name; a VIF without a network is left out and reported.
    pub network_map: BTreeMap<String, String>,
    /// MAC addresses.
    pub mac: MacPolicy,
}

impl RestoreRequest {
    /// Restores `point` to `target_sr`, everything else by default.
    pub fn new(point: PointId, target_sr: SrSelector) -> Self {
        Self { point, target_sr, name: None, network_map: BTreeMap::new(), mac: MacPolicy::default() }
    }
}

/// What a good restore did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreReport {
    /// This execution.
    pub run_id: String,
    /// UUID of the new VM.
    pub vm_uuid: String,
    /// Its name.
    pub vm_name: String,
    /// Its disks, by position.
    pub disks: Vec<RestoredDisk>,
    /// Its VIFs, also those that were left out.
    pub vifs: Vec<RestoredVif>,
    /// Settings of the original that the new VM does not have, each with the reason.
    pub not_restored: Vec<NotRestored>,
    /// Totals; `done_bytes` counts what was sent to the pool.
    pub totals: Progress,
    /// What an operator should know.
    pub warnings: Vec<Warning>,
    /// From the call to its end.
    pub elapsed: Duration,
}

/// One disk of the restored VM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoredDisk {
    /// Position (`userdevice`).
    pub device: String,
    /// UUID of the new disk.
    pub vdi_uuid: String,
    /// Size in bytes.
    pub virtual_size: u64,
    /// Bytes sent to the pool.
    pub sent_bytes: u64,
}

/// One VIF of the original.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoredVif {
    /// Position.
    pub device: String,
    /// Name of its network at the time of the backup.
    pub network: String,
    /// Name of the network that it is on now; `None`: no network fits, the VIF was left out.
    pub mapped_to: Option<String>,
    /// MAC address now.
    pub mac: Option<String>,
}

/// A setting that the new VM does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotRestored {
    /// Field of the VM record.
    pub field: String,
    /// Why.
    pub reason: String,
}
