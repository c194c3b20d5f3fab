//! [`SimPool`]: the whole pool as one handle, for Rust tests and for the binary.

use std::net::IpAddr;

use crate::{Counters, Fault, NbdAccess, SimError, SimOptions};

/// A running pool. Clones share it; it ends with [`SimPool::shutdown`] or when the last clone is dropped.
#[derive(Clone)]
pub struct SimPool {}

/// One host of the pool.
#[derive(Clone, Debug, serde::Serialize)]
pub struct HostInfo {
    /// Its uuid.
    pub uuid: String,
    /// `name_label`.
    pub name: String,
    /// Its loopback address.
    pub address: IpAddr,
    /// Where its XenAPI is served.
    pub url: String,
    /// SHA-256 of its certificate (DER), lower-case hexadecimal without separators.
    pub fingerprint: String,
}

/// One SR of the pool.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SrInfo {
    /// Its uuid.
    pub uuid: String,
    /// `name_label`.
    pub name: String,
}

/// One VM that the pool started with.
#[derive(Clone, Debug, serde::Serialize)]
pub struct VmInfo {
    /// Its uuid.
    pub uuid: String,
    /// `name_label`.
    pub name: String,
    /// Its disks by `userdevice`.
    pub disks: Vec<DiskInfo>,
}

/// One disk of a VM.
#[derive(Clone, Debug, serde::Serialize)]
pub struct DiskInfo {
    /// Uuid of the VDI.
    pub vdi: String,
    /// `userdevice` of its VBD.
    pub userdevice: String,
    /// Virtual size in bytes.
    pub size: u64,
    /// Uuid of its SR.
    pub sr: String,
}

#[expect(clippy::todo, reason = "being built")]
impl SimPool {
    /// Makes the disks, binds every port and answers from then on.
    ///
    /// # Errors
    /// [`SimError::Options`] for contradictions, [`SimError::Io`] and [`SimError::Certificate`] for the rest.
    pub async fn start(options: SimOptions) -> Result<Self, SimError> {
        let _ = options;
        todo!()
    }
    /// URL of the coordinator.
    pub fn url(&self) -> String {
        todo!()
    }
    /// SHA-256 of the coordinator's certificate, lower-case hexadecimal without separators (also with `plain_http`,
    /// where only NBD uses it).
    pub fn fingerprint(&self) -> String {
        todo!()
    }
    /// The account: `root`.
    pub fn user(&self) -> &str {
        "root"
    }
    /// Its password.
    pub fn password(&self) -> String {
        todo!()
    }
    /// URL of the control interface, plain HTTP.
    pub fn control_url(&self) -> String {
        todo!()
    }
    /// The hosts, coordinator first.
    pub fn hosts(&self) -> Vec<HostInfo> {
        todo!()
    }
    /// The SRs in the order of the options.
    pub fn srs(&self) -> Vec<SrInfo> {
        todo!()
    }
    /// The VMs in the order of the options, with their present disks.
    pub fn vms(&self) -> Vec<VmInfo> {
        todo!()
    }
    /// Any VM of the pool (restored ones too) by uuid or, where unique, by name.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn vm(&self, name_or_uuid: &str) -> Result<VmInfo, SimError> {
        let _ = name_or_uuid;
        todo!()
    }
    /// Writes to a VM's disk as its guest would; changed block tracking sees it. `userdevice` as in the VBD.
    /// Works on halted VMs too (as a boot, write, shutdown).
    ///
    /// # Errors
    /// [`SimError::Unknown`], or [`SimError::Api`] with the SR's error (past the end, SR full).
    pub fn guest_write(&self, vm: &str, userdevice: &str, offset: u64, data: &[u8]) -> Result<(), SimError> {
        let _ = (vm, userdevice, offset, data);
        todo!()
    }
    /// Reads a VM's disk as its guest would.
    ///
    /// # Errors
    /// As [`SimPool::guest_write`].
    pub fn guest_read(&self, vm: &str, userdevice: &str, offset: u64, length: u64) -> Result<Vec<u8>, SimError> {
        let _ = (vm, userdevice, offset, length);
        todo!()
    }
    /// Reads any VDI (by uuid) without a VM.
    ///
    /// # Errors
    /// As [`SimPool::guest_write`].
    pub fn vdi_read(&self, vdi: &str, offset: u64, length: u64) -> Result<Vec<u8>, SimError> {
        let _ = (vdi, offset, length);
        todo!()
    }
    /// Starts a halted VM on the host of that index (as `VM.start_on`).
    ///
    /// # Errors
    /// [`SimError::Unknown`] or [`SimError::Api`].
    pub async fn start_vm(&self, vm: &str, host: usize) -> Result<(), SimError> {
        let _ = (vm, host);
        todo!()
    }
    /// Shuts a VM down cleanly.
    ///
    /// # Errors
    /// [`SimError::Unknown`] or [`SimError::Api`].
    pub async fn shutdown_vm(&self, vm: &str) -> Result<(), SimError> {
        let _ = vm;
        todo!()
    }
    /// Live-migrates a VM to another host (as `VM.pool_migrate`).
    ///
    /// # Errors
    /// [`SimError::Unknown`] or [`SimError::Api`].
    pub async fn migrate_vm(&self, vm: &str, host: usize) -> Result<(), SimError> {
        let _ = (vm, host);
        todo!()
    }
    /// A host crashes and is back at once with a later boot time: its VMs are halted without a clean shutdown, its
    /// disks' CBT logs stay marked as inconsistent, its NBD and HTTP connections break.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub async fn crash_host(&self, host: usize) -> Result<(), SimError> {
        let _ = host;
        todo!()
    }
    /// Sets the purpose of the first network.
    pub fn set_nbd(&self, access: NbdAccess) {
        let _ = access;
        todo!()
    }
    /// Orders a fault. Faults of one call are met in the order in which they were added.
    pub fn fault(&self, fault: Fault) {
        let _ = fault;
        todo!()
    }
    /// Takes all faults away.
    pub fn clear_faults(&self) {
        todo!()
    }
    /// A copy of the counters.
    pub fn counters(&self) -> Counters {
        todo!()
    }
    /// All objects of one class (`VM`, `VDI`, ...): full records as JSON by reference.
    pub fn records(&self, class: &str) -> serde_json::Map<String, serde_json::Value> {
        let _ = class;
        todo!()
    }
    /// The record of one object by uuid.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn record(&self, class: &str, uuid: &str) -> Result<serde_json::Value, SimError> {
        let _ = (class, uuid);
        todo!()
    }
    /// What stands in the pool that did not when it had started: class, reference and record of every VM, VDI, VBD,
    /// VIF, task and session (session records without secrets) that is new. For leak asserts.
    pub fn new_objects(&self) -> Vec<(String, String, serde_json::Value)> {
        todo!()
    }
    /// Calls a XenAPI method as `root` without HTTP; parameters as in JSON-RPC, without the session.
    ///
    /// # Errors
    /// [`SimError::Api`] with the failure.
    pub async fn call(&self, method: &str, params: &[serde_json::Value]) -> Result<serde_json::Value, SimError> {
        let _ = (method, params);
        todo!()
    }
    /// Stops listening, breaks all connections and removes the disks.
    pub async fn shutdown(&self) {
        todo!()
    }
}
