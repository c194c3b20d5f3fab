//! Where an export is served, and who to ask for it again.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use rustls::pki_types::ServerName;

/// Any error of a caller's own code.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Name of an export. On XenServer it carries a session reference: a secret, never shown, never logged (X04).
#[derive(Clone, PartialEq, Eq)]
pub struct ExportName(String);

impl ExportName {
    /// Wraps a name.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The name itself.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExportName(..)")
    }
}

/// How to secure a connection. Trust is the caller's business: the configuration holds the verifier.
#[derive(Clone)]
pub struct Tls {
    /// Verifier, versions and groups.
    pub config: Arc<rustls::ClientConfig>,
    /// Name that is sent and verified.
    pub server_name: ServerName<'static>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// One address at which one export can be opened.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Address and port of the host's NBD server.
    pub address: SocketAddr,
    /// TLS by STARTTLS; `None` is clear text, by the caller's explicit choice.
    pub tls: Option<Tls>,
    /// What to open.
    pub export_name: ExportName,
}

/// Gives the endpoints of one export; asked at the start, and again when the host closed after the export name was sent
/// (the session in the name can be gone) or when no address is left.
pub trait EndpointSource: Send + Sync {
    /// The endpoints now. IPv6 ones may be among them; they are tried last (X24).
    fn endpoints(&self) -> BoxFuture<'_, Result<Vec<Endpoint>, BoxError>>;
}

/// A source that always gives the same endpoints.
#[derive(Clone, Debug)]
pub struct FixedEndpoints(pub Vec<Endpoint>);

impl EndpointSource for FixedEndpoints {
    fn endpoints(&self) -> BoxFuture<'_, Result<Vec<Endpoint>, BoxError>> {
        let endpoints = self.0.clone();
        Box::pin(async move { Ok(endpoints) })
    }
}
