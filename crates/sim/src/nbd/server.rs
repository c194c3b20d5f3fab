//! The life of a connection: its place among the 16, its VBD, and the ways in which it ends.
//!
//! A connection is closed only after its VBD is gone. A VBD that was plugged is unplugged whatever happens to the
//! client, except on a kill.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::faults::Fault;
use super::transmit::Transmission;
use super::{NbdBackend, NbdCounters, NbdFaults, OpenDisk, name, negotiate};

/// Client connections of a host at once; more are closed without a word.
const CONNECTION_LIMIT: usize = 16;

/// What all connections of a host share.
pub(super) struct Shared {
    pub(super) host: Uuid,
    pub(super) backend: Arc<dyn NbdBackend>,
    pub(super) counters: NbdCounters,
    pub(super) faults: NbdFaults,
    pub(super) tls: Arc<ServerConfig>,
    pub(super) places: AtomicUsize,
    /// SIGTERM: VBDs are cleaned up.
    pub(super) terminate: CancellationToken,
    /// The end of the process after that: sockets close.
    pub(super) exit: CancellationToken,
    /// SIGKILL.
    pub(super) kill: CancellationToken,
    /// Open exports.
    pub(super) exports: TaskTracker,
    /// Everything that runs.
    pub(super) tasks: TaskTracker,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("host", &self.host).finish_non_exhaustive()
    }
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The server closes the channel: with `close_notify` inside TLS.
    Orderly,
    /// The socket is closed and nothing else: the client is gone, or the handshake failed.
    Broken,
    /// The socket is reset.
    Reset,
    /// The server is ending; the socket stays until the process would be gone.
    Terminated,
}

/// A place among the connections, given back on drop.
struct Place(Arc<Shared>);

impl Place {
    /// Counts in; `None` where all places are taken.
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let before = shared.places.fetch_add(1, Ordering::SeqCst);
        let place = Self(Arc::clone(shared));
        shared.counters.host(shared.host, |host| {
            host.open_connections += 1;
            if before < CONNECTION_LIMIT {
                host.accepted_connections += 1;
                host.peak_connections = host.peak_connections.max(host.open_connections);
            } else {
                host.refused_connections += 1;
            }
        });
        (before < CONNECTION_LIMIT).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.places.fetch_sub(1, Ordering::SeqCst);
        self.0.counters.host(self.0.host, |host| host.open_connections = host.open_connections.saturating_sub(1));
    }
}

/// Takes connections until the server ends.
pub(super) async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = shared.kill.cancelled() => return,
            () = shared.terminate.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors, perhaps: not an end, but no reason to spin.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            continue;
        };
        let Some(place) = Place::take(&shared) else { continue };
        let shared = Arc::clone(&shared);
        let tasks = shared.tasks.clone();
        tasks.spawn(async move {
            tokio::select! {
                biased;
                () = shared.kill.cancelled() => {}
                () = connection(&shared, stream, place) => {}
            }
        });
    }
}

/// Serves one client. The socket is closed when this returns; its place is free before that, so that who saw the close
/// can come again at once.
async fn connection(shared: &Arc<Shared>, mut stream: TcpStream, place: Place) {
    // Small replies must not wait for the client's acknowledgements.
    let _ = stream.set_nodelay(true);
    let end = match handshake(shared, &mut stream).await {
        Ok(Some(Channel::Clear)) => session(shared, &mut stream, false).await,
        Ok(Some(Channel::Tls)) => {
            let acceptor = TlsAcceptor::from(Arc::clone(&shared.tls));
            let accepted = unless_terminated(shared, async { Ok(acceptor.accept(stream).await) }).await;
            return match accepted {
                Ok(Ok(tls)) => inside_tls(shared, tls, place).await,
                Ok(Err(_)) => {}
                Err(_) => shared.exit.cancelled().await,
            };
        }
        Ok(None) => End::Broken,
        Err(end) => end,
    };
    finish(shared, &stream, end).await;
    drop(place);
}

async fn inside_tls(shared: &Arc<Shared>, mut tls: TlsStream<TcpStream>, place: Place) {
    let end = session(shared, &mut tls, true).await;
    if end == End::Orderly {
        drop(place);
        let _ = unless_terminated(shared, tls.shutdown()).await;
        return;
    }
    finish(shared, tls.get_ref().0, end).await;
    drop(place);
}

