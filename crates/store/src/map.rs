//! Walking disk maps. Pages are read once and kept for a while; a part of the disk that is zero costs nothing.

use std::sync::Arc;

use xenvault_block::ByteRange;
use xenvault_store_format::{
    BLOCK_BYTES, ChunkId, ChunkKind, DiskMapRef, LEAF_BLOCKS, LeafPage, MAP_FANOUT, NodePage, leaves_of, leaves_under,
    level_of,
};

use crate::StoreError;
use crate::repository::Inner;

/// A page of a map, decoded.
#[derive(Clone, Debug)]
pub(crate) enum Page {
    Leaf(Arc<LeafPage>),
    Node(Arc<NodePage>),
}

/// The map of one disk.
#[derive(Clone, Debug)]
pub(crate) struct MapReader {
    pub(crate) repository: Arc<Inner>,
    map: DiskMapRef,
}

impl MapReader {
    pub(crate) fn new(repository: Arc<Inner>, map: DiskMapRef) -> Self {
        Self { repository, map }
    }

    pub(crate) fn map(&self) -> &DiskMapRef {
        &self.map
    }

    /// Level of the root.
    pub(crate) fn level(&self) -> u8 {
        level_of(self.map.virtual_size)
    }

    /// The first leaf from number `from` on, and below `end`, that is not all zero.
    pub(crate) async fn next_leaf(&self, from: u64, end: u64) -> Result<Option<(u64, ChunkId)>, StoreError> {
        let end = end.min(leaves_of(self.map.virtual_size));
        let Some(root) = self.map.root else { return Ok(None) };
        let mut cursor = from;
        'from_root: while cursor < end {
            let (mut id, mut first) = (root, 0);
            for level in (1..=self.level()).rev() {
                let node = self.node_page(&id, level).await?;
                let below = leaves_under(level - 1);
                let wanted = cursor.saturating_sub(first) / below;
                let Some((number, child)) = node.present().find(|&(number, _)| number >= wanted) else {
                    cursor = first.saturating_add(below.saturating_mul(MAP_FANOUT));
                    continue 'from_root;
                };
                if number > wanted {
                    cursor = first + number * below;
                }
                (id, first) = (child, first + number * below);
            }
            return Ok((first < end).then_some((first, id)));
        }
        Ok(None)
    }

    /// The leaf with this number; `None` if it is all zero.
    pub(crate) async fn leaf(&self, number: u64) -> Result<Option<Arc<LeafPage>>, StoreError> {
        match self.next_leaf(number, number.saturating_add(1)).await? {
            Some((_, id)) => self.leaf_page(&id).await.map(Some),
            None => Ok(None),
        }
    }

    /// The node of this level with this number among its level; `None` if it is all zero.
    pub(crate) async fn node(&self, level: u8, number: u64) -> Result<Option<Arc<NodePage>>, StoreError> {
        let (Some(root), top) = (self.map.root, self.level()) else { return Ok(None) };
        let first_leaf = number.saturating_mul(leaves_under(level));
        if level > top || first_leaf >= leaves_of(self.map.virtual_size) {
            return Ok(None);
        }
        let mut id = root;
        for above in (level + 1..=top).rev() {
            let node = self.node_page(&id, above).await?;
            match node.child(first_leaf / leaves_under(above - 1) % MAP_FANOUT) {
                Some(child) => id = child,
                None => return Ok(None),
            }
        }
        self.node_page(&id, level).await.map(Some)
    }

    /// Looks up every chunk of the disk; reads the whole map, and no chunk.
    ///
    /// A base is taken over by its ids. Where packs were lost, that would make a point that can not be restored.
    pub(crate) async fn check_chunks(&self) -> Result<(), StoreError> {
        let mut from = 0;
        while let Some((number, id)) = self.next_leaf(from, u64::MAX).await? {
            let leaf = self.leaf_page(&id).await?;
            for (block, entry) in leaf.placed() {
                let Some(id) = entry.chunk else { continue };
                if !self.repository.index.is_there(&id, ChunkKind::Data) {
                    let start = (number * LEAF_BLOCKS + block) * BLOCK_BYTES as u64;
                    let source = StoreError::ChunkMissing { id };
                    let range = ByteRange::with_length(start, u64::from(entry.blocks) * BLOCK_BYTES as u64);
                    return Err(match range {
                        Ok(range) => StoreError::DiskRange { range, source: Box::new(source) },
                        Err(_) => source,
                    });
                }
            }
            from = number + 1;
        }
        Ok(())
    }

    pub(crate) async fn leaf_page(&self, id: &ChunkId) -> Result<Arc<LeafPage>, StoreError> {
        match self.page(id, 0).await? {
            Page::Leaf(leaf) => Ok(leaf),
            Page::Node(_) => Err(wrong_page(id)),
        }
    }

    async fn node_page(&self, id: &ChunkId, level: u8) -> Result<Arc<NodePage>, StoreError> {
        match self.page(id, level).await? {
            Page::Node(node) if node.level() == level => Ok(node),
            _ => Err(wrong_page(id)),
        }
    }

    async fn page(&self, id: &ChunkId, level: u8) -> Result<Page, StoreError> {
        if let Some(page) = self.repository.pages.get(id) {
            return Ok(page);
        }
        let bytes = self.repository.chunk(id, ChunkKind::Map).await?;
        let failed = |error| StoreError::format(&format!("map page {id}"), error);
        let page = match level {
            0 => Page::Leaf(Arc::new(LeafPage::decode(&bytes).map_err(failed)?)),
            level => Page::Node(Arc::new(NodePage::decode(&bytes, level).map_err(failed)?)),
        };
        self.repository.pages.put(*id, page.clone(), 512 + bytes.len() * 2);
        Ok(page)
    }
}

fn wrong_page(id: &ChunkId) -> StoreError {
    let source = "it is a page of another level than its place in the map asks for".into();
    StoreError::Damaged { object: format!("map page {id}"), source }
}
