//! From plain chunks to packs on the medium: the writing half of a run that all its disks share.
//!
//! ```text
//! callers -> (budget in bytes) -> frames -> workers: compress, seal -> (4 MiB) -> one task: write packs, then index
//! ```
//! Frames are sealed in the order in which they come out of compression, under one lock: sealing is far faster than
//! compressing. Two packs are open at the same time: one for content, one for structure. The first failure ends the run: it is told once in full, and to all others by its text.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use xenvault_store_format::{
    ChunkId, ChunkKind, Compressor, DirectoryEntry, FormatError, IndexEntry, MAX_PLAIN_BYTES, PackClass, PackEncoder,
};

use crate::backend::Upload;
use crate::counters::{add, add_time};
use crate::frames::{Frames, OpenFrame};
use crate::pool::{Priority, WorkerPool};
use crate::repository::Inner;
use crate::{StoreError, WriteCounters, WriterOptions, names};

/// Unit in which the budget counts.
const BUDGET_UNIT: usize = 4096;
/// Bytes of a pack that are handed to the medium at once.
const WRITE_BYTES: usize = 1024 * 1024;
/// Writes that wait for the medium.
const WRITES_AHEAD: usize = 3;
/// Packs after which an index segment is published, so that a killed run's work is found at once by the next.
const PACKS_PER_SEGMENT: usize = 4;

/// What the disks and blobs of one run share.
#[derive(Debug)]
pub(crate) struct Sink {
    pub(crate) repository: Arc<Inner>,
    pub(crate) counters: Arc<WriteCounters>,
    pub(crate) pool: WorkerPool,
    budget: Arc<Semaphore>,
    budget_units: u32,
    compression_level: i32,
    jobs: Jobs,
    frames: Frames,
    disks: AtomicU64,
    /// Chunks of this run that no loaded segment of the index knows yet.
    claimed: Arc<Mutex<HashSet<ChunkId>>>,
    /// Folders of packs that this run did not write and that it refers to.
    leaned_on: Mutex<BTreeSet<String>>,
    assembler: Mutex<Assembler>,
    failure: Arc<Failure>,
}

/// Work that was handed over and is not done.
///
/// Each piece holds a sender of the channel that was current when it began; a channel whose senders are all gone has
/// no work left. So one can wait for what has begun so far, while more begins.
#[derive(Debug)]
struct Jobs {
    current: Mutex<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
    /// Channels that somebody waits for, or has begun to wait for.
    earlier: tokio::sync::Mutex<Vec<mpsc::Receiver<()>>>,
}

impl Default for Jobs {
    fn default() -> Self {
        Self { current: Mutex::new(mpsc::channel(1)), earlier: tokio::sync::Mutex::default() }
    }
}

impl Jobs {
    fn begin(&self) -> mpsc::Sender<()> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Waits for everything that has begun before the call, also if an earlier call was dropped half way.
    async fn all_begun(&self) {
        let mut earlier = self.earlier.lock().await;
        let fresh = mpsc::channel(1);
        let (_, receiver) = std::mem::replace(&mut *self.current.lock().unwrap_or_else(PoisonError::into_inner), fresh);
        earlier.push(receiver);
        while let Some(receiver) = earlier.last_mut() {
            // Nothing is ever sent; this returns when the last sender is gone.
            receiver.recv().await;
            earlier.pop();
        }
    }
}

/// The packs that are being filled.
#[derive(Debug)]
struct Assembler {
    open: PerClass<Option<OpenPack>>,
    queue: mpsc::Sender<Message>,
}

#[derive(Debug)]
struct OpenPack {
    encoder: PackEncoder,
    /// What was not handed to the medium yet.
    buffer: Vec<u8>,
}

/// One of each class.
#[derive(Debug, Default)]
struct PerClass<T> {
    content: T,
    structure: T,
}

impl<T> PerClass<T> {
    fn of(&mut self, class: PackClass) -> &mut T {
        match class {
            PackClass::Content => &mut self.content,
            PackClass::Structure => &mut self.structure,
        }
    }
}

