//! Points: which of them are hurt by what was found, and where.

use std::collections::HashSet;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use xenvault_block::ByteRange;
use xenvault_store_format::{
    BLOCK_BYTES, BlobRef, ChunkId, ChunkKind, LEAF_BYTES, LeafPage, NodePage, PackId, PointManifest, Receipt,
    decode_piece_list, leaves_under, level_of,
};

use super::{DamageKind, HurtDisk, HurtPoint, Listed, Ranges, Verify, VerifyMode, reason};
use crate::forget::tombstones;
use crate::monitor::MaintenanceStage;
use crate::promise::is_promised;
use crate::{StoreError, names, points, records};

impl Verify {
    pub(super) async fn check_points(&mut self) -> Result<(), StoreError> {
        let repository = self.repository.clone();
        let state = repository.look_at_sweeps().await.ok();
        let forgotten = tombstones(&repository).await?.of_points();
        let mut listed = Listed::new();
        for name in records::list(&repository, names::POINTS).await? {
            match names::point_parts(&name) {
                Some((_, _, id)) => {
                    listed.insert(id, name);
                }
                None => self.damaged(&name, DamageKind::Misplaced, "it is no restore point of this name"),
            }
        }
        for name in records::list(&repository, names::RECEIPTS).await? {
            let Some(id) = names::receipt_point(&name).filter(|id| !listed.contains_key(id)) else { continue };
            let is_going = state.as_ref().is_some_and(|state| state.takes(&id));
            if is_going || forgotten.contains_key(&id) {
                continue;
            }
            // One that can not be read, or is another one, was told of already.
            let receipt = records::read::<Receipt>(&repository, &name).await;
            let Some(receipt) = receipt.ok().filter(|receipt| receipt.point == id) else { continue };
            if repository.was_swept(&id).await? {
                continue;
            }
            let Ok(object) = names::point(&receipt.pool_uuid, &receipt.vm_uuid, &id) else { continue };
            self.damaged(&object, DamageKind::Missing, "it was complete, and nobody has forgotten it");
            let (pool_uuid, vm_uuid) = (receipt.pool_uuid, receipt.vm_uuid);
            let gone = HurtPoint { id: Some(id), pool_uuid, vm_uuid, unreadable: true, ..HurtPoint::default() };
            self.report.hurt.push(gone);
        }
        let loaded = repository.index.snapshot();
        let unindexed = loaded.segments.iter().filter(|segment| segment.name.is_none());
        let unindexed: HashSet<PackId> = unindexed.flat_map(|segment| segment.packs().collect::<Vec<_>>()).collect();
        let walks =
            matches!(self.options.mode, VerifyMode::Full) || !self.report.damage.is_empty() || !unindexed.is_empty();
        let mut walk = Walk { verify: self, clean: HashSet::new(), unindexed, needed: HashSet::new() };
        let planned = listed.len() as u64;
        let mut done = 0;
        for (id, name) in listed {
            // One that is promised restores in any case, so it is looked at.
            let is_forgotten = forgotten.contains_key(&id) && !is_promised(&repository, &name).await?;
            match points::read(&repository, &name).await {
                Ok(point) => {
                    walk.verify.report.points += 1;
                    if !is_forgotten && !records::exists(&repository, &names::receipt(&id)).await? {
                        walk.verify.report.unconfirmed.push(id);
                    }
                    if walks && !is_forgotten {
                        walk.point(&point).await?;
                    }
                }
                Err(error) if error.is_gone() => {}
                Err(error) if error.is_loss() => walk.verify.unreadable(&name, &error),
                Err(error) => return Err(error),
            }
            done += 1;
            let read_bytes = walk.verify.report.read_bytes;
            walk.verify.options.monitor.tell(MaintenanceStage::Points, done, planned, read_bytes);
        }
        let needed = walk.needed;
        let barred = repository.index.barred();
        for pack in needed.iter().filter(|pack| !barred.condemned.contains(pack)) {
            let reason = format!("no readable segment names {}: a repair writes one", names::pack(pack));
            self.damaged(names::INDEX, DamageKind::Missing, reason);
        }
        Ok(())
    }

    fn unreadable(&mut self, name: &str, error: &StoreError) {
        self.damaged(name, DamageKind::Damaged, reason(error));
        let parts = names::point_parts(name);
        let (pool_uuid, vm_uuid) =
            parts.map_or_else(Default::default, |(pool, vm, _)| (pool.to_owned(), vm.to_owned()));
        let id = parts.map(|(_, _, id)| id);
        self.report.hurt.push(HurtPoint { id, pool_uuid, vm_uuid, unreadable: true, ..HurtPoint::default() });
    }
}

/// Walks points one after the other; what is whole is gone over once.
struct Walk<'a> {
    verify: &'a mut Verify,
    /// Pages under which everything is there.
    clean: HashSet<ChunkId>,
    /// Packs that no segment of the repository names.
    unindexed: HashSet<PackId>,
    /// Those of them that points need.
    needed: HashSet<PackId>,
}

