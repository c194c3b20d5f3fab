//! Where a restore goes: the SR, a host that reaches it, and the network of each interface.

use std::collections::{BTreeMap, BTreeSet};

use xenvault_xenapi::{Session, host, network, pbd, pool, sm, sr, vdi, vif, vm};

use super::request::{MacPolicy, SrSelector};
use crate::EngineError;
use crate::config::Interface;
use crate::pool::{Doing as _, keeps_vhds};

/// What an empty disk of an SR reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Emptiness {
    /// Zeros: what is zero need not be sent.
    Zeros,
    /// Anything: every byte is sent.
    Garbage,
}

/// The SR of a restore.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) reference: sr::Ref,
    pub(super) record: sr::Record,
    /// A host that has it plugged.
    pub(super) host: host::Ref,
    formats: Vec<sm::ImageFormatType>,
}

impl Target {
    pub(super) async fn find(session: &Session, pool: &pool::Record, wanted: &SrSelector) -> Result<Self, EngineError> {
        let all = sr::get_all_records(session).await.doing("list the SRs")?;
        let text = match wanted {
            SrSelector::Uuid(text) | SrSelector::Name(text) | SrSelector::UuidOrName(text) => text.as_str(),
            SrSelector::Default => "the pool's default SR",
        };
        let matches = |reference: &sr::Ref, record: &sr::Record| match wanted {
            SrSelector::Uuid(uuid) => record.uuid == *uuid,
            SrSelector::Name(name) => record.name_label == *name,
            SrSelector::UuidOrName(text) => record.uuid == *text || record.name_label == *text,
            SrSelector::Default => *reference == pool.default_sr,
        };
        let mut found: Vec<(sr::Ref, sr::Record)> = all
            .into_iter()
            .filter(|(reference, record)| record.content_type != "iso" && matches(reference, record))
            .collect();
        if found.len() > 1 {
            let uuids = found.into_iter().map(|(_, record)| record.uuid).collect();
            return Err(EngineError::AmbiguousSr { name: text.to_owned(), uuids });
        }
        let unknown = || EngineError::UnknownSr { wanted: text.to_owned() };
        let (reference, record) = found.pop().ok_or_else(unknown)?;
        let pbds = pbd::get_all_records(session).await.doing("list the PBDs")?;
        let host = pbds
            .into_values()
            .find(|pbd| pbd.sr == reference && pbd.currently_attached)
            .map(|pbd| pbd.host)
            .ok_or_else(unknown)?;
        let managers = sm::get_all_records(session).await.doing("list the storage managers")?;
        let formats = managers
            .into_values()
            .find(|manager| manager.type_ == record.type_)
            .map(|manager| manager.supported_image_formats)
            .unwrap_or_default();
        Ok(Self { reference, record, host, formats })
    }

    /// Refuses an SR that can not hold the disks.
    pub(super) fn check_space(&self, disks: u64, data: u64) -> Result<(), EngineError> {
        let size = u64::try_from(self.record.physical_size).unwrap_or(0);
        let used = u64::try_from(self.record.physical_utilisation).unwrap_or(0);
        let free = size.saturating_sub(used);
        let thick = self.record.type_.starts_with("lvm")
            && !self.record.sm_config.get("allocation").is_some_and(|value| value.contains("thin"));
        let needed = if thick { disks } else { data };
        if size > 0 && needed > free {
            return Err(EngineError::TargetSpace { sr: self.record.name_label.clone(), free, needed });
        }
        Ok(())
    }

    /// What a disk that was made on this SR a moment ago reads as. Unknown types are taken for garbage.
    pub(super) fn emptiness(&self, disk: &vdi::Record) -> Emptiness {
        if disk.sm_config.get("type").is_some_and(|format| format == "raw") {
            return Emptiness::Garbage;
        }
        // gfs2 keeps its disks as qcow2; newer servers say which formats a type writes.
        let sparse = |format: &sm::ImageFormatType| matches!(format.as_str(), "vhd" | "qcow2");
        let sparse_only = !self.formats.is_empty() && self.formats.iter().all(sparse);
        if keeps_vhds(&self.record, disk) || self.record.type_ == "gfs2" || sparse_only {
            Emptiness::Zeros
        } else {
            Emptiness::Garbage
        }
    }
}

/// The networks of the pool, and what the caller wants to go where.
pub(super) struct Networks {
    all: BTreeMap<network::Ref, network::Record>,
    map: BTreeMap<String, network::Ref>,
    used_macs: BTreeSet<String>,
}

