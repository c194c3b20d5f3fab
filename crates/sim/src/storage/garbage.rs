//! Base copies, and how they go: the storage manager's garbage collector.
//!
//! A base copy below a single child is merged with it. Onto a base copy goes a base copy ("coalesce", the lower one
//! stays), or a disk's own layer ("leaf-coalesce", the result is the disk). For the time of the copying both are
//! there and the lower one has grown, so a repository that is nearly full can not be relieved in this way.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering;

use uuid::Uuid;
use xenvault_block::VHD_BLOCK_BYTES;

use super::layer::Layer;
use super::space;
use super::state::State;
use super::{SrError, SrKind, Storage, VdiInfo};

/// A disk's layer up to this size is merged in one go while the disk is paused. A larger one is frozen first (a
/// snapshot that nobody sees), which needs the room for another leaf.
const LIVE_LEAF_LIMIT: u64 = 20 << 20;

/// What an administrator forbids in `SR.other_config`: `coalesce=false`, `leaf-coalesce=false`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoalesceSwitches {
    /// Base copies may be merged at all.
    pub coalesce: bool,
    /// Disks' own layers may be merged.
    pub leaf: bool,
}

impl Default for CoalesceSwitches {
    fn default() -> Self {
        Self { coalesce: true, leaf: true }
    }
}

/// A merge that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coalescing {
    /// The base copy that is merged into another one; for a leaf, its disk.
    pub vdi: Uuid,
    /// The base copy that takes the data.
    pub onto: Uuid,
    /// Whether it is a disk's own layer.
    pub leaf: bool,
    /// Bytes to copy.
    pub bytes: u64,
    /// Space that the repository has less until the end, in bytes.
    pub extra_bytes: u64,
}

/// What the collector found to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoalesceStart {
    /// The merge that is in progress now; none if nothing can be merged.
    pub work: Option<Coalescing>,
    /// Base copies and disks that would be merged if there were space for it.
    pub no_space: Vec<Uuid>,
}

/// A disk or base copy whose existence or place in a chain changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainChange {
    /// Its repository.
    pub sr: Uuid,
    /// Its name.
    pub vdi: Uuid,
    /// What it is now; none if it is gone.
    pub now: Option<VdiInfo>,
    /// Whether it is a hidden base copy.
    pub hidden: bool,
}

/// A merge that has begun, with the layers that it is about.
#[derive(Clone, Debug)]
pub(super) struct InProgress {
    base: u64,
    child: u64,
    pub(super) extra_bytes: u64,
    shown: Coalescing,
}

impl State {
    /// A base copy by its name.
    pub(super) fn base(&self, name: Uuid) -> Option<(u64, &Layer)> {
        let id = *self.bases.get(&name)?;
        Some((id, self.layers.get(&id)?))
    }

    fn base_info(&self, kind: SrKind, layer: &Layer) -> VdiInfo {
        VdiInfo {
            vdi: layer.uuid,
            sr: layer.sr,
            kind,
            virtual_size: layer.size,
            physical_utilisation: Self::base_bytes(kind, layer),
            cbt_enabled: false,
            metadata_only: false,
            parent: layer.parent.and_then(|parent| self.layers.get(&parent)).map(|layer| layer.uuid),
        }
    }

    pub(super) fn base_copies(&self, id: Uuid) -> Result<Vec<VdiInfo>, SrError> {
        let kind = self.sr(id)?.kind;
        Ok(self.bases(id).map(|(_, layer)| self.base_info(kind, layer)).collect())
    }

    /// Remembers that the place of a disk or base copy in its chain changed.
    pub(super) fn mark_moved(&mut self, sr: Uuid, name: Uuid) {
        if let Some(moved) = &mut self.moved {
            moved.insert((sr, name));
            self.any_moved.store(true, Ordering::Release);
        }
    }

    /// Remembers the same of everything right above a layer.
    fn mark_above(&mut self, id: u64) {
        if self.moved.is_none() {
            return;
        }
        let Some(layer) = self.layers.get(&id) else { return };
        let (sr, children) = (layer.sr, layer.children.clone());
        let bases: Vec<Uuid> = children
            .iter()
            .filter_map(|child| self.layers.get(child))
            .filter(|child| !child.leaf)
            .map(|child| child.uuid)
            .collect();
        let disks = self.vdis.iter().filter(|(_, vdi)| vdi.top.is_some_and(|top| children.contains(&top)));
        let names: Vec<Uuid> = disks.map(|(&name, _)| name).chain(bases).collect();
        for name in names {
            self.mark_moved(sr, name);
        }
    }

    fn take_moved(&mut self) -> Vec<ChainChange> {
        self.any_moved.store(false, Ordering::Release);
        let moved = self.moved.replace(BTreeSet::new()).unwrap_or_default();
        let seen = |(sr, vdi): (Uuid, Uuid)| {
            let base = self.base(vdi).and_then(|(_, layer)| Some(self.base_info(self.sr(sr).ok()?.kind, layer)));
            let hidden = base.is_some();
            ChainChange { sr, vdi, now: base.or_else(|| self.info(vdi).ok()), hidden }
        };
        moved.into_iter().map(seen).collect()
    }

