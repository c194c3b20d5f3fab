//! Going over every chunk of one point: is it in a pack that nobody is about to remove? If not, it is stored again from
//! wherever it can still be read.
//!
//! Cost: every map page of the point is read. Memory: one page per level.

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use xenvault_block::ByteRange;
use xenvault_store_format::{
    BLOB_PIECE_BYTES, BLOCK_BYTES, BlobRef, ChunkId, ChunkKind, LEAF_BYTES, LeafPage, NodePage, PointManifest,
    decode_piece_list, leaves_under, level_of,
};

use crate::StoreError;
use crate::packs::Sink;
use crate::repository::Inner;

/// Looks for every chunk of a point; with a sink, stores again what is only in a condemned pack. Returns how many chunks
/// were stored again.
///
/// # Errors
/// The first chunk that is nowhere, or without a sink in no pack that stays.
pub(crate) async fn check_point(
    repository: &Arc<Inner>,
    point: &PointManifest,
    sink: Option<&Arc<Sink>>,
) -> Result<u64, StoreError> {
    let disk = sink.map_or(0, |sink| sink.new_disk());
    let mut check = Check { repository, sink, disk, stored: 0 };
    for disk in &point.disks {
        if let Some(root) = disk.map.root {
            check.page(root, level_of(disk.map.virtual_size), 0).await?;
        }
        if let Some(bitmap) = &disk.bitmap {
            check.blob(bitmap).await?;
        }
    }
    check.blob(&point.vm_config).await?;
    Ok(check.stored)
}

struct Check<'a> {
    repository: &'a Arc<Inner>,
    sink: Option<&'a Arc<Sink>>,
    /// Under which chunks that are stored again share frames.
    disk: u64,
    stored: u64,
}

impl Check<'_> {
    /// One page and what lies under it. `first_leaf` is the number of its first leaf on the disk.
    fn page(&mut self, id: ChunkId, level: u8, first_leaf: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            self.chunk(&id, ChunkKind::Map).await?;
            let bytes = self.repository.chunk(&id, ChunkKind::Map).await?;
            let failed = |error| StoreError::format(&format!("map page {id}"), error);
            if level == 0 {
                let leaf = LeafPage::decode(&bytes).map_err(failed)?;
                for (block, entry) in leaf.placed() {
                    let Some(chunk) = entry.chunk else { continue };
                    let start = first_leaf * LEAF_BYTES + block * BLOCK_BYTES as u64;
                    let range = ByteRange::with_length(start, u64::from(entry.blocks) * BLOCK_BYTES as u64);
                    self.chunk(&chunk, ChunkKind::Data).await.map_err(|error| match range {
                        Ok(range) => StoreError::DiskRange { range, source: Box::new(error) },
                        Err(_) => error,
                    })?;
                }
                return Ok(());
            }
            let node = NodePage::decode(&bytes, level).map_err(failed)?;
            for (number, child) in node.present() {
                self.page(child, level - 1, first_leaf + number * leaves_under(level - 1)).await?;
            }
            Ok(())
        }
        .boxed()
    }

    async fn blob(&mut self, blob: &BlobRef) -> Result<(), StoreError> {
        self.chunk(&blob.id, ChunkKind::Blob).await?;
        if blob.length > BLOB_PIECE_BYTES as u64 {
            let list = self.repository.chunk(&blob.id, ChunkKind::Blob).await?;
            let pieces = decode_piece_list(&list, blob.length);
            for piece in pieces.map_err(|error| StoreError::format(&format!("blob {}", blob.id), error))? {
                self.chunk(&piece, ChunkKind::Blob).await?;
            }
        }
        Ok(())
    }

    async fn chunk(&mut self, id: &ChunkId, kind: ChunkKind) -> Result<(), StoreError> {
        let Some(sink) = self.sink else {
            let found = self.repository.index.find(id, kind);
            return found.map(|_| ()).ok_or(StoreError::ChunkMissing { id: *id });
        };
        if sink.is_known(id, kind) {
            return Ok(());
        }
        let plain = self.repository.chunk(id, kind).await?;
        let new = sink.offer_again(*id, kind, &plain, self.disk).await?;
        self.stored += u64::from(new);
        Ok(())
    }
}