enum Message {
    Begin {
        class: PackClass,
        name: String,
    },
    Data {
        class: PackClass,
        data: Bytes,
    },
    End {
        class: PackClass,
        data: Bytes,
        name: String,
        entries: Vec<IndexEntry>,
    },
    /// Publish what is left of the index, then answer.
    Flush(oneshot::Sender<()>),
}

/// The first failure of a run.
#[derive(Debug, Default)]
struct Failure {
    state: Mutex<Option<(Option<StoreError>, String)>>,
}

impl Failure {
    fn set(&self, error: StoreError) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_none() {
            let reason = error.to_string();
            *state = Some((Some(error), reason));
        }
    }

    /// The failure in full for whoever asks first, its text for all others.
    fn take(&self) -> Option<StoreError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (error, reason) = state.as_mut()?;
        Some(error.take().unwrap_or_else(|| StoreError::WriterFailed { reason: reason.clone() }))
    }
}

impl Sink {
    pub(crate) fn start(repository: Arc<Inner>, pool: WorkerPool, options: WriterOptions) -> Arc<Self> {
        let counters = Arc::new(WriteCounters::default());
        add(&counters.threads, pool.threads() as u64);
        let (queue, receiver) = mpsc::channel(WRITES_AHEAD);
        let units = usize::try_from(options.memory_bytes).unwrap_or(usize::MAX) / BUDGET_UNIT;
        let units = u32::try_from(units.clamp(1024, 1 << 24)).unwrap_or(1024);
        let budget = Arc::new(Semaphore::new(units as usize));
        let (claimed, failure) = (Arc::<Mutex<HashSet<ChunkId>>>::default(), Arc::<Failure>::default());
        let task = PackTask {
            repository: Arc::clone(&repository),
            counters: Arc::clone(&counters),
            claimed: Arc::clone(&claimed),
            uploads: PerClass::default(),
            unindexed: Vec::new(),
            packs: 0,
        };
        let frame_bytes = options.frame_bytes.min(repository.config.pack_target_bytes as usize).min(MAX_PLAIN_BYTES);
        tokio::spawn(task.run(receiver, Arc::clone(&failure), Arc::clone(&budget)));
        Arc::new(Self {
            repository,
            counters,
            pool,
            budget,
            budget_units: units,
            compression_level: options.compression_level,
            frames: Frames::new(frame_bytes, units as usize / 4),
            disks: AtomicU64::new(0),
            jobs: Jobs::default(),
            claimed,
            leaned_on: Mutex::default(),
            assembler: Mutex::new(Assembler { open: PerClass::default(), queue }),
            failure,
        })
    }

