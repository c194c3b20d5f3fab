//! The NBD servers of the hosts, with the manners of xapi-nbd: one listener for each host address.
//!
//! Owns the wire and the limits. What an export is, whether a session is good, and what attaching and detaching do is
//! the business of the [`NbdBackend`].

mod backend;
mod counters;
mod faults;
mod name;
mod negotiate;
mod server;
mod tls;
mod transmit;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpSocket;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

pub use backend::{BlockDevice, ExportRequest, NbdBackend, OpenDisk, Purposes, Refusal};
pub use counters::{HostCounts, NbdCounters, NbdCounts, VdiCounts};
pub use faults::{Fault, FaultId, FaultOrder, NbdFaults};
use server::Shared;

/// What a listener needs.
pub struct NbdOptions {
    /// The host, handed to the backend.
    pub host: Uuid,
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The host's certificates, leaf first; all are sent.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The leaf's private key (RSA: no other cipher suites are offered).
    pub key: PrivateKeyDer<'static>,
    /// Decides what is exported.
    pub backend: Arc<dyn NbdBackend>,
    /// Counts; may be shared between hosts.
    pub counters: NbdCounters,
    /// Faults; may be shared between hosts.
    pub faults: NbdFaults,
}

impl std::fmt::Debug for NbdOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdOptions").field("host", &self.host).field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// Connections that wait to be accepted.
const BACKLOG: u32 = 5;

/// A running NBD server of one host address.
///
/// Dropping it kills it as SIGKILL does: connections break and VBDs stay. [`NbdServer::shutdown`] is SIGTERM.
#[derive(Debug)]
pub struct NbdServer {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl NbdServer {
    /// Binds and serves, on the current tokio runtime.
    ///
    /// # Errors
    /// The address can not be bound, or certificate and key are refused.
    pub fn start(options: NbdOptions) -> io::Result<Self> {
        let tls = tls::server_config(options.certificates, options.key)?;
        let socket = match options.listen {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(options.listen)?;
        let listener = socket.listen(BACKLOG)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            host: options.host,
            backend: options.backend,
            counters: options.counters,
            faults: options.faults,
            tls,
            places: AtomicUsize::new(0),
            terminate: CancellationToken::new(),
            exit: CancellationToken::new(),
            kill: CancellationToken::new(),
            exports: TaskTracker::new(),
            tasks: TaskTracker::new(),
        });
        shared.tasks.spawn(server::accept(Arc::clone(&shared), listener));
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends as on SIGTERM: all VBDs are closed, then clients see end of file.
    pub async fn shutdown(self) {
        let shared = &self.shared;
        shared.terminate.cancel();
        shared.exports.close();
        shared.exports.wait().await;
        shared.exit.cancel();
        shared.tasks.close();
        shared.tasks.wait().await;
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.kill.cancel();
    }
}
