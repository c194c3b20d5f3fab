//! Disks, layers and repositories, and what the operations do to them. Under one lock; reads and writes of data take
//! it shared, changes of the structure take it alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use xenvault_block::ExtentSet;

use super::cbt::ChangeLogs;
use super::layer::Layer;
use super::mirror::Mirror;
use super::space::{self, LVM_EXTENT_BYTES};
use super::{AttachMode, CbtMessage, LostBits, SrError, SrKind, SrUsage, VdiInfo};

/// The most files of a chain below a disk that is to be snapshotted.
const MAX_CHAIN: usize = 30;

/// A storage repository.
#[derive(Debug)]
pub(super) struct Sr {
    pub(super) kind: SrKind,
    physical_size: u64,
    pub(super) foreign_bytes: u64,
    pub(super) collects_garbage: bool,
    logs: Mutex<ChangeLogs>,
}

impl Sr {
    pub(super) fn logs(&self) -> MutexGuard<'_, ChangeLogs> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk.
#[derive(Debug)]
pub(super) struct Vdi {
    pub(super) sr: Uuid,
    pub(super) size: u64,
    /// Its own layer, which takes its writes; none once the data was destroyed.
    pub(super) top: Option<u64>,
    /// Whether its volume is as small as can be: a snapshot's.
    deflated: bool,
    readers: u32,
    writers: u32,
}

/// Everything.
#[derive(Debug, Default)]
pub(super) struct State {
    srs: BTreeMap<Uuid, Sr>,
    vdis: BTreeMap<Uuid, Vdi>,
    layers: BTreeMap<u64, Layer>,
    next_layer: u64,
    /// Copies that take every write to a disk, by the disk.
    mirrors: BTreeMap<Uuid, Mirror>,
}

impl State {
    pub(super) fn create_sr(&mut self, sr: Uuid, kind: SrKind, physical_size: u64) {
        let logs = Mutex::default();
        self.srs.insert(sr, Sr { kind, physical_size, foreign_bytes: 0, collects_garbage: true, logs });
    }

    pub(super) fn destroy_sr(&mut self, sr: Uuid) -> Result<(), SrError> {
        self.srs.remove(&sr).ok_or_else(|| SrError::no_such_sr(sr))?;
        self.vdis.retain(|_, vdi| vdi.sr != sr);
        self.layers.retain(|_, layer| layer.sr != sr);
        Ok(())
    }

    pub(super) fn sr(&self, sr: Uuid) -> Result<&Sr, SrError> {
        self.srs.get(&sr).ok_or_else(|| SrError::no_such_sr(sr))
    }

    pub(super) fn sr_mut(&mut self, sr: Uuid) -> Result<&mut Sr, SrError> {
        self.srs.get_mut(&sr).ok_or_else(|| SrError::no_such_sr(sr))
    }

    pub(super) fn vdi(&self, vdi: Uuid) -> Result<&Vdi, SrError> {
        self.vdis.get(&vdi).ok_or_else(|| SrError::no_such_vdi(vdi))
    }

    fn vdi_mut(&mut self, vdi: Uuid) -> Result<&mut Vdi, SrError> {
        self.vdis.get_mut(&vdi).ok_or_else(|| SrError::no_such_vdi(vdi))
    }

    pub(super) fn layer(&self, id: u64) -> Option<&Layer> {
        self.layers.get(&id)
    }

    /// The layer that takes a disk's writes.
    pub(super) fn top_of(&self, vdi: Uuid) -> Result<u64, SrError> {
        self.vdi(vdi)?.top.ok_or_else(|| SrError::api("VDI_INCOMPATIBLE_TYPE", &[&vdi.to_string(), "cbt_metadata"]))
    }

    /// The layers of a disk, its own first.
    pub(super) fn chain(&self, top: u64) -> impl Iterator<Item = (u64, &Layer)> {
        let first = self.layers.get(&top).map(|layer| (top, layer));
        std::iter::successors(first, |(_, layer)| {
            let parent = layer.parent?;
            self.layers.get(&parent).map(|layer| (parent, layer))
        })
    }

    fn add_layer(&mut self, layer: Layer) -> u64 {
        let id = self.next_layer;
        self.next_layer += 1;
        self.layers.insert(id, layer);
        id
    }

