//! Finding and reading restore points.

use std::collections::HashSet;
use std::sync::Arc;

use futures::{StreamExt as _, stream};
use xenvault_store_format::{Level, MAX_POINT_BYTES, PointId, PointManifest, decode_point};

use crate::backend::get;
use crate::promise::is_promised;
use crate::repository::Inner;
use crate::{StoreError, forget, names, records};

/// A restore point with everything in its manifest.
pub type Point = PointManifest;

/// Which points are wanted; every field that is set must fit. The default fits every point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PointFilter {
    /// Only points of the pool with this UUID.
    pub pool_uuid: Option<String>,
    /// Only points of the VM with this UUID.
    pub vm_uuid: Option<String>,
    /// Only points of VMs with exactly this name.
    pub vm_name: Option<String>,
}

/// What a listing shows of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointSummary {
    /// Identity.
    pub id: PointId,
    /// UUID of the pool.
    pub pool_uuid: String,
    /// UUID of the VM.
    pub vm_uuid: String,
    /// The VM's name at that moment.
    pub vm_name: String,
    /// What was read.
    pub level: Level,
    /// Why.
    pub reason: String,
    /// The moment, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// How many disks it has.
    pub disks: usize,
    /// Sum of the disks' sizes in bytes.
    pub virtual_bytes: u64,
    /// Sum of the bytes that counted as changed.
    pub changed_bytes: u64,
}

/// A point's object that can not be read.
#[derive(Debug)]
pub struct DamagedPoint {
    /// Name of the object in the repository.
    pub object: String,
    /// What is wrong.
    pub error: StoreError,
}

/// All points that fit a filter, oldest first, and the ones that can not be read.
#[derive(Debug, Default)]
pub struct PointListing {
    /// Readable points, ascending by moment.
    pub points: Vec<PointSummary>,
    /// Points that exist and can not be read; whether they fit the filter may be unknown, so all of the folder count.
    pub damaged: Vec<DamagedPoint>,
    /// Points that were forgotten and that no sweep has removed yet.
    pub forgotten: Vec<PointSummary>,
    /// Points of runs that nobody saw to their end, and that a sweep may have taken chunks from: they are no base, and
    /// the next sweep looks for every chunk. What can be read of them is right.
    pub quarantined: Vec<PointSummary>,
    /// Points among `points` that were forgotten and are listed all the same: they are immutable until their promise
    /// ends, and only then does the tombstone count.
    pub promised: Vec<PointId>,
}

/// Points read at the same time when they are listed.
const PARALLEL: usize = 16;

pub(crate) async fn list(repository: &Arc<Inner>, filter: &PointFilter) -> Result<PointListing, StoreError> {
    let names = backend_list(repository).await?;
    let wanted = names.into_iter().filter(|name| match names::point_parts(name) {
        Some((pool, vm, _)) => fits(&filter.pool_uuid, pool) && fits(&filter.vm_uuid, vm),
        // Whatever else lies there is no point, and is told of: it may have been one.
        None => true,
    });
    let read = |name: String| async move {
        let point = read(repository, &name).await;
        (name, point)
    };
    let forgotten = forget::tombstones(repository).await?.of_points();
    let confirmed = Confirmed::load(repository).await?;
    let mut listing = PointListing::default();
    let mut results = stream::iter(wanted).map(read).buffered(PARALLEL);
    while let Some((object, result)) = results.next().await {
        let id = names::point_parts(&object).map(|(_, _, id)| id);
        let mut is_forgotten = id.is_some_and(|id| forgotten.contains_key(&id));
        if is_forgotten && is_promised(repository, &object).await? {
            is_forgotten = false;
            listing.promised.extend(id);
        }
        match result {
            Ok(point) if !fits(&filter.vm_name, &point.vm_name) => {}
            Ok(point) if is_forgotten => listing.forgotten.push(PointSummary::of(&point)),
            Ok(point) if confirmed.is_late(repository, &point).await? => {
                listing.quarantined.push(PointSummary::of(&point));
            }
            Ok(point) => listing.points.push(PointSummary::of(&point)),
            // A sweep was faster, or it is on its way out.
            Err(error) if error.is_gone() || is_forgotten => {}
            Err(error) => listing.damaged.push(DamagedPoint { object, error }),
        }
    }
    for list in [&mut listing.points, &mut listing.forgotten, &mut listing.quarantined] {
        list.sort_by_key(|point| (point.created_unix_ms, point.id));
    }
    Ok(listing)
}

