//! Index segments are replaced: entries of packs that are gone are left out, small segments become one.
//!
//! New segments are published before old ones are removed, so a chunk is found at every moment. Whoever is interrupted in
//! between leaves entries in two segments, which is no harm, and the next one takes it up. Memory: one output segment.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use xenvault_store_format::{IndexEntry, Keys, PackId, encode_index};

use super::{Index, Loaded, Segment};
use crate::StoreError;
use crate::backend::{Backend, is_held};
use crate::names;

/// A segment with fewer entries is small.
const SMALL_ENTRIES: usize = 32 * 1024;
/// So many small segments may lie around: a run makes one or two.
const SMALL_SEGMENTS: usize = 16;
/// Entries that are put into one segment, and so held in memory.
const TOGETHER_ENTRIES: usize = 256 * 1024;

impl Index {
    /// Replaces segments that name one of the packs `gone`, and small ones if there are many. Returns how many old
    /// segments went.
    pub(crate) async fn tidy(
        &self,
        backend: &dyn Backend,
        keys: &Arc<Keys>,
        gone: &HashSet<PackId>,
    ) -> Result<u64, StoreError> {
        let loaded = self.snapshot();
        let is_small = |segment: &&Arc<Segment>| segment.name.is_some() && segment.len() < SMALL_ENTRIES;
        let merge = loaded.segments.iter().filter(is_small).count() > SMALL_SEGMENTS;
        let is_old =
            |segment: &&Arc<Segment>| (merge && is_small(segment)) || segment.packs().any(|pack| gone.contains(&pack));
        let mut waiting: VecDeque<Arc<Segment>> = VecDeque::new();
        for segment in loaded.segments.iter().filter(is_old) {
            let held = match &segment.name {
                Some(name) => is_held(backend, name).await.map_err(|error| StoreError::io("remove", name, error))?,
                None => false,
            };
            // One that is locked would only be doubled; a later sweep replaces it.
            if !held {
                waiting.push_back(Arc::clone(segment));
            }
        }
        let mut replaced = 0;
        while !waiting.is_empty() {
            let (mut together, mut entries) = (Vec::new(), Vec::new());
            while let Some(next) = waiting.front() {
                if !together.is_empty() && entries.len() + next.len() > TOGETHER_ENTRIES {
                    break;
                }
                let Some(next) = waiting.pop_front() else { break };
                let kept = next.entries().map(|(_, entry)| entry);
                entries.extend(kept.filter(|entry| !gone.contains(&entry.salt.pack_id())));
                together.push(next);
            }
            for layer in layers(entries) {
                let bytes = encode_index(keys, &layer).map_err(|error| StoreError::format(names::INDEX, error))?;
                self.publish_bytes(backend, keys, bytes).await?;
            }
            for name in together.iter().filter_map(|segment| segment.name.as_ref()) {
                backend.remove(name).await.map_err(|error| StoreError::io("remove", name, error))?;
                replaced += 1;
            }
            let mut seen = self.seen.lock().await;
            self.change(|loaded| {
                loaded.segments.retain(|segment| !together.iter().any(|old| Arc::ptr_eq(old, segment)));
            });
            for name in together.iter().filter_map(|segment| segment.name.as_ref()) {
                seen.segments.remove(name);
            }
            seen.packs = covered(&self.snapshot());
        }
        Ok(replaced)
    }
}

/// The packs that loaded segments name.
pub(super) fn covered(loaded: &Loaded) -> HashSet<PackId> {
    let mut packs = HashSet::new();
    loaded.segments.iter().for_each(|segment| packs.extend(segment.packs()));
    packs
}

/// The entries in as many parts as the chunk with the most copies has: a segment holds one place of a chunk, and no
/// copy may become unknown.
pub(super) fn layers(mut entries: Vec<IndexEntry>) -> Vec<Vec<IndexEntry>> {
    entries.sort_by_key(|entry| (entry.id, entry.salt.pack_id(), entry.placement.frame, entry.placement.part));
    entries.dedup();
    let mut layers: Vec<Vec<IndexEntry>> = Vec::new();
    let (mut before, mut depth) = (None, 0);
    for entry in entries {
        depth = if before == Some(entry.id) { depth + 1 } else { 0 };
        before = Some(entry.id);
        match layers.get_mut(depth) {
            Some(layer) => layer.push(entry),
            None => layers.push(vec![entry]),
        }
    }
    layers
}

#[cfg(test)]
mod tests {
    use xenvault_store_format::{ChunkId, ChunkKind, PackSalt, Placement};

    use super::*;

    #[test]
    fn no_copy_of_a_chunk_becomes_unknown() {
        let entry = |chunk: u8, pack: u8| IndexEntry {
            id: ChunkId::from_bytes([chunk; 32]),
            kind: ChunkKind::Data,
            salt: PackSalt::from_bytes([pack; 32]),
            placement: Placement { offset: 64, length: 100, frame: 0, part: 0 },
        };
        let entries = vec![entry(1, 1), entry(2, 1), entry(1, 2), entry(1, 2), entry(1, 3), entry(3, 3)];
        let layers = layers(entries.clone());
        assert_eq!(layers.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 1]);
        assert!(entries.iter().all(|entry| layers.iter().flatten().any(|kept| kept == entry)));
        assert!(super::layers(Vec::new()).is_empty());
    }
}