    /// The failure of the run, if it has failed.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Room for `bytes` on their way through the run; waits for it. At most an eighth of the budget at once.
    pub(crate) async fn room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, StoreError> {
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT)).unwrap_or(u32::MAX).min(self.budget_units / 8);
        let began = Instant::now();
        let permit = Arc::clone(&self.budget).acquire_many_owned(units).await;
        add_time(&self.counters.throttled_nanos, began.elapsed());
        self.check()?;
        permit.map_err(|_| self.gone())
    }

    /// A number for a disk, under which its new chunks share frames.
    pub(crate) fn new_disk(&self) -> u64 {
        self.disks.fetch_add(1, Ordering::Relaxed)
    }

    /// Stores a chunk unless it is known; says whether it was new. Returns at once. A chunk of a disk shares a frame
    /// with others of that disk.
    ///
    /// Of `room` the chunk's share is kept until it is sealed. Claiming and handing over are one step: a chunk that
    /// this run believes to have must be on its way, whatever is dropped or cancelled around it.
    pub(crate) fn offer(
        self: &Arc<Self>,
        id: ChunkId,
        kind: ChunkKind,
        plain: &[u8],
        disk: Option<u64>,
        room: &mut OwnedSemaphorePermit,
    ) -> bool {
        let guard = FailIfDropped(&self.failure);
        // Begun before it is claimed: whoever meets the claim, and then waits for all that has begun, waits for this.
        let job = self.jobs.begin();
        let new = self.claim(&id, kind);
        if new {
            let units = plain.len().div_ceil(BUDGET_UNIT).min(room.num_permits());
            let room = room.split(units);
            let complete = match disk {
                Some(disk) => self.frames.push(disk, id, plain, room, job),
                None => {
                    let mut frame = OpenFrame::default();
                    frame.push(id, plain, room, job);
                    vec![frame]
                }
            };
            complete.into_iter().for_each(|frame| self.store(kind, frame));
        }
        std::mem::forget(guard);
        new
    }

    /// As [`Self::offer`], after waiting for room.
    pub(crate) async fn offer_whole(
        self: &Arc<Self>,
        kind: ChunkKind,
        plain: &[u8],
    ) -> Result<(ChunkId, bool), StoreError> {
        let id = self.repository.keys.chunk_id(kind, plain);
        let mut room = self.room(plain.len()).await?;
        Ok((id, self.offer(id, kind, plain, None, &mut room)))
    }

    /// As [`Self::offer`], of a chunk that was read under its id. Chunks of disks share frames under the number `disk`.
    pub(crate) async fn offer_again(
        self: &Arc<Self>,
        id: ChunkId,
        kind: ChunkKind,
        plain: &[u8],
        disk: u64,
    ) -> Result<bool, StoreError> {
        let mut room = self.room(plain.len()).await?;
        Ok(self.offer(id, kind, plain, (kind == ChunkKind::Data).then_some(disk), &mut room))
    }

    /// Whether nobody knows this chunk, and nobody else of this run is about to store it.
    fn claim(&self, id: &ChunkId, kind: ChunkKind) -> bool {
        if self.is_known(id, kind) {
            return false;
        }
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        // Once more under the lock: a chunk leaves `claimed` only after the index has it.
        !claimed.contains(id) && !self.is_known(id, kind) && claimed.insert(*id)
    }

    pub(crate) fn is_known(&self, id: &ChunkId, kind: ChunkKind) -> bool {
        let Some(entry) = self.repository.index.find(id, kind) else { return false };
        let folder = names::pack_folder(&entry.pack);
        self.leaned_on.lock().unwrap_or_else(PoisonError::into_inner).insert(folder);
        true
    }

    /// Makes the packs of others that this run refers to as durable as its own: one that is visible need not be
    /// durable yet, and its writer may die before it gets there.
    pub(crate) async fn settle(&self) -> Result<(), StoreError> {
        let folders: Vec<String> =
            self.leaned_on.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        let settled = self.repository.backend.settle(&folders).await;
        settled.map_err(|error| StoreError::io("sync", names::PACKS, error))
    }

    fn store(self: &Arc<Self>, kind: ChunkKind, frame: OpenFrame) {
        let sink = Arc::clone(self);
        self.pool.spawn(Priority::Normal, move || {
            let guard = FailIfDropped(&sink.failure);
            let done = sink.compress_and_append(kind, &frame);
            std::mem::forget(guard);
            if let Err(error) = done {
                sink.fail(error);
            }
        });
    }

    /// Waits until everything that was stored so far is durable and in the index.
    pub(crate) async fn flush(self: &Arc<Self>) -> Result<(), StoreError> {
        // Only chunks of disks wait in frames.
        let (flushing, complete) = self.frames.flush();
        complete.into_iter().for_each(|frame| self.store(ChunkKind::Data, frame));
        self.jobs.all_begun().await;
        drop(flushing);
        self.check()?;
        let sink = Arc::clone(self);
        let (send, done) = oneshot::channel();
        let ended = self.pool.run(move || {
            let mut assembler = sink.assembler.lock().unwrap_or_else(PoisonError::into_inner);
            assembler.end_pack(PackClass::Content)?;
            assembler.end_pack(PackClass::Structure)?;
            assembler.send(Message::Flush(send))
        });
        ended.await.unwrap_or(Err(AppendError::Gone)).map_err(|error| self.explain(error))?;
        let flushed = done.await;
        self.check()?;
        flushed.map_err(|_| self.gone())
    }

    fn compress_and_append(&self, kind: ChunkKind, frame: &OpenFrame) -> Result<(), AppendError> {
        thread_local! {
            static COMPRESSOR: RefCell<Option<Compressor>> = const { RefCell::new(None) };
        }
        let began = Instant::now();
        let payload = COMPRESSOR.with_borrow_mut(|slot| {
            let compressor = match slot {
                Some(compressor) => compressor,
                None => slot.insert(Compressor::new(self.compression_level)?),
            };
            compressor.prepare_all(&frame.plain, &frame.lengths)
        })?;
        add_time(&self.counters.compress_nanos, began.elapsed());
        let mut assembler = self.assembler.lock().unwrap_or_else(PoisonError::into_inner);
        let target = self.repository.config.pack_target_bytes as usize;
        let class = kind.class();
        let full =
            |OpenPack { encoder, .. }: &OpenPack| encoder.final_length() >= target || !encoder.has_room_for(&payload);
        if assembler.open.of(class).as_ref().is_some_and(full) {
            assembler.end_pack(class)?;
        }
        if assembler.open.of(class).is_none() {
            assembler.begin_pack(&self.repository, class)?;
        }
        let began = Instant::now();
        let OpenPack { encoder, buffer } = assembler.open.of(class).as_mut().ok_or(AppendError::Gone)?;
        let sealed = encoder.append(&frame.ids, kind, payload)?;
        add_time(&self.counters.seal_nanos, began.elapsed());
        buffer.extend_from_slice(&sealed);
        if buffer.len() >= WRITE_BYTES {
            let data = std::mem::replace(buffer, new_buffer(class)).into();
            assembler.send(Message::Data { class, data })?;
        }
        Ok(())
    }

    fn fail(&self, error: AppendError) {
        self.failure.set(match error {
            AppendError::Format(error) => StoreError::format(names::PACKS, error),
            // The task has said why before it ended, unless the runtime has ended it; then this is the first to say.
            AppendError::Gone => StoreError::WriterFailed { reason: "its task has ended".to_owned() },
        });
        // Whoever waits for room wakes up, and finds the failure.
        self.budget.close();
    }

    fn explain(&self, error: AppendError) -> StoreError {
        self.fail(error);
        self.failure.take().unwrap_or_else(|| self.gone())
    }

    fn gone(&self) -> StoreError {
        self.failure.take().unwrap_or_else(|| StoreError::WriterFailed { reason: "its task has ended".to_owned() })
    }
}

