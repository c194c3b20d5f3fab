//! [`SimPool`]: the whole pool as one handle, for Rust tests and for the binary.

mod build;
mod certificate;
mod life;
mod nbd_backend;
mod restore;
mod start;
mod storage;
mod vtpm;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use xenvault_block::{ByteRange, ReadAt, WriteAt};

pub(crate) use certificate::fingerprint;

use crate::control::WeakPool;
use crate::core::{Core, parse_uuid};
use crate::methods::{self, Reply};
use crate::model::Value;
use crate::nbd::{NbdFaults, NbdServer};
use crate::rpc::Failure;
use crate::storage::Storage;
use crate::{Counters, Fault, FaultEffect, NbdAccess, SimError, SimOptions};

/// A running pool. Clones share it; it ends with [`SimPool::shutdown`] or when the last clone is dropped.
#[derive(Clone)]
pub struct SimPool {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    core: Arc<Core>,
    /// By host; `None` while it is down.
    nbd: Mutex<Vec<Option<NbdServer>>>,
    control: SocketAddr,
    /// References of the SRs and VMs in the order of the options.
    srs: Vec<String>,
    vms: Vec<String>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.core.end.cancel();
    }
}

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

impl SimPool {
    /// Makes the disks, binds every port and answers from then on.
    ///
    /// # Errors
    /// [`SimError::Options`] for contradictions, [`SimError::Io`] and [`SimError::Certificate`] for the rest.
    pub async fn start(options: SimOptions) -> Result<Self, SimError> {
        start::start(options).await
    }

    pub(crate) fn downgrade(&self) -> WeakPool {
        WeakPool(Arc::downgrade(&self.inner))
    }

    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    fn coordinator(&self) -> Option<&crate::core::HostNode> {
        self.inner.core.hosts.get(self.inner.core.coordinator())
    }

    /// URL of the coordinator.
    pub fn url(&self) -> String {
        self.coordinator().map(|host| self.inner.core.url_of(host)).unwrap_or_default()
    }

    /// SHA-256 of the coordinator's certificate, lower-case hexadecimal without separators (also with `plain_http`,
    /// where only NBD uses it).
    pub fn fingerprint(&self) -> String {
        self.coordinator().map(|host| fingerprint(&host.certificate)).unwrap_or_default()
    }

    /// The account: `root`.
    pub fn user(&self) -> &str {
        "root"
    }

    /// Its password.
    pub fn password(&self) -> String {
        self.inner.core.options.password.clone()
    }

    /// URL of the control interface, plain HTTP.
    pub fn control_url(&self) -> String {
        format!("http://{}", self.inner.control)
    }

    /// The hosts in their order; the first is the coordinator at the start.
    pub fn hosts(&self) -> Vec<HostInfo> {
        let core = &self.inner.core;
        let info = |host: &crate::core::HostNode| HostInfo {
            uuid: host.uuid.to_string(),
            name: core.db().text("host", &host.reference, "name_label"),
            address: IpAddr::V4(host.address),
            url: core.url_of(host),
            fingerprint: fingerprint(&host.certificate),
        };
        core.hosts.iter().map(info).collect()
    }

    /// The SRs in the order of the options.
    pub fn srs(&self) -> Vec<SrInfo> {
        let db = self.inner.core.db();
        let info = |sr: &String| SrInfo { uuid: db.text("SR", sr, "uuid"), name: db.text("SR", sr, "name_label") };
        self.inner.srs.iter().map(info).collect()
    }

    /// The VMs in the order of the options, with their present disks.
    pub fn vms(&self) -> Vec<VmInfo> {
        self.inner.vms.iter().filter(|vm| self.inner.core.db().exists("VM", vm)).map(|vm| self.vm_info(vm)).collect()
    }

