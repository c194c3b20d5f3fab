//! The NBD servers of the hosts, with the manners of xapi-nbd: one listener for each host address.
//!
//! Owns the wire and the limits. What an export is, whether a session is good, and what attaching and detaching do is
//! the business of the [`NbdBackend`].

mod backend;
mod counters;
mod faults;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use uuid::Uuid;

pub use backend::{BlockDevice, ExportRequest, NbdBackend, OpenDisk, Purposes, Refusal};
pub use counters::{HostCounts, NbdCounters, NbdCounts, VdiCounts};
pub use faults::{Fault, FaultId, FaultOrder, NbdFaults};

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

/// A running NBD server of one host address.
///
/// Dropping it kills it as SIGKILL does: connections break and VBDs stay. [`NbdServer::shutdown`] is SIGTERM.
#[derive(Debug)]
pub struct NbdServer {}

#[allow(clippy::todo, unused_variables, reason = "skeleton")]
impl NbdServer {
    /// Binds and serves, on the current tokio runtime.
    ///
    /// # Errors
    /// The address can not be bound, or certificate and key are refused.
    pub fn start(options: NbdOptions) -> io::Result<Self> {
        todo!()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        todo!()
    }

    /// Ends as on SIGTERM: all VBDs are closed, then clients see end of file.
    pub async fn shutdown(self) {
        todo!()
    }
}
