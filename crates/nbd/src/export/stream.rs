//! Extents as one stream of pieces in ascending order, bounded in bytes.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesOrdered, StreamExt};
use futures::{FutureExt, Stream};
use xenvault_block::{ByteRange, ExtentSet};

use super::fetch;
use super::pool::Pool;
use super::{ALIGN_BYTES, ReadOptions};
use crate::error::NbdError;

type Piece = Result<(u64, Bytes), NbdError>;

/// Pieces of disk in ascending order: offset and bytes.
///
/// The pieces cover exactly the extents that were asked for, without overlap; none is empty.
pub struct ExtentStream {
    pool: Arc<Pool>,
    runs: VecDeque<ByteRange>,
    request_bytes: u64,
    window_bytes: u64,
    /// Bytes that are asked for or wait for the reader.
    taken_bytes: u64,
    flights: FuturesOrdered<BoxFuture<'static, (u64, Piece)>>,
    ended: bool,
}

impl ExtentStream {
    pub(super) fn new(pool: Arc<Pool>, extents: ExtentSet, options: ReadOptions) -> Self {
        let request_bytes = pool.shared.options.request_bytes;
        Self {
            runs: extents.runs().iter().copied().collect(),
            request_bytes,
            window_bytes: options.window_bytes.max(request_bytes),
            taken_bytes: 0,
            flights: FuturesOrdered::new(),
            ended: false,
            pool,
        }
    }

    /// Asks for more while the window has room.
    fn fill(&mut self) {
        while let Some(run) = self.runs.front().copied() {
            // The first cut brings a run that begins at an odd place onto the grid of requests.
            let room = self.request_bytes - run.start() % ALIGN_BYTES;
            let end = run.end().min(run.start().saturating_add(room));
            let Ok(piece) = ByteRange::new(run.start(), end) else { return };
            // What is read for it, so that many small odd pieces do not pass the window unseen.
            let cost = piece.align_outward(ALIGN_BYTES, u64::MAX).len();
            if self.taken_bytes > 0 && self.taken_bytes + cost > self.window_bytes {
                return;
            }
            match ByteRange::new(end, run.end()) {
                Ok(rest) if !rest.is_empty() => {
                    if let Some(front) = self.runs.front_mut() {
                        *front = rest;
                    }
                }
                _ => {
                    self.runs.pop_front();
                }
            }
            self.taken_bytes += cost;
            let pool = self.pool.clone();
            let flight = async move {
                let data = fetch::read(&pool.shared, piece).await;
                (cost, data.map(|data| (piece.start(), data)))
            };
            self.flights.push_back(flight.boxed());
        }
    }
}

impl Stream for ExtentStream {
    type Item = Piece;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.fill();
        let next = std::task::ready!(self.flights.poll_next_unpin(context));
        let piece = next.map(|(cost, piece)| {
            self.taken_bytes -= cost;
            piece
        });
        if !matches!(piece, Some(Ok(_))) {
            self.ended = true;
            self.flights = FuturesOrdered::new();
            self.runs.clear();
        }
        Poll::Ready(piece)
    }
}

impl fmt::Debug for ExtentStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExtentStream")
            .field("runs_left", &self.runs.len())
            .field("taken_bytes", &self.taken_bytes)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}
