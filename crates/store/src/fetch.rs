//! Opening frames: read from packs in long runs; authenticated, unpacked and hashed in one piece of work each; kept for a
//! while, since the next chunk that somebody wants is often in the same one.
//!
//! A frame is in the cache from the moment on that somebody wants it. Whoever else does waits for the same work, and
//! drives it as well: nobody waits for a reader that stands still.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use xenvault_store_format::{
    ChunkId, ChunkKind, FormatError, IndexEntry, Keys, MAX_PLAIN_BYTES, PackId, PackKey, PlainFrame,
};

use crate::cache::Cache;
use crate::repository::Inner;
use crate::{StoreError, names};

/// Bytes between two frames that are read along, rather than asking the medium twice.
const GAP_BYTES: u64 = 64 * 1024;
/// What the smallest frame counts for in the cache, so that it never holds very many.
const LEAST_WEIGHT: usize = 64 * 1024;

/// A frame by its pack and its offset there.
pub(crate) type FrameKey = (PackId, u32);

/// A frame that is being opened, or was; `None` if that can not be done. Nothing happens before somebody waits for it.
///
/// It holds nothing of the repository that holds the cache: unfinished ones may lie there for long.
pub(crate) type Opening = Shared<BoxFuture<'static, Option<OpenedFrame>>>;

/// Frames of disks that were wanted last.
pub(crate) type OpenedFrames = Cache<FrameKey, Opening>;

/// The frames of a run, each for the one who opens it, and the key of their pack.
type Run = Shared<BoxFuture<'static, Option<(Arc<PackKey>, Arc<Mutex<Vec<Option<BytesMut>>>>)>>>;

pub(crate) fn key_of(entry: &IndexEntry) -> FrameKey {
    (entry.pack, entry.placement.offset)
}

impl Inner {
    /// One copy of a chunk.
    pub(crate) async fn copy(&self, entry: IndexEntry) -> Result<Bytes, StoreError> {
        let wanted = [(entry.id, entry.placement.part)];
        let found = if entry.kind == ChunkKind::Data {
            let opening = self.openings(&[entry]).pop();
            let opening = opening.ok_or(StoreError::ChunkMissing { id: entry.id })?;
            self.chunks_of(&opening, entry, wanted).await?
        } else {
            self.open(entry).await?.chunks(entry, wanted)?
        };
        found.into_iter().next().ok_or(StoreError::ChunkMissing { id: entry.id })
    }

    /// What opens the frames of disks that these entries lie in, in their order. Frames that lie together and that
    /// nobody wanted yet are read together.
    pub(crate) fn openings(&self, entries: &[IndexEntry]) -> Vec<Opening> {
        let mut openings: Vec<Option<Opening>> =
            entries.iter().map(|entry| self.opened_frames.get(&key_of(entry))).collect();
        let mut missing: Vec<(usize, IndexEntry)> = entries
            .iter()
            .copied()
            .enumerate()
            .filter(|(at, _)| openings.get(*at).is_none_or(Option::is_none))
            .collect();
        missing.sort_by_cached_key(|(_, entry)| (entry.pack, entry.placement.offset));
        missing.dedup_by_key(|(_, entry)| key_of(entry));
        let neighbours = |(_, one): &(usize, IndexEntry), (_, next): &(usize, IndexEntry)| {
            let end = u64::from(one.placement.offset) + u64::from(one.placement.length);
            one.pack == next.pack && u64::from(next.placement.offset) <= end + GAP_BYTES
        };
        for frames in missing.chunk_by(neighbours) {
            let run = self.run_of(frames.iter().map(|(_, entry)| *entry).collect());
            for (number, (at, entry)) in frames.iter().enumerate() {
                let opening = self.opening(run.clone(), number, *entry);
                let weight = (entry.placement.length as usize).saturating_mul(3).clamp(LEAST_WEIGHT, MAX_PLAIN_BYTES);
                self.opened_frames.put(key_of(entry), opening.clone(), weight);
                if let Some(slot) = openings.get_mut(*at) {
                    *slot = Some(opening);
                }
            }
        }
        let made = |(slot, entry): (Option<Opening>, &IndexEntry)| {
            // An entry of the same frame as another one before it.
            slot.or_else(|| self.opened_frames.get(&key_of(entry)))
                .unwrap_or_else(|| self.opening(self.run_of(vec![*entry]), 0, *entry))
        };
        openings.into_iter().zip(entries).map(made).collect()
    }

