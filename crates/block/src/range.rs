//! Half-open byte ranges of a disk. A range never wraps and may be empty.

/// A run of bytes of a disk: from `start`, up to and without `end`.
///
/// Invariant: `start <= end`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

/// Why two numbers are no range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The end lies before the start.
    #[error("a range can not end at byte {end}, before its start at byte {start}")]
    Reversed {
        /// First byte asked for.
        start: u64,
        /// End asked for.
        end: u64,
    },
    /// `start + length` does not fit 64 bits.
    #[error("a range of {length} bytes at byte {start} passes the largest possible offset")]
    Overflow {
        /// First byte asked for.
        start: u64,
        /// Length asked for.
        length: u64,
    },
}

impl ByteRange {
    /// The range from `start` up to and without `end`.
    ///
    /// # Errors
    /// [`RangeError::Reversed`] if `end` lies before `start`.
    pub fn new(start: u64, end: u64) -> Result<Self, RangeError> {
        if start <= end { Ok(Self { start, end }) } else { Err(RangeError::Reversed { start, end }) }
    }

    /// The range of `length` bytes that begins at `start`.
    ///
    /// # Errors
    /// [`RangeError::Overflow`] if the end does not fit 64 bits.
    pub fn with_length(start: u64, length: u64) -> Result<Self, RangeError> {
        match start.checked_add(length) {
            Some(end) => Ok(Self { start, end }),
            None => Err(RangeError::Overflow { start, length }),
        }
    }

    /// The first `end` bytes of a disk.
    pub const fn up_to(end: u64) -> Self {
        Self { start: 0, end }
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// First byte after the range.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether the byte at `offset` lies in the range.
    pub const fn contains(self, offset: u64) -> bool {
        self.start <= offset && offset < self.end
    }

    /// The bytes that both ranges hold; `None` if there are none.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }

    /// The smallest range of whole units of `unit` bytes that covers this one, cut at `limit`.
    ///
    /// `unit` 0 counts as 1. The start is rounded down, the end up.
    pub fn align_outward(self, unit: u64, limit: u64) -> Self {
        let unit = unit.max(1);
        let start = self.start - self.start % unit;
        let end = match self.end % unit {
            0 => self.end,
            rest => self.end.saturating_add(unit - rest),
        };
        let end = end.min(limit);
        Self { start: start.min(end), end }
    }

    /// Cuts the range into pieces of at most `piece` bytes (0 counts as 1), in ascending order.
    pub fn pieces(self, piece: u64) -> impl Iterator<Item = Self> {
        let piece = piece.max(1);
        let mut at = self.start;
        std::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let end = at.saturating_add(piece).min(self.end);
            let next = Self { start: at, end };
            at = end;
            Some(next)
        })
    }
}

impl std::fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes {} to {}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_ends_before_it_starts_is_refused() {
        assert_eq!(ByteRange::new(5, 4), Err(RangeError::Reversed { start: 5, end: 4 }));
        assert_eq!(ByteRange::with_length(u64::MAX, 2), Err(RangeError::Overflow { start: u64::MAX, length: 2 }));
    }

    #[test]
    fn aligning_rounds_outward_and_stops_at_the_limit() {
        let range = ByteRange::new(5, 9).unwrap();
        assert_eq!(range.align_outward(4, 100), ByteRange::new(4, 12).unwrap());
        assert_eq!(range.align_outward(4, 10), ByteRange::new(4, 10).unwrap());
    }

    #[test]
    fn pieces_cover_the_range_without_a_gap() {
        let pieces: Vec<_> = ByteRange::new(3, 11).unwrap().pieces(4).collect();
        assert_eq!(pieces, [ByteRange::new(3, 7).unwrap(), ByteRange::new(7, 11).unwrap()]);
        assert_eq!(ByteRange::new(3, 3).unwrap().pieces(4).count(), 0);
    }

    #[test]
    fn ranges_that_only_touch_share_nothing() {
        let left = ByteRange::new(0, 4).unwrap();
        assert_eq!(left.intersect(ByteRange::new(4, 8).unwrap()), None);
        assert_eq!(left.intersect(ByteRange::new(3, 8).unwrap()), ByteRange::new(3, 4).ok());
    }
}
