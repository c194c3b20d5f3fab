//! A store in memory with a clock of its own, in which everything goes wrong that is ordered: processes die or stand still
//! before or after any operation, PUTs arrive later than their senders wait, listings lie.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::Notify;
use xenvault_store::backend::{Backend, Upload};

/// Random numbers that are the same for the same seed.
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self, below: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % below.max(1)
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.next(100) < chance
    }
}

/// The store.
#[derive(Debug)]
pub struct World {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    objects: BTreeMap<String, (Bytes, u64)>,
    /// PUTs whose senders have given up, or died.
    in_flight: Vec<(String, Bytes)>,
    now: u64,
    dice: Dice,
}

impl World {
    pub fn new(seed: u64) -> Arc<Self> {
        let (objects, in_flight) = Default::default();
        let state = State { objects, in_flight, now: 1_700_000_000, dice: Dice(seed) };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Somebody who uses the store.
    pub fn process(self: &Arc<Self>) -> Arc<Process> {
        Arc::new(Process(Arc::new(Hand {
            world: Arc::clone(self),
            plan: Mutex::new(Plan { left: 0, then: Then::Run, counts: Counts::All }),
            is_paused: Notify::new(),
            goes_on: Notify::new(),
            lies: AtomicBool::new(false),
            has_lied: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
        })))
    }

    /// Puts the files of a folder into the store.
    pub fn fill(&self, root: &std::path::Path) {
        let mut state = self.state.lock().unwrap();
        let now = state.now;
        for path in super::objects(root, "") {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            state.objects.insert(name, (super::fs::read(&path).unwrap().into(), now));
        }
    }

    /// Another store with the same objects.
    pub fn fork(&self) -> Arc<Self> {
        let state = self.state.lock().unwrap();
        let (objects, in_flight, dice) = (state.objects.clone(), state.in_flight.clone(), state.dice.clone());
        Arc::new(Self { state: Mutex::new(State { objects, in_flight, now: state.now, dice }) })
    }

    /// Lets time pass.
    pub fn pass(&self, seconds: u64) {
        self.state.lock().unwrap().now += seconds;
    }

    /// Names of all objects below a folder.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let prefix = format!("{folder}/");
        self.state.lock().unwrap().objects.keys().filter(|name| name.starts_with(&prefix)).cloned().collect()
    }

    /// One of the PUTs that are under way arrives, in any order. Says whether there was one.
    pub fn arrive(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        let count = state.in_flight.len() as u64;
        if count == 0 {
            return false;
        }
        let at = usize::try_from(state.dice.next(count)).unwrap();
        let (name, data) = state.in_flight.swap_remove(at);
        let now = state.now;
        // A conditional PUT is as late as any other, and still conditional.
        if name.starts_with("sweeps/") && name.ends_with("/intent") {
            state.objects.entry(name).or_insert((data, now));
        } else {
            state.objects.insert(name, (data, now));
        }
        true
    }
}

/// What happens at one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing, and neither at any later one.
    Run,
    /// The process stands still before it, until it is told to go on.
    Pause,
    /// The process dies, and the operation is not done.
    DieBefore,
    /// The operation is done, and the process dies before it hears of it.
    DieAfter,
    /// The process dies; what it was putting arrives later.
    DieInFlight,
    /// The operation is done, and its answer is lost.
    FailAfter,
    /// The answer is lost; what was put arrives later.
    FailInFlight,
    /// The process is dead.
    Dead,
}

/// Which operations are counted until something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    All,
    /// Those that change the store.
    Changes,
    Puts,
}

#[derive(Debug)]
struct Plan {
    /// Operations before it happens.
    left: u64,
    then: Then,
    counts: Counts,
}

/// A process that uses the store.
#[derive(Clone, Debug)]
pub struct Process(Arc<Hand>);

/// What a process and its uploads share.
#[derive(Debug)]
pub struct Hand {
    world: Arc<World>,
    plan: Mutex<Plan>,
    is_paused: Notify,
    goes_on: Notify,
    lies: AtomicBool,
    has_lied: AtomicBool,
    has_failed: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Go {
    Do,
    DoAndFail,
    FlyAndFail,
}

impl std::ops::Deref for Process {
    type Target = Hand;

    fn deref(&self) -> &Hand {
        &self.0
    }
}

impl Hand {
    /// After `operations` more, this happens. Wakes a process that stands still.
    pub fn plan(&self, operations: u64, then: Then) {
        self.plan_counting(Counts::All, operations, then);
    }

    /// As [`Self::plan`], where not every operation counts.
    pub fn plan_counting(&self, counts: Counts, operations: u64, then: Then) {
        *self.plan.lock().unwrap() = Plan { left: operations, then, counts };
        self.goes_on.notify_waiters();
    }

    /// Some listings of this process lack something from now on, or none.
    pub fn lie(&self, lies: bool) {
        self.lies.store(lies, Ordering::SeqCst);
        self.has_lied.store(false, Ordering::SeqCst);
        self.has_failed.store(false, Ordering::SeqCst);
    }

    /// Whether a listing has lacked something since.
    pub fn has_lied(&self) -> bool {
        self.has_lied.load(Ordering::SeqCst)
    }

    /// Whether an operation has failed since, or the process is dead.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::SeqCst)
    }

    pub fn is_dead(&self) -> bool {
        self.plan.lock().unwrap().then == Then::Dead
    }

    /// Returns when the process stands still.
    pub async fn paused(&self) {
        self.is_paused.notified().await;
    }

