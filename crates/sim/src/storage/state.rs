//! Disks, layers and repositories, and what the operations do to them. Under one lock; reads and writes of data take
//! it shared, changes of the structure take it alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use xenvault_block::ExtentSet;

use super::cbt::ChangeLogs;
use super::garbage::InProgress;
use super::layer::Layer;
use super::mirror::Mirror;
use super::space::{self, LVM_EXTENT_BYTES};
use super::usage::{self, Counted};
use super::{AttachMode, CbtFault, CbtMessage, LostBits, SrError, SrKind, VdiInfo};

/// The most files of a chain below a disk that is to be snapshotted.
const MAX_CHAIN: usize = 30;

/// A storage repository.
#[derive(Debug)]
pub(super) struct Sr {
    pub(super) kind: SrKind,
    pub(super) physical_size: u64,
    pub(super) foreign_bytes: u64,
    pub(super) collects_garbage: bool,
    /// The merge that has begun and not ended.
    pub(super) merging: Option<InProgress>,
    /// The sums over all disks, as long as they are known.
    pub(super) counted: Counted,
    logs: Mutex<ChangeLogs>,
}

impl Sr {
    pub(super) fn logs(&self) -> MutexGuard<'_, ChangeLogs> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a new disk holds.
pub(super) enum Content {
    /// The content of a file, where it has any.
    File(File, ExtentSet),
    /// Noise in its first bytes.
    Noise { seed: u64, bytes: u64 },
}

/// A disk.
#[derive(Debug)]
pub(super) struct Vdi {
    pub(super) sr: Uuid,
    pub(super) size: u64,
    /// Its own layer, which takes its writes; none once the data was destroyed.
    pub(super) top: Option<u64>,
    /// Whether its volume is as small as can be: a snapshot's that nobody writes to.
    pub(super) deflated: bool,
    /// Whether it was, until somebody began to write to it.
    inflated: bool,
    readers: u32,
    writers: u32,
    /// What is to go wrong with its change log, oldest order first.
    cbt_faults: Vec<CbtFault>,
}

impl Vdi {
    fn new(sr: Uuid, size: u64, top: u64, deflated: bool) -> Self {
        Self { sr, size, top: Some(top), deflated, inflated: false, readers: 0, writers: 0, cbt_faults: Vec::new() }
    }

    /// Takes an order to fail; gives whether there was one.
    fn takes_fault(&mut self, fault: CbtFault) -> bool {
        let found = self.cbt_faults.iter().position(|known| *known == fault);
        found.map(|at| self.cbt_faults.remove(at)).is_some()
    }
}

/// Everything.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) srs: BTreeMap<Uuid, Sr>,
    pub(super) vdis: BTreeMap<Uuid, Vdi>,
    pub(super) layers: BTreeMap<u64, Layer>,
    /// The base copies by their names.
    pub(super) bases: BTreeMap<Uuid, u64>,
    next_layer: u64,
    /// Copies that take every write to a disk, by the disk.
    mirrors: BTreeMap<Uuid, Mirror>,
    /// Disks and base copies whose place in a chain changed since somebody asked; none while nobody does.
    pub(super) moved: Option<BTreeSet<(Uuid, Uuid)>>,
    /// Whether there are any.
    pub(super) any_moved: Arc<AtomicBool>,
}

impl State {
    pub(super) fn new(any_moved: Arc<AtomicBool>) -> Self {
        Self { any_moved, ..Self::default() }
    }

    pub(super) fn create_sr(&mut self, sr: Uuid, kind: SrKind, physical_size: u64) {
        let logs = Mutex::default();
        let counted = Counted::default();
        let collects_garbage = true;
        let new = Sr { kind, physical_size, foreign_bytes: 0, collects_garbage, merging: None, counted, logs };
        self.srs.insert(sr, new);
    }