async fn finish(shared: &Shared, stream: &TcpStream, end: End) {
    match end {
        End::Reset => {
            let _ = stream.set_zero_linger();
        }
        End::Terminated => shared.exit.cancelled().await,
        End::Orderly | End::Broken => {}
    }
}

/// Whether the rest happens inside TLS.
enum Channel {
    Clear,
    Tls,
}

/// Everything before the options that matter; `None` is a silent close.
async fn handshake(shared: &Shared, stream: &mut TcpStream) -> Result<Option<Channel>, End> {
    let first = shared.faults.strike(shared.host, None, |fault| match fault {
        Fault::Refuse | Fault::Silence => Some(fault.clone()),
        _ => None,
    });
    match first {
        Some(Fault::Refuse) => {
            shared.counters.host(shared.host, |host| host.refused_connections += 1);
            return Ok(None);
        }
        Some(_) => return silence(shared, stream).await.map(|()| None),
        None => {}
    }
    let purposes = unless_terminated(shared, async { Ok(shared.backend.purposes().await) }).await?;
    if purposes.nbd == purposes.insecure_nbd {
        return Ok(None);
    }
    let fixed = unless_terminated(shared, negotiate::greet(stream)).await?;
    if purposes.insecure_nbd {
        return Ok(Some(Channel::Clear));
    }
    if !fixed {
        return Ok(None);
    }
    let wants_tls = unless_terminated(shared, negotiate::until_starttls(stream)).await?;
    Ok(wants_tls.then_some(Channel::Tls))
}

/// Says nothing until the client has had enough.
async fn silence(shared: &Shared, stream: &mut TcpStream) -> Result<(), End> {
    let mut ignored = [0; 512];
    unless_terminated(shared, async {
        while stream.read(&mut ignored).await? > 0 {}
        Ok(())
    })
    .await
}

/// From the export name to the end, VBD and all.
async fn session<S: AsyncRead + AsyncWrite + Unpin>(shared: &Arc<Shared>, stream: &mut S, inside_tls: bool) -> End {
    let named = unless_terminated(shared, negotiate::until_export_name(stream, inside_tls)).await;
    let request = match named {
        Ok(Some(text)) => name::parse(&text),
        Ok(None) => return End::Broken,
        Err(end) => return end,
    };
    let Some(request) = request else {
        shared.counters.host(shared.host, |host| host.failed_opens += 1);
        return End::Orderly;
    };
    let _export = shared.exports.token();
    let vdi = request.vdi_uuid.parse().ok();
    let (refused, delay) = open_faults(shared, vdi);
    if let Some(delay) = delay {
        tokio::time::sleep(delay).await;
    }
    let opened = if refused { None } else { shared.backend.open(shared.host, request).await.ok() };
    let Some(disk) = opened else {
        shared.counters.host(shared.host, |host| host.failed_opens += 1);
        return End::Orderly;
    };
    shared.counters.disk(shared.host, disk.vdi, |host, vdi| {
        host.opens += 1;
        host.open_exports += 1;
        vdi.opens += 1;
    });
    let mut transmission = Transmission::new(shared, &disk);
    let end = unless_terminated(shared, async { Ok(transmission.run(stream).await) }).await;
    close(shared, disk).await;
    end.unwrap_or_else(|end| end)
}

fn open_faults(shared: &Shared, vdi: Option<Uuid>) -> (bool, Option<std::time::Duration>) {
    let refused = shared.faults.strike(shared.host, vdi, |fault| (*fault == Fault::RefuseOpen).then_some(()));
    let delay = shared.faults.strike(shared.host, vdi, |fault| match fault {
        Fault::OpenDelay(delay) => Some(*delay),
        _ => None,
    });
    (refused.is_some(), delay)
}

async fn close(shared: &Shared, disk: OpenDisk) {
    let vdi = disk.vdi;
    shared.backend.close(shared.host, disk).await;
    shared.counters.disk(shared.host, vdi, |host, vdi| {
        host.open_exports = host.open_exports.saturating_sub(1);
        vdi.closes += 1;
    });
}

/// Does something that the end of the server interrupts.
async fn unless_terminated<T>(shared: &Shared, work: impl Future<Output = io::Result<T>>) -> Result<T, End> {
    tokio::select! {
        biased;
        () = shared.terminate.cancelled() => Err(End::Terminated),
        done = work => done.map_err(|_| End::Broken),
    }
}
