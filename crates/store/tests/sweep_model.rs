//! Backups, forgetting, taking back, sweeps and verifications in any order, by several processes that stand still, die and
//! come back, over a store that is late and lies: compared with a simple model of what must be there.
//!
//! `XENVAULT_SEED` chooses the run, `XENVAULT_STEPS` its length.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, clippy::print_stdout, reason = "a test")]

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::world::{Counts, Dice, Process, Then, World};
use common::{manifest, noise};
use tokio::task::JoinHandle;
use xenvault_block::ByteRange;
use xenvault_store::{
    DiskMapRef, DiskOptions, PointFilter, PointId, PointManifest, Repository, StoreError, SweepOptions, VerifyMode,
    VerifyOptions, Writer, WriterOptions,
};

const GRACE_SECONDS: u64 = 100;
const VMS: u64 = 3;
const PIECES: usize = 12;
const PIECE_BYTES: usize = 16 * 1024;
const SIZE: u64 = (PIECES * PIECE_BYTES) as u64;

/// What is on a disk: the number of each of its pieces; 0 is zeros.
type Content = Vec<u64>;

/// What the model knows of a point.
#[derive(Clone, Debug)]
struct Known {
    content: Content,
    /// Its run was told that it is there for good.
    done: bool,
    forgotten: Forgotten,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forgotten {
    No,
    Yes,
    /// Nobody can tell any more, since an answer was lost.
    Perhaps,
}

#[derive(Debug, Default)]
struct Model {
    points: BTreeMap<PointId, Known>,
    /// Points that a job is about to forget or take back.
    busy: BTreeSet<PointId>,
}

impl Model {
    /// Points that must be there.
    fn certain(&self) -> impl Iterator<Item = (&PointId, &Known)> {
        self.points.iter().filter(|(_, known)| known.done && known.forgotten == Forgotten::No)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Backup,
    Forget,
    Undo,
    Sweep,
    Verify,
}

struct Job {
    kind: Kind,
    handle: JoinHandle<Result<(), StoreError>>,
    /// Others went on while it stood still.
    stood_still: bool,
    /// It was lied to before.
    excused: bool,
}

struct Slot {
    process: Arc<Process>,
    repository: Repository,
    job: Option<Job>,
}

struct Run {
    dice: Dice,
    world: Arc<World>,
    /// Opened on a folder that only gave the keys.
    keys: Repository,
    model: Arc<Mutex<Model>>,
    slots: Vec<Slot>,
    /// Somebody who only reads, and knows the repository since long.
    reader: Repository,
    pieces: Arc<HashMap<u64, Vec<u8>>>,
    done: BTreeMap<String, u64>,
}

fn bytes_of(pieces: &HashMap<u64, Vec<u8>>, content: &Content) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PIECES * PIECE_BYTES);
    content.iter().for_each(|piece| bytes.extend_from_slice(&pieces[piece]));
    bytes
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[test]
fn any_order_of_backups_and_sweeps_keeps_what_was_promised() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = setting("XENVAULT_SEED", u64::try_from(now.as_nanos() & 0xffff_ffff).unwrap());
    let steps = setting("XENVAULT_STEPS", 10_000);
    println!("XENVAULT_SEED={seed} XENVAULT_STEPS={steps}");
    // Printed where the output is swallowed, too: a failure names it.
    let result = std::panic::catch_unwind(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(Run::go(seed, steps))
    });
    if let Err(panic) = result {
        println!("failed with XENVAULT_SEED={seed} XENVAULT_STEPS={steps}");
        std::panic::resume_unwind(panic);
    }
}

impl Run {
    async fn go(seed: u64, steps: u64) {
        let folder = tempfile::tempdir().unwrap();
        let mut options = xenvault_store::InitOptions::default();
        options.pack_target_bytes = 64 * 1024;
        let keys = Repository::init(folder.path(), &common::passphrase(), options).await.unwrap();
        let world = World::new(seed ^ 0x5eed);
        world.fill(folder.path());
        let pieces = (0..40).map(|number| {
            let bytes = if number == 0 { vec![0; PIECE_BYTES] } else { noise(number, PIECE_BYTES) };
            (number, bytes)
        });
        let mut run = Self {
            dice: Dice(seed),
            slots: Vec::new(),
            reader: keys.reopen_on(world.process()).unwrap(),
            world,
            keys,
            model: Arc::default(),
            pieces: Arc::new(pieces.collect()),
            done: BTreeMap::new(),
        };
        for _ in 0..4 {
            let slot = run.slot();
            run.slots.push(slot);
        }
        for step in 0..steps {
            run.step().await;
            if step % 500 == 499 {
                run.calm_down().await;
            }
        }
        run.calm_down().await;
        println!("{:?}", run.done);
    }

