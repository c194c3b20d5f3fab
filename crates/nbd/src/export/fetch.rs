//! Reading a range, and what it means when connections end at it (X29).
//!
//! A host answers "no error" before it reads the disk; a bad place on the medium looks like a lost connection in
//! mid-payload. So a range at which connections end is cut smaller until it is one unit, and only a unit that fails
//! again and again, on several connections, while other reads succeed is called a media error. Zeros are never made up.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use futures::stream::{FuturesOrdered, StreamExt};
use tokio::sync::oneshot;
use xenvault_block::ByteRange;

use super::ALIGN_BYTES;
use super::pool::Shared;
use super::queue::{Failed, Job, Outcome};
use crate::error::NbdError;

/// Failures of one unit before it is given up.
const ATTEMPTS: u32 = 3;
/// Connections on which it must have failed.
const CONNECTIONS: usize = 2;

/// Reads a range of any alignment and length.
pub(super) async fn read(shared: &Shared, range: ByteRange) -> Result<Bytes, NbdError> {
    if range.end() > shared.size {
        return Err(NbdError::OutOfRange { range, size: shared.size });
    }
    let aligned = range.align_outward(ALIGN_BYTES, shared.size);
    let mut pieces: FuturesOrdered<_> =
        aligned.pieces(shared.options.request_bytes).map(|piece| fetch(shared, piece)).collect();
    let Some(first) = pieces.next().await else { return Ok(Bytes::new()) };
    let first = first?;
    let mut all = if pieces.is_empty() {
        first
    } else {
        let mut all = BytesMut::with_capacity(usize::try_from(aligned.len()).unwrap_or(0));
        all.extend_from_slice(&first);
        while let Some(piece) = pieces.next().await {
            all.extend_from_slice(&piece?);
        }
        all.freeze()
    };
    // Back to what was asked for.
    let skip = usize::try_from(range.start() - aligned.start()).unwrap_or(usize::MAX);
    let length = usize::try_from(range.len()).unwrap_or(usize::MAX);
    let _ = all.split_to(skip.min(all.len()));
    all.truncate(length);
    Ok(all)
}

/// Reads one aligned range of at most one request.
pub(super) async fn fetch(shared: &Shared, range: ByteRange) -> Result<Bytes, NbdError> {
    let failed = match submit(shared, range).await? {
        Ok(data) => return Ok(data),
        Err(failed) => failed,
    };
    // The rare path: some place in this range may be bad.
    let mut suspects = vec![Suspect::new(range)];
    let mut data = BytesMut::with_capacity(usize::try_from(range.len()).unwrap_or(0));
    let mut next_failure = Some(failed);
    while let Some(mut suspect) = suspects.pop() {
        let failed = match next_failure.take() {
            Some(failed) => failed,
            None => match submit(shared, suspect.range).await? {
                Ok(piece) => {
                    data.extend_from_slice(&piece);
                    continue;
                }
                Err(failed) => failed,
            },
        };
        shared.repeated_requests.fetch_add(1, Ordering::Relaxed);
        let received_bytes = failed.received_bytes;
        if let Some(verdict) = suspect.note(failed) {
            let (range, attempts) = (suspect.range, suspect.failures);
            let media = verdict.others_succeeded || answers_elsewhere(shared, range).await?;
            let source = Box::new(verdict.last);
            return Err(if media { NbdError::MediaError { range, attempts, source } } else { *source });
        }
        // Ascending: the lower part is looked at first.
        let (lower, upper) = suspect.halve(received_bytes);
        suspects.extend(upper);
        suspects.push(lower);
    }
    Ok(data.freeze())
}

/// Hands one request to the pool.
async fn submit(shared: &Shared, range: ByteRange) -> Result<Result<Bytes, Failed>, NbdError> {
    let (answer, outcome) = oneshot::channel();
    shared.queue.push(Job { range, answer });
    let outcome = tokio::select! {
        biased;
        outcome = outcome => outcome,
        // Nobody may be left to take the job.
        () = shared.closed() => return Err(NbdError::Closed),
    };
    match outcome {
        Ok(Outcome::Data(data)) => Ok(Ok(data)),
        Ok(Outcome::Failed(failed)) => Ok(Err(failed)),
        Ok(Outcome::Hopeless(error)) => Err(error),
        Err(_) => Err(NbdError::Closed),
    }
}

