//! The floor under the speed of a transfer: over any window of waiting, so many bytes have to move.
//!
//! Only time that is spent waiting for the other side counts: a reader that takes its time with what came is not a slow
//! server. That bounds every transfer, also by a server that sends a byte now and then.

use crate::session_handle::Floor;
use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

/// Steps of a window: the memory of what moved is that coarse.
const STEPS: u32 = 16;

/// The other side is slower than the floor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooSlow;

/// Follows one direction of one transfer.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    floor: Floor,
    /// Time that was spent waiting.
    waited: Duration,
    /// What moved, by the time of waiting at which a step began; at most a window's worth.
    moved: VecDeque<(Duration, u64)>,
}

impl Pace {
    pub(crate) fn new(floor: &Floor) -> Self {
        Self { floor: floor.clone(), waited: Duration::ZERO, moved: VecDeque::new() }
    }

    /// Waits for something that moves bytes, as long as the floor allows.
    pub(crate) async fn wait<T>(&mut self, moving: impl Future<Output = T>) -> Result<T, TooSlow> {
        let left = self.left();
        if left.is_zero() {
            return Err(TooSlow);
        }
        let began = Instant::now();
        let outcome = tokio::time::timeout(left, moving).await;
        self.waited = self.waited.saturating_add(began.elapsed());
        outcome.map_err(|_| TooSlow)
    }

    /// So many bytes moved.
    pub(crate) fn moved(&mut self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let step = self.floor.window / STEPS;
        match self.moved.back_mut() {
            Some((since, sum)) if self.waited < since.saturating_add(step) => *sum = sum.saturating_add(bytes),
            _ => self.moved.push_back((self.waited, bytes)),
        }
        let begin = self.waited.saturating_sub(self.floor.window);
        while self.moved.front().is_some_and(|(since, _)| *since < begin) {
            self.moved.pop_front();
        }
    }

    /// How long may be waited from now until too little moved within a window, if nothing moves any more.
    fn left(&self) -> Duration {
        // The newest steps that reach the floor together: the window must not leave the oldest of them behind.
        let mut sum = 0_u64;
        let mut enough_since = Duration::ZERO;
        for (since, bytes) in self.moved.iter().rev() {
            sum = sum.saturating_add(*bytes);
            if sum >= self.floor.bytes.max(1) {
                enough_since = *since;
                break;
            }
        }
        // Before anything counts, the first window runs from the start.
        enough_since.saturating_add(self.floor.window).saturating_sub(self.waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor() -> Floor {
        Floor { bytes: 1000, window: Duration::from_secs(100) }
    }

    /// Moves `bytes` every `every` until the floor ends it; gives the time of waiting, if it ended before `most`.
    async fn drip(bytes: usize, every: Duration, most: Duration) -> Option<Duration> {
        let mut pace = Pace::new(&floor());
        let began = Instant::now();
        while began.elapsed() < most {
            if pace.wait(tokio::time::sleep(every)).await.is_err() {
                return Some(began.elapsed());
            }
            pace.moved(bytes);
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_single_bytes_end_within_a_window() {
        let hour = Duration::from_secs(3600);
        for (bytes, every) in [(1, Duration::from_secs(1)), (1, Duration::from_millis(200)), (0, hour)] {
            let ended = drip(bytes, every, hour).await.unwrap();
            assert!(ended <= Duration::from_secs(101), "{bytes} every {every:?}: {ended:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn slow_but_honest_is_fine_for_ever() {
        let days = Duration::from_secs(3 * 86_400);
        // A bit more than 10 bytes a second, in one piece a window or evenly.
        assert_eq!(drip(1000, Duration::from_secs(90), days).await, None);
        assert_eq!(drip(12, Duration::from_secs(1), days).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fast_start_does_not_pay_for_a_slow_end() {
        let mut pace = Pace::new(&floor());
        pace.moved(1 << 30);
        let mut slow = Duration::ZERO;
        while pace.wait(tokio::time::sleep(Duration::from_secs(1))).await.is_ok() {
            pace.moved(1);
            slow += Duration::from_secs(1);
        }
        assert!(slow <= Duration::from_secs(101), "{slow:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_of_a_slow_reader_does_not_count() {
        let mut pace = Pace::new(&floor());
        for _ in 0..100 {
            pace.wait(tokio::time::sleep(Duration::from_millis(1))).await.unwrap();
            pace.moved(1);
            tokio::time::sleep(Duration::from_secs(1000)).await;
        }
        assert!(pace.moved.len() <= 2 * usize::try_from(STEPS).unwrap());
    }
}