/// Marks the run as failed if a worker panics.
struct FailIfDropped<'a>(&'a Failure);

impl Drop for FailIfDropped<'_> {
    fn drop(&mut self) {
        self.0.set(StoreError::WriterFailed { reason: "a worker thread died".to_owned() });
    }
}

#[derive(Debug)]
enum AppendError {
    Format(FormatError),
    /// The task that writes has ended; it has said why.
    Gone,
}

impl From<FormatError> for AppendError {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}

impl Assembler {
    fn begin_pack(&mut self, repository: &Inner, class: PackClass) -> Result<(), AppendError> {
        let (encoder, header) = PackEncoder::new(&repository.keys, class)?;
        self.send(Message::Begin { class, name: names::pack(&encoder.id()) })?;
        let mut buffer = new_buffer(class);
        buffer.extend_from_slice(&header);
        *self.open.of(class) = Some(OpenPack { encoder, buffer });
        Ok(())
    }

    fn end_pack(&mut self, class: PackClass) -> Result<(), AppendError> {
        let Some(OpenPack { encoder, buffer }) = self.open.of(class).take() else { return Ok(()) };
        let (name, pack) = (names::pack(&encoder.id()), encoder.id());
        let (end, directory) = encoder.finish()?;
        let mut data = buffer;
        data.extend_from_slice(&end);
        let entry =
            |entry: DirectoryEntry| IndexEntry { id: entry.id, kind: entry.kind, pack, placement: entry.placement };
        let entries = directory.into_iter().map(entry).collect();
        self.send(Message::End { class, data: data.into(), name, entries })
    }