impl Walk<'_> {
    async fn point(&mut self, point: &PointManifest) -> Result<(), StoreError> {
        let mut hurt = HurtPoint {
            id: Some(point.id),
            pool_uuid: point.pool_uuid.clone(),
            vm_uuid: point.vm_uuid.clone(),
            vm_name: point.vm_name.clone(),
            created_unix_ms: point.created_unix_ms,
            configuration: !self.blob(&point.vm_config).await?,
            ..HurtPoint::default()
        };
        for disk in &point.disks {
            let mut ranges = Ranges::default();
            if let Some(root) = disk.map.root {
                let size = disk.map.virtual_size;
                self.page(root, level_of(size), 0, size, &mut ranges).await?;
            }
            let bitmap = match &disk.bitmap {
                Some(bitmap) => !self.blob(bitmap).await?,
                None => false,
            };
            if ranges.bytes > 0 || bitmap {
                hurt.disks.push(HurtDisk {
                    device: disk.device.clone(),
                    vdi_uuid: disk.vdi_uuid.clone(),
                    name: disk.name.clone(),
                    ranges: ranges.ranges,
                    bytes: ranges.bytes,
                    bitmap,
                });
            }
        }
        if hurt.configuration || !hurt.disks.is_empty() {
            self.verify.report.hurt.push(hurt);
        }
        Ok(())
    }

    /// One page and what lies under it; says whether all of it can be read.
    fn page<'b>(
        &'b mut self,
        id: ChunkId,
        level: u8,
        first_leaf: u64,
        size: u64,
        ranges: &'b mut Ranges,
    ) -> BoxFuture<'b, Result<bool, StoreError>> {
        async move {
            if self.clean.contains(&id) {
                return Ok(true);
            }
            let start = first_leaf.saturating_mul(LEAF_BYTES);
            let bytes = match self.read(&id, ChunkKind::Map).await? {
                Some(bytes) => bytes,
                None => {
                    push(ranges, start, leaves_under(level).saturating_mul(LEAF_BYTES), size);
                    return Ok(false);
                }
            };
            let mut whole = true;
            if level == 0 {
                match LeafPage::decode(&bytes) {
                    Ok(leaf) => {
                        for (block, entry) in leaf.placed() {
                            let Some(chunk) = entry.chunk else { continue };
                            if !self.is_there(&chunk, ChunkKind::Data) {
                                let length = u64::from(entry.blocks) * BLOCK_BYTES as u64;
                                push(ranges, start + block * BLOCK_BYTES as u64, length, size);
                                whole = false;
                            }
                        }
                    }
                    Err(_) => {
                        push(ranges, start, LEAF_BYTES, size);
                        whole = false;
                    }
                }
            } else {
                match NodePage::decode(&bytes, level) {
                    Ok(node) => {
                        let below = leaves_under(level - 1);
                        for (number, child) in node.present() {
                            let first_leaf = first_leaf.saturating_add(number.saturating_mul(below));
                            whole &= self.page(child, level - 1, first_leaf, size, ranges).await?;
                        }
                    }
                    Err(_) => {
                        push(ranges, start, leaves_under(level).saturating_mul(LEAF_BYTES), size);
                        whole = false;
                    }
                }
            }
            if whole {
                self.clean.insert(id);
            }
            Ok(whole)
        }
        .boxed()
    }

    /// Whether a blob can be read.
    async fn blob(&mut self, blob: &BlobRef) -> Result<bool, StoreError> {
        if blob.kind() == ChunkKind::Blob {
            return Ok(self.is_there(&blob.id, ChunkKind::Blob));
        }
        let Some(bytes) = self.read(&blob.id, ChunkKind::List).await? else { return Ok(false) };
        let Ok(pieces) = decode_piece_list(&bytes, blob.length) else { return Ok(false) };
        // All of them, since each may be in a pack that no segment names.
        Ok(pieces.iter().filter(|piece| !self.is_there(piece, ChunkKind::Blob)).count() == 0)
    }

    /// The bytes of a chunk that lists others; `None` if they are lost.
    async fn read(&mut self, id: &ChunkId, kind: ChunkKind) -> Result<Option<bytes::Bytes>, StoreError> {
        self.is_there(id, kind);
        match self.verify.repository.chunk(id, kind).await {
            Ok(bytes) => {
                self.verify.report.read_bytes += bytes.len() as u64;
                Ok(Some(bytes))
            }
            Err(error) if error.is_loss() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a copy is left that nothing is known against.
    fn is_there(&mut self, id: &ChunkId, kind: ChunkKind) -> bool {
        let bad = &self.verify.bad;
        let loaded = self.verify.repository.index.snapshot();
        let copies = self.verify.repository.index.copies(id, kind);
        let is_good = |pack: &PackId| {
            !loaded.lost.contains(pack) && !bad.packs.contains(pack) && !bad.copies.contains(&(*id, *pack))
        };
        let good: Vec<PackId> = copies.iter().map(|entry| entry.pack).filter(is_good).collect();
        if !good.is_empty() && good.iter().all(|pack| self.unindexed.contains(pack)) {
            self.needed.extend(good.iter().copied());
        }
        !good.is_empty()
    }
}

/// Adds a range of a disk, cut at its end.
fn push(ranges: &mut Ranges, start: u64, length: u64, size: u64) {
    let range = ByteRange::new(start.min(size), start.saturating_add(length).min(size));
    if let Some(range) = range.ok().filter(|range| !range.is_empty()) {
        ranges.push(range);
    }
}
