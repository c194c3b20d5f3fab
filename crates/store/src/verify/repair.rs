//! Repair: what can be made again from what is there. It never touches a pack or a point.

use std::collections::HashSet;

use xenvault_store_format::{IndexLayout, MAX_SEGMENT_BYTES, Receipt};

use crate::backend::get;
use crate::forget::tombstones;
use crate::heal::check_point;
use crate::publish::write_receipt;
use crate::{PointFilter, Repository, StoreError, names, records};

/// What a repair has made again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RepairReport {
    /// Bytes of index segments that were written from the directories of packs.
    pub index_bytes: u64,
    /// Damaged index segments that were removed, by name.
    pub removed_segments: Vec<String>,
    /// Points that got a receipt since they are complete.
    pub confirmed: Vec<xenvault_store_format::PointId>,
    /// Points without a receipt that are not complete.
    pub incomplete: Vec<xenvault_store_format::PointId>,
}

impl Repository {
    /// Makes index segments again from the packs that no readable segment names, removes segments that are damaged, and
    /// writes receipts for points that have none and are complete. What is in no pack any more can not be made again:
    /// backups store it when they meet it.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Backend`]: then some of it is done, and the call can be repeated.
    pub async fn repair(&self) -> Result<RepairReport, StoreError> {
        let repository = &self.inner;
        repository.writable()?;
        let mut report = RepairReport::default();
        let state = repository.look_at_sweeps().await?;
        repository.bar_copies(&state).await?;
        let mut damaged = Vec::new();
        for name in records::list(repository, names::INDEX).await? {
            match get(&*repository.backend, &name, MAX_SEGMENT_BYTES).await {
                Ok(bytes) => match IndexLayout::check(&bytes, &repository.keys) {
                    Ok(_) => {}
                    Err(error) => match StoreError::format(&name, error) {
                        error @ StoreError::NewerFormat { .. } => return Err(error),
                        _ => damaged.push(name),
                    },
                },
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => damaged.push(name),
                Err(error) => return Err(StoreError::io("read", &name, error)),
            }
        }
        // As somebody who comes new: what this process has loaded may be gone or damaged since.
        let fresh = self.reopen_on(repository.backend.clone())?.inner;
        fresh.bar_copies(&state).await?;
        fresh.index.refresh(&*fresh.backend, &fresh.keys).await?;
        fresh.index.read_all(&*fresh.backend, &fresh.keys).await?;
        report.index_bytes = fresh.index.publish_learned(&*fresh.backend, &fresh.keys).await?;
        for name in damaged {
            if crate::promise::is_held(&fresh, &name).await? {
                continue;
            }
            records::remove(&fresh, &name).await?;
            report.removed_segments.push(name);
        }
        self.confirm(&mut report).await?;
        Ok(report)
    }

    /// Writes receipts. Points that are forgotten get none.
    async fn confirm(&self, report: &mut RepairReport) -> Result<(), StoreError> {
        let repository = &self.inner;
        repository.index.refresh(&*repository.backend, &repository.keys).await?;
        repository.index.read_all(&*repository.backend, &repository.keys).await?;
        let forgotten: HashSet<_> = tombstones(repository).await?.of_points().into_keys().collect();
        let listing = self.points(&PointFilter::default()).await?;
        for summary in listing.points.iter().chain(&listing.quarantined).filter(|point| !forgotten.contains(&point.id))
        {
            let name = names::receipt(&summary.id);
            match records::read::<Receipt>(repository, &name).await {
                Ok(receipt) if receipt.point == summary.id => continue,
                Err(error) if !error.is_loss() => return Err(error),
                _ => {}
            }
            let state = repository.look_at_sweeps().await?;
            repository.bar_copies(&state).await?;
            let point = self.point(&summary.id).await?;
            match check_point(repository, &point, None).await {
                Ok(_) => {
                    // A sweep that began meanwhile has seen the point, since it is there.
                    write_receipt(repository, &point, state.number).await?;
                    report.confirmed.push(summary.id);
                }
                Err(error) if error.is_loss() => report.incomplete.push(summary.id),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