    pub(super) fn destroy_sr(&mut self, sr: Uuid) -> Result<(), SrError> {
        self.srs.remove(&sr).ok_or_else(|| SrError::no_such_sr(sr))?;
        self.vdis.retain(|_, vdi| vdi.sr != sr);
        self.layers.retain(|_, layer| layer.sr != sr);
        let layers = &self.layers;
        self.bases.retain(|_, id| layers.contains_key(id));
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
        if let Some(parent) = layer.parent.and_then(|parent| self.layers.get_mut(&parent)) {
            parent.children.insert(id);
        }
        self.layers.insert(id, layer);
        id
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
        content: Option<Content>,
    ) -> Result<VdiInfo, SrError> {
        let kind = self.sr(sr)?.kind;
        if self.vdis.contains_key(&vdi) {
            return Err(SrError::exists());
        }
        let size = space::disk_size(kind, wanted)?;
        let mut layer = Layer::new(sr, None);
        layer.garbage = kind == SrKind::LvmRaw;
        match content {
            None => {}
            Some(Content::File(file, extents)) => {
                // A raw volume that was filled from a file has zeros where the file has holes.
                let whole = || ExtentSet::from_range(xenvault_block::ByteRange::up_to(size));
                let extents = if layer.garbage { whole() } else { extents };
                layer = layer.with_source(file, &extents);
            }
            Some(Content::Noise { seed, bytes }) => layer = layer.with_noise(seed, bytes.min(size)),
        }
        let needed = match kind {
            SrKind::Ext => space::vhd_file(size, layer.block_count()),
            SrKind::Lvm => space::full_vhd_volume(size),
            SrKind::LvmRaw => size,
            SrKind::Large => space::cluster_file(layer.page_count()),
        };
        self.require(sr, needed)?;
        let top = self.add_layer(layer);
        self.vdis.insert(vdi, Vdi::new(sr, size, top, false));
        self.sr(sr)?.counted.add(needed, size);
        self.info(vdi)
    }

    /// Puts an empty layer over a disk's, and another one for the new disk: both are leaves of a base copy then. A VHD
    /// without a block of its own is not frozen: both stand on what was below it.
    fn fork(&mut self, id: Uuid, new: Uuid, snapshot: bool) -> Result<(), SrError> {
        if self.bases.contains_key(&id) {
            return Err(SrError::hidden(snapshot));
        }
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
        let unwritten = self.layers.get(&top).filter(|layer| kind.is_vhd() && layer.block_count() == 0);
        if let Some(parent) = unwritten.and_then(|layer| layer.parent) {
            let other = self.add_layer(Layer::new(sr, Some(parent)));
            self.vdis.insert(new, Vdi::new(sr, size, other, snapshot));
        } else {
            let leaf = self.add_layer(Layer::new(sr, Some(top)));
            let other = self.add_layer(Layer::new(sr, Some(top)));
            if let Some(frozen) = self.layers.get_mut(&top) {
                (frozen.leaf, frozen.size) = (false, size);
                let name = frozen.uuid;
                self.bases.insert(name, top);
                self.mark_moved(sr, name);
            }
            self.vdi_mut(id)?.top = Some(leaf);
            self.vdis.insert(new, Vdi::new(sr, size, other, snapshot));
        }
        let vdi = self.vdi_mut(id)?;
        vdi.deflated &= !running;
        self.sr(sr)?.counted.forget();
        self.mark_moved(sr, id);
        self.mark_moved(sr, new);
        Ok(())
    }