    // Space

    /// What a disk's own file or volume takes.
    fn vdi_bytes(&self, kind: SrKind, vdi: &Vdi) -> u64 {
        let Some(layer) = vdi.top.and_then(|top| self.layers.get(&top)) else { return 0 };
        match kind {
            SrKind::Ext => space::vhd_file(vdi.size, layer.block_count()),
            SrKind::Lvm if vdi.deflated => space::deflated_vhd_volume(layer.block_count()),
            SrKind::Lvm => space::full_vhd_volume(vdi.size),
            SrKind::LvmRaw => vdi.size,
            SrKind::Large => space::cluster_file(layer.page_count()),
        }
    }

    /// What a base copy takes.
    fn base_bytes(&self, kind: SrKind, layer: &Layer) -> u64 {
        match kind {
            SrKind::Ext => space::vhd_file(0, layer.block_count()),
            SrKind::Lvm | SrKind::LvmRaw => space::deflated_vhd_volume(layer.block_count()),
            SrKind::Large => space::cluster_file(layer.page_count()),
        }
    }

    /// The base copies of a repository.
    fn bases(&self, sr: Uuid) -> impl Iterator<Item = (u64, &Layer)> {
        let tops: std::collections::BTreeSet<u64> = self.vdis.values().filter_map(|vdi| vdi.top).collect();
        self.layers
            .iter()
            .filter(move |(id, layer)| layer.sr == sr && !tops.contains(id))
            .map(|(&id, layer)| (id, layer))
    }

    pub(super) fn usage(&self, id: Uuid) -> Result<SrUsage, SrError> {
        let sr = self.sr(id)?;
        let disks = self.vdis.values().filter(|vdi| vdi.sr == id);
        let (mut used, mut virtual_allocation) = (sr.foreign_bytes, 0);
        for vdi in disks {
            used += self.vdi_bytes(sr.kind, vdi);
            virtual_allocation += vdi.size;
        }
        used += self.bases(id).map(|(_, layer)| self.base_bytes(sr.kind, layer)).sum::<u64>();
        used += sr.logs().iter().map(|(_, log)| log_bytes(sr.kind, log.file_bytes())).sum::<u64>();
        Ok(SrUsage { physical_size: sr.physical_size, physical_utilisation: used, virtual_allocation })
    }

    pub(super) fn free_bytes(&self, sr: Uuid) -> Result<u64, SrError> {
        let usage = self.usage(sr)?;
        Ok(usage.physical_size.saturating_sub(usage.physical_utilisation))
    }

    fn require(&self, sr: Uuid, bytes: u64) -> Result<(), SrError> {
        if self.free_bytes(sr)? < bytes { Err(SrError::no_space()) } else { Ok(()) }
    }

    // What is known

    pub(super) fn info(&self, id: Uuid) -> Result<VdiInfo, SrError> {
        let vdi = self.vdi(id)?;
        let sr = self.sr(vdi.sr)?;
        let below = vdi.top.and_then(|top| self.layers.get(&top)?.parent).and_then(|parent| self.layers.get(&parent));
        Ok(VdiInfo {
            vdi: id,
            sr: vdi.sr,
            kind: sr.kind,
            virtual_size: vdi.size,
            physical_utilisation: self.vdi_bytes(sr.kind, vdi),
            cbt_enabled: sr.logs().contains(id),
            metadata_only: vdi.top.is_none(),
            parent: below.map(|layer| layer.uuid),
        })
    }

    pub(super) fn infos(&self, sr: Uuid) -> Result<Vec<VdiInfo>, SrError> {
        self.sr(sr)?;
        self.vdis.iter().filter(|(_, vdi)| vdi.sr == sr).map(|(&id, _)| self.info(id)).collect()
    }

