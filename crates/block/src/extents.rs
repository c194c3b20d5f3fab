//! Sets of byte ranges. Memory follows the number of runs, never the size of the disk.

use crate::ByteRange;

/// A set of bytes of a disk, kept as its runs.
///
/// Invariant: the runs are not empty, ascend, and neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    runs: Vec<ByteRange>,
}

impl ExtentSet {
    /// The set without a byte.
    pub const fn new() -> Self {
        Self { runs: Vec::new() }
    }

    /// The set of all bytes of one range.
    pub fn from_range(range: ByteRange) -> Self {
        let mut set = Self::new();
        set.insert(range);
        set
    }

    /// The runs, ascending, neither overlapping nor touching.
    pub fn runs(&self) -> &[ByteRange] {
        &self.runs
    }

    /// How many bytes are in the set.
    pub fn total_bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.len()).sum()
    }

    /// Whether no byte is in the set.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether the byte at `offset` is in the set. Cost: logarithmic in the number of runs.
    pub fn contains(&self, offset: u64) -> bool {
        let after = self.runs.partition_point(|run| run.end() <= offset);
        self.runs.get(after).is_some_and(|run| run.contains(offset))
    }

    /// Adds all bytes of `range`. Constant cost when `range` lies at or after the last run.
    pub fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let first = self.runs.partition_point(|run| run.end() < range.start());
        let last = self.runs.partition_point(|run| run.start() <= range.end());
        let mut merged = range;
        for run in self.runs.drain(first..last) {
            merged = hull(merged, run);
        }
        self.runs.insert(first, merged);
    }

    /// All bytes that are in this set, in `other`, or in both.
    pub fn union(&self, other: &Self) -> Self {
        let mut runs: Vec<ByteRange> = self.runs.iter().chain(&other.runs).copied().collect();
        runs.sort_unstable();
        runs.into_iter().collect()
    }

    /// All bytes that are in both sets.
    pub fn intersection(&self, other: &Self) -> Self {
        let mut set = Self::new();
        let (mut left, mut right) = (self.runs.iter().copied().peekable(), other.runs.iter().copied().peekable());
        while let (Some(&a), Some(&b)) = (left.peek(), right.peek()) {
            set.runs.extend(a.intersect(b));
            if a.end() <= b.end() {
                left.next();
            } else {
                right.next();
            }
        }
        set
    }

    /// All bytes below `limit` that are not in this set.
    pub fn complement(&self, limit: u64) -> Self {
        let mut set = Self::new();
        let mut at = 0;
        for run in &self.runs {
            set.runs.extend(ByteRange::new(at, run.start().min(limit)).ok().filter(|gap| !gap.is_empty()));
            at = run.end();
        }
        set.runs.extend(ByteRange::new(at, limit).ok().filter(|gap| !gap.is_empty()));
        set
    }

    /// The same set without any byte at or after `limit`.
    pub fn clipped(&self, limit: u64) -> Self {
        let bound = ByteRange::up_to(limit);
        Self { runs: self.runs.iter().filter_map(|run| run.intersect(bound)).collect() }
    }

    /// The bytes of `range` that are in this set, as a set.
    pub fn within(&self, range: ByteRange) -> Self {
        let first = self.runs.partition_point(|run| run.end() <= range.start());
        let runs = self.runs.iter().skip(first).take_while(|run| run.start() < range.end());
        Self { runs: runs.filter_map(|run| run.intersect(range)).collect() }
    }

    /// Joins runs whose gap is under `gap` bytes: reading a small gap costs less than another request.
    pub fn merge_gaps(&self, gap: u64) -> Self {
        let mut runs: Vec<ByteRange> = Vec::with_capacity(self.runs.len());
        for &run in &self.runs {
            match runs.last_mut() {
                Some(last) if run.start() - last.end() < gap => *last = hull(*last, run),
                _ => runs.push(run),
            }
        }
        Self { runs }
    }

    /// The set of all whole units of `unit` bytes that this set touches, cut at `limit`.
    pub fn align_outward(&self, unit: u64, limit: u64) -> Self {
        self.runs.iter().map(|run| run.align_outward(unit, limit)).collect()
    }
}