    fn vm_info(&self, vm: &str) -> VmInfo {
        let db = self.inner.core.db();
        let mut disks: Vec<DiskInfo> = db
            .set_of("VM", vm, "VBDs")
            .iter()
            .filter(|vbd| db.text("VBD", vbd, "type") == "Disk")
            .map(|vbd| {
                let vdi = db.text("VBD", vbd, "VDI");
                DiskInfo {
                    vdi: db.text("VDI", &vdi, "uuid"),
                    userdevice: db.text("VBD", vbd, "userdevice"),
                    size: u64::try_from(db.int("VDI", &vdi, "virtual_size")).unwrap_or_default(),
                    sr: db.text("SR", &db.text("VDI", &vdi, "SR"), "uuid"),
                }
            })
            .collect();
        disks.sort_by_key(|disk| disk.userdevice.parse().unwrap_or(u32::MAX));
        VmInfo { uuid: db.text("VM", vm, "uuid"), name: db.text("VM", vm, "name_label"), disks }
    }

    fn vm_ref(&self, name_or_uuid: &str) -> Result<String, SimError> {
        let db = self.inner.core.db();
        if let Ok(vm) = db.by_uuid("VM", name_or_uuid) {
            return Ok(vm);
        }
        let named = db.refs_where("VM", "name_label", name_or_uuid);
        match named.as_slice() {
            [vm] => Ok(vm.clone()),
            _ => Err(SimError::Unknown { kind: "VM", name: name_or_uuid.to_owned() }),
        }
    }

