//! Building the map of a disk from its leaves, in ascending order, over the map of a base.
//!
//! Only nodes on the way to a leaf that was set are opened; all others stay the base's. Memory: one node per level.

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use xenvault_store_format::{
    ChunkId, ChunkKind, DiskMapRef, MAP_FANOUT, MAX_MAP_LEVEL, NodePage, leaves_under, level_of,
};

use crate::StoreError;
use crate::map::MapReader;
use crate::packs::Sink;

#[derive(Debug)]
pub(crate) struct TreeBuilder {
    sink: Arc<Sink>,
    virtual_size: u64,
    base: Option<MapReader>,
    /// The open node of each level from 1 on, with its number among its level.
    open: [Option<(u64, NodePage)>; MAX_MAP_LEVEL as usize + 1],
    root: Option<ChunkId>,
    new_pages: u64,
}

impl TreeBuilder {
    /// A map that equals the base's as long as nothing is set. The base is not larger than the disk.
    pub(crate) async fn begin(sink: Arc<Sink>, virtual_size: u64, base: Option<MapReader>) -> Result<Self, StoreError> {
        let root = base.as_ref().and_then(|base| base.map().root);
        let base_level = base.as_ref().map_or(0, MapReader::level);
        let mut tree = Self { sink, virtual_size, base, open: Default::default(), root, new_pages: 0 };
        // A disk that has outgrown the height of its map: the old root becomes the first child of a higher one.
        if root.is_some() && base_level < tree.level() {
            tree.root = None;
            tree.set(base_level + 1, 0, root).await?;
        }
        Ok(tree)
    }

    /// Stores a page unless it is known.
    pub(crate) async fn store_page(&mut self, bytes: &[u8]) -> Result<ChunkId, StoreError> {
        let (id, new) = self.sink.offer_whole(ChunkKind::Map, bytes).await?;
        self.new_pages += u64::from(new);
        Ok(id)
    }

    /// Sets a leaf; `None` makes it all zero. Leaves come in ascending order.
    pub(crate) async fn set_leaf(&mut self, number: u64, id: Option<ChunkId>) -> Result<(), StoreError> {
        self.set(1, number, id).await
    }

    /// Completes the map.
    pub(crate) async fn finish(mut self) -> Result<(DiskMapRef, u64), StoreError> {
        for level in 1..=self.level() {
            self.close(level).await?;
        }
        Ok((DiskMapRef { root: self.root, virtual_size: self.virtual_size }, self.new_pages))
    }

    fn level(&self) -> u8 {
        level_of(self.virtual_size)
    }

    /// Sets the child with this number among the pages of the level below `level`.
    fn set(&mut self, level: u8, child: u64, id: Option<ChunkId>) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            if level > self.level() {
                self.root = id;
                return Ok(());
            }
            let number = child / MAP_FANOUT;
            if self.slot(level).as_ref().is_some_and(|(open, _)| *open != number) {
                self.close(level).await?;
            }
            if self.slot(level).is_none() {
                let page = self.base_node(level, number).await?;
                *self.slot(level) = Some((number, page));
            }
            if let Some((_, page)) = self.slot(level) {
                page.set_child(child % MAP_FANOUT, id);
            }
            Ok(())
        }
        .boxed()
    }

    async fn close(&mut self, level: u8) -> Result<(), StoreError> {
        let Some((number, page)) = self.slot(level).take() else { return Ok(()) };
        let id = match page.encode() {
            Some(bytes) => Some(self.store_page(&bytes).await?),
            None => None,
        };
        self.set(level + 1, number, id).await
    }

    async fn base_node(&self, level: u8, number: u64) -> Result<NodePage, StoreError> {
        let found = match &self.base {
            // Above the base's own root there is nothing of it but that root, which `begin` has set.
            Some(base) if level <= base.level() => base.node(level, number).await?,
            _ => None,
        };
        debug_assert!(number.saturating_mul(leaves_under(level)) <= self.virtual_size);
        Ok(found.map_or_else(|| NodePage::new(level), |page| (*page).clone()))
    }

    #[expect(clippy::indexing_slicing, reason = "levels are at most MAX_MAP_LEVEL, one less than the array's length")]
    fn slot(&mut self, level: u8) -> &mut Option<(u64, NodePage)> {
        &mut self.open[usize::from(level.min(MAX_MAP_LEVEL))]
    }
}