/// Which points are known to be complete.
#[derive(Debug, Default)]
pub(crate) struct Confirmed {
    /// Number of the newest sweep that has ended.
    ended: u64,
    receipts: HashSet<PointId>,
}

impl Confirmed {
    pub(crate) async fn load(repository: &Inner) -> Result<Self, StoreError> {
        let ended = repository.look_at_sweeps().await?.ended();
        if ended == 0 {
            return Ok(Self::default());
        }
        let listed = records::list(repository, names::RECEIPTS).await?;
        Ok(Self { ended, receipts: listed.iter().filter_map(|name| names::receipt_point(name)).collect() })
    }

    /// Whether a point may have appeared after a sweep has removed what nobody had referred to.
    pub(crate) async fn is_late(&self, repository: &Inner, point: &Point) -> Result<bool, StoreError> {
        Ok(point.newest_sweep_seen < self.ended && !self.has_receipt(repository, &point.id).await?)
    }

    /// Whether a point has a receipt. The listing may lack it, so it is asked for by name.
    pub(crate) async fn has_receipt(&self, repository: &Inner, point: &PointId) -> Result<bool, StoreError> {
        Ok(self.receipts.contains(point) || records::exists(repository, &names::receipt(point)).await?)
    }
}

pub(crate) async fn find(repository: &Arc<Inner>, id: &PointId) -> Result<Point, StoreError> {
    let names = backend_list(repository).await?;
    let is_it = |name: &&String| names::point_parts(name).is_some_and(|(_, _, found)| found == *id);
    let name = names.iter().find(is_it).ok_or(StoreError::UnknownPoint { id: *id })?;
    read(repository, name).await
}

async fn backend_list(repository: &Inner) -> Result<Vec<String>, StoreError> {
    let listed = repository.backend.list(names::POINTS).await;
    listed.map_err(|error| StoreError::io("list", names::POINTS, error))
}

pub(crate) async fn read(repository: &Inner, name: &str) -> Result<Point, StoreError> {
    let bytes = get(&*repository.backend, name, MAX_POINT_BYTES).await;
    let bytes = bytes.map_err(|error| StoreError::io("read", name, error))?;
    let point = decode_point(&repository.keys, &bytes).map_err(|error| StoreError::format(name, error))?;
    // A copy of a point under another name would show a VM's disks under another VM.
    if names::point_parts(name) == Some((&point.pool_uuid, &point.vm_uuid, point.id)) {
        Ok(point)
    } else {
        let source = format!("it is point {} of VM {}", point.id, point.vm_uuid).into();
        Err(StoreError::Damaged { object: name.to_owned(), source })
    }
}

fn fits(wanted: &Option<String>, found: &str) -> bool {
    wanted.as_deref().is_none_or(|wanted| wanted == found)
}

impl PointSummary {
    fn of(point: &Point) -> Self {
        Self {
            id: point.id,
            pool_uuid: point.pool_uuid.clone(),
            vm_uuid: point.vm_uuid.clone(),
            vm_name: point.vm_name.clone(),
            level: point.level,
            reason: point.reason.clone(),
            created_unix_ms: point.created_unix_ms,
            disks: point.disks.len(),
            virtual_bytes: point.disks.iter().map(|disk| disk.virtual_size).sum(),
            changed_bytes: point.disks.iter().map(|disk| disk.changed_bytes).sum(),
        }
    }
}