    pub(super) fn base_copies(&self, id: Uuid) -> Result<Vec<VdiInfo>, SrError> {
        let sr = self.sr(id)?;
        let size_above = |base: u64| {
            let users = self
                .vdis
                .values()
                .filter(|vdi| vdi.top.is_some_and(|top| self.chain(top).any(|(layer, _)| layer == base)));
            users.map(|vdi| vdi.size).min().unwrap_or_default()
        };
        let bases = self.bases(id).map(|(base, layer)| VdiInfo {
            vdi: layer.uuid,
            sr: id,
            kind: sr.kind,
            virtual_size: size_above(base),
            physical_utilisation: self.base_bytes(sr.kind, layer),
            cbt_enabled: false,
            metadata_only: false,
            parent: layer.parent.and_then(|parent| self.layers.get(&parent)).map(|layer| layer.uuid),
        });
        Ok(bases.collect())
    }

    pub(super) fn mirror_of(&self, vdi: Uuid) -> Option<&Mirror> {
        self.mirrors.get(&vdi)
    }

    pub(super) fn set_mirror(&mut self, vdi: Uuid, mirror: Option<Mirror>) -> Option<Mirror> {
        match mirror {
            Some(mirror) => self.mirrors.insert(vdi, mirror),
            None => self.mirrors.remove(&vdi),
        }
    }

    // Operations

    pub(super) fn create(
        &mut self,
        sr: Uuid,
        vdi: Uuid,
        wanted: u64,
        content: Option<(File, ExtentSet)>,
    ) -> Result<VdiInfo, SrError> {
        let kind = self.sr(sr)?.kind;
        if self.vdis.contains_key(&vdi) {
            return Err(SrError::exists());
        }
        let size = space::disk_size(kind, wanted)?;
        let mut layer = Layer::new(sr, None);
        layer.garbage = kind == SrKind::LvmRaw;
        if let Some((file, extents)) = content {
            // A raw volume that was filled from a file has zeros where the file has holes.
            let extents =
                if layer.garbage { ExtentSet::from_range(xenvault_block::ByteRange::up_to(size)) } else { extents };
            layer = layer.with_source(file, &extents);
        }
        let needed = match kind {
            SrKind::Ext => space::vhd_file(size, layer.block_count()),
            SrKind::Lvm => space::full_vhd_volume(size),
            SrKind::LvmRaw => size,
            SrKind::Large => space::cluster_file(layer.page_count()),
        };
        self.require(sr, needed)?;
        let top = Some(self.add_layer(layer));
        self.vdis.insert(vdi, Vdi { sr, size, top, deflated: false, readers: 0, writers: 0 });
        self.info(vdi)
    }

    /// Puts an empty layer over a disk's, and another one for the new disk: both are leaves of a base copy then.
    fn fork(&mut self, id: Uuid, new: Uuid, snapshot: bool) -> Result<(), SrError> {
        let top = self.top_of(id)?;
        let vdi = self.vdi(id)?;
        let (sr, size, running) = (vdi.sr, vdi.size, vdi.writers + vdi.readers > 0);
        let kind = self.sr(sr)?.kind;
        if kind == SrKind::LvmRaw {
            return Err(SrError::unimplemented(Some("Raw VDI, snapshot or clone not permitted")));
        }
        if self.vdis.contains_key(&new) {
            return Err(SrError::exists());
        }
        if self.chain(top).count() >= MAX_CHAIN {
            return Err(SrError::chain_too_long());
        }
        let needed = match kind {
            SrKind::Ext => 2 * space::vhd_file(size, 0),
            SrKind::LvmRaw | SrKind::Large => 2 * space::cluster_file(0),
            SrKind::Lvm => {
                let (full, thin) = (space::full_vhd_volume(size), space::deflated_vhd_volume(0));
                let original = if vdi.deflated && !running { thin } else { full };
                let second = if snapshot { thin } else { full };
                let base = self.layers.get(&top).map(Layer::block_count).map(space::deflated_vhd_volume);
                let given_back = self.vdi_bytes(kind, vdi).saturating_sub(base.unwrap_or_default());
                (original + second + 2 * LVM_EXTENT_BYTES).saturating_sub(given_back)
            }
        };
        self.require(sr, needed)?;
        let leaf = self.add_layer(Layer::new(sr, Some(top)));
        let other = self.add_layer(Layer::new(sr, Some(top)));
        self.vdi_mut(id)?.top = Some(leaf);
        self.vdis.insert(new, Vdi { sr, size, top: Some(other), deflated: snapshot, readers: 0, writers: 0 });
        Ok(())
    }