    /// Chunks of the frame that `entry` lies in, by their ids and numbers.
    pub(crate) async fn chunks_of(
        &self,
        opening: &Opening,
        entry: IndexEntry,
        wanted: impl IntoIterator<Item = (ChunkId, u8)>,
    ) -> Result<Vec<Bytes>, StoreError> {
        let frame = match opening.clone().await {
            Some(frame) => {
                self.opened_frames.set_weight(&key_of(&entry), frame.bytes.len().max(LEAST_WEIGHT));
                frame
            }
            // By itself: what went wrong may be about its neighbours, or have passed. If not, this tells what it is.
            None => {
                self.opened_frames.forget(&key_of(&entry));
                self.open(entry).await?
            }
        };
        frame.chunks(entry, wanted)
    }

    /// Reads frames of one pack, given in ascending order, at once.
    fn run_of(&self, entries: Vec<IndexEntry>) -> Run {
        let (backend, keys) = (Arc::clone(&self.backend), Arc::clone(&self.keys));
        let pack_keys = Arc::clone(&self.pack_keys);
        let read = async move {
            let first = entries.first()?;
            let key = pack_keys.of(&*backend, &keys, &first.pack).await.ok()?;
            let start = u64::from(first.placement.offset);
            let end_of = |entry: &IndexEntry| u64::from(entry.placement.offset) + u64::from(entry.placement.length);
            let end = entries.iter().map(end_of).max()?;
            let name = names::pack(&first.pack);
            let bytes = backend.read(&name, start, usize::try_from(end - start).ok()?).await.ok()?;
            // Frames are opened where they lie, each by another thread.
            let mut rest = Bytes::from(bytes).try_into_mut().ok()?;
            let (mut at, mut frames) = (start, Vec::with_capacity(entries.len()));
            for entry in &entries {
                let gap = usize::try_from(u64::from(entry.placement.offset).checked_sub(at)?).ok()?;
                let length = entry.placement.length as usize;
                if gap.checked_add(length)? > rest.len() {
                    return None;
                }
                let _ = rest.split_to(gap);
                frames.push(Some(rest.split_to(length)));
                at = end_of(entry);
            }
            Some((key, Arc::new(Mutex::new(frames))))
        };
        read.boxed().shared()
    }

    fn opening(&self, run: Run, number: usize, entry: IndexEntry) -> Opening {
        let (pool, keys) = (Arc::clone(&self.pool), Arc::clone(&self.keys));
        let open = async move {
            let (key, frames) = run.await?;
            let frame = frames.lock().unwrap_or_else(PoisonError::into_inner).get_mut(number).and_then(Option::take);
            drop(frames);
            let mut frame = frame?;
            let opened = pool.run(move || OpenedFrame::open(&keys, &key, &entry, &mut frame)).await;
            opened.ok()?.ok()
        };
        open.boxed().shared()
    }

    /// Reads and opens a frame, past the cache.
    async fn open(&self, entry: IndexEntry) -> Result<OpenedFrame, StoreError> {
        let object = names::pack(&entry.pack);
        let key = self.pack_keys.of(&*self.backend, &self.keys, &entry.pack).await?;
        let length = entry.placement.length as usize;
        let frame = self.backend.read(&object, entry.placement.offset.into(), length).await;
        let mut frame = frame.map_err(|error| StoreError::io("read", &object, error))?;
        let keys = Arc::clone(&self.keys);
        let opened = self.run(move || OpenedFrame::open(&keys, &key, &entry, &mut frame)).await?;
        opened.map_err(|error| StoreError::format(&object, error))
    }
}

/// A frame in memory: its chunks with the ids that their bytes hash to. Parts of it are handed out without copying.
#[derive(Clone, Debug)]
pub(crate) struct OpenedFrame {
    plain: Arc<PlainFrame>,
    bytes: Bytes,
    ids: Arc<[ChunkId]>,
}

impl OpenedFrame {
    fn open(keys: &Keys, key: &PackKey, entry: &IndexEntry, sealed: &mut [u8]) -> Result<Self, FormatError> {
        let plain = key.open_in_place(entry.kind, entry.placement.frame, sealed)?;
        let ids = plain.ids(keys, entry.kind);
        let plain = Arc::new(plain);
        Ok(Self { bytes: Bytes::from_owner(Owner(Arc::clone(&plain))), plain, ids: ids.into() })
    }

    fn chunks(
        &self,
        entry: IndexEntry,
        wanted: impl IntoIterator<Item = (ChunkId, u8)>,
    ) -> Result<Vec<Bytes>, StoreError> {
        let find = |(id, part): (ChunkId, u8)| {
            let place = self.plain.place(part)?;
            match self.ids.get(usize::from(part)) {
                Some(found) if *found == id => Ok(self.bytes.slice(place)),
                _ => Err(FormatError::WrongContent { id }),
            }
        };
        let found: Result<Vec<Bytes>, FormatError> = wanted.into_iter().map(find).collect();
        found.map_err(|error| StoreError::format(&names::pack(&entry.pack), error))
    }
}

struct Owner(Arc<PlainFrame>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}