impl Extend<ByteRange> for ExtentSet {
    fn extend<I: IntoIterator<Item = ByteRange>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

impl FromIterator<ByteRange> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = ByteRange>>(ranges: I) -> Self {
        let mut set = Self::new();
        for range in ranges {
            set.insert(range);
        }
        set
    }
}

/// The smallest range that covers both.
fn hull(a: ByteRange, b: ByteRange) -> ByteRange {
    let (start, end) = (a.start().min(b.start()), a.end().max(b.end()));
    // `start <= end` holds since it holds for `a`; the fall-back is never taken.
    ByteRange::new(start, end).unwrap_or(a)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range() -> impl Strategy<Value = ByteRange> {
        (0_u64..200, 0_u64..40).prop_map(|(start, length)| ByteRange::with_length(start, length).unwrap())
    }

    fn set() -> impl Strategy<Value = ExtentSet> {
        proptest::collection::vec(range(), 0..12).prop_map(|ranges| ranges.into_iter().collect())
    }

    fn bytes(set: &ExtentSet) -> BTreeSet<u64> {
        set.runs().iter().flat_map(|run| run.start()..run.end()).collect()
    }

    fn assert_invariant(set: &ExtentSet) {
        assert!(set.runs().iter().all(|run| !run.is_empty()));
        assert!(set.runs().windows(2).all(|pair| pair[0].end() < pair[1].start()), "{set:?}");
    }

    proptest! {
        #[test]
        fn inserting_in_any_order_equals_a_plain_set_of_bytes(ranges in proptest::collection::vec(range(), 0..20)) {
            let set: ExtentSet = ranges.iter().copied().collect();
            assert_invariant(&set);
            let plain: BTreeSet<u64> = ranges.iter().flat_map(|range| range.start()..range.end()).collect();
            prop_assert_eq!(bytes(&set), plain);
        }

        #[test]
        fn set_operations_equal_those_of_plain_sets(a in set(), b in set(), limit in 0_u64..260, cut in range()) {
            let (plain_a, plain_b) = (bytes(&a), bytes(&b));
            for result in [a.union(&b), a.intersection(&b), a.complement(limit), a.clipped(limit), a.within(cut)] {
                assert_invariant(&result);
            }
            prop_assert_eq!(bytes(&a.union(&b)), &plain_a | &plain_b);
            prop_assert_eq!(bytes(&a.intersection(&b)), &plain_a & &plain_b);
            prop_assert_eq!(bytes(&a.complement(limit)), &(0..limit).collect() - &plain_a);
            prop_assert_eq!(bytes(&a.clipped(limit)), &plain_a & &(0..limit).collect());
            prop_assert_eq!(bytes(&a.within(cut)), &plain_a & &(cut.start()..cut.end()).collect());
            prop_assert_eq!(a.contains(limit), plain_a.contains(&limit));
            prop_assert_eq!(a.total_bytes(), plain_a.len() as u64);
        }

        #[test]
        fn merging_gaps_keeps_every_byte_and_leaves_no_small_gap(a in set(), gap in 1_u64..30) {
            let merged = a.merge_gaps(gap);
            assert_invariant(&merged);
            prop_assert!(bytes(&merged).is_superset(&bytes(&a)));
            prop_assert!(merged.runs().windows(2).all(|pair| pair[1].start() - pair[0].end() >= gap));
        }

        #[test]
        fn aligning_touches_exactly_the_units_that_were_touched(a in set(), unit in 1_u64..16) {
            let limit = 1_000;
            let aligned = a.align_outward(unit, limit);
            assert_invariant(&aligned);
            let units: BTreeSet<u64> = bytes(&a).iter().map(|byte| byte / unit).collect();
            let expected = units.iter().flat_map(|n| n * unit..(n + 1) * unit).collect::<BTreeSet<_>>();
            prop_assert_eq!(bytes(&aligned), expected);
        }
    }
}