    /// Waits while the medium is behind. On worker threads only.
    fn send(&self, message: Message) -> Result<(), AppendError> {
        self.queue.blocking_send(message).map_err(|_| AppendError::Gone)
    }
}

/// Room for what is written at once and the frame that goes beyond it; structure is small and grows as it comes.
fn new_buffer(class: PackClass) -> Vec<u8> {
    match class {
        PackClass::Content => Vec::with_capacity(WRITE_BYTES + MAX_PLAIN_BYTES + 64 * 1024),
        PackClass::Structure => Vec::new(),
    }
}

/// Writes packs, at most one of each class at the same time, and index segments after them.
struct PackTask {
    repository: Arc<Inner>,
    counters: Arc<WriteCounters>,
    claimed: Arc<Mutex<HashSet<ChunkId>>>,
    uploads: PerClass<Option<Box<dyn Upload>>>,
    /// Entries of packs that are durable and in no segment yet.
    unindexed: Vec<IndexEntry>,
    packs: usize,
}

impl PackTask {
    async fn run(mut self, mut queue: mpsc::Receiver<Message>, failure: Arc<Failure>, budget: Arc<Semaphore>) {
        while let Some(message) = queue.recv().await {
            let mut asked = None;
            if let Err(error) = self.handle(message, &mut asked).await {
                failure.set(error);
                budget.close();
                // Only now does whoever asked for a flush wake up, and finds the failure.
                return;
            }
            if let Some(asked) = asked {
                let _ = asked.send(());
            }
        }
    }

    async fn handle(&mut self, message: Message, asked: &mut Option<oneshot::Sender<()>>) -> Result<(), StoreError> {
        let began = Instant::now();
        match message {
            Message::Begin { class, name } => {
                let upload = self.repository.backend.create(&name).await;
                *self.uploads.of(class) = Some(upload.map_err(|error| StoreError::io("create", &name, error))?);
            }
            Message::Data { class, data } => self.write(class, data, names::PACKS).await?,
            Message::End { class, data, name, entries } => {
                self.write(class, data, &name).await?;
                if let Some(upload) = self.uploads.of(class).take() {
                    upload.finish().await.map_err(|error| StoreError::io("complete", &name, error))?;
                }
                add(&self.counters.packs, 1);
                self.unindexed.extend(entries);
                self.packs += 1;
                if self.packs >= PACKS_PER_SEGMENT {
                    self.publish_index().await?;
                }
            }
            Message::Flush(done) => {
                *asked = Some(done);
                self.publish_index().await?;
            }
        }
        add_time(&self.counters.write_nanos, began.elapsed());
        Ok(())
    }

    async fn write(&mut self, class: PackClass, data: Bytes, name: &str) -> Result<(), StoreError> {
        let length = data.len() as u64;
        if let Some(upload) = self.uploads.of(class).as_mut() {
            upload.write(data).await.map_err(|error| StoreError::io("write", name, error))?;
            add(&self.counters.stored_bytes, length);
        }
        Ok(())
    }

    async fn publish_index(&mut self) -> Result<(), StoreError> {
        let entries = std::mem::take(&mut self.unindexed);
        self.packs = 0;
        if entries.is_empty() {
            return Ok(());
        }
        let ids: Vec<ChunkId> = entries.iter().map(|entry| entry.id).collect();
        let Inner { index, backend, keys, .. } = &*self.repository;
        let stored = index.publish(&**backend, keys, entries).await?;
        add(&self.counters.stored_bytes, stored);
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        ids.iter().for_each(|id| {
            claimed.remove(id);
        });
        Ok(())
    }
}
