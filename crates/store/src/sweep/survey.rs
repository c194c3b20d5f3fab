//! Which points there are: listed twice, held against receipts and tombstones. Whatever does not fit ends the sweep.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt as _, stream};
use xenvault_store_format::{PointId, Receipt, SweepIntent};

use super::SweepOptions;
use crate::forget::{Tombstones, tombstones};
use crate::heal::check_point;
use crate::mark::Marks;
use crate::monitor::MaintenanceStage;
use crate::points::{self, Confirmed, Point};
use crate::publish::write_receipt;
use crate::repository::Inner;
use crate::{StoreError, names, records};

/// The points of a repository, complete.
#[derive(Debug)]
pub(super) struct Survey {
    /// Every point, with the name of its object.
    pub(super) points: BTreeMap<PointId, String>,
    pub(super) tombstones: Tombstones,
    /// Names of receipts of points that are gone.
    pub(super) spent_receipts: Vec<String>,
}

impl Survey {
    /// Takes stock. `intent` is that of the open sweep, whose points may be gone.
    pub(super) async fn take(
        repository: &Arc<Inner>,
        intent: Option<&SweepIntent>,
        options: &SweepOptions,
    ) -> Result<Self, StoreError> {
        options.monitor.tell(MaintenanceStage::List, 0, 0, 0);
        let first = list(repository).await?;
        let receipts = records::list(repository, names::RECEIPTS).await?;
        let tombstones = tombstones(repository).await?;
        let points = list(repository).await?;
        for (id, name) in &first {
            // It may have been removed in between, by somebody who carries out the same sweep.
            if !points.contains_key(id) && records::exists(repository, name).await? {
                return Err(incomplete(name));
            }
        }
        for (_, tombstone) in tombstones.valid.iter().filter(|(_, tombstone)| !points.contains_key(&tombstone.point)) {
            let name = names::point(&tombstone.pool_uuid, &tombstone.vm_uuid, &tombstone.point)?;
            if records::exists(repository, &name).await? {
                return Err(incomplete(&name));
            }
        }
        let mut explained: BTreeSet<PointId> = tombstones.valid.iter().map(|(_, tombstone)| tombstone.point).collect();
        explained.extend(intent.iter().flat_map(|intent| intent.forgotten.iter().map(|going| going.point)));
        let mut spent_receipts = Vec::new();
        for receipt in receipts {
            let Some(id) = names::receipt_point(&receipt).filter(|id| !points.contains_key(id)) else { continue };
            if !explained.contains(&id) {
                let name = place(repository, &receipt, id).await?;
                if records::exists(repository, &name).await? {
                    return Err(incomplete(&name));
                }
                if !options.accept_lost_points && !repository.was_swept(&id).await? {
                    return Err(StoreError::PointGone { object: name });
                }
            }
            spent_receipts.push(receipt);
        }
        Ok(Self { points, tombstones, spent_receipts })
    }

    fn is_forgotten(&self, name: &str) -> bool {
        let id = names::point_parts(name).map(|(_, _, id)| id);
        self.tombstones.valid.iter().any(|(_, tombstone)| Some(tombstone.point) == id)
    }

    /// Marks everything that the points refer to, but for those that go. Of those that nobody saw to their end and that
    /// came late, it is forgiven that something can not be found.
    pub(super) async fn mark(
        &self,
        repository: &Arc<Inner>,
        marks: &mut Marks,
        going: &BTreeSet<PointId>,
        options: &SweepOptions,
    ) -> Result<Unconfirmed, StoreError> {
        let confirmed = Confirmed::load(repository).await?;
        let staying: Vec<&String> =
            self.points.iter().filter(|(id, _)| !going.contains(id)).map(|(_, name)| name).collect();
        let planned = staying.len() as u64;
        let mut unconfirmed = Unconfirmed::default();
        let read = |name: &'_ String| {
            let name = name.clone();
            async move { (points::read(repository, &name).await, name) }
        };
        let reads: Vec<_> = staying.into_iter().map(read).collect();
        let mut reads = stream::iter(reads).buffered(records::PARALLEL);
        let mut done = 0;
        while let Some((point, name)) = reads.next().await {
            let point = match point {
                Ok(point) => point,
                // Somebody has put it there, and it was forgotten: it only waits for its lock to end.
                Err(error) if error.is_loss() && self.is_forgotten(&name) => {
                    tracing::warn!(object = name, error = %error, "a forgotten point that is none is left out");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if confirmed.is_late(repository, &point).await? {
                match marks.point(repository, &point).await {
                    Err(error) if !error.is_loss() => return Err(error),
                    _ => unconfirmed.late.push(point),
                }
            } else {
                marks.point(repository, &point).await.map_err(|error| of_point(&name, error))?;
                if !confirmed.has_receipt(repository, &point.id).await? {
                    unconfirmed.in_time.push(point);
                }
            }
            done += 1;
            options.monitor.tell(MaintenanceStage::Mark, done, planned, marks.read_bytes);
        }
        Ok(unconfirmed)
    }
}

/// Points without a receipt.
#[derive(Debug, Default)]
pub(super) struct Unconfirmed {
    /// Those that may have come after a sweep had looked.
    pub(super) late: Vec<Point>,
    /// All others. They need a receipt before the sweep ends, since then they count as late.
    pub(super) in_time: Vec<Point>,
}

/// Writes receipts for points that came in time and of which every chunk stays.
pub(super) async fn confirm(repository: &Arc<Inner>, points: Vec<Point>, checked_sweep: u64) -> Result<(), StoreError> {
    for point in points {
        match check_point(repository, &point, None).await {
            Ok(_) => write_receipt(repository, &point, checked_sweep).await?,
            // Its run is not at its end, and sees to it; if it does not, the point is late from then on.
            Err(error) if error.is_loss() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The points by their objects' names. What lies there and is no point may be one whose name was hurt.
async fn list(repository: &Inner) -> Result<BTreeMap<PointId, String>, StoreError> {
    let mut points = BTreeMap::new();
    for name in records::list(repository, names::POINTS).await? {
        let Some((_, _, id)) = names::point_parts(&name) else {
            if repository.backend.oldest_counts() {
                // No medium has hurt a name there: somebody has put it beside the points.
                tracing::warn!(object = name, "an object among the points that is none is left out");
                continue;
            }
            let source = "its name is not that of a restore point".into();
            return Err(StoreError::Damaged { object: name, source });
        };
        if let Some(other) = points.insert(id, name.clone()) {
            let source = format!("{other} is the same point").into();
            return Err(StoreError::Damaged { object: name, source });
        }
    }
    Ok(points)
}

/// The name of the object of the point with this receipt.
async fn place(repository: &Inner, name: &str, id: PointId) -> Result<String, StoreError> {
    let receipt: Receipt = records::read(repository, name).await?;
    if receipt.point != id {
        let source = format!("it is of point {}", receipt.point).into();
        return Err(StoreError::Damaged { object: name.to_owned(), source });
    }
    names::point(&receipt.pool_uuid, &receipt.vm_uuid, &id)
}

fn incomplete(object: &str) -> StoreError {
    StoreError::IncompleteListing { folder: names::POINTS.to_owned(), object: object.to_owned() }
}

/// An operator wants to know which point it was.
fn of_point(name: &str, error: StoreError) -> StoreError {
    if error.is_loss() { StoreError::Damaged { object: name.to_owned(), source: Box::new(error) } } else { error }
}
