//! Forgetting points, and taking that back. A tombstone hides a point; only a sweep removes it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use xenvault_store_format::{PointId, RecordId, Tombstone, Undo};

use crate::repository::Inner;
use crate::{Repository, StoreError, names, records};

/// Longest reason that a tombstone keeps, in bytes.
const MAX_REASON_BYTES: usize = 1024;

/// What forgetting, or taking it back, has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForgetReport {
    /// Points whose state was changed, in the order in which they were named.
    pub changed: Vec<PointId>,
    /// Points that were as wanted before.
    pub unchanged: Vec<PointId>,
}

impl Repository {
    /// Forgets points: they are not listed any more, and the next sweep removes them and what only they need. Until
    /// then [`Self::undo_forget`] takes it back. Nothing is rewritten; the cost is one small object a point. A point
    /// that can not be read can be forgotten too, and so can one that is gone (see [`StoreError::PointGone`]).
    ///
    /// # Errors
    /// [`StoreError::UnknownPoint`] if there is no such point: then nothing was forgotten. [`StoreError::Full`] and
    /// [`StoreError::Backend`]: then some may be forgotten, and the call can be repeated.
    pub async fn forget(&self, points: &[PointId], reason: &str) -> Result<ForgetReport, StoreError> {
        let repository = &self.inner;
        repository.writable()?;
        let places = places(repository, points).await?;
        let forgotten = tombstones(repository).await?.of_points();
        let mut report = ForgetReport::default();
        let mut named = HashSet::new();
        for id in points.iter().filter(|id| named.insert(**id)) {
            let list = if forgotten.contains_key(id) { &mut report.unchanged } else { &mut report.changed };
            list.push(*id);
        }
        let mut reason = reason;
        while reason.len() > MAX_REASON_BYTES {
            reason = reason.char_indices().next_back().map_or("", |(end, _)| reason.get(..end).unwrap_or(""));
        }
        let write = |id: &PointId| {
            let (pool_uuid, vm_uuid) = places.get(id).cloned().unwrap_or_default();
            let tombstone = Tombstone {
                id: RecordId::random(),
                point: *id,
                pool_uuid,
                vm_uuid,
                created_unix_ms: records::unix_ms(),
                reason: reason.to_owned(),
            };
            async move { records::write(repository, &names::tombstone(&tombstone.point, &tombstone.id), &tombstone).await }
        };
        let writes = report.changed.iter().map(write).collect::<Vec<_>>();
        stream::iter(writes).buffer_unordered(records::PARALLEL).try_collect::<()>().await?;
        Ok(report)
    }

    /// Takes the forgetting of points back: they are as before.
    ///
    /// # Errors
    /// [`StoreError::TooLate`] if a sweep is removing one of them: look at the listing, since a sweep that begins at the
    /// same moment may still have left it. [`StoreError::UnknownPoint`] if a point is neither there nor forgotten: then
    /// nothing was taken back.
    pub async fn undo_forget(&self, points: &[PointId]) -> Result<ForgetReport, StoreError> {
        let repository = &self.inner;
        repository.writable()?;
        let forgotten = tombstones(repository).await?.of_points();
        let others: Vec<PointId> = points.iter().filter(|id| !forgotten.contains_key(id)).copied().collect();
        places(repository, &others).await?;
        let mut report = ForgetReport::default();
        for id in points {
            let Some(tombstones) = forgotten.get(id) else {
                report.unchanged.push(*id);
                continue;
            };
            let too_late = |taken: bool| if taken { Err(StoreError::TooLate { id: *id }) } else { Ok(()) };
            too_late(repository.look_at_sweeps().await?.takes(id))?;
            for tombstone in tombstones {
                let undo = Undo { tombstone: *tombstone, point: *id, created_unix_ms: records::unix_ms() };
                records::write(repository, &names::undo(tombstone), &undo).await?;
            }
            // A sweep that did not see this has written its intent before; and one that ended has removed the point.
            too_late(repository.look_at_sweeps().await?.takes(id))?;
            if find(repository, id).await?.is_none() {
                return Err(StoreError::TooLate { id: *id });
            }
            report.changed.push(*id);
        }
        Ok(report)
    }
}