    fn slot(&self) -> Slot {
        let process = self.world.process();
        let repository = self.keys.reopen_on(process.clone()).unwrap();
        Slot { process, repository, job: None }
    }

    fn count(&mut self, what: &str) {
        *self.done.entry(what.to_owned()).or_default() += 1;
    }

    async fn step(&mut self) {
        match self.dice.next(100) {
            0..70 => {
                let at = usize::try_from(self.dice.next(self.slots.len() as u64)).unwrap();
                if self.slots[at].job.is_none() {
                    self.begin(at);
                }
                self.go_on(at).await;
            }
            70..80 => {
                let seconds = self.dice.next(GRACE_SECONDS);
                self.world.pass(seconds);
            }
            80..86 => {
                if self.world.arrive() {
                    self.count("late PUT");
                }
            }
            86..90 => {
                let at = usize::try_from(self.dice.next(self.slots.len() as u64)).unwrap();
                self.restart(at).await;
            }
            _ => self.check_some().await,
        }
    }

    /// Begins a job for an idle process.
    fn begin(&mut self, at: usize) {
        let kind = match self.dice.next(100) {
            0..42 => Kind::Backup,
            42..60 => Kind::Forget,
            60..66 => Kind::Undo,
            66..95 => Kind::Sweep,
            _ => Kind::Verify,
        };
        let (repository, process) = (self.slots[at].repository.clone(), self.slots[at].process.clone());
        process.lie(self.dice.percent(8));
        let (model, pieces, dice) = (Arc::clone(&self.model), Arc::clone(&self.pieces), Dice(self.dice.next(u64::MAX)));
        let handle = match kind {
            Kind::Backup => tokio::spawn(back_up(repository, model, pieces, dice)),
            Kind::Forget => tokio::spawn(forget(repository, model, dice)),
            Kind::Undo => tokio::spawn(undo(repository, model, dice)),
            Kind::Sweep => tokio::spawn(sweep(repository, dice)),
            Kind::Verify => tokio::spawn(verify(repository, model, dice)),
        };
        self.slots[at].job = Some(Job { kind, handle, stood_still: false, excused: false });
    }

    /// Lets a process go on with its job: to its end, to its next standstill, or to its death.
    async fn go_on(&mut self, at: usize) {
        let operations = match self.dice.next(3) {
            0 => self.dice.next(6),
            1 => self.dice.next(30),
            _ => self.dice.next(120),
        };
        let then = match self.dice.next(100) {
            0..60 => Then::Run,
            60..82 => Then::Pause,
            82..86 => Then::DieBefore,
            86..90 => Then::DieAfter,
            90..94 => Then::DieInFlight,
            94..97 => Then::FailAfter,
            _ => Then::FailInFlight,
        };
        // Most operations read; half of the mishaps are to meet those that write.
        if then != Then::Run && self.dice.percent(50) {
            let counts = if self.dice.percent(50) { Counts::Puts } else { Counts::Changes };
            let operations = self.dice.next(8);
            self.slots[at].process.plan_counting(counts, operations, then);
            self.run_planned(at).await;
        } else {
            self.run_job(at, operations, then).await;
        }
    }

    async fn run_job(&mut self, at: usize, operations: u64, then: Then) {
        self.slots[at].process.plan(operations, then);
        self.run_planned(at).await;
    }

    async fn run_planned(&mut self, at: usize) {
        let slot = &mut self.slots[at];
        let Some(job) = slot.job.as_mut() else { return };
        let result = tokio::select! {
            biased;
            result = &mut job.handle => result.unwrap(),
            () = slot.process.paused() => {
                job.stood_still = true;
                return;
            }
        };
        let (kind, stood_still) = (job.kind, job.stood_still);
        let excused = job.excused || slot.process.has_failed() || slot.process.has_lied();
        slot.job = None;
        if slot.process.is_dead() {
            self.slots[at] = self.slot();
        } else {
            slot.process.plan(0, Then::Run);
        }
        self.judge(kind, result, excused, stood_still);
    }

