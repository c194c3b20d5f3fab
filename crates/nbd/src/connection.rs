//! One connection to one export.
//!
//! Two tasks stand behind it, one sends and one receives; a table of handles joins them. Whatever goes wrong ends the
//! connection as a whole and is told to every request in flight.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep, timeout};
use xenvault_block::ByteRange;

use crate::endpoint::Endpoint;
use crate::error::{NbdError, Phase, Violation};
use crate::handshake::{self, Opened, Transport};
use crate::protocol::{self, Command};

/// Time limits of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP connect. Default 5 s.
    pub connect: Duration,
    /// Greeting, options and TLS. Default 30 s.
    pub handshake: Duration,
    /// From the export name to its answer: the host attaches the disk, which can take minutes (X26). Default 5 min.
    pub open: Duration,
    /// Without a byte of the answer that is due. Default 60 s (X29).
    pub progress: Duration,
    /// From DISC to the close, in which the host detaches the disk. Default 2 min.
    pub disconnect: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(30),
            open: Duration::from_secs(300),
            progress: Duration::from_secs(60),
            disconnect: Duration::from_secs(120),
        }
    }
}

/// An open export over one socket. Reads may be made at the same time; they are sent at once and answered by handle.
///
/// Dropping it closes the socket without a word; the host notices that within a second.
#[derive(Debug)]
pub struct Connection {
    address: SocketAddr,
    size: u64,
    disconnect_limit: Duration,
    shared: Arc<Shared>,
    requests: mpsc::UnboundedSender<[u8; protocol::REQUEST_BYTES]>,
    tasks: [AbortOnDrop; 2],
}

impl Connection {
    /// Longest read in one request, in bytes.
    pub const MAX_READ_BYTES: u64 = 32 * 1024 * 1024;

    /// Connects, secures the connection if asked to, and opens the export.
    ///
    /// # Errors
    /// [`NbdError`] by the moment at which the peer fails.
    pub async fn open(endpoint: &Endpoint, timeouts: &Timeouts) -> Result<Self, NbdError> {
        Self::open_stream(connect(endpoint, timeouts).await?, endpoint, timeouts).await
    }

    /// Finds out whether a host's NBD server can be reached and shows the certificate that it must: as
    /// [`Connection::open`] up to the export, which is not opened, so that nothing happens on the host.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub async fn probe(endpoint: &Endpoint, timeouts: &Timeouts) -> Result<(), NbdError> {
        handshake::greet(connect(endpoint, timeouts).await?, endpoint, timeouts).await
    }

    /// As [`Connection::open`], over a stream that leads to the endpoint already.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub async fn open_stream<T>(stream: T, endpoint: &Endpoint, timeouts: &Timeouts) -> Result<Self, NbdError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let address = endpoint.address;
        let Opened { transport, size, piece_bytes } = handshake::open(stream, endpoint, timeouts).await?;
        let (input, output) = tokio::io::split(transport);
        let (requests, queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::new(address, timeouts.progress));
        let sending = tokio::spawn(send(output, queue, shared.clone()));
        let receiving = tokio::spawn(receive(input, piece_bytes, shared.clone()));
        let tasks = [AbortOnDrop(receiving), AbortOnDrop(sending)];
        Ok(Self { address, size, disconnect_limit: timeouts.disconnect, shared, requests, tasks })
    }

    /// Where it leads.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Size of the export in bytes; a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads one range (not empty, start and end multiples of 512, at most [`Connection::MAX_READ_BYTES`]).
    ///
    /// The request is sent when this is called, not when the future is first polled. Dropping the future leaves the
    /// connection in order; the answer is thrown away when it comes.
    ///
    /// # Errors
    /// After any error but [`NbdError::OutOfRange`] and [`NbdError::BadRequest`] the connection is over.
    pub fn read(&self, range: ByteRange) -> impl Future<Output = Result<Bytes, NbdError>> + Send + use<> {
        let answer = self.request(range);
        let (address, shared) = (self.address, self.shared.clone());
        async move {
            match answer?.await {
                Ok(result) => result,
                // The receiving task is gone, together with the runtime.
                Err(_) => Err(shared.failure().unwrap_or(Failure::Ended).at(address, range, None)),
            }
        }
    }

    fn request(&self, range: ByteRange) -> Result<oneshot::Receiver<Result<Bytes, NbdError>>, NbdError> {
        if range.end() > self.size {
            return Err(NbdError::OutOfRange { range, size: self.size });
        }
        let length = match u32::try_from(range.len()) {
            Ok(length) if protocol::is_request(range, Self::MAX_READ_BYTES) => length,
            _ => return Err(NbdError::BadRequest { range, limit: Self::MAX_READ_BYTES }),
        };
        let (answer, receiver) = oneshot::channel();
        let handle = self.shared.enter(Pending { range, answer })?;
        // If the sending task is gone, the receiving one has failed every request, or will.
        let _ = self.requests.send(protocol::request(Command::Read, handle, range.start(), length));
        Ok(receiver)
    }

    /// Says DISC and waits until the host has closed: only then has it detached the disk.
    ///
    /// # Errors
    /// [`NbdError::Timeout`] if the close does not come; the connection is gone in any case.
    pub async fn disconnect(mut self) -> Result<(), NbdError> {
        self.shared.leaving.store(true, Ordering::SeqCst);
        let _ = self.requests.send(protocol::request(Command::Disconnect, 0, 0, 0));
        let [receiving, _] = &mut self.tasks;
        let limit = self.disconnect_limit;
        if timeout(limit, &mut receiving.0).await.is_err() {
            return Err(NbdError::Timeout { address: self.address, phase: Phase::Disconnect, limit });
        }
        match self.shared.failure() {
            // However the end comes after DISC, it is the end that was asked for.
            None | Some(Failure::Ended | Failure::Io(_)) => Ok(()),
            Some(failure) => Err(failure.at(self.address, ByteRange::up_to(0), None)),
        }
    }
}

