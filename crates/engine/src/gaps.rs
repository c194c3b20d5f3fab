//! Joining of changed runs over small gaps, within a budget of bytes that nobody needs. Pure.

use xenvault_block::{ByteRange, ExtentSet};

/// Gaps of this size or more are never read, in bytes.
pub(crate) const MAX_GAP_BYTES: u64 = 256 * 1024;

/// At most one byte of gap for so many bytes of change: 12.5%.
const CHANGED_PER_GAP: u64 = 8;

/// The runs of `changed`, joined over gaps under 256 KiB, the smallest gaps first, as long as all gaps together stay
/// under an eighth of the changed bytes.
///
/// One request over a gap is cheaper than two, but many scattered small changes would otherwise multiply what is read.
pub(crate) fn join_gaps(changed: &ExtentSet) -> ExtentSet {
    let runs = changed.runs();
    let mut gaps: Vec<(u64, usize)> = runs
        .windows(2)
        .enumerate()
        .filter_map(|(index, pair)| match pair {
            [left, right] => Some((right.start() - left.end(), index)),
            _ => None,
        })
        .filter(|&(gap, _)| gap < MAX_GAP_BYTES)
        .collect();
    gaps.sort_unstable();
    let mut budget = changed.total_bytes() / CHANGED_PER_GAP;
    let mut joined = vec![false; runs.len()];
    for (gap, index) in gaps {
        if gap > budget {
            break;
        }
        budget -= gap;
        if let Some(slot) = joined.get_mut(index) {
            *slot = true;
        }
    }
    let mut set = ExtentSet::new();
    let mut open: Option<ByteRange> = None;
    for (run, join) in runs.iter().zip(joined) {
        let start = open.map_or(run.start(), ByteRange::start);
        // `start` never lies after the end of a later run; the fall-back is never taken.
        let whole = ByteRange::new(start, run.end()).unwrap_or(*run);
        if join {
            open = Some(whole);
        } else {
            set.insert(whole);
            open = None;
        }
    }
    set
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xenvault_block::CBT_BLOCK_BYTES;

    use super::*;

    fn blocks(numbers: impl IntoIterator<Item = u64>) -> ExtentSet {
        numbers.into_iter().map(|n| ByteRange::with_length(n * CBT_BLOCK_BYTES, CBT_BLOCK_BYTES).unwrap()).collect()
    }

    #[test]
    fn x16_small_gaps_are_joined_and_large_ones_never() {
        // 16 changed blocks buy 2 blocks of gap.
        let changed = blocks((0..8).chain(9..17).chain(30..31));
        let joined = join_gaps(&changed);
        assert_eq!(joined, blocks((0..17).chain(30..31)));
        let far = blocks((0..1000).chain(1004..2000));
        assert_eq!(join_gaps(&far), far, "a gap of exactly 256 KiB is not read");
    }

    #[test]
    fn x16_scattered_changes_cost_little_more_than_their_blocks() {
        let changed = blocks((0..10_000).map(|n| n * 2));
        let joined = join_gaps(&changed);
        assert!(joined.total_bytes() * 100 <= changed.total_bytes() * 113);
    }

    proptest! {
        #[test]
        fn nothing_changed_is_left_out_and_the_budget_holds(numbers in proptest::collection::btree_set(0_u64..400, 0..120)) {
            let changed = blocks(numbers);
            let joined = join_gaps(&changed);
            prop_assert_eq!(&joined.intersection(&changed), &changed);
            prop_assert!(joined.total_bytes() - changed.total_bytes() <= changed.total_bytes() / CHANGED_PER_GAP);
        }
    }
}