    pub(super) fn snapshot(&mut self, id: Uuid, new: Uuid) -> Result<(VdiInfo, Option<CbtMessage>), SrError> {
        self.fork(id, new, true)?;
        let vdi = self.vdi_mut(id)?;
        let (sr_id, size, running) = (vdi.sr, vdi.size, vdi.writers + vdi.readers > 0);
        let (fails, unseen) = (vdi.takes_fault(CbtFault::Snapshot), vdi.takes_fault(CbtFault::SnapshotOnHost));
        let sr = self.sr(sr_id)?;
        let room = sr.kind != SrKind::Lvm || self.free_bytes(sr_id)? >= LVM_EXTENT_BYTES;
        let tracked = sr.logs().contains(id);
        let made = sr.logs().snapshot(id, new, size, room && !fails, running);
        let message = |body| CbtMessage { vdi: id, name: "VDI_CBT_SNAPSHOT_FAILED", body };
        let message = if !made {
            Some(message(format!("Creating CBT metadata log for disk {id} failed.")))
        } else if unseen && tracked {
            // The logs were in order, but the host that runs the disk could not be told: the new one goes again.
            sr.logs().drop_log(id);
            Some(message(format!("Creating CBT snapshot for {id} failed")))
        } else {
            None
        };
        sr.counted.forget();
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
            // A volume that was deflated is a full one afterwards.
            SrKind::Lvm if size > old => space::full_vhd_volume(size).saturating_sub(self.vdi_bytes(kind, vdi)),
            SrKind::LvmRaw => size - old,
            _ => 0,
        };
        self.require(sr_id, needed)?;
        let vdi = self.vdi_mut(id)?;
        vdi.deflated &= size == old;
        vdi.size = size;
        let fails = vdi.takes_fault(CbtFault::Resize);
        let sr = self.sr(sr_id)?;
        sr.counted.forget();
        let tracked = sr.logs().contains(id);
        if !(fails && tracked) && sr.logs().resize(id, size) {
            return Ok((size, None));
        }
        sr.logs().drop_log(id);
        let body = format!("Resizing of CBT metadata for disk {id} failed.");
        Ok((size, Some(CbtMessage { vdi: id, name: "VDI_CBT_RESIZE_FAILED", body })))
    }

    pub(super) fn destroy(&mut self, folder: &Path, id: Uuid) -> Result<(), SrError> {
        if self.bases.contains_key(&id) {
            return Err(SrError::not_a_leaf());
        }
        let Some(vdi) = self.vdis.get(&id) else { return Ok(()) };
        if vdi.readers + vdi.writers > 0 {
            return Err(SrError::in_use());
        }
        let (sr, top) = (vdi.sr, vdi.top);
        self.vdis.remove(&id);
        if let Some(top) = top {
            self.drop_leaf(top);
        }
        self.sr(sr)?.logs().delete(id);
        self.sr(sr)?.counted.forget();
        self.mark_moved(sr, id);
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
        if let Some(top) = self.vdi_mut(id)?.top.take() {
            self.drop_leaf(top);
        }
        self.sr(sr)?.counted.forget();
        self.mark_moved(sr, id);
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
            sr.counted.forget();
            return Ok(());
        }
        if sr.kind == SrKind::Lvm && self.free_bytes(vdi.sr)? < LVM_EXTENT_BYTES {
            let text = "Unable to activate changed block tracking.";
            return Err(SrError::backend(457, text, Some("There is insufficient space")));
        }
        sr.logs().enable(id, vdi.size, vdi.writers > 0);
        let made = sr.logs().get(id).map_or(0, |log| usage::log_bytes(sr.kind, log.file_bytes()));
        sr.counted.add(made, 0);
        Ok(())
    }

    pub(super) fn changed_blocks(&self, from: Uuid, to: Uuid) -> Result<Vec<u8>, SrError> {
        let sr = self.vdi(to)?.sr;
        self.sr(sr)?.logs().changed_blocks(from, to)
    }

    pub(super) fn lose_change_log(&mut self, id: Uuid) -> Result<(), SrError> {
        let sr = self.vdi(id)?.sr;
        self.sr(sr)?.logs().drop_log(id);
        self.sr(sr)?.counted.forget();
        Ok(())
    }

    pub(super) fn fail_cbt(&mut self, id: Uuid, fault: CbtFault) -> Result<(), SrError> {
        self.vdi_mut(id)?.cbt_faults.push(fault);
        Ok(())
    }

    pub(super) fn attach(&mut self, id: Uuid, mode: AttachMode) -> Result<Option<CbtMessage>, SrError> {
        self.top_of(id).map_err(|_| SrError::no_such_vdi(id))?;
        let vdi = self.vdi_mut(id)?;
        if mode == AttachMode::ReadOnly {
            vdi.readers += 1;
            return Ok(None);
        }
        if vdi.writers > 0 {
            vdi.writers += 1;
            return Ok(None);
        }
        let (sr, deflated, size) = (vdi.sr, vdi.deflated, vdi.size);
        let kind = self.sr(sr)?.kind;
        if deflated && kind == SrKind::Lvm {
            // A volume that is written has to have room for every block.
            let present = self.vdi_bytes(kind, self.vdi(id)?);
            let more = space::full_vhd_volume(size).saturating_sub(present);
            self.require(sr, more).map_err(|_| SrError::no_space_to_attach())?;
            self.sr(sr)?.counted.forget();
        }
        let vdi = self.vdi_mut(id)?;
        vdi.writers += 1;
        (vdi.deflated, vdi.inflated) = (false, deflated);
        let fails = vdi.takes_fault(CbtFault::Inconsistent);
        let sr = self.sr(sr)?;
        let dropped = sr.logs().activate(id, fails);
        if dropped {
            sr.counted.forget();
        }
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
            // A snapshot's volume is made small again.
            vdi.deflated |= std::mem::take(&mut vdi.inflated);
            let sr = vdi.sr;
            self.sr(sr)?.logs().deactivate(id);
            self.sr(sr)?.counted.forget();
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
}