async fn connect(endpoint: &Endpoint, timeouts: &Timeouts) -> Result<TcpStream, NbdError> {
    let address = endpoint.address;
    let failed = |source| NbdError::Connect { address, source: Arc::new(source) };
    let connect = async { TcpStream::connect(address).await.map_err(failed) };
    let stream = handshake::within(timeouts.connect, Phase::Connect, address, connect).await?;
    // Requests are small and wait for nothing.
    stream.set_nodelay(true).map_err(failed)?;
    Ok(stream)
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Reads outlive the connection, and the tasks that could tell them are about to be aborted.
        self.shared.fail(Failure::Ended);
    }
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What ended a connection. Every request that waited hears of it.
#[derive(Clone, Debug)]
enum Failure {
    Ended,
    Io(Arc<io::Error>),
    Timeout(Duration),
    Violation(Violation),
    /// An error reply; it is told to its own request, the others only hear that the connection is over.
    Refused,
}

impl Failure {
    fn at(&self, address: SocketAddr, range: ByteRange, received_bytes: Option<u64>) -> NbdError {
        match self {
            Self::Ended | Self::Refused => NbdError::Lost { address, range, received_bytes, source: None },
            Self::Io(error) => {
                let source = Some(error.clone());
                NbdError::Lost { address, range, received_bytes, source }
            }
            Self::Timeout(limit) if received_bytes.is_some() => {
                NbdError::Timeout { address, phase: Phase::Read, limit: *limit }
            }
            Self::Timeout(_) => NbdError::Lost { address, range, received_bytes, source: None },
            Self::Violation(violation) => NbdError::Protocol { address, violation: *violation },
        }
    }
}

#[derive(Debug)]
struct Pending {
    range: ByteRange,
    answer: oneshot::Sender<Result<Bytes, NbdError>>,
}

/// What the sending and the receiving side know together.
#[derive(Debug)]
struct Shared {
    address: SocketAddr,
    progress_limit: Duration,
    table: Mutex<Table>,
    /// DISC was sent: the end of the stream is what is waited for.
    leaving: AtomicBool,
}

#[derive(Debug)]
struct Table {
    next_handle: u64,
    /// Ordered: handles ascend in the order of the requests.
    pending: BTreeMap<u64, Pending>,
    /// When a byte last came, or when the first request was made after a pause.
    progress: Instant,
    failure: Option<Failure>,
}