    /// A job may fail, but only for a reason.
    fn judge(&mut self, kind: Kind, result: Result<(), StoreError>, excused: bool, stood_still: bool) {
        let Err(error) = result else {
            self.count(&format!("{kind:?} done"));
            return;
        };
        let others = self.slots.iter().any(|slot| slot.job.is_some());
        let allowed = match (&error, kind) {
            _ if excused => true,
            (StoreError::TooManyPoints { .. } | StoreError::SweepTaken { .. }, Kind::Sweep) => true,
            (StoreError::TooLate { .. }, Kind::Undo | Kind::Forget) => true,
            // It began before a sweep, and went on after it.
            (StoreError::Overtaken { .. } | StoreError::DiskRange { .. }, Kind::Backup) => stood_still,
            (StoreError::ChunkMissing { .. } | StoreError::Damaged { .. }, Kind::Backup) => stood_still,
            // A sweep has removed it before.
            (StoreError::UnknownPoint { .. }, Kind::Undo | Kind::Forget) => true,
            // Points come and go while it looks.
            (StoreError::UnknownPoint { .. }, Kind::Backup) => stood_still || others,
            (StoreError::Damaged { .. }, Kind::Sweep) => stood_still,
            (StoreError::Damaged { .. } | StoreError::Misuse { .. }, Kind::Verify) => stood_still,
            _ => false,
        };
        assert!(allowed, "{kind:?} failed without a reason: {error} ({error:?})");
        self.count(&format!("{kind:?} failed"));
    }

    /// A process dies wherever it is, and another one takes its place.
    async fn restart(&mut self, at: usize) {
        self.slots[at].process.plan(0, Then::Dead);
        if let Some(job) = self.slots[at].job.take() {
            let _ = job.handle.await;
        }
        self.slots[at] = self.slot();
        self.count("restart");
    }

    fn honest(&self) -> Repository {
        self.keys.reopen_on(self.world.process()).unwrap()
    }

    /// Looks at the repository at any moment, as somebody who has it open or who comes new.
    async fn check_some(&mut self) {
        if self.dice.percent(20) {
            self.reader = self.honest();
        }
        let repository = self.reader.clone();
        let listing = repository.points(&PointFilter::default()).await.unwrap();
        assert!(listing.damaged.is_empty(), "{:?}", listing.damaged);
        let listed: BTreeSet<PointId> = listing.points.iter().map(|point| point.id).collect();
        let certain: Vec<(PointId, Content)> = {
            let model = self.model.lock().unwrap();
            model.certain().map(|(id, known)| (*id, known.content.clone())).collect()
        };
        for (id, _) in &certain {
            assert!(
                listed.contains(id),
                "point {id} was promised and is not listed: {:?}",
                self.model.lock().unwrap().points[id]
            );
        }
        if !certain.is_empty() {
            let at = usize::try_from(self.dice.next(certain.len() as u64)).unwrap();
            let (id, content) = &certain[at];
            self.must_restore(&repository, id, content).await;
        }
        // Whatever else can be read is right.
        let all: Vec<PointId> =
            listing.points.iter().chain(&listing.forgotten).chain(&listing.quarantined).map(|point| point.id).collect();
        if !all.is_empty() {
            let id = all[usize::try_from(self.dice.next(all.len() as u64)).unwrap()];
            let content = self.model.lock().unwrap().points[&id].content.clone();
            if let Ok(point) = repository.point(&id).await {
                let read = read(&repository, &point.disks[0].map).await;
                assert!(read.is_none_or(|bytes| bytes == bytes_of(&self.pieces, &content)), "wrong bytes in {id}");
            }
        }
        self.count("check");
    }

    async fn must_restore(&self, repository: &Repository, id: &PointId, content: &Content) {
        let point = repository.point(id).await.unwrap();
        let map = point.disks[0].map;
        match repository.disk(&map).read_at(ByteRange::up_to(SIZE)).await {
            Ok(bytes) => assert!(bytes[..] == bytes_of(&self.pieces, content)[..], "wrong bytes in {id}"),
            Err(error) => {
                let known = self.model.lock().unwrap().points[id].clone();
                panic!("point {id} was promised and does not restore: {error:?}; {known:?}; {point:?}");
            }
        }
        repository.blob(&point.vm_config).await.unwrap();
    }

