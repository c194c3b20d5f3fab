//! How much of a repository is in use.
//!
//! The sums over all disks are kept while nothing but additions happens: a repository of thousands of disks is not
//! counted anew for each one that is made, or for each block that a guest writes.

use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use super::layer::Layer;
use super::space::{self, LVM_EXTENT_BYTES};
use super::state::{Sr, State, Vdi};
use super::{SrError, SrKind, SrUsage};

/// What all disks, base copies and change logs of a repository take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sums {
    used: u64,
    virtual_allocation: u64,
}

/// The sums, as long as they are known.
#[derive(Debug, Default)]
pub(super) struct Counted(Mutex<Option<Sums>>);

impl Counted {
    /// They have to be counted anew.
    pub(super) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// So much more is in use and, of virtual sizes, there.
    pub(super) fn add(&self, used: u64, virtual_size: u64) {
        if let Some(sums) = self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            sums.used += used;
            sums.virtual_allocation += virtual_size;
        }
    }

    /// Does something that takes so much, unless it fails. Nobody counts meanwhile, who would see it twice.
    pub(super) fn while_adding<E>(&self, used: u64, act: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let done = act();
        match (&done, known.as_mut()) {
            (Ok(()), Some(sums)) => sums.used += used,
            (Ok(()), None) => {}
            // How much of it was done is not known.
            (Err(_), _) => *known = None,
        }
        done
    }

    fn get(&self, count: impl FnOnce() -> Sums) -> Sums {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *known.get_or_insert_with(count)
    }
}

/// What a change log takes.
pub(super) fn log_bytes(kind: SrKind, file_bytes: u64) -> u64 {
    if kind == SrKind::Lvm { LVM_EXTENT_BYTES } else { file_bytes }
}

impl State {
    /// What a disk's own file or volume takes.
    pub(super) fn vdi_bytes(&self, kind: SrKind, vdi: &Vdi) -> u64 {
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
    pub(super) fn base_bytes(kind: SrKind, layer: &Layer) -> u64 {
        match kind {
            SrKind::Ext => space::vhd_file(0, layer.block_count()),
            SrKind::Lvm | SrKind::LvmRaw => space::deflated_vhd_volume(layer.block_count()),
            SrKind::Large => space::cluster_file(layer.page_count()),
        }
    }

    /// The base copies of a repository.
    pub(super) fn bases(&self, sr: Uuid) -> impl Iterator<Item = (u64, &Layer)> {
        let all = self.bases.values().filter_map(|&id| Some((id, self.layers.get(&id)?)));
        all.filter(move |(_, layer)| layer.sr == sr)
    }

    fn count(&self, id: Uuid, sr: &Sr) -> Sums {
        let mut sums = Sums::default();
        for vdi in self.vdis.values().filter(|vdi| vdi.sr == id) {
            sums.used += self.vdi_bytes(sr.kind, vdi);
            sums.virtual_allocation += vdi.size;
        }
        sums.used += self.bases(id).map(|(_, layer)| Self::base_bytes(sr.kind, layer)).sum::<u64>();
        sums.used += sr.logs().iter().map(|(_, log)| log_bytes(sr.kind, log.file_bytes())).sum::<u64>();
        sums
    }

    pub(super) fn usage(&self, id: Uuid) -> Result<SrUsage, SrError> {
        let sr = self.sr(id)?;
        let sums = sr.counted.get(|| self.count(id, sr));
        let merging = sr.merging.as_ref().map_or(0, |merge| merge.extra_bytes);
        Ok(SrUsage {
            physical_size: sr.physical_size,
            physical_utilisation: sr.foreign_bytes + sums.used + merging,
            virtual_allocation: sums.virtual_allocation,
        })
    }

    pub(super) fn free_bytes(&self, sr: Uuid) -> Result<u64, SrError> {
        let usage = self.usage(sr)?;
        Ok(usage.physical_size.saturating_sub(usage.physical_utilisation))
    }

    /// 44 unless so much is free.
    pub(super) fn require(&self, sr: Uuid, bytes: u64) -> Result<(), SrError> {
        if self.free_bytes(sr)? < bytes { Err(SrError::no_space()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xenvault_block::WriteAt;

    use super::super::{AttachMode, Storage};
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn kept_sums_equal_counted_ones(
            kind in prop_oneof![Just(SrKind::Ext), Just(SrKind::Lvm), Just(SrKind::Large)],
            steps in proptest::collection::vec((0..9_u8, 0..6_usize, 0..16_u64), 0..40),
        ) {
            let storage = Storage::new().unwrap();
            let sr = Uuid::new_v4();
            storage.create_sr(sr, kind, 1 << 40);
            let mut disks: Vec<Uuid> = Vec::new();
            for (step, at, block) in steps {
                let disk = disks.get(at % disks.len().max(1)).copied();
                let new = Uuid::new_v4();
                // What is refused changes nothing, which is as good a case as any.
                match (step, disk) {
                    (0, _) | (_, None) => {
                        storage.create_vdi(sr, new, 32 << 20).unwrap();
                        disks.push(new);
                    }
                    (1 | 2, Some(disk)) => {
                        storage.disk(disk).unwrap().write_all_at(&[1; 512], block << 20).unwrap();
                    }
                    (3, Some(disk)) if storage.snapshot(disk, new).is_ok() => disks.push(new),
                    (4, Some(disk)) if storage.clone_vdi(disk, new).is_ok() => disks.push(new),
                    (5, Some(disk)) if storage.destroy(disk).is_ok() => disks.retain(|known| *known != disk),
                    (6, Some(disk)) => drop(storage.enable_cbt(disk, false)),
                    (7, Some(disk)) => {
                        drop(storage.attach(disk, AttachMode::ReadWrite));
                        drop(storage.detach(disk, AttachMode::ReadWrite));
                        drop(storage.resize(disk, (34 << 20) + (block << 21)));
                    }
                    (8, _) => storage.set_garbage_collection(sr, block % 2 == 0).unwrap(),
                    _ => {}
                }
                let state = storage.read();
                let usage = state.usage(sr).unwrap();
                let counted = state.count(sr, state.sr(sr).unwrap());
                prop_assert_eq!(usage.physical_utilisation, counted.used);
                prop_assert_eq!(usage.virtual_allocation, counted.virtual_allocation);
            }
        }
    }
}
