//! The configuration of a VM as a point keeps it: every record as it was read, in one JSON document.

use serde::{Deserialize, Serialize};
use xenvault_xenapi::value::{FromValue, ToValue};
use xenvault_xenapi::{Session, Value, network, vbd, vdi, vif, vm, vtpm};

use crate::EngineError;
use crate::backup::SkippedDevice;
use crate::pool::{Doing as _, is_gone};

/// Version of the document.
const VERSION: u32 = 1;

/// The document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VmConfig {
    version: u32,
    vm: Value,
    devices: Vec<DeviceConfig>,
    vifs: Vec<VifConfig>,
    vtpms: Vec<Value>,
    skipped: Vec<SkippedConfig>,
}

/// One block device.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct DeviceConfig {
    vbd: Value,
    /// The disk, if it has one that is part of the backup.
    vdi: Option<Value>,
}

/// One network interface.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct VifConfig {
    vif: Value,
    network_name: String,
    network_uuid: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SkippedConfig {
    device: String,
    reason: String,
}

/// A device with typed records.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) vbd: vbd::Record,
    pub(crate) vdi: Option<vdi::Record>,
}

/// An interface with a typed record.
#[derive(Clone, Debug)]
pub(crate) struct Interface {
    pub(crate) vif: vif::Record,
    pub(crate) network_name: String,
    pub(crate) network_uuid: String,
}

impl VmConfig {
    /// Reads what belongs to the VM. `disks` are the disks that are backed up, by the reference of their VBD's VDI.
    pub(crate) async fn read(
        session: &Session,
        vm: &vm::Record,
        devices: &[vbd::Record],
        disks: &[(vdi::Ref, vdi::Record)],
        skipped: &[SkippedDevice],
    ) -> Result<Self, EngineError> {
        let mut vifs = Vec::new();
        for reference in &vm.vifs {
            let record = match vif::get_record(session, reference).await {
                Err(error) if is_gone(&error) => continue,
                other => other.doing("read the VM's interfaces")?,
            };
            let network = network::get_record(session, &record.network).await.doing("read a network's record")?;
            vifs.push(VifConfig {
                vif: record.to_value(),
                network_name: network.name_label,
                network_uuid: network.uuid,
            });
        }
        let mut vtpms = Vec::new();
        for reference in &vm.vtpms {
            vtpms.push(vtpm::get_record(session, reference).await.doing("read the VM's TPM")?.to_value());
        }
        let device = |vbd: &vbd::Record| DeviceConfig {
            vbd: vbd.to_value(),
            vdi: disks.iter().find(|(reference, _)| *reference == vbd.vdi).map(|(_, record)| record.to_value()),
        };
        Ok(Self {
            version: VERSION,
            vm: vm.to_value(),
            devices: devices.iter().map(device).collect(),
            vifs,
            vtpms,
            skipped: skipped
                .iter()
                .map(|skip| SkippedConfig { device: skip.device.clone(), reason: skip.reason.clone() })
                .collect(),
        })
    }

    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, EngineError> {
        serde_json::to_vec(self).map_err(|_| EngineError::Internal { what: "encoding the VM's configuration".into() })
    }

    pub(crate) fn from_bytes(point: &str, bytes: &[u8]) -> Result<Self, EngineError> {
        let bad = |source| EngineError::Configuration { point: point.to_owned(), source };
        let config: Self = serde_json::from_slice(bytes).map_err(bad)?;
        if config.version == VERSION {
            return Ok(config);
        }
        let text =
            format!("it has version {}, this release reads version {VERSION}: use a newer release", config.version);
        Err(bad(serde::de::Error::custom(text)))
    }

    pub(crate) fn vm(&self, point: &str) -> Result<vm::Record, EngineError> {
        typed(point, self.vm.clone())
    }

    pub(crate) fn devices(&self, point: &str) -> Result<Vec<Device>, EngineError> {
        let device = |config: &DeviceConfig| {
            Ok(Device {
                vbd: typed(point, config.vbd.clone())?,
                vdi: config.vdi.clone().map(|value| typed(point, value)).transpose()?,
            })
        };
        self.devices.iter().map(device).collect()
    }

    pub(crate) fn interfaces(&self, point: &str) -> Result<Vec<Interface>, EngineError> {
        let interface = |config: &VifConfig| {
            Ok(Interface {
                vif: typed(point, config.vif.clone())?,
                network_name: config.network_name.clone(),
                network_uuid: config.network_uuid.clone(),
            })
        };
        self.vifs.iter().map(interface).collect()
    }

    pub(crate) fn has_tpm(&self) -> bool {
        !self.vtpms.is_empty()
    }

    pub(crate) fn skipped(&self) -> impl Iterator<Item = (&str, &str)> {
        self.skipped.iter().map(|skip| (skip.device.as_str(), skip.reason.as_str()))
    }
}

fn typed<T: FromValue>(point: &str, value: Value) -> Result<T, EngineError> {
    T::from_value(value).map_err(|error| EngineError::Configuration {
        point: point.to_owned(),
        source: serde::de::Error::custom(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        let record = vm::Record { name_label: "web".into(), vcpus_max: 4, ..Default::default() };
        let vbd = vbd::Record { userdevice: "0".into(), bootable: true, ..Default::default() };
        VmConfig {
            version: VERSION,
            vm: record.to_value(),
            devices: vec![DeviceConfig { vbd: vbd.to_value(), vdi: None }],
            vifs: Vec::new(),
            vtpms: Vec::new(),
            skipped: vec![SkippedConfig { device: "3".into(), reason: "CD drive".into() }],
        }
    }

    #[test]
    fn a_configuration_survives_its_bytes() {
        let bytes = config().to_bytes().unwrap();
        let back = VmConfig::from_bytes("p", &bytes).unwrap();
        let record = back.vm("p").unwrap();
        assert_eq!((record.name_label.as_str(), record.vcpus_max), ("web", 4));
        assert!(back.devices("p").unwrap()[0].vbd.bootable);
        assert_eq!(back.skipped().collect::<Vec<_>>(), [("3", "CD drive")]);
    }

    #[test]
    fn a_newer_or_damaged_configuration_is_an_error() {
        let mut newer = config();
        newer.version = 2;
        assert!(VmConfig::from_bytes("p", &newer.to_bytes().unwrap()).is_err());
        assert!(VmConfig::from_bytes("p", b"{").is_err());
    }
}
