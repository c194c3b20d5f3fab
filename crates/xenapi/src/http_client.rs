//! HTTP to one host: connections that are kept, time limits per phase, bounded heads and bodies.
//!
//! Hosts refuse heads of more than about 1000 bytes and chunked request bodies, so neither is ever sent.

mod endpoint;
mod exchange;
mod head;
mod pace;
mod watched;

pub(crate) use endpoint::{Endpoint, Scheme, normal};
pub(crate) use exchange::{Failed, HttpClient, Post};
pub(crate) use head::{check_request_head, read_head};
pub(crate) use pace::{Pace, TooSlow};
use watched::{Blocked, Watched};

use crate::error::{Phase, XenApiError};
use crate::session_handle::Timeouts;
use crate::trust;
use rustls::ClientConfig;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// What [`Head`] of requests calls us.
pub(crate) const USER_AGENT: &str = concat!("xenvault/", env!("CARGO_PKG_VERSION"));

/// A connection, with or without TLS.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Opens the TCP connection.
pub(crate) async fn connect_tcp(endpoint: &Endpoint, timeouts: &Timeouts) -> Result<TcpStream, XenApiError> {
    let host = endpoint.display_host();
    let connecting = TcpStream::connect((endpoint.host.as_str(), endpoint.port));
    match tokio::time::timeout(timeouts.connect, connecting).await {
        Err(_) => Err(XenApiError::Timeout { host, phase: Phase::Connect, waited: timeouts.connect }),
        Ok(Err(source)) => Err(XenApiError::Connection { host, phase: Phase::Connect, source: Box::new(source) }),
        Ok(Ok(tcp)) => {
            // Without it the last part of a request waits for the answer to the part before.
            let _ = tcp.set_nodelay(true);
            Ok(tcp)
        }
    }
}

/// Opens a connection, and secures it unless the endpoint is in clear text.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    tls: Option<&Arc<ClientConfig>>,
    timeouts: &Timeouts,
) -> Result<Box<dyn Stream>, XenApiError> {
    let tcp = connect_tcp(endpoint, timeouts).await?;
    match tls {
        None => Ok(Box::new(tcp)),
        Some(config) => Ok(Box::new(trust::handshake(endpoint, Arc::clone(config), tcp, timeouts).await?)),
    }
}