    /// Any VM of the pool (restored ones too) by uuid or, where unique, by name.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn vm(&self, name_or_uuid: &str) -> Result<VmInfo, SimError> {
        self.vm_ref(name_or_uuid).map(|vm| self.vm_info(&vm))
    }

    fn vdi_of(&self, vm: &str, userdevice: &str) -> Result<uuid::Uuid, SimError> {
        let info = self.vm(vm)?;
        let disk = info.disks.iter().find(|disk| disk.userdevice == userdevice);
        let disk = disk.ok_or_else(|| SimError::Unknown { kind: "disk", name: format!("{vm} {userdevice}") })?;
        Ok(parse_uuid(&disk.vdi)?)
    }

    /// Writes to a VM's disk as its guest would; changed block tracking sees it. `userdevice` as in the VBD.
    /// Works on halted VMs too (as a boot, write, shutdown).
    ///
    /// # Errors
    /// [`SimError::Unknown`], [`SimError::Io`] past the end, [`SimError::Api`] with the SR's error.
    pub fn guest_write(&self, vm: &str, userdevice: &str, offset: u64, data: &[u8]) -> Result<(), SimError> {
        loop {
            let vdi = self.vdi_of(vm, userdevice)?;
            let disk = self.inner.core.storage.disk(vdi).map_err(Failure::from);
            let written = disk
                .map_err(SimError::from)
                .and_then(|disk| disk.write_all_at(data, offset).map_err(SimError::io("write to the disk")));
            // A storage migration may have put another disk in its place just now.
            if written.is_ok() || self.vdi_of(vm, userdevice)? == vdi {
                return written;
            }
        }
    }

    /// Reads a VM's disk as its guest would.
    ///
    /// # Errors
    /// As [`SimPool::guest_write`].
    pub fn guest_read(&self, vm: &str, userdevice: &str, offset: u64, length: u64) -> Result<Vec<u8>, SimError> {
        let vdi = self.vdi_of(vm, userdevice)?;
        self.vdi_read(&vdi.to_string(), offset, length)
    }

    /// Reads any VDI (by uuid) without a VM.
    ///
    /// # Errors
    /// As [`SimPool::guest_write`].
    pub fn vdi_read(&self, vdi: &str, offset: u64, length: u64) -> Result<Vec<u8>, SimError> {
        let disk = self.inner.core.storage.disk(parse_uuid(vdi)?).map_err(Failure::from)?;
        let wrong = |error| SimError::io("read from the disk")(std::io::Error::other(error));
        let range = ByteRange::with_length(offset, length).map_err(wrong)?;
        disk.read(range).map(|bytes| bytes.to_vec()).map_err(SimError::io("read from the disk"))
    }

    /// Size of any VDI (by uuid) in bytes.
    ///
    /// # Errors
    /// [`SimError::Api`] if there is none or its data is gone.
    pub fn vdi_size(&self, vdi: &str) -> Result<u64, SimError> {
        Ok(self.inner.core.storage.disk(parse_uuid(vdi)?).map_err(Failure::from)?.size())
    }

    fn host_ref(&self, host: usize) -> Result<String, SimError> {
        let node = self.inner.core.hosts.get(host);
        node.map(|node| node.reference.clone())
            .ok_or_else(|| SimError::Unknown { kind: "host", name: host.to_string() })
    }

    /// Starts a halted VM on the host of that index (as `VM.start_on`).
    ///
    /// # Errors
    /// [`SimError::Unknown`] or [`SimError::Api`].
    pub async fn start_vm(&self, vm: &str, host: usize) -> Result<(), SimError> {
        let (vm, host) = (self.vm_ref(vm)?, self.host_ref(host)?);
        let params = [vm.into(), host.into(), false.into(), false.into()];
        self.call("VM.start_on", &params).await.map(drop)
    }

    /// Shuts a VM down cleanly.
    ///
    /// # Errors
    /// [`SimError::Unknown`] or [`SimError::Api`].
    pub async fn shutdown_vm(&self, vm: &str) -> Result<(), SimError> {
        let vm = self.vm_ref(vm)?;
        self.call("VM.clean_shutdown", &[vm.into()]).await.map(drop)
    }

    /// Live-migrates a VM to another host (as `VM.pool_migrate`).
    ///
    /// # Errors
    /// [`SimError::Unknown`] or [`SimError::Api`].
    pub async fn migrate_vm(&self, vm: &str, host: usize) -> Result<(), SimError> {
        let (vm, host) = (self.vm_ref(vm)?, self.host_ref(host)?);
        self.call("VM.pool_migrate", &[vm.into(), host.into(), serde_json::json!({})]).await.map(drop)
    }

    /// Sets the purpose of the first network.
    pub fn set_nbd(&self, access: NbdAccess) {
        let mut db = self.inner.core.db();
        let purposes = Value::texts(build::purposes(access));
        for network in db.refs_where("network", "bridge", "xenbr0") {
            db.set("network", &network, "purpose", purposes.clone());
        }
    }

    /// Orders a fault. Faults of one call are met in the order in which they were added.
    pub fn fault(&self, fault: Fault) {
        let core = &self.inner.core;
        match nbd_fault(&fault) {
            Some(order) => drop(core.nbd_faults.order(order)),
            None => core.faults.add(fault),
        }
    }

    /// Faults of the NBD servers, in their own terms (media errors, stalls, by host or disk).
    pub fn nbd_faults(&self) -> NbdFaults {
        self.inner.core.nbd_faults.clone()
    }

    /// Takes all faults away.
    pub fn clear_faults(&self) {
        self.inner.core.faults.clear();
        self.inner.core.nbd_faults.clear();
    }

    /// A copy of the counters.
    pub fn counters(&self) -> Counters {
        self.inner.core.counters.snapshot(&self.inner.core.nbd_counters)
    }

    /// The names of the calls and transfers that came, in their order: those of [`Counters::calls`], the first 10,000
    /// of the pool's life.
    pub fn call_sequence(&self) -> Vec<String> {
        self.inner.core.counters.sequence()
    }

    /// The disks and SRs behind the pool, for filling an SR and the like.
    pub fn storage(&self) -> Storage {
        self.inner.core.storage.clone()
    }

    /// All objects of one class (`VM`, `VDI`, ...): full records as JSON by reference.
    pub fn records(&self, class: &str) -> serde_json::Map<String, serde_json::Value> {
        let core = &self.inner.core;
        let db = core.db();
        let record = |reference: String| {
            let record = methods::record(core, &db, class, &reference).ok()?.to_json();
            let shown = if class == "session" { "session".to_owned() } else { reference };
            Some((shown, record))
        };
        db.refs(class).into_iter().filter_map(record).collect()
    }

    /// The record of one object by uuid.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn record(&self, class: &str, uuid: &str) -> Result<serde_json::Value, SimError> {
        let core = &self.inner.core;
        let db = core.db();
        let reference = db.by_uuid(class, uuid)?;
        Ok(methods::record(core, &db, class, &reference)?.to_json())
    }

    /// What stands in the pool that did not when it had started: class, reference and record of every VM, VDI, VBD,
    /// VIF, task and session (session references are not shown) that is new. For leak asserts, so without hidden base
    /// copies: nobody but the storage manager can remove them.
    pub fn new_objects(&self) -> Vec<(String, String, serde_json::Value)> {
        let core = &self.inner.core;
        let db = core.db();
        let mut found = Vec::new();
        for class in ["VM", "VDI", "VBD", "VIF", "task", "session"] {
            for reference in db.refs(class) {
                let known = core.baseline.get().is_some_and(|all| all.contains(&(class.to_owned(), reference.clone())));
                if known || (class == "VDI" && !db.flag("VDI", &reference, "managed")) {
                    continue;
                }
                if let Ok(record) = methods::record(core, &db, class, &reference) {
                    let shown = if class == "session" { "session".to_owned() } else { reference };
                    found.push((class.to_owned(), shown, record.to_json()));
                }
            }
        }
        found
    }

    /// Calls a XenAPI method as `root` without HTTP; parameters as in JSON-RPC, without the session.
    ///
    /// # Errors
    /// [`SimError::Api`] with the failure; `HOST_OFFLINE` while no coordinator answers.
    pub async fn call(&self, method: &str, params: &[serde_json::Value]) -> Result<serde_json::Value, SimError> {
        let core = &self.inner.core;
        let coordinator = core.coordinator();
        let host = self.host_ref(coordinator)?;
        if !core.has_coordinator() {
            return Err(Failure::new("HOST_OFFLINE", [host]).into());
        }
        let session = methods::session::open(core, &host, "root", methods::session::Identity::Root, "simulator");
        let mut values = vec![Value::text(session.as_str())];
        values.extend(params.iter().map(Value::from_json));
        let reply = methods::dispatch(core, coordinator, method, values).await;
        core.db().destroy("session", &session);
        match reply {
            Reply::Answer(outcome) => Ok(outcome.map(|value| value.to_json())?),
            Reply::Close | Reply::Silence => Err(Failure::new("INTERNAL_ERROR", ["no answer"]).into()),
        }
    }

    /// What a client needs to know, as one JSON object: the line that the binary prints.
    pub fn description(&self) -> serde_json::Value {
        serde_json::json!({
            "url": self.url(),
            "fingerprint": self.fingerprint(),
            "user": self.user(),
            "password": self.password(),
            "control_url": self.control_url(),
            "hosts": self.hosts(),
            "srs": self.srs(),
            "vms": self.vms(),
        })
    }

    /// Stops listening, breaks all connections and removes the disks.
    pub async fn shutdown(&self) {
        let servers: Vec<Option<NbdServer>> =
            std::mem::take(&mut *self.inner.nbd.lock().unwrap_or_else(PoisonError::into_inner));
        for server in servers.into_iter().flatten() {
            server.shutdown().await;
        }
        self.inner.core.end.cancel();
    }
}

/// An order for the NBD servers, if it is one.
fn nbd_fault(fault: &Fault) -> Option<crate::nbd::FaultOrder> {
    use crate::nbd::Fault as Nbd;
    let effect = match (fault.call.as_str(), &fault.effect) {
        ("nbd/accept", FaultEffect::Hang) => Nbd::Silence,
        ("nbd/accept", _) => Nbd::Refuse,
        ("nbd/open", FaultEffect::Delay(time)) => Nbd::OpenDelay(*time),
        ("nbd/open", _) => Nbd::RefuseOpen,
        ("nbd/read", FaultEffect::Delay(time)) => Nbd::ReadDelay(*time),
        ("nbd/read", FaultEffect::Hang) => Nbd::StallAfter(0),
        ("nbd/read", FaultEffect::Truncate(bytes)) => Nbd::DropAfter(*bytes),
        ("nbd/read", _) => Nbd::DropAfter(0),
        _ => return None,
    };
    let times = (fault.count != u64::MAX).then_some(fault.count);
    Some(crate::nbd::FaultOrder { fault: effect, host: None, vdi: None, skip: fault.skip, times })
}