    async fn enter(&self, what: Counts) -> io::Result<Go> {
        loop {
            let going_on = self.goes_on.notified();
            tokio::pin!(going_on);
            going_on.as_mut().enable();
            {
                let mut plan = self.plan.lock().unwrap();
                let counted = match plan.counts {
                    Counts::All => true,
                    Counts::Changes => what != Counts::All,
                    Counts::Puts => what == Counts::Puts,
                };
                if plan.then == Then::Run || (!counted && plan.then != Then::Dead) {
                    return Ok(Go::Do);
                }
                if plan.left > 0 && plan.then != Then::Dead {
                    plan.left -= 1;
                    return Ok(Go::Do);
                }
                if plan.then == Then::Pause {
                    self.is_paused.notify_one();
                } else {
                    self.has_failed.store(true, Ordering::SeqCst);
                    let (go, next) = match plan.then {
                        Then::DieAfter => (Some(Go::DoAndFail), Then::Dead),
                        Then::DieInFlight => (Some(Go::FlyAndFail), Then::Dead),
                        Then::FailAfter => (Some(Go::DoAndFail), Then::Run),
                        Then::FailInFlight => (Some(Go::FlyAndFail), Then::Run),
                        _ => (None, Then::Dead),
                    };
                    plan.then = next;
                    return go.ok_or_else(no_answer);
                }
            }
            going_on.await;
        }
    }

    async fn ask<T>(&self, answer: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        self.ask_as(Counts::All, answer).await
    }

    async fn ask_as<T>(&self, what: Counts, answer: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let go = self.enter(what).await?;
        let answer = answer(&mut self.world.state.lock().unwrap());
        if go == Go::Do { answer } else { Err(no_answer()) }
    }

    async fn put(&self, name: &str, data: Bytes, unless_there: bool) -> io::Result<()> {
        let go = self.enter(Counts::Puts).await?;
        let mut state = self.world.state.lock().unwrap();
        if go == Go::FlyAndFail {
            state.in_flight.push((name.to_owned(), data));
        } else if unless_there && state.objects.contains_key(name) {
            return Err(if go == Go::Do { io::ErrorKind::AlreadyExists.into() } else { no_answer() });
        } else {
            let now = state.now;
            state.objects.insert(name.to_owned(), (data, now));
        }
        if go == Go::Do { Ok(()) } else { Err(no_answer()) }
    }
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer")
}

fn found(state: &State, name: &str) -> io::Result<(Bytes, u64)> {
    state.objects.get(name).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn time(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

impl Backend for Process {
    fn create<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Box<dyn Upload>>> {
        let (hand, name) = (Arc::clone(&self.0), name.to_owned());
        std::future::ready(Ok(Box::new(MemoryUpload { hand, name, data: Vec::new() }) as Box<dyn Upload>)).boxed()
    }

    fn read<'a>(&'a self, name: &'a str, offset: u64, length: usize) -> BoxFuture<'a, io::Result<Vec<u8>>> {
        self.ask(move |state| {
            let (bytes, _) = found(state, name)?;
            let part =
                usize::try_from(offset).ok().and_then(|from| bytes.get(from..)?.get(..length).map(<[u8]>::to_vec));
            part.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })
        .boxed()
    }

    fn length<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<u64>> {
        self.ask(move |state| found(state, name).map(|(bytes, _)| bytes.len() as u64)).boxed()
    }

    fn list<'a>(&'a self, folder: &'a str) -> BoxFuture<'a, io::Result<Vec<String>>> {
        let (lies, has_lied) = (self.lies.load(Ordering::SeqCst), &self.has_lied);
        self.ask(move |state| {
            let prefix = format!("{folder}/");
            let mut names: Vec<String> =
                state.objects.keys().filter(|name| name.starts_with(&prefix)).cloned().collect();
            if lies && !names.is_empty() && state.dice.percent(20) {
                has_lied.store(true, Ordering::SeqCst);
                if state.dice.percent(50) {
                    let end = state.dice.next(names.len() as u64);
                    names.truncate(usize::try_from(end).unwrap());
                } else {
                    names.retain(|_| state.dice.percent(60));
                }
            }
            Ok(names)
        })
        .boxed()
    }

    fn clean<'a>(&'a self) -> BoxFuture<'a, io::Result<()>> {
        std::future::ready(Ok(())).boxed()
    }

    fn put_new<'a>(&'a self, name: &'a str, data: Bytes) -> BoxFuture<'a, io::Result<()>> {
        self.put(name, data, true).boxed()
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<()>> {
        self.ask_as(Counts::Changes, move |state| {
            state.objects.remove(name);
            Ok(())
        })
        .boxed()
    }

    fn modified<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<SystemTime>> {
        self.ask(move |state| found(state, name).map(|(_, at)| time(at))).boxed()
    }

    fn now<'a>(&'a self) -> BoxFuture<'a, io::Result<SystemTime>> {
        self.ask(|state| Ok(time(state.now))).boxed()
    }

    fn local_path(&self, _name: &str) -> Option<PathBuf> {
        None
    }

    fn location(&self) -> PathBuf {
        PathBuf::from("a store in memory")
    }
}

struct MemoryUpload {
    hand: Arc<Hand>,
    name: String,
    data: Vec<u8>,
}

impl Upload for MemoryUpload {
    fn write(&mut self, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        self.data.extend_from_slice(&data);
        std::future::ready(Ok(())).boxed()
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        async move { self.hand.put(&self.name, self.data.into(), false).await }.boxed()
    }
}