    pub(super) fn snapshot(&mut self, id: Uuid, new: Uuid) -> Result<(VdiInfo, Option<CbtMessage>), SrError> {
        self.fork(id, new, true)?;
        let vdi = self.vdi(id)?;
        let sr = self.sr(vdi.sr)?;
        let room = sr.kind != SrKind::Lvm || self.free_bytes(vdi.sr)? >= LVM_EXTENT_BYTES;
        let made = sr.logs().snapshot(id, new, vdi.size, room);
        let message = (!made).then(|| CbtMessage {
            vdi: id,
            name: "VDI_CBT_SNAPSHOT_FAILED",
            body: format!("Creating CBT metadata log for disk {id} failed."),
        });
        Ok((self.info(new)?, message))
    }

    pub(super) fn clone_disk(&mut self, id: Uuid, new: Uuid) -> Result<VdiInfo, SrError> {
        self.fork(id, new, false)?;
        self.info(new)
    }

    pub(super) fn resize(&mut self, id: Uuid, wanted: u64) -> Result<(u64, Option<CbtMessage>), SrError> {
        self.top_of(id)?;
        let vdi = self.vdi(id)?;
        let (sr_id, old) = (vdi.sr, vdi.size);
        let kind = self.sr(sr_id)?.kind;
        if wanted < old {
            return Err(SrError::bad_size("shrinking not allowed"));
        }
        let size = space::disk_size(kind, wanted)?;
        let needed = match kind {
            SrKind::Lvm if !vdi.deflated => space::full_vhd_volume(size) - space::full_vhd_volume(old),
            SrKind::LvmRaw => size - old,
            _ => 0,
        };
        self.require(sr_id, needed)?;
        self.vdi_mut(id)?.size = size;
        let sr = self.sr(sr_id)?;
        let grown = sr.logs().resize(id, size);
        if grown {
            return Ok((size, None));
        }
        sr.logs().drop_log(id);
        let body = format!("Resizing of CBT metadata for disk {id} failed.");
        Ok((size, Some(CbtMessage { vdi: id, name: "VDI_CBT_RESIZE_FAILED", body })))
    }

    pub(super) fn destroy(&mut self, folder: &Path, id: Uuid) -> Result<(), SrError> {
        let Some(vdi) = self.vdis.get(&id) else { return Ok(()) };
        if vdi.readers + vdi.writers > 0 {
            return Err(SrError::in_use());
        }
        let sr = vdi.sr;
        self.vdis.remove(&id);
        self.sr(sr)?.logs().delete(id);
        self.collect_garbage(folder, sr);
        Ok(())
    }

    pub(super) fn data_destroy(&mut self, folder: &Path, id: Uuid) -> Result<(), SrError> {
        let vdi = self.vdi(id)?;
        let sr = vdi.sr;
        if !self.sr(sr)?.logs().contains(id) {
            return Err(SrError::api("VDI_NO_CBT_METADATA", &[&id.to_string()]));
        }
        if vdi.readers + vdi.writers > 0 {
            return Err(SrError::in_use());
        }
        self.vdi_mut(id)?.top = None;
        self.collect_garbage(folder, sr);
        Ok(())
    }

    pub(super) fn configure_cbt(&mut self, id: Uuid, is_snapshot: bool, enable: bool) -> Result<(), SrError> {
        self.top_of(id)?;
        let vdi = self.vdi(id)?;
        let sr = self.sr(vdi.sr)?;
        if sr.kind == SrKind::LvmRaw || is_snapshot {
            return Err(SrError::bad_type("Raw VDI or snapshot not permitted"));
        }
        if sr.logs().contains(id) == enable {
            return Ok(());
        }
        if !enable {
            sr.logs().disable(id);
            return Ok(());
        }
        if sr.kind == SrKind::Lvm && self.free_bytes(vdi.sr)? < LVM_EXTENT_BYTES {
            let text = "Unable to activate changed block tracking.";
            return Err(SrError::backend(457, text, Some("There is insufficient space")));
        }
        sr.logs().enable(id, vdi.size, vdi.writers > 0);
        Ok(())
    }

    pub(super) fn changed_blocks(&self, from: Uuid, to: Uuid) -> Result<Vec<u8>, SrError> {
        let sr = self.vdi(to)?.sr;
        self.sr(sr)?.logs().changed_blocks(from, to)
    }