impl Shared {
    fn new(address: SocketAddr, progress_limit: Duration) -> Self {
        let table = Table { next_handle: 1, pending: BTreeMap::new(), progress: Instant::now(), failure: None };
        Self { address, progress_limit, table: Mutex::new(table), leaving: AtomicBool::new(false) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it is held; and if it did, the table would still be whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, pending: Pending) -> Result<u64, NbdError> {
        let mut table = self.table();
        if let Some(failure) = &table.failure {
            return Err(failure.at(self.address, pending.range, None));
        }
        if table.pending.is_empty() {
            table.progress = Instant::now();
        }
        let handle = table.next_handle;
        table.next_handle += 1;
        table.pending.insert(handle, pending);
        Ok(handle)
    }

    fn failure(&self) -> Option<Failure> {
        self.table().failure.clone()
    }

    /// Ends the connection: tells every request that waits.
    fn fail(&self, failure: Failure) {
        let pending = {
            let mut table = self.table();
            table.failure.get_or_insert_with(|| failure.clone());
            std::mem::take(&mut table.pending)
        };
        let mut oldest = true;
        for Pending { range, answer } in pending.into_values() {
            // Requests are served in order: if nothing comes at all, the first in line is what the host hangs on.
            let received = (oldest && matches!(failure, Failure::Timeout(_))).then_some(0);
            let _ = answer.send(Err(failure.at(self.address, range, received)));
            oldest = false;
        }
    }

    /// How long a byte may still take; `None` if none is due.
    fn patience(&self) -> Option<Duration> {
        let table = self.table();
        let due = !table.pending.is_empty();
        due.then(|| self.progress_limit.saturating_sub(table.progress.elapsed()))
    }
}

async fn send(
    mut output: WriteHalf<Box<dyn Transport>>,
    mut queue: mpsc::UnboundedReceiver<[u8; protocol::REQUEST_BYTES]>,
    shared: Arc<Shared>,
) {
    let mut batch = Vec::new();
    loop {
        let mut requests = Vec::with_capacity(64);
        if queue.recv_many(&mut requests, 64).await == 0 {
            return;
        }
        batch.clear();
        batch.extend(requests.iter().flatten());
        let sent = async {
            output.write_all(&batch).await?;
            output.flush().await
        };
        if let Err(error) = sent.await {
            // What the host still has to say (an error reply, answers on their way) is read before this counts.
            tracing::debug!(address = %shared.address, %error, "sending to the NBD server failed");
            return;
        }
    }
}

async fn receive(input: ReadHalf<Box<dyn Transport>>, piece_bytes: usize, shared: Arc<Shared>) {
    let alarm = Box::pin(sleep(shared.progress_limit));
    let mut receiver = Receiver { input, piece_bytes, shared: shared.clone(), alarm };
    let failure = loop {
        if let Err(failure) = receiver.answer().await {
            break failure;
        }
    };
    if !shared.leaving.load(Ordering::SeqCst) {
        tracing::debug!(address = %shared.address, ?failure, "the NBD connection ended");
    }
    shared.fail(failure);
}

/// Whether the next byte is owed to us.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Due {
    Now,
    /// Only while a request waits.
    IfAsked,
}

struct Receiver {
    input: ReadHalf<Box<dyn Transport>>,
    /// Bytes to ask the transport for at once.
    piece_bytes: usize,
    shared: Arc<Shared>,
    /// Goes off now and then to look whether a byte is overdue; moving it for every byte would cost more.
    alarm: Pin<Box<Sleep>>,
}

impl Receiver {
    /// Takes one answer.
    async fn answer(&mut self) -> Result<(), Failure> {
        let mut head = BytesMut::with_capacity(protocol::REPLY_BYTES);
        self.fill(&mut head, protocol::REPLY_BYTES, Due::IfAsked).await?;
        let head: &[u8; protocol::REPLY_BYTES] = head.as_ref().try_into().map_err(|_| Failure::Ended)?;
        let reply = protocol::reply(head).map_err(Failure::Violation)?;
        // Nothing is allocated before the handle is known to be one of ours, and then only what we asked for.
        let pending = self.shared.table().pending.remove(&reply.handle);
        let Some(Pending { range, answer }) = pending else {
            return Err(Failure::Violation(Violation::Handle));
        };
        let address = self.shared.address;
        if reply.error != 0 {
            // Some servers send data behind an error that must have none: what follows can not be trusted.
            let _ = answer.send(Err(NbdError::ReadRefused { address, range, code: reply.error }));
            return Err(Failure::Refused);
        }
        let length = usize::try_from(range.len()).map_err(|_| Failure::Ended)?;
        let mut data = BytesMut::with_capacity(length);
        self.shared.table().progress = Instant::now();
        match self.fill(&mut data, length, Due::Now).await {
            Ok(()) => {
                let _ = answer.send(Ok(data.freeze()));
                Ok(())
            }
            Err(failure) => {
                let _ = answer.send(Err(failure.at(address, range, Some(data.len() as u64))));
                // The others only hear that the connection is over.
                Err(if let Failure::Timeout(_) = failure { Failure::Ended } else { failure })
            }
        }
    }

    /// Reads until `buffer` holds `length` bytes, but never longer than the limit without a byte that is due.
    async fn fill(&mut self, buffer: &mut BytesMut, length: usize, due: Due) -> Result<(), Failure> {
        let mut last = Instant::now();
        while buffer.len() < length {
            let missing = (length - buffer.len()).min(self.piece_bytes);
            let mut room = (&mut *buffer).limit(missing);
            tokio::select! {
                biased;
                count = self.input.read_buf(&mut room) => match count {
                    Ok(0) => return Err(Failure::Ended),
                    Ok(_) => last = Instant::now(),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Failure::Io(Arc::new(error))),
                },
                () = &mut self.alarm => {
                    let limit = self.shared.progress_limit;
                    let left = if due == Due::Now || !buffer.is_empty() {
                        limit.saturating_sub(last.elapsed())
                    } else {
                        self.shared.patience().unwrap_or(limit)
                    };
                    if left.is_zero() {
                        return Err(Failure::Timeout(limit));
                    }
                    self.alarm.as_mut().reset(Instant::now() + left);
                }
            }
        }
        self.shared.table().progress = last;
        Ok(())
    }
}