    /// Everybody comes to an end, everything late arrives, and sweeps bring the repository to rest: then all that was
    /// promised is there, all that is listed restores, and nothing else is left.
    async fn calm_down(&mut self) {
        for at in 0..self.slots.len() {
            let slot = &mut self.slots[at];
            if let Some(job) = &mut slot.job {
                job.excused = slot.process.has_failed() || slot.process.has_lied();
            }
            slot.process.lie(false);
            while self.slots[at].job.is_some() {
                self.run_job(at, 0, Then::Run).await;
            }
        }
        while self.world.arrive() {}
        for _ in 0..6 {
            let repository = self.honest();
            let listing = repository.points(&PointFilter::default()).await.unwrap();
            let late: Vec<PointId> = listing.quarantined.iter().map(|point| point.id).collect();
            repository.forget(&late, "incomplete").await.unwrap();
            for id in late {
                let mut model = self.model.lock().unwrap();
                let known = model.points.get_mut(&id).unwrap();
                assert!(!known.done || known.forgotten != Forgotten::No, "point {id} was promised and is quarantined");
                known.forgotten = Forgotten::Yes;
            }
            self.world.pass(GRACE_SECONDS + 1);
            let mut options = sweep_options();
            (options.confirm_many, options.rewrite_below_percent) = (true, 100);
            repository.sweep(options).await.unwrap();
        }
        let repository = self.honest();
        let listing = repository.points(&PointFilter::default()).await.unwrap();
        assert!(listing.damaged.is_empty() && listing.quarantined.is_empty() && listing.forgotten.is_empty());
        let listed: BTreeSet<PointId> = listing.points.iter().map(|point| point.id).collect();
        let known = self.model.lock().unwrap().points.clone();
        for (id, known) in &known {
            if known.done && known.forgotten == Forgotten::No {
                assert!(listed.contains(id), "point {id} was promised and is gone: {known:?}");
            }
            if known.forgotten == Forgotten::Yes {
                assert!(!listed.contains(id), "point {id} was forgotten and is there: {known:?}");
            }
        }
        for id in &listed {
            self.must_restore(&repository, id, &known[id].content).await;
        }
        self.model.lock().unwrap().points.retain(|id, _| listed.contains(id));
        let mut options = VerifyOptions::default();
        (options.mode, options.write) = (VerifyMode::Full, false);
        let report = repository.verify(options).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        // Nothing more to do: what is there is needed.
        let mut options = sweep_options();
        options.dry_run = true;
        let report = repository.sweep(options).await.unwrap();
        assert!(report.begun.is_none() && report.waiting.is_none(), "{report:?}");
        let (points, receipts) = (self.world.names("points").len(), self.world.names("records").len());
        assert!(points == listed.len() && receipts <= points, "{points} points, {receipts} records");
        self.count("rest");
    }
}

/// Some bytes of a disk, if all of them can be read.
async fn read(repository: &Repository, map: &DiskMapRef) -> Option<Vec<u8>> {
    repository.disk(map).read_at(ByteRange::up_to(SIZE)).await.ok().map(|bytes| bytes.to_vec())
}

fn sweep_options() -> SweepOptions {
    let mut options = SweepOptions::default();
    options.grace = Duration::from_secs(GRACE_SECONDS);
    options.writer = WriterOptions { threads: 1, ..WriterOptions::default() };
    options
}

async fn sweep(repository: Repository, mut dice: Dice) -> Result<(), StoreError> {
    let mut options = sweep_options();
    options.confirm_many = dice.percent(70);
    options.dry_run = dice.percent(5);
    options.rewrite_below_percent = [0, 30, 60, 100][usize::try_from(dice.next(4)).unwrap()];
    options.rewrite_budget_bytes = dice.next(500_000);
    if dice.percent(10) {
        options.grace = Duration::ZERO;
    }
    repository.sweep(options).await.map(|_| ())
}

/// What is promised before and after is hurt in no report.
async fn verify(repository: Repository, model: Arc<Mutex<Model>>, mut dice: Dice) -> Result<(), StoreError> {
    let certain =
        |model: &Mutex<Model>| -> BTreeSet<PointId> { model.lock().unwrap().certain().map(|(id, _)| *id).collect() };
    let before = certain(&model);
    let mut options = VerifyOptions::default();
    options.write = false;
    options.mode = match dice.next(3) {
        0 => VerifyMode::Quick,
        1 => VerifyMode::Sample { percent: 30, seed: dice.next(u64::MAX) },
        _ => VerifyMode::Full,
    };
    let report = repository.verify(options).await?;
    let promised: BTreeSet<PointId> = before.intersection(&certain(&model)).copied().collect();
    match report.hurt.iter().find(|point| point.id.is_some_and(|id| promised.contains(&id))) {
        Some(point) => Err(StoreError::Misuse { what: format!("{point:?} is not hurt: {:?}", report.damage) }),
        None => Ok(()),
    }
}

