//! Which loaded segments belong together: a run answers for a chunk with one of its segments, and only a whole run says
//! that it knows everything that is in its packs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use xenvault_store_format::{ChunkId, PackId, RunPart};

use super::Segment;

/// The runs of loaded segments. Memory: some bytes per segment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Runs {
    runs: Vec<Run>,
    by_name: HashMap<([u8; 16], u32), usize>,
}

#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) level: u8,
    /// Number of the segment among those that are loaded, by part. Two objects can be the same part: the last counts.
    parts: Vec<Option<u32>>,
    missing: usize,
}

impl Run {
    pub(super) fn is_whole(&self) -> bool {
        self.missing == 0
    }

    pub(super) fn segments<'a>(&'a self, loaded: &'a [Arc<Segment>]) -> impl Iterator<Item = &'a Arc<Segment>> {
        self.parts.iter().flatten().filter_map(|&at| loaded.get(at as usize))
    }
}

impl Runs {
    pub(super) fn of(segments: &[Arc<Segment>]) -> Self {
        let mut runs = Self::default();
        segments.iter().enumerate().for_each(|(at, segment)| runs.add(at, &segment.place()));
        runs
    }

    fn add(&mut self, at: usize, place: &RunPart) {
        let key = (place.run, place.parts);
        let number = *self.by_name.entry(key).or_insert_with(|| {
            let parts = vec![None; place.parts as usize];
            self.runs.push(Run { level: place.level, missing: parts.len(), parts });
            self.runs.len() - 1
        });
        let Some(run) = self.runs.get_mut(number) else { return };
        let slot = run.parts.get_mut(place.part as usize);
        if let (Some(slot), Ok(at)) = (slot, u32::try_from(at)) {
            run.missing -= usize::from(slot.is_none());
            *slot = Some(at);
        }
    }

    /// The segments that may know a chunk, by their numbers: one of each run, the latest first.
    pub(super) fn candidates<'a>(&'a self, id: &'a ChunkId) -> impl Iterator<Item = usize> + 'a {
        self.runs.iter().rev().filter_map(|run| {
            let parts = u32::try_from(run.parts.len()).unwrap_or(u32::MAX);
            let part = RunPart::of_chunk(id, parts) as usize;
            run.parts.get(part).copied().flatten().map(|at| at as usize)
        })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter()
    }

    /// The packs of which everything is known.
    pub(super) fn covered(&self, segments: &[Arc<Segment>]) -> HashSet<PackId> {
        let whole = self.runs.iter().filter(|run| run.is_whole());
        whole.flat_map(|run| run.segments(segments)).flat_map(|segment| segment.packs()).collect()
    }
}
