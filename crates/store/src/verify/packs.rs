//! Packs: their frame, the index against it, and every chunk in them.

use std::sync::Arc;

use futures::{StreamExt as _, stream};
use xenvault_store_format::{
    IndexEntry, KeyAccess, Keys, MAX_PACK_BYTES, PACK_HEADER_BYTES, PackClass, PackId, PackKey, Placement,
};

use super::{DamageKind, Verify, VerifyMode, reason};
use crate::index::{Loaded, read_directory};
use crate::monitor::MaintenanceStage;
use crate::repository::Inner;
use crate::{StoreError, names, records};

/// Packs that are read at the same time; each of them is held in memory.
const PARALLEL: usize = 2;

/// What was found of one pack.
#[derive(Debug, Default)]
struct Found {
    damage: Option<(DamageKind, String)>,
    bad: Vec<IndexEntry>,
    /// Nothing can be said of what is in it.
    unknown: bool,
    read_bytes: u64,
    read: bool,
}

impl Verify {
    pub(super) async fn check_packs(&mut self) -> Result<(), StoreError> {
        let repository = self.repository.clone();
        let loaded = repository.index.snapshot();
        let mut packs = Vec::new();
        for name in records::list(&repository, names::PACKS).await? {
            match names::pack_id(&name) {
                Some(id) => packs.push((id, name)),
                None => self.damaged(&name, DamageKind::Misplaced, "it is no pack of this name"),
            }
        }
        let planned = packs.len() as u64;
        let check = |(id, name): (PackId, String)| {
            let (repository, loaded, mode) = (repository.clone(), loaded.clone(), self.options.mode);
            async move {
                let found = check_pack(&repository, &loaded, &id, &name, is_read(mode, &id)).await;
                (id, name, found)
            }
        };
        let checks: Vec<_> = packs.into_iter().map(check).collect();
        let mut checks = stream::iter(checks).buffer_unordered(PARALLEL);
        let mut done = 0;
        while let Some((id, name, found)) = checks.next().await {
            let found = found?;
            self.report.read_bytes += found.read_bytes;
            self.report.packs += u64::from(found.read);
            self.bad.copies.extend(found.bad.iter().map(|entry| (entry.id, id)));
            if found.unknown {
                self.bad.packs.insert(id);
            }
            if let Some((kind, reason)) = found.damage {
                self.damaged(&name, kind, reason);
            }
            done += 1;
            self.options.monitor.tell(MaintenanceStage::Packs, done, planned, self.report.read_bytes);
        }
        let barred = repository.index.barred();
        for id in loaded.lost.iter().filter(|id| !barred.condemned.contains(id)) {
            let reason = "index segments name it: what it held is lost, unless it is in another pack too";
            self.damaged(&names::pack(id), DamageKind::Missing, reason);
        }
        Ok(())
    }
}

/// Whether the chunks of this pack are read. The id is a hash, so its bits choose evenly.
fn is_read(mode: VerifyMode, id: &PackId) -> bool {
    match mode {
        VerifyMode::Quick => false,
        VerifyMode::Full => true,
        VerifyMode::Sample { percent, seed } => {
            let bits = id.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let mixed = (bits ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed >> 32) * 100 < u64::from(percent) << 32
        }
    }
}

async fn check_pack(
    repository: &Arc<Inner>,
    loaded: &Arc<Loaded>,
    id: &PackId,
    name: &str,
    read: bool,
) -> Result<Found, StoreError> {
    let mut found = Found::default();
    let entries = match read_directory(&*repository.backend, &repository.keys, *id, name).await {
        Ok(directory) => {
            let entries: Vec<IndexEntry> = directory.index_entries().collect();
            found.read_bytes += PACK_HEADER_BYTES as u64 + u64::from(directory.trailer.directory_length);
            let end = u64::from(directory.trailer.directory_offset);
            if let Some(error) = &directory.lost_header {
                let reason = format!("one of the two copies of its header is lost: {}", reason(error));
                found.damage = Some((DamageKind::Damaged, reason));
            } else if !are_seamless(&entries, end) {
                let reason = format!("the chunks of its directory do not fill its {} bytes", directory.length);
                found.damage = Some((DamageKind::Damaged, reason));
            } else if entries.iter().any(|entry| is_elsewhere(repository, entry)) {
                let reason = "the index names other places than its directory".to_owned();
                found.damage = Some((DamageKind::Damaged, reason));
            }
            entries
        }
        // A sweep has removed it since it was listed.
        Err(error) if error.is_gone() => return Ok(found),
        Err(error) if error.is_loss() => {
            found.damage = Some((DamageKind::Damaged, reason(&error)));
            // The index may know what is in it.
            entries_of(loaded, id)
        }
        Err(error) => return Err(error),
    };
    if found.damage.is_some() && entries.is_empty() {
        found.unknown = true;
    } else if (read || found.damage.is_some()) && are_readable(&repository.keys, &entries) {
        check_chunks(repository, id, name, entries, &mut found).await?;
    }
    Ok(found)
}

