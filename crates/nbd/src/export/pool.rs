//! The connections of one export and the tasks that feed them.
//!
//! One task for each place a connection can have. It waits until there is more to read than the open connections hold,
//! gets a connection from the dialer, and serves jobs until it ends. Dialling is one at a time for an export.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::task::JoinHandle;

use super::dialer::{Dialer, Need};
use super::queue::{Failed, Job, Outcome, Queue};
use super::{ExportCounters, ExportOptions};
use crate::budget::Place;
use crate::connection::Connection;
use crate::endpoint::EndpointSource;
use crate::error::NbdError;

/// Requests in flight on one connection at most, however small.
const MAX_IN_FLIGHT: usize = 64;
/// Connections lost one after the other, without an answer in between, before the export is given up.
const FRUITLESS_LIMIT: u64 = 6;
/// How long a place for a further connection rests after no address took one, while others work.
const REST: Duration = Duration::from_secs(10);

pub(super) struct Pool {
    pub(super) shared: Arc<Shared>,
    tasks: Mutex<Vec<JoinHandle<Result<(), NbdError>>>>,
}

/// What all connections of one export know together.
pub(super) struct Shared {
    pub(super) size: u64,
    pub(super) options: ExportOptions,
    pub(super) queue: Queue,
    pub(super) repeated_requests: AtomicU64,
    dialer: AsyncMutex<Dialer>,
    closing: watch::Sender<bool>,
    /// Connections that work.
    alive: AtomicUsize,
    /// Bytes that are asked for on any connection.
    flying_bytes: AtomicU64,
    /// Connections lost since the last answer.
    fruitless: AtomicU64,
    next_connection: AtomicU64,
    read_bytes: AtomicU64,
    answered_requests: AtomicU64,
    lost_connections: AtomicU64,
}

/// A connection and its right to be.
struct Line {
    connection: Connection,
    /// Given back after the connection is gone.
    place: Place,
}

/// How a line ended.
enum End {
    Closing,
    Lost(SocketAddr),
}

impl Pool {
    pub(super) async fn open(source: Arc<dyn EndpointSource>, options: ExportOptions) -> Result<Self, NbdError> {
        let mut dialer = Dialer::new(source);
        let (connection, place) = dialer.dial(&options, Need::First, None, None).await?;
        let connections = options.connections;
        let shared = Arc::new(Shared {
            size: connection.size(),
            options,
            queue: Queue::default(),
            repeated_requests: AtomicU64::new(0),
            dialer: AsyncMutex::new(dialer),
            closing: watch::Sender::new(false),
            // The first one, which is open.
            alive: AtomicUsize::new(1),
            flying_bytes: AtomicU64::new(0),
            fruitless: AtomicU64::new(0),
            next_connection: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            answered_requests: AtomicU64::new(0),
            lost_connections: AtomicU64::new(0),
        });
        let mut first = Some(Line { connection, place });
        let tasks = (0..connections).map(|_| tokio::spawn(shared.clone().run(first.take()))).collect();
        Ok(Self { shared, tasks: Mutex::new(tasks) })
    }

    pub(super) async fn close(&self) -> Result<(), NbdError> {
        self.shared.closing.send_replace(true);
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let mut result = Ok(());
        for task in tasks {
            // A task that was torn down with its runtime has closed its socket.
            let closed = task.await.unwrap_or(Ok(()));
            result = result.and(closed);
        }
        result
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // The tasks say DISC in the background.
        self.shared.closing.send_replace(true);
    }
}

impl Shared {
    /// Ends when the export is being closed.
    pub(super) async fn closed(&self) {
        // The sender lives as long as this: there is no error to see.
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
    }