impl Networks {
    /// Reads the networks and checks the caller's map before anything is made.
    pub(super) async fn read(session: &Session, wanted: &BTreeMap<String, String>) -> Result<Self, EngineError> {
        let all = network::get_all_records(session).await.doing("list the networks")?;
        let mut map = BTreeMap::new();
        for (from, to) in wanted {
            let unknown = || EngineError::UnknownNetwork { wanted: to.clone() };
            let target = by_uuid(&all, to).or_else(|| by_name(&all, to)).ok_or_else(unknown)?;
            map.insert(from.clone(), target);
        }
        let vms = vm::get_all_records(session).await.doing("list the VMs")?;
        let vifs = vif::get_all_records(session).await.doing("list the VIFs")?;
        // Snapshots and templates keep the addresses of their VM and never use them.
        let of_vm = |vif: &vif::Record| vms.get(&vif.vm).is_none_or(|vm| !vm.is_a_snapshot && !vm.is_a_template);
        let used_macs = vifs.into_values().filter(of_vm).map(|record| record.mac.to_ascii_lowercase()).collect();
        Ok(Self { all, map, used_macs })
    }

    /// The network of an interface: by the caller's map, else the same one, else the only one of that name; never any
    /// other (U20).
    pub(super) fn of(&self, interface: &Interface) -> Option<(network::Ref, String)> {
        let mapped = self.map.get(&interface.network_uuid).or_else(|| self.map.get(&interface.network_name)).cloned();
        let found = mapped
            .or_else(|| by_uuid(&self.all, &interface.network_uuid))
            .or_else(|| by_name(&self.all, &interface.network_name))?;
        let name = self.all.get(&found)?.name_label.clone();
        Some((found, name))
    }

    /// The address for a new interface; empty means that the pool makes one.
    pub(super) fn mac(&self, policy: MacPolicy, original: &str) -> String {
        let keep = match policy {
            MacPolicy::Keep => true,
            MacPolicy::New => false,
            MacPolicy::KeepIfFree => !self.used_macs.contains(&original.to_ascii_lowercase()),
        };
        if keep { original.to_owned() } else { String::new() }
    }
}

fn by_uuid(all: &BTreeMap<network::Ref, network::Record>, uuid: &str) -> Option<network::Ref> {
    all.iter().find(|(_, record)| record.uuid == uuid).map(|(reference, _)| reference.clone())
}

/// The network of that name, if there is exactly one.
fn by_name(all: &BTreeMap<network::Ref, network::Record>, name: &str) -> Option<network::Ref> {
    let mut found = all.iter().filter(|(_, record)| record.name_label == name);
    match (found.next(), found.next()) {
        (Some((reference, _)), None) => Some(reference.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(list: &[(&str, &str)]) -> BTreeMap<network::Ref, network::Record> {
        list.iter()
            .map(|(uuid, name)| {
                let record = network::Record { uuid: (*uuid).into(), name_label: (*name).into(), ..Default::default() };
                (network::Ref::new(&format!("OpaqueRef:{uuid}")), record)
            })
            .collect()
    }

    fn interface(uuid: &str, name: &str) -> Interface {
        Interface { vif: vif::Record::default(), network_name: name.into(), network_uuid: uuid.into() }
    }

    #[test]
    fn an_interface_goes_to_its_own_network_or_one_of_its_name_or_none() {
        let all = networks(&[("1", "lan"), ("2", "dmz"), ("3", "twice"), ("4", "twice")]);
        let networks = Networks { all, map: BTreeMap::new(), used_macs: BTreeSet::new() };
        let name = |uuid: &str, name: &str| networks.of(&interface(uuid, name)).map(|(_, name)| name);
        assert_eq!(name("2", "lan").as_deref(), Some("dmz"), "the UUID is the better name");
        assert_eq!(name("9", "lan").as_deref(), Some("lan"));
        assert_eq!(name("9", "gone"), None, "never a random network");
        assert_eq!(name("9", "twice"), None, "never one of two");
    }

    #[test]
    fn the_callers_map_goes_first() {
        let all = networks(&[("1", "lan"), ("2", "dmz")]);
        let map = BTreeMap::from([("lan".to_owned(), network::Ref::new("OpaqueRef:2"))]);
        let networks = Networks { all, map, used_macs: BTreeSet::new() };
        assert_eq!(networks.of(&interface("1", "lan")).unwrap().1, "dmz");
    }

    #[test]
    fn an_address_is_kept_only_where_it_is_free() {
        let used_macs = BTreeSet::from(["00:00:5e:00:53:01".to_owned()]);
        let networks = Networks { all: BTreeMap::new(), map: BTreeMap::new(), used_macs };
        assert_eq!(networks.mac(MacPolicy::KeepIfFree, "00:00:5E:00:53:01"), "");
        assert_eq!(networks.mac(MacPolicy::KeepIfFree, "00:00:5e:00:53:02"), "00:00:5e:00:53:02");
        assert_eq!(networks.mac(MacPolicy::Keep, "00:00:5e:00:53:01"), "00:00:5e:00:53:01");
        assert_eq!(networks.mac(MacPolicy::New, "00:00:5e:00:53:02"), "");
    }
}