/// Whether the index says that this pack has the chunk at another place. That it does not name the pack is nothing: it may
/// be newer than the index, or the chunk be known from another pack.
fn is_elsewhere(repository: &Inner, entry: &IndexEntry) -> bool {
    let copies = repository.index.copies(&entry.id, entry.kind);
    let mut of_this = copies.iter().filter(|copy| copy.pack == entry.pack).peekable();
    of_this.peek().is_some() && of_this.all(|copy| copy != entry)
}

/// Whether the frames lie one behind the other, so that every byte of the pack belongs to something with a checksum.
fn are_seamless(entries: &[IndexEntry], end: u64) -> bool {
    let last = frames_of(entries).try_fold(PACK_HEADER_BYTES as u64, |at, chunks| {
        let place = chunks.first()?.placement;
        (u64::from(place.offset) == at).then(|| at + u64::from(place.length))
    });
    last == Some(end)
}

/// Whether these keys open the frames of a pack. That they do not is nothing against it.
fn are_readable(keys: &Keys, entries: &[IndexEntry]) -> bool {
    let opens = |class| class == PackClass::Structure || keys.access() == KeyAccess::Full;
    entries.first().is_none_or(|entry| opens(entry.kind.class()))
}

/// Entries that follow each other and lie in one frame, frame by frame.
fn frames_of(entries: &[IndexEntry]) -> impl Iterator<Item = &[IndexEntry]> {
    entries.chunk_by(|one, next| {
        let frame = |entry: &IndexEntry| {
            let Placement { offset, length, frame, .. } = entry.placement;
            (entry.pack, entry.kind, offset, length, frame)
        };
        frame(one) == frame(next)
    })
}

/// Opens a frame once, and hashes each of its chunks; returns those that can not be read, and why.
fn check_frame(
    keys: &Keys,
    key: &Result<Arc<PackKey>, String>,
    pack: &mut [u8],
    chunks: &[IndexEntry],
) -> Vec<(IndexEntry, String)> {
    let Some(first) = chunks.first() else { return Vec::new() };
    let (from, count) = (first.placement.offset as usize, first.placement.length as usize);
    let opened = match pack.get_mut(from..).and_then(|rest| rest.get_mut(..count)) {
        None => Err(format!("it ends before byte {}", from.saturating_add(count))),
        Some(frame) => key.clone().and_then(|key| {
            let opened = key.open_in_place(first.kind, first.placement.frame, frame);
            opened.map_err(|error| error.to_string())
        }),
    };
    let of_chunk = |entry: &IndexEntry| match &opened {
        Err(reason) => Some((*entry, reason.clone())),
        Ok(frame) => {
            let found = frame.chunk(keys, entry.kind, &entry.id, entry.placement.part);
            found.err().map(|error| (*entry, error.to_string()))
        }
    };
    chunks.iter().filter_map(of_chunk).collect()
}

fn entries_of(loaded: &Loaded, id: &PackId) -> Vec<IndexEntry> {
    let mut entries = loaded.entries_in(id);
    entries.sort_by_key(|entry| (entry.placement.offset, entry.placement.frame, entry.placement.part));
    entries.dedup();
    entries
}

/// Reads the whole pack, opens every frame once and hashes every chunk.
async fn check_chunks(
    repository: &Arc<Inner>,
    id: &PackId,
    name: &str,
    entries: Vec<IndexEntry>,
    found: &mut Found,
) -> Result<(), StoreError> {
    let failed = |error| StoreError::io("read", name, error);
    let length = match repository.backend.length(name).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        length => length.map_err(failed)?,
    };
    let length = usize::try_from(length).unwrap_or(usize::MAX).min(MAX_PACK_BYTES);
    let bytes = repository.backend.read(name, 0, length).await;
    let bytes = match bytes.map_err(failed) {
        Ok(bytes) => bytes,
        Err(error) if error.is_gone() => return Ok(()),
        Err(error) => return Err(error),
    };
    found.read_bytes += bytes.len() as u64;
    found.read = true;
    let repository = Arc::clone(repository);
    let keys = Arc::clone(&repository.keys);
    let key = match repository.pack_keys.of(&*repository.backend, &repository.keys, id).await {
        Ok(key) => Ok(key),
        Err(error) if error.is_loss() => Err(reason(&error)),
        Err(error) => return Err(error),
    };
    let work = move || -> Vec<(IndexEntry, String)> {
        let mut bytes = bytes;
        frames_of(&entries).flat_map(|chunks| check_frame(&keys, &key, &mut bytes, chunks)).collect()
    };
    let bad = repository.run(work).await?;
    if let (None, Some((first, reason))) = (&found.damage, bad.first()) {
        let count = bad.len();
        let text = format!("{count} of its chunks can not be read, the first one (chunk {}): {reason}", first.id);
        found.damage = Some((DamageKind::Damaged, text));
    }
    tracing::debug!(pack = %id, bad = bad.len(), "pack was read");
    found.bad = bad.into_iter().map(|(entry, _)| entry).collect();
    Ok(())
}
