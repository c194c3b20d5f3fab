//! New chunks that wait for others to share a frame with.
//!
//! Chunks are small, so that what is known is found; frames are large, so that what is new compresses well. Chunks of one
//! disk that follow each other share a frame, so that a restore that reads one of them soon needs the others.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use xenvault_store_format::{ChunkId, MAX_FRAME_CHUNKS};

/// Chunks of one frame, with what they hold of the run.
#[derive(Debug, Default)]
pub(crate) struct OpenFrame {
    pub(crate) ids: Vec<ChunkId>,
    pub(crate) lengths: Vec<usize>,
    pub(crate) plain: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
    jobs: Vec<mpsc::Sender<()>>,
}

impl OpenFrame {
    /// Appends a chunk. Its share of the budget and its piece of work are kept until the frame is dropped.
    pub(crate) fn push(
        &mut self,
        id: ChunkId,
        plain: &[u8],
        room: Option<OwnedSemaphorePermit>,
        job: mpsc::Sender<()>,
    ) {
        self.ids.push(id);
        self.lengths.push(plain.len());
        self.plain.extend_from_slice(plain);
        match (self.room.as_mut(), room) {
            (Some(all), Some(more)) => all.merge(more),
            (None, room) => self.room = room,
            (Some(_), None) => {}
        }
        self.jobs.push(job);
    }

    fn units(&self) -> usize {
        self.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }
}

/// The open frames of a run: at most one for each disk.
#[derive(Debug)]
pub(crate) struct Frames {
    state: Mutex<State>,
    /// Plain bytes from which on a frame is complete.
    target_bytes: usize,
    /// Units of the run's budget that open frames may hold together.
    most_units: usize,
}

#[derive(Debug, Default)]
struct State {
    open: HashMap<u64, OpenFrame>,
    /// Callers that wait until nothing is open. As long as there are any, no frame stays open.
    flushing: usize,
}

impl Frames {
    pub(crate) fn new(target_bytes: usize, most_units: usize) -> Self {
        Self { state: Mutex::default(), target_bytes, most_units }
    }

    /// Puts a chunk into the frame of its disk; returns the frames that are complete.
    pub(crate) fn push(
        &self,
        disk: u64,
        id: ChunkId,
        plain: &[u8],
        room: Option<OwnedSemaphorePermit>,
        job: mpsc::Sender<()>,
    ) -> Vec<OpenFrame> {
        let mut state = self.state();
        let mut complete = Vec::new();
        let frame = state.open.entry(disk).or_default();
        let fits = frame.plain.len() + plain.len() <= self.target_bytes && frame.ids.len() < MAX_FRAME_CHUNKS;
        if !fits && !frame.ids.is_empty() {
            complete.push(std::mem::take(frame));
        }
        if frame.ids.is_empty() {
            frame.plain.reserve(self.target_bytes.max(plain.len()));
        }
        frame.push(id, plain, room, job);
        let full = frame.plain.len() >= self.target_bytes;
        // Disks that stand still must not keep the budget from those that go on.
        if state.flushing > 0 || state.open.values().map(OpenFrame::units).sum::<usize>() > self.most_units {
            complete.extend(state.open.drain().map(|(_, frame)| frame));
        } else if full {
            complete.extend(state.open.remove(&disk));
        }
        complete
    }

    /// Ends all frames, and keeps new ones from staying open until the guard is dropped.
    pub(crate) fn flush(&self) -> (Flushing<'_>, Vec<OpenFrame>) {
        let mut state = self.state();
        state.flushing += 1;
        let complete = state.open.drain().map(|(_, frame)| frame).collect();
        (Flushing(self), complete)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody waits until nothing is open.
#[derive(Debug)]
pub(crate) struct Flushing<'a>(&'a Frames);

impl Drop for Flushing<'_> {
    fn drop(&mut self) {
        self.0.state().flushing -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(frames: &Frames, disk: u64, length: usize) -> Vec<usize> {
        let id = ChunkId::from_bytes([1; 32]);
        let complete = frames.push(disk, id, &vec![1; length], None, mpsc::channel(1).0);
        complete.iter().map(|frame| frame.plain.len()).collect()
    }

    #[test]
    fn a_frame_is_complete_before_it_passes_its_target_and_disks_do_not_mix() {
        let frames = Frames::new(100, 100);
        assert_eq!(push(&frames, 1, 60), []);
        assert_eq!(push(&frames, 2, 90), []);
        assert_eq!(push(&frames, 1, 60), [60]);
        assert_eq!(push(&frames, 1, 40), [100]);
        assert_eq!(push(&frames, 1, 300), [300]);
        let small: Vec<_> = (0..MAX_FRAME_CHUNKS).flat_map(|_| push(&frames, 3, 0)).collect();
        assert_eq!((small, push(&frames, 3, 0)), (Vec::new(), vec![0]));
    }

    #[test]
    fn while_somebody_flushes_nothing_stays_open() {
        let frames = Frames::new(100, 100);
        push(&frames, 1, 10);
        let (flushing, complete) = frames.flush();
        assert_eq!(complete.len(), 1);
        assert_eq!(push(&frames, 1, 20), [20]);
        drop(flushing);
        assert_eq!(push(&frames, 1, 20), []);
    }

    #[tokio::test]
    async fn what_open_frames_hold_of_the_budget_is_limited() {
        let budget = std::sync::Arc::new(tokio::sync::Semaphore::new(10));
        let frames = Frames::new(100, 4);
        for (disk, complete) in [(1, 0), (2, 0), (3, 3)] {
            let room = std::sync::Arc::clone(&budget).try_acquire_many_owned(2).ok();
            let id = ChunkId::from_bytes([1; 32]);
            assert_eq!(frames.push(disk, id, &[1], room, mpsc::channel(1).0).len(), complete);
        }
        assert_eq!(budget.available_permits(), 10);
    }
}
