//! Publishing a point while others sweep: look before, write, look after, then the receipt.
//!
//! A sweep condemns packs by an intent that is there long before it removes anything. Whoever sees a new one goes over
//! the whole point and stores again what is only in condemned packs; if that is too late, there is no point.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use xenvault_store_format::{PointId, PointManifest, Receipt, RecordId, Tombstone, encode_point};

use crate::backend::put;
use crate::counters::add;
use crate::heal::check_point;
use crate::points;
use crate::repository::{Inner, is_absent};
use crate::sweeps::SweepState;
use crate::{StoreError, Writer, names, records};

/// So many new sweeps may appear while one point is published.
const MAX_SWEEPS: u64 = 16;

pub(crate) async fn publish(writer: &Writer, manifest: PointManifest) -> Result<PointId, StoreError> {
    let repository = &writer.sink.repository;
    let name = names::point(&manifest.pool_uuid, &manifest.vm_uuid, &manifest.id)?;
    writer.sink.flush().await?;
    let seen = settle_with_sweeps(writer, &manifest, &writer.sweeps).await?;
    writer.sink.settle().await?;

    let manifest = PointManifest { newest_sweep_seen: seen.number, ..manifest };
    let bytes = encode_point(&repository.keys, &manifest).map_err(|error| StoreError::format(&name, error))?;
    match repository.backend.length(&name).await {
        Err(error) if is_absent(&error) => {}
        Err(error) => return Err(StoreError::io("look for", &name, error)),
        Ok(_) => {
            let what = format!("restore point {} exists already, and a point is never replaced", manifest.id);
            return Err(StoreError::Misuse { what });
        }
    }
    let length = bytes.len() as u64;
    put(&*repository.backend, &name, Bytes::from(bytes))
        .await
        .map_err(|error| StoreError::io("write", &name, error))?;
    add(&writer.sink.counters.stored_bytes, length);

    let seen = match look_again(writer, &manifest, &seen).await {
        Ok(seen) => seen,
        Err(error) => {
            withdraw(repository, &manifest).await;
            return Err(error);
        }
    };
    if let Err(error) = write_receipt(repository, &manifest, seen.number).await {
        if seen.number > manifest.newest_sweep_seen {
            // By its number it may lack something, and nobody would know better: it can not be promised.
            return Err(error);
        }
        // The point is complete and durable; the next sweep, which looks at it anyway, writes the receipt.
        tracing::warn!(point = %manifest.id, error = %error, "the receipt of a point can not be written");
    }
    Ok(manifest.id)
}

/// Before the point is written: goes over it if there is a new sweep, or if its base may lose something.
async fn settle_with_sweeps(
    writer: &Writer,
    manifest: &PointManifest,
    begun: &Arc<SweepState>,
) -> Result<Arc<SweepState>, StoreError> {
    let repository = &writer.sink.repository;
    let now = repository.look_at_sweeps().await?;
    if now.number == begun.number && base_is_safe(writer, manifest, &now).await? {
        return Ok(now);
    }
    heal(writer, manifest, now).await
}

/// After the point was written.
async fn look_again(
    writer: &Writer,
    manifest: &PointManifest,
    before: &Arc<SweepState>,
) -> Result<Arc<SweepState>, StoreError> {
    let now = writer.sink.repository.look_at_sweeps().await?;
    if now.number == before.number { Ok(now) } else { heal(writer, manifest, now).await }
}

/// Makes the point independent of what sweeps up to `state` condemn, and of those that come meanwhile. Returns the
/// newest one.
async fn heal(
    writer: &Writer,
    manifest: &PointManifest,
    state: Arc<SweepState>,
) -> Result<Arc<SweepState>, StoreError> {
    let repository = &writer.sink.repository;
    let mut state = state;
    for _ in 0..MAX_SWEEPS {
        repository.bar_copies(&state).await?;
        repository.index.refresh(&*repository.backend, &repository.keys).await?;
        let overtaken = |error: StoreError| match error {
            // What is only in packs that go has to be read to be stored again; the next run writes it anew.
            error if error.is_loss() || error.is_write_only() => {
                StoreError::Overtaken { sweep: state.number, source: Box::new(error) }
            }
            error => error,
        };
        let stored = check_point(repository, manifest, Some(&writer.sink)).await.map_err(overtaken)?;
        if stored > 0 {
            tracing::info!(point = %manifest.id, chunks = stored, "stored again what a sweep has condemned");
            writer.sink.flush().await?;
        }
        writer.sink.settle().await?;
        let now = repository.look_at_sweeps().await?;
        if now.number == state.number {
            return Ok(now);
        }
        state = now;
    }
    let source = Box::new(StoreError::SweepTaken { number: state.number });
    Err(StoreError::Overtaken { sweep: state.number, source })
}

/// Whether everything that was taken over from bases stays: they are the disks of a point that is known to be complete,
/// and that the open sweep does not remove. Of bases that nobody names, nothing is known.
async fn base_is_safe(writer: &Writer, manifest: &PointManifest, now: &SweepState) -> Result<bool, StoreError> {
    let bases = writer.bases.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if now.number == 0 || bases.is_empty() {
        return Ok(true);
    }
    let repository = &writer.sink.repository;
    let Some(parent) = manifest.parent.filter(|parent| !now.takes(parent)) else { return Ok(false) };
    if !records::exists(repository, &names::receipt(&parent)).await? {
        return Ok(false);
    }
    let name = names::point(&manifest.pool_uuid, &manifest.vm_uuid, &parent)?;
    match points::read(repository, &name).await {
        Ok(parent) => {
            let roots: Vec<_> = parent.disks.iter().filter_map(|disk| disk.map.root).collect();
            Ok(bases.iter().all(|base| roots.contains(base)))
        }
        Err(error) if error.is_loss() => Ok(false),
        Err(error) => Err(error),
    }
}

pub(crate) async fn write_receipt(
    repository: &Inner,
    point: &PointManifest,
    checked_sweep: u64,
) -> Result<(), StoreError> {
    let receipt = Receipt {
        point: point.id,
        pool_uuid: point.pool_uuid.clone(),
        vm_uuid: point.vm_uuid.clone(),
        checked_sweep,
        created_unix_ms: records::unix_ms(),
    };
    records::write(repository, &names::receipt(&point.id), &receipt).await
}

/// Takes a point back that was written and can not be vouched for. If that fails too, it stays without a receipt.
async fn withdraw(repository: &Inner, point: &PointManifest) {
    let tombstone = Tombstone {
        id: RecordId::random(),
        point: point.id,
        pool_uuid: point.pool_uuid.clone(),
        vm_uuid: point.vm_uuid.clone(),
        created_unix_ms: records::unix_ms(),
        reason: "withdrawn: a sweep was faster than its run".to_owned(),
    };
    let name = names::tombstone(&tombstone.point, &tombstone.id);
    if let Err(error) = records::write(repository, &name, &tombstone).await {
        tracing::warn!(point = %point.id, error = %error, "a point that is not complete can not be withdrawn");
    }
}