    /// Removes the layer of a disk whose file or volume is deleted.
    pub(super) fn drop_leaf(&mut self, id: u64) {
        let Some(layer) = self.layers.remove(&id) else { return };
        if let Some(parent) = layer.parent.and_then(|parent| self.layers.get_mut(&parent)) {
            parent.children.remove(&id);
        }
    }

    /// Removes base copies that nothing stands on.
    fn prune(&mut self, sr: Uuid) {
        loop {
            let unused: Vec<u64> =
                self.bases(sr).filter(|(_, layer)| layer.children.is_empty()).map(|(id, _)| id).collect();
            if unused.is_empty() {
                return;
            }
            for id in unused {
                if let Some(name) = self.layers.get(&id).map(|layer| layer.uuid) {
                    self.bases.remove(&name);
                    self.mark_moved(sr, name);
                }
                self.drop_leaf(id);
            }
            if let Ok(sr) = self.sr(sr) {
                sr.counted.forget();
            }
        }
    }

    /// Base copies with a single child, and that child.
    fn pairs(&self, sr: Uuid) -> Vec<(u64, u64)> {
        let single = |(id, layer): (u64, &Layer)| match (layer.children.len(), layer.children.first()) {
            (1, Some(&child)) => Some((id, child)),
            _ => None,
        };
        self.bases(sr).filter_map(single).collect()
    }

    /// Does all that there is to do at once, whatever space it takes in between.
    pub(super) fn collect_garbage(&mut self, folder: &Path, sr: Uuid) {
        if self.sr(sr).is_ok_and(|sr| sr.collects_garbage) {
            self.collect_all(folder, sr);
        }
    }

    pub(super) fn collect_all(&mut self, folder: &Path, sr: Uuid) {
        if let Ok(sr) = self.sr_mut(sr) {
            sr.merging = None;
        }
        self.prune(sr);
        while let Some((base, child)) = self.pairs(sr).first().copied() {
            if !self.join(folder, base, child) {
                return;
            }
        }
    }

    /// Files from a layer up to the uppermost one above it.
    fn height(&self, id: u64) -> usize {
        let mut level = vec![id];
        let mut height = 0;
        while !level.is_empty() {
            height += 1;
            let above = level.iter().filter_map(|id| self.layers.get(id)).flat_map(|layer| layer.children.iter());
            level = above.copied().collect();
        }
        height
    }

    fn begin_coalesce(&mut self, id: Uuid, switches: CoalesceSwitches) -> Result<CoalesceStart, SrError> {
        if let Some(merge) = &self.sr(id)?.merging {
            return Ok(CoalesceStart { work: Some(merge.shown), no_space: Vec::new() });
        }
        self.prune(id);
        let kind = self.sr(id)?.kind;
        let free = self.free_bytes(id)?;
        let mut candidates: Vec<(bool, std::cmp::Reverse<usize>, u64, u64)> = Vec::new();
        for (base, child) in self.pairs(id) {
            let leaf = self.layers.get(&child).is_some_and(|layer| layer.leaf);
            if !switches.coalesce || (leaf && !switches.leaf) {
                continue;
            }
            let root = self.chain(base).last().map_or(base, |(root, _)| root);
            candidates.push((leaf, std::cmp::Reverse(self.height(root)), base, child));
        }
        // Base copies before leaves, and of the base copies one in the tallest tree.
        candidates.sort_unstable();
        let mut start = CoalesceStart::default();
        for (_, _, base, child) in candidates {
            let Some(merge) = self.merge_of(kind, base, child) else { continue };
            if merge.extra_bytes > free {
                start.no_space.push(merge.shown.vdi);
                continue;
            }
            start.work = Some(merge.shown);
            self.sr_mut(id)?.merging = Some(merge);
            break;
        }
        Ok(start)
    }

    /// What merging a base copy and its only child is about.
    fn merge_of(&self, kind: SrKind, base: u64, child: u64) -> Option<InProgress> {
        let (below, above) = (self.layers.get(&base)?, self.layers.get(&child)?);
        let mine = above.blocks();
        let union = below.blocks().union(&mine).count() as u64;
        let lower = below.block_count();
        let disk = self.vdis.iter().find(|(_, vdi)| vdi.top == Some(child));
        let volume = space::deflated_vhd_volume;
        let grown = match kind {
            SrKind::Ext => space::vhd_file(0, union) - space::vhd_file(0, lower),
            SrKind::Lvm | SrKind::LvmRaw => volume(union).saturating_sub(volume(lower)),
            SrKind::Large => space::cluster_file(above.page_count()),
        };
        let own = mine.len() as u64;
        let live = own * VHD_BLOCK_BYTES < LIVE_LEAF_LIMIT;
        let extra_bytes = match (kind, disk) {
            (_, None) => grown,
            // A leaf of a thick repository is deflated before its base copy grows.
            (SrKind::Lvm, Some((_, vdi))) if live => {
                grown.saturating_sub(self.vdi_bytes(kind, vdi).saturating_sub(volume(own)))
            }
            (_, Some(_)) if live => grown,
            (SrKind::Lvm, Some(_)) => grown + volume(own),
            (_, Some((_, vdi))) => grown + space::vhd_file(vdi.size, 0),
        };
        let vdi = disk.map_or(above.uuid, |(&name, _)| name);
        let bytes = own * VHD_BLOCK_BYTES;
        let shown = Coalescing { vdi, onto: below.uuid, leaf: disk.is_some(), bytes, extra_bytes };
        Some(InProgress { base, child, extra_bytes, shown })
    }

