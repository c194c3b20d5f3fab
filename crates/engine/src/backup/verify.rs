//! A verified incremental: the whole disk was read, and what differs from the last point must have been listed as
//! changed.
//!
//! Equal chunks have equal ids, so that equal parts of the two disks cost no more than their maps. Only where the chunks
//! differ (a change that was listed re-cuts its neighbours too) bytes are read back from the repository and compared.

use xenvault_block::{ByteRange, CBT_BLOCK_BYTES, ExtentSet};
use xenvault_store::{DiskMapRef, Repository};

use super::request::Verification;
use crate::EngineError;
use crate::pool::DoingInRepository as _;

/// How much is compared at once, in bytes.
const PIECE_BYTES: u64 = 1024 * 1024;

/// Compares the disk as it was read with the last point, outside of what was `listed` as changed. Beyond the end of the
/// smaller one everything counts as listed.
pub(crate) async fn compare(
    repository: &Repository,
    before: &DiskMapRef,
    now: &DiskMapRef,
    listed: &ExtentSet,
) -> Result<Verification, EngineError> {
    let common = before.virtual_size.min(now.virtual_size);
    let mut found = Verification { compared_bytes: common, ..Verification::default() };
    if before.root == now.root && before.virtual_size == now.virtual_size {
        return Ok(found);
    }
    let (old, new) = (repository.disk(before), repository.disk(now));
    let quiet = listed.complement(common);
    let mut unlisted = ExtentSet::new();
    for run in quiet.runs() {
        for piece in run.pieces(PIECE_BYTES) {
            let old_chunks = old.chunks(piece).await.doing("read the map of the last point")?;
            if old_chunks == new.chunks(piece).await.doing("read the map of a disk")? {
                continue;
            }
            let left = old.read_at(piece).await.doing("read the last point")?;
            let right = new.read_at(piece).await.doing("read back a disk")?;
            if left == right {
                continue;
            }
            for block in piece.pieces(CBT_BLOCK_BYTES) {
                let from = usize::try_from(block.start() - piece.start()).unwrap_or(usize::MAX);
                let to = usize::try_from(block.end() - piece.start()).unwrap_or(usize::MAX);
                if left.get(from..to) != right.get(from..to) {
                    found.unlisted_bytes += block.len();
                    note(&mut unlisted, block);
                }
            }
        }
    }
    found.unlisted = unlisted.runs().to_vec();
    Ok(found)
}

/// Keeps the first ranges, and lets the last one grow.
fn note(unlisted: &mut ExtentSet, block: ByteRange) {
    let touches = unlisted.runs().last().is_some_and(|last| last.end() == block.start());
    if touches || unlisted.runs().len() < Verification::MAX_RANGES {
        unlisted.insert(block);
    }
}