/// The tombstones that are not undone.
#[derive(Debug, Default)]
pub(crate) struct Tombstones {
    /// All of them that can be read, by the name of their object.
    pub(crate) valid: Vec<(String, Tombstone)>,
    /// Names of tombstones that were undone.
    pub(crate) undone: Vec<(String, RecordId)>,
}

impl Tombstones {
    /// The tombstones of each point.
    pub(crate) fn of_points(&self) -> HashMap<PointId, Vec<RecordId>> {
        let mut points: HashMap<PointId, Vec<RecordId>> = HashMap::new();
        self.valid.iter().for_each(|(_, tombstone)| points.entry(tombstone.point).or_default().push(tombstone.id));
        points
    }
}

/// Reads all tombstones. One that can not be read hides nothing and removes nothing, and is warned of.
pub(crate) async fn tombstones(repository: &Inner) -> Result<Tombstones, StoreError> {
    let mut found = Tombstones::default();
    if repository.ignore_deletions {
        return Ok(found);
    }
    let all = records::read_all::<Tombstone>(repository, names::TOMBSTONES).await?;
    let checked = all.into_iter().map(|(name, tombstone)| async move {
        let tombstone = match tombstone {
            Ok(tombstone) if names::tombstone(&tombstone.point, &tombstone.id) == name => tombstone,
            Ok(_) => {
                tracing::warn!(object = name, "tombstone under the name of another left out");
                return Ok(None);
            }
            Err(error) if error.is_loss() => {
                tracing::warn!(object = name, error = %error, "tombstone left out");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // By name: a listing that lacks it would remove a point that was taken back.
        let undone = is_undone(repository, &tombstone.id).await?;
        Ok(Some((name, tombstone, undone)))
    });
    let mut checked = stream::iter(checked.collect::<Vec<_>>()).buffered(records::PARALLEL);
    while let Some(checked) = checked.try_next().await? {
        match checked {
            Some((name, tombstone, false)) => found.valid.push((name, tombstone)),
            Some((name, tombstone, true)) => found.undone.push((name, tombstone.id)),
            None => {}
        }
    }
    Ok(found)
}

/// Whether a tombstone was taken back. What is there and can not be read counts: rather a point too many.
pub(crate) async fn is_undone(repository: &Inner, tombstone: &RecordId) -> Result<bool, StoreError> {
    records::exists(repository, &names::undo(tombstone)).await
}

/// The object of a point, asked for by listing.
async fn find(repository: &Inner, id: &PointId) -> Result<Option<String>, StoreError> {
    let listed = records::list(repository, names::POINTS).await?;
    Ok(listed.into_iter().find(|name| names::point_parts(name).is_some_and(|(_, _, found)| found == *id)))
}

/// Pool and VM of each point, from the names of the objects, or from the receipt of a point that is gone.
async fn places(repository: &Arc<Inner>, points: &[PointId]) -> Result<HashMap<PointId, (String, String)>, StoreError> {
    if points.is_empty() {
        return Ok(HashMap::new());
    }
    let listed = records::list(repository, names::POINTS).await?;
    let parts = listed.iter().filter_map(|name| names::point_parts(name));
    let mut places: HashMap<PointId, (String, String)> =
        parts.map(|(pool, vm, id)| (id, (pool.to_owned(), vm.to_owned()))).collect();
    for id in points.iter().filter(|id| !places.contains_key(id)).collect::<Vec<_>>() {
        let receipt: xenvault_store_format::Receipt = match records::read(repository, &names::receipt(id)).await {
            Ok(receipt) => receipt,
            Err(error) if error.is_loss() => return Err(StoreError::UnknownPoint { id: *id }),
            Err(error) => return Err(error),
        };
        places.insert(*id, (receipt.pool_uuid, receipt.vm_uuid));
    }
    Ok(places)
}