/// Whether the export still answers anything: one unit elsewhere is tried.
async fn answers_elsewhere(shared: &Shared, bad: ByteRange) -> Result<bool, NbdError> {
    let start = if bad.end() < shared.size { bad.end() } else { 0 };
    let end = start.saturating_add(ALIGN_BYTES).min(shared.size);
    match ByteRange::new(start, end) {
        Ok(other) if other.intersect(bad).is_none() => Ok(submit(shared, other).await?.is_ok()),
        _ => Ok(false),
    }
}

/// A range at which a connection ended.
struct Suspect {
    range: ByteRange,
    failures: u32,
    connections: BTreeSet<u64>,
    /// Answers that the export had given when it failed first.
    answered_before: Option<u64>,
}

/// A unit failed as often as it may.
struct Verdict {
    last: NbdError,
    /// Other requests were answered since it failed first.
    others_succeeded: bool,
}

impl Suspect {
    fn new(range: ByteRange) -> Self {
        Self { range, failures: 0, connections: BTreeSet::new(), answered_before: None }
    }

    /// Counts a failure; a verdict if it was the last one allowed.
    fn note(&mut self, failed: Failed) -> Option<Verdict> {
        self.failures += 1;
        self.connections.insert(failed.connection);
        let answered_before = *self.answered_before.get_or_insert(failed.answered_requests);
        let last_one =
            self.range.len() <= ALIGN_BYTES && self.failures >= ATTEMPTS && self.connections.len() >= CONNECTIONS;
        let others_succeeded = failed.answered_requests > answered_before;
        last_one.then_some(Verdict { last: failed.error, others_succeeded })
    }

    /// Two smaller suspects, or the same again if it is one unit already.
    ///
    /// What had come before the end is good and becomes the lower part.
    fn halve(self, received_bytes: u64) -> (Self, Option<Self>) {
        let range = self.range;
        if range.len() <= ALIGN_BYTES {
            return (self, None);
        }
        let received = received_bytes - received_bytes % ALIGN_BYTES;
        let half = (range.len() / 2).next_multiple_of(ALIGN_BYTES);
        let cut = range.start() + if received > 0 && received < range.len() { received } else { half };
        match (ByteRange::new(range.start(), cut), ByteRange::new(cut, range.end())) {
            (Ok(lower), Ok(upper)) => (Self::new(lower), Some(Self::new(upper))),
            _ => (self, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[track_caller]
    fn check(whole: ByteRange, received: u64, lower: ByteRange, upper: Option<ByteRange>) {
        let (found_lower, found_upper) = Suspect::new(whole).halve(received);
        assert_eq!((found_lower.range, found_upper.map(|upper| upper.range)), (lower, upper));
    }

    #[test]
    fn x29_a_suspect_range_is_halved_down_to_one_unit() {
        check(range(0, 65_536), 0, range(0, 32_768), Some(range(32_768, 65_536)));
        check(range(0, 12_288), 0, range(0, 8_192), Some(range(8_192, 12_288)));
        check(range(4_096, 8_192), 0, range(4_096, 8_192), None);
        // The tail of a disk.
        check(range(4_096, 8_704), 0, range(4_096, 8_192), Some(range(8_192, 8_704)));
        check(range(8_192, 8_704), 0, range(8_192, 8_704), None);
    }

    #[test]
    fn x29_what_had_come_is_not_suspected() {
        check(range(0, 1 << 20), 524_288 + 5, range(0, 524_288), Some(range(524_288, 1 << 20)));
        check(range(0, 1 << 20), 1 << 20, range(0, 524_288), Some(range(524_288, 1 << 20)));
    }
}