    /// Ends the merge that has begun. It is given up if the chain is another one meanwhile (a snapshot was taken, or
    /// the disk was deleted), as the storage manager does.
    fn end_coalesce(&mut self, folder: &Path, sr: Uuid) -> Result<bool, SrError> {
        let Some(merge) = self.sr_mut(sr)?.merging.take() else { return Ok(false) };
        let same = self.layers.get(&merge.base).is_some_and(|base| {
            base.children.len() == 1
                && base.children.contains(&merge.child)
                && self.layers.get(&merge.child).is_some_and(|child| child.leaf == merge.shown.leaf)
        });
        Ok(same && self.join(folder, merge.base, merge.child))
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
        let (sr, leaf, names) = (above.sr, above.leaf, (below.uuid, above.uuid));
        let (parent, children, size) = (below.parent, std::mem::take(&mut above.children), above.size);
        let mut joined = if upward { above } else { below };
        (joined.parent, joined.children, joined.size, joined.leaf) = (parent, children, size, leaf);
        // Of two base copies the lower one's name stays. A disk's layer has no name until it becomes a base copy.
        joined.uuid = if leaf { Uuid::new_v4() } else { names.0 };
        if let Some(grandparent) = parent.and_then(|parent| self.layers.get_mut(&parent)) {
            grandparent.children.remove(&base);
            grandparent.children.insert(child);
        }
        self.bases.remove(&names.0);
        self.mark_moved(sr, names.0);
        if !leaf {
            self.bases.remove(&names.1);
            self.mark_moved(sr, names.1);
            self.bases.insert(names.0, child);
        }
        // The child's number stays: disks and layers above refer to it.
        self.layers.insert(child, joined);
        self.mark_above(child);
        if leaf && let Some(disk) = self.vdis.iter().find(|(_, vdi)| vdi.top == Some(child)).map(|(&name, _)| name) {
            self.mark_moved(sr, disk);
        }
        if let Ok(sr) = self.sr(sr) {
            sr.counted.forget();
        }
        true
    }
}

impl Storage {
    /// Begins the next merge of a repository whose garbage collection is not done at once
    /// ([`Storage::set_garbage_collection`]): base copies without a use go, and space is taken for the merge. Reads
    /// and writes go on. One that is in progress is given again.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn begin_coalesce(&self, sr: Uuid, switches: CoalesceSwitches) -> Result<CoalesceStart, SrError> {
        self.write().begin_coalesce(sr, switches)
    }

    /// Ends the merge that has begun; gives whether anything was merged. `false` without one, and for one whose chain
    /// was changed meanwhile.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn end_coalesce(&self, sr: Uuid) -> Result<bool, SrError> {
        self.write().end_coalesce(&self.inner.folder, sr)
    }

    /// Gives up the merge that has begun, if any: the space that it took is free again.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn abort_coalesce(&self, sr: Uuid) -> Result<(), SrError> {
        self.write().sr_mut(sr)?.merging = None;
        Ok(())
    }

    /// Whether a merge has begun and not ended.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn is_coalescing(&self, sr: Uuid) -> Result<bool, SrError> {
        Ok(self.read().sr(sr)?.merging.is_some())
    }

    /// Does all waiting work of a repository at once, whatever space it takes in between.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn coalesce_all(&self, sr: Uuid) -> Result<(), SrError> {
        let mut state = self.write();
        state.sr(sr)?;
        state.collect_all(&self.inner.folder, sr);
        Ok(())
    }

    /// Files in the chain of a disk, its own among them.
    ///
    /// # Errors
    /// 46 if there is none or its data is gone.
    pub fn chain_length(&self, vdi: Uuid) -> Result<usize, SrError> {
        let state = self.read();
        let top = state.top_of(vdi).map_err(|_| SrError::no_such_vdi(vdi))?;
        Ok(state.chain(top).count())
    }

    /// From now on changes of chains are remembered for [`Storage::take_chain_changes`], which has to be called now
    /// and then.
    pub fn watch_chains(&self) {
        self.write().moved.get_or_insert_default();
    }

    /// Disks and base copies that came, went, or stand on another one than at the last call. Nothing before
    /// [`Storage::watch_chains`].
    pub fn take_chain_changes(&self) -> Vec<ChainChange> {
        if !self.inner.moved.load(Ordering::Acquire) {
            return Vec::new();
        }
        self.write().take_moved()
    }
}