    pub(super) fn counters(&self) -> ExportCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ExportCounters {
            read_bytes: get(&self.read_bytes),
            answered_requests: get(&self.answered_requests),
            opened_connections: get(&self.next_connection),
            lost_connections: get(&self.lost_connections),
            repeated_requests: get(&self.repeated_requests),
        }
    }

    async fn run(self: Arc<Self>, mut line: Option<Line>) -> Result<(), NbdError> {
        let mut avoid = None;
        let mut closing = self.closing.subscribe();
        loop {
            let next = match line.take() {
                Some(line) => Ok(line),
                None => tokio::select! {
                    biased;
                    _ = closing.wait_for(|closing| *closing) => return Ok(()),
                    next = self.connect(avoid) => next,
                },
            };
            match next {
                Ok(line) => match self.serve(&line.connection, &mut closing).await {
                    End::Closing => {
                        let Line { connection, place } = line;
                        let result = connection.disconnect().await;
                        drop(place);
                        return result;
                    }
                    End::Lost(address) => avoid = Some(address),
                },
                Err((need, error)) => {
                    avoid = None;
                    self.no_connection(need, error).await;
                }
            }
        }
    }

    /// Waits until one more connection would help, and opens it.
    async fn connect(&self, avoid: Option<SocketAddr>) -> Result<Line, (Need, NbdError)> {
        loop {
            self.queue.until(|waiting| self.one_more_helps(waiting)).await;
            let mut dialer = self.dialer.lock().await;
            // Meanwhile another place may have got the connection that was wanted.
            if self.one_more_helps(self.queue.waiting_bytes()) {
                let need = if self.alive.load(Ordering::SeqCst) == 0 { Need::First } else { Need::Further };
                let dialled = dialer.dial(&self.options, need, Some(self.size), avoid).await;
                let (connection, place) = dialled.map_err(|error| (need, error))?;
                self.alive.fetch_add(1, Ordering::SeqCst);
                return Ok(Line { connection, place });
            }
        }
    }

    fn one_more_helps(&self, waiting_bytes: u64) -> bool {
        let alive = self.alive.load(Ordering::SeqCst) as u64;
        let capacity = self.bytes_in_flight().saturating_mul(alive);
        waiting_bytes > 0 && waiting_bytes + self.flying_bytes.load(Ordering::SeqCst) > capacity
    }

    fn bytes_in_flight(&self) -> u64 {
        self.options.request_bytes.saturating_mul(self.options.in_flight as u64)
    }

    /// No address took a connection. With others at work this place rests; without, whoever waits has to know.
    ///
    /// One round for a further connection says too little to give up, even if the last one was lost meanwhile.
    async fn no_connection(&self, need: Need, error: NbdError) {
        if need == Need::First {
            self.give_up(error);
        } else {
            tracing::debug!(%error, "reading goes on with fewer NBD connections");
            tokio::select! {
                () = self.closed() => {}
                () = self.queue.until(|_| self.alive.load(Ordering::SeqCst) == 0) => {}
                () = tokio::time::sleep(REST) => {}
            }
        }
    }

    /// Tells everybody who waits.
    fn give_up(&self, error: NbdError) {
        while let Some((_, job)) = self.queue.pop() {
            let _ = job.answer.send(Outcome::Hopeless(error.clone()));
        }
    }

    /// Serves jobs over one connection until it ends.
    async fn serve(&self, connection: &Connection, closing: &mut watch::Receiver<bool>) -> End {
        let number = self.next_connection.fetch_add(1, Ordering::SeqCst);
        let end = self.serve_jobs(connection, number, closing).await;
        self.alive.fetch_sub(1, Ordering::SeqCst);
        if let End::Lost(_) = end {
            self.lost_connections.fetch_add(1, Ordering::Relaxed);
        }
        // Others may be wanted now.
        self.queue.nudge();
        end
    }

    async fn serve_jobs(&self, connection: &Connection, number: u64, closing: &mut watch::Receiver<bool>) -> End {
        let capacity = self.bytes_in_flight();
        let mut flying_bytes = 0;
        let mut flights: FuturesUnordered<BoxFuture<'static, Landed>> = FuturesUnordered::new();
        let landed = loop {
            let room = flights.is_empty() || (flying_bytes < capacity && flights.len() < MAX_IN_FLIGHT);
            tokio::select! {
                biased;
                _ = closing.wait_for(|closing| *closing) => {
                    self.flying_bytes.fetch_sub(flying_bytes, Ordering::SeqCst);
                    return End::Closing;
                }
                Some(landed) = flights.next() => {
                    flying_bytes -= landed.length();
                    self.flying_bytes.fetch_sub(landed.length(), Ordering::SeqCst);
                    match landed.result {
                        Ok(data) => self.deliver(landed.job, data),
                        Err(_) => break landed,
                    }
                }
                (position, job) = self.queue.next(), if room => {
                    flying_bytes += job.range.len();
                    self.flying_bytes.fetch_add(job.range.len(), Ordering::SeqCst);
                    // The request leaves now, not when the flight is first looked at.
                    let answer = connection.read(job.range);
                    flights.push(Box::pin(async move { Landed { position, job, result: answer.await } }));
                }
            }
        };
        self.flying_bytes.fetch_sub(flying_bytes, Ordering::SeqCst);
        self.clear_up(number, landed, flights).await;
        End::Lost(connection.address())
    }

    fn deliver(&self, job: Job, data: Bytes) {
        self.read_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.answered_requests.fetch_add(1, Ordering::Relaxed);
        self.fruitless.store(0, Ordering::Relaxed);
        let _ = job.answer.send(Outcome::Data(data));
    }

    /// The connection is over: what had come is delivered, what it ended at is told, everything else is put back.
    async fn clear_up(&self, number: u64, first: Landed, mut rest: FuturesUnordered<BoxFuture<'static, Landed>>) {
        let mut landed = vec![first];
        while let Some(next) = rest.next().await {
            landed.push(next);
        }
        let mut innocent = Vec::new();
        let mut fruitless = true;
        for Landed { position, job, result } in landed {
            let error = match result {
                Ok(data) => {
                    fruitless = false;
                    self.deliver(job, data);
                    continue;
                }
                Err(error) => error,
            };
            let Some(received_bytes) = blamed_at(&error) else {
                innocent.push((position, job, error));
                continue;
            };
            fruitless = false;
            let answered_requests = self.answered_requests.load(Ordering::Relaxed);
            let failed = Failed { error, connection: number, received_bytes, answered_requests };
            let _ = job.answer.send(Outcome::Failed(failed));
        }
        let losses = if fruitless { self.fruitless.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        for (position, job, error) in innocent {
            if losses >= FRUITLESS_LIMIT {
                let _ = job.answer.send(Outcome::Hopeless(error));
            } else {
                self.repeated_requests.fetch_add(1, Ordering::Relaxed);
                self.queue.put_back(position, job);
            }
        }
    }
}

/// If this very request is what its connection ended at: how much of it had come.
fn blamed_at(error: &NbdError) -> Option<u64> {
    match error {
        NbdError::Lost { received_bytes, .. } => *received_bytes,
        NbdError::ReadRefused { .. } | NbdError::Timeout { .. } => Some(0),
        _ => None,
    }
}

/// A request that came back.
struct Landed {
    position: u64,
    job: Job,
    result: Result<Bytes, NbdError>,
}

impl Landed {
    fn length(&self) -> u64 {
        self.job.range.len()
    }
}