    pub(super) fn lose_change_log(&mut self, id: Uuid) -> Result<(), SrError> {
        let sr = self.vdi(id)?.sr;
        self.sr(sr)?.logs().drop_log(id);
        Ok(())
    }

    pub(super) fn attach(&mut self, id: Uuid, mode: AttachMode) -> Result<Option<CbtMessage>, SrError> {
        self.top_of(id).map_err(|_| SrError::no_such_vdi(id))?;
        let vdi = self.vdi_mut(id)?;
        if mode == AttachMode::ReadOnly {
            vdi.readers += 1;
            return Ok(None);
        }
        vdi.writers += 1;
        if vdi.writers > 1 {
            return Ok(None);
        }
        let sr = vdi.sr;
        let dropped = self.sr(sr)?.logs().activate(id);
        Ok(dropped.then(|| CbtMessage {
            vdi: id,
            name: "VDI_CBT_METADATA_INCONSISTENT",
            body: format!("Changed Block Tracking metadata is inconsistent for disk {id}."),
        }))
    }

    pub(super) fn detach(&mut self, id: Uuid, mode: AttachMode) -> Result<(), SrError> {
        let vdi = self.vdi_mut(id)?;
        if mode == AttachMode::ReadOnly {
            vdi.readers = vdi.readers.saturating_sub(1);
            return Ok(());
        }
        vdi.writers = vdi.writers.saturating_sub(1);
        if vdi.writers == 0 {
            let sr = vdi.sr;
            self.sr(sr)?.logs().deactivate(id);
        }
        Ok(())
    }

    pub(super) fn crash(&mut self, id: Uuid, lost: LostBits) -> Result<(), SrError> {
        let vdi = self.vdi_mut(id)?;
        (vdi.readers, vdi.writers) = (0, 0);
        let sr = vdi.sr;
        self.sr(sr)?.logs().crash(id, lost == LostBits::SinceAttach);
        Ok(())
    }

    // Base copies

    /// Removes layers that nothing uses, and joins base copies that have only one child with it.
    pub(super) fn collect_garbage(&mut self, folder: &Path, sr: Uuid) {
        if !self.sr(sr).is_ok_and(|sr| sr.collects_garbage) {
            return;
        }
        loop {
            let mut children: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
            for (&id, layer) in self.layers.iter().filter(|(_, layer)| layer.sr == sr) {
                children.entry(id).or_default();
                if let Some(parent) = layer.parent {
                    children.entry(parent).or_default().push(id);
                }
            }
            for top in self.vdis.values().filter_map(|vdi| vdi.top) {
                children.remove(&top);
            }
            let unused = children.iter().find(|(_, above)| above.is_empty()).map(|(&id, _)| id);
            if let Some(id) = unused {
                self.layers.remove(&id);
                continue;
            }
            let single = children.iter().find_map(|(&id, above)| match above.as_slice() {
                &[child] => Some((id, child)),
                _ => None,
            });
            let Some((base, child)) = single else { return };
            if !self.join(folder, base, child) {
                return;
            }
        }
    }

    /// Makes one layer of a base copy and its only child; gives whether that worked. The lesser of the two is copied.
    fn join(&mut self, folder: &Path, base: u64, child: u64) -> bool {
        let (Some(mut below), Some(mut above)) = (self.layers.remove(&base), self.layers.remove(&child)) else {
            return false;
        };
        let upward = below.own_page_count() <= above.own_page_count();
        let done = if upward { above.absorb_below(folder, &mut below) } else { below.absorb_above(folder, &mut above) };
        if let Err(error) = done {
            tracing::error!(%error, "a base copy could not be merged and stays");
            self.layers.insert(base, below);
            self.layers.insert(child, above);
            return false;
        }
        above.parent = below.parent;
        // The child's number stays: disks and layers above refer to it.
        self.layers.insert(child, if upward { above } else { below });
        true
    }
}

/// What a change log takes.
fn log_bytes(kind: SrKind, file_bytes: u64) -> u64 {
    if kind == SrKind::Lvm { LVM_EXTENT_BYTES } else { file_bytes }
}