/// Takes points that fit, and that no other job is about to change.
fn choose(model: &Mutex<Model>, dice: &mut Dice, fits: impl Fn(&Known) -> bool) -> Vec<PointId> {
    let mut model = model.lock().unwrap();
    let fitting = model.points.iter().filter(|(id, known)| fits(known) && !model.busy.contains(id));
    let mut chosen: Vec<PointId> = fitting.map(|(id, _)| *id).collect();
    let most = 1 + dice.next(4);
    while chosen.len() as u64 > most {
        let at = usize::try_from(dice.next(chosen.len() as u64)).unwrap();
        chosen.swap_remove(at);
    }
    model.busy.extend(chosen.iter().copied());
    chosen
}

/// Notes what became of points. Once nobody can tell, it stays so: a late PUT may come at any time.
fn settle(model: &Mutex<Model>, points: &[PointId], to: Forgotten) {
    let mut model = model.lock().unwrap();
    for id in points {
        model.busy.remove(id);
        if let Some(known) = model.points.get_mut(id).filter(|known| known.forgotten != Forgotten::Perhaps) {
            known.forgotten = to;
        }
    }
}

async fn forget(repository: Repository, model: Arc<Mutex<Model>>, mut dice: Dice) -> Result<(), StoreError> {
    let chosen = choose(&model, &mut dice, |known| known.done && known.forgotten == Forgotten::No);
    // From now on it may go at any moment.
    chosen.iter().for_each(|id| model.lock().unwrap().points.get_mut(id).unwrap().forgotten = Forgotten::Yes);
    let result = repository.forget(&chosen, "expired").await;
    settle(&model, &chosen, if result.is_ok() { Forgotten::Yes } else { Forgotten::Perhaps });
    result?;
    // Somebody changes his mind at once.
    if dice.percent(30) { undo(repository, model, dice).await } else { Ok(()) }
}

async fn undo(repository: Repository, model: Arc<Mutex<Model>>, mut dice: Dice) -> Result<(), StoreError> {
    let mut result = Ok(());
    for id in choose(&model, &mut dice, |known| known.forgotten == Forgotten::Yes) {
        let undone = repository.undo_forget(&[id]).await;
        let certainly = matches!(&undone, Ok(report) if report.changed == [id]);
        settle(&model, &[id], if certainly { Forgotten::No } else { Forgotten::Perhaps });
        result = result.and(undone.map(|_| ()));
    }
    result
}

async fn back_up(
    repository: Repository,
    model: Arc<Mutex<Model>>,
    pieces: Arc<HashMap<u64, Vec<u8>>>,
    mut dice: Dice,
) -> Result<(), StoreError> {
    let vm_uuid = format!("vm-{}", dice.next(VMS));
    let filter = PointFilter { vm_uuid: Some(vm_uuid.clone()), ..PointFilter::default() };
    let parent = match repository.points(&filter).await?.points.last() {
        Some(newest) if dice.percent(75) => Some(repository.point(&newest.id).await?),
        _ => None,
    };
    let before: Option<Content> =
        parent.as_ref().map(|parent| model.lock().unwrap().points[&parent.id].content.clone());
    let writer = repository.writer(WriterOptions { threads: 1, ..WriterOptions::default() }).await?;
    let (map, content) = write(&writer, parent.as_ref(), before, &pieces, &mut dice).await?;
    let config = writer.put_blob(vm_uuid.as_bytes()).await?;
    let created_unix_ms = dice.next(1 << 40);
    let created_unix_ms = parent.as_ref().map_or(created_unix_ms, |parent| parent.created_unix_ms + 1);
    let parent = parent.map(|parent| parent.id);
    let point = PointManifest { vm_uuid, created_unix_ms, parent, ..manifest(&[map], config) };
    let known = Known { content, done: false, forgotten: Forgotten::No };
    model.lock().unwrap().points.insert(point.id, known);
    let id = writer.publish(point).await?;
    model.lock().unwrap().points.get_mut(&id).unwrap().done = true;
    Ok(())
}

async fn write(
    writer: &Writer,
    parent: Option<&PointManifest>,
    before: Option<Content>,
    pieces: &HashMap<u64, Vec<u8>>,
    dice: &mut Dice,
) -> Result<(DiskMapRef, Content), StoreError> {
    let base = parent.map(|parent| parent.disks[0].map);
    let mut disk = writer.disk(DiskOptions { virtual_size: SIZE, base }).await?;
    let mut content = before.clone().unwrap_or_else(|| vec![0; PIECES]);
    for (number, place) in content.iter_mut().enumerate() {
        if before.is_some() && !dice.percent(25) {
            continue;
        }
        let piece = dice.next(pieces.len() as u64);
        *place = piece;
        disk.write((number * PIECE_BYTES) as u64, Bytes::from(pieces[&piece].clone())).await?;
    }
    Ok((disk.finish().await?.map, content))
}
