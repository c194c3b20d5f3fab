//! Which blocks are read again after a disk was stored. Pure; the choice depends on the run, so that runs differ.

use xenvault_block::{ByteRange, CBT_BLOCK_BYTES, ExtentSet};

/// Where blocks may be taken from.
#[derive(Clone, Debug)]
pub(crate) struct Field<'a> {
    /// Size of the disk in bytes.
    pub(crate) virtual_size: u64,
    /// What was read in this run.
    pub(crate) read: &'a ExtentSet,
    /// Offsets at which the disk held data at an earlier point.
    pub(crate) known_data: &'a [u64],
}

/// Chooses at most `count` blocks of 64 KiB (the last one of a disk may be shorter), ascending, none twice.
///
/// Half of them are taken from what was read, the others from what was not: blocks that held data, and any blocks.
pub(crate) fn choose(field: &Field<'_>, count: usize, dice: &mut Dice) -> Vec<ByteRange> {
    if field.virtual_size == 0 || count == 0 {
        return Vec::new();
    }
    let last_block = (field.virtual_size - 1) / CBT_BLOCK_BYTES;
    let mut chosen = std::collections::BTreeSet::new();
    let total = field.read.total_bytes();
    for _ in 0..if total == 0 { 0 } else { count / 2 } {
        if let Some(offset) = nth_byte(field.read, dice.below(total)) {
            chosen.insert(offset / CBT_BLOCK_BYTES);
        }
    }
    let unread = |block: u64| !field.read.contains(block * CBT_BLOCK_BYTES);
    let quiet: Vec<u64> = field
        .known_data
        .iter()
        .map(|offset| offset / CBT_BLOCK_BYTES)
        .filter(|&b| b <= last_block && unread(b))
        .collect();
    let wanted = chosen.len() + (count - chosen.len()) / 2;
    for _ in 0..count {
        if chosen.len() >= wanted || quiet.is_empty() {
            break;
        }
        let pick = usize::try_from(dice.below(quiet.len() as u64)).unwrap_or(0);
        chosen.extend(quiet.get(pick));
    }
    // Any blocks for the rest. A few more throws than places, since a block may come up twice.
    for _ in 0..count * 2 {
        if chosen.len() >= count {
            break;
        }
        chosen.insert(dice.below(last_block + 1));
    }
    let range = |block: u64| {
        ByteRange::with_length(block * CBT_BLOCK_BYTES, CBT_BLOCK_BYTES)
            .ok()
            .and_then(|range| range.intersect(ByteRange::up_to(field.virtual_size)))
    };
    chosen.into_iter().filter_map(range).collect()
}

/// The byte number `index` of a set.
fn nth_byte(set: &ExtentSet, mut index: u64) -> Option<u64> {
    for run in set.runs() {
        if index < run.len() {
            return Some(run.start() + index);
        }
        index -= run.len();
    }
    None
}

/// Keeps a few offsets out of a stream of unknown length, each with the same chance.
#[derive(Clone, Debug)]
pub(crate) struct Reservoir {
    kept: Vec<u64>,
    places: usize,
    seen: u64,
}

impl Reservoir {
    pub(crate) fn new(places: usize) -> Self {
        Self { kept: Vec::with_capacity(places), places, seen: 0 }
    }

    pub(crate) fn offer(&mut self, offset: u64, dice: &mut Dice) {
        self.seen += 1;
        if self.kept.len() < self.places {
            self.kept.push(offset);
        } else if let Ok(place) = usize::try_from(dice.below(self.seen))
            && let Some(slot) = self.kept.get_mut(place)
        {
            *slot = offset;
        }
    }

    /// What was kept, ascending.
    pub(crate) fn into_offsets(mut self) -> Vec<u64> {
        self.kept.sort_unstable();
        self.kept.dedup();
        self.kept
    }
}

/// A small generator of numbers (SplitMix64) that needs no entropy of its own: good enough to spread samples.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed from texts, such as the run and the disk.
    pub(crate) fn seeded_by(texts: &[&str]) -> Self {
        let bytes = texts.iter().flat_map(|text| text.bytes());
        // FNV-1a.
        Self::new(
            bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)),
        )
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, 0 if `limit` is 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next().checked_rem(limit).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_sample_stays_inside_the_disk_and_the_budget(
            size in 1_u64..40_000_000, start in 0_u64..30_000_000, length in 0_u64..1_000_000,
            known in proptest::collection::vec(0_u64..60_000_000, 0..10), count in 0_usize..17, seed: u64,
        ) {
            let read = ExtentSet::from_range(ByteRange::with_length(start, length).unwrap()).clipped(size);
            let field = Field { virtual_size: size, read: &read, known_data: &known };
            let sample = choose(&field, count, &mut Dice::new(seed));
            prop_assert!(sample.len() <= count);
            for range in &sample {
                prop_assert!(range.end() <= size && range.len() <= CBT_BLOCK_BYTES && !range.is_empty());
                prop_assert_eq!(range.start() % CBT_BLOCK_BYTES, 0);
            }
            prop_assert!(sample.windows(2).all(|pair| pair[0].start() < pair[1].start()));
        }
    }

    #[test]
    fn a_sample_has_changed_and_unchanged_blocks() {
        let read = ExtentSet::from_range(ByteRange::with_length(0, 64 * CBT_BLOCK_BYTES).unwrap());
        let known = [500 * CBT_BLOCK_BYTES, 600 * CBT_BLOCK_BYTES];
        let field = Field { virtual_size: 1 << 40, read: &read, known_data: &known };
        let sample = choose(&field, 16, &mut Dice::new(1));
        let changed = sample.iter().filter(|range| read.contains(range.start())).count();
        assert!(changed >= 4 && sample.len() - changed >= 4, "{sample:?}");
        assert!(known.iter().any(|&offset| sample.iter().any(|range| range.start() == offset)), "{sample:?}");
    }

    #[test]
    fn a_reservoir_keeps_no_more_than_its_places() {
        let (mut reservoir, mut dice) = (Reservoir::new(8), Dice::new(7));
        (0..1000).for_each(|n| reservoir.offer(n, &mut dice));
        let kept = reservoir.into_offsets();
        assert_eq!(kept.len(), 8);
        assert!(kept.iter().any(|&offset| offset > 100));
    }
}
