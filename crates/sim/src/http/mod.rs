//! HTTP in xapi's manner: RPC on POST, disk transfers, and pages for everything that is refused.

mod auth;
mod connection;
mod db_restore;
mod export;
mod import;
mod import_vhd;
mod reports;
mod request;
mod response;
mod transfer;
mod vm_export;
mod vm_import;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::SimError;
use crate::core::Core;

/// The XenAPI listeners of all hosts, on one port number.
pub(crate) fn bind(addresses: &[std::net::Ipv4Addr]) -> Result<(u16, Vec<std::net::TcpListener>), SimError> {
    const ATTEMPTS: usize = 50;
    let mut last = std::io::Error::other("no address");
    for _ in 0..ATTEMPTS {
        match bind_once(addresses) {
            Ok(found) => return Ok(found),
            Err(error) => last = error,
        }
    }
    Err(SimError::io("listen on its hosts' addresses")(last))
}

fn bind_once(addresses: &[std::net::Ipv4Addr]) -> std::io::Result<(u16, Vec<std::net::TcpListener>)> {
    let mut port = 0;
    let mut listeners = Vec::new();
    for address in addresses {
        let listener = std::net::TcpListener::bind(SocketAddr::from((*address, port)))?;
        port = listener.local_addr()?.port();
        listener.set_nonblocking(true)?;
        listeners.push(listener);
    }
    Ok((port, listeners))
}

/// Serves a host's XenAPI until the pool ends.
pub(crate) fn serve(core: &Arc<Core>, host: usize, listener: std::net::TcpListener) -> Result<(), SimError> {
    let listener = TcpListener::from_std(listener).map_err(SimError::io("listen"))?;
    let acceptor = if core.options.plain_http { None } else { Some(acceptor(core, host)?) };
    let core = Arc::clone(core);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = core.end.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { continue };
            let (core, acceptor) = (Arc::clone(&core), acceptor.clone());
            tokio::spawn(one(core, host, acceptor, stream));
        }
    });
    Ok(())
}

async fn one(core: Arc<Core>, host: usize, acceptor: Option<TlsAcceptor>, stream: TcpStream) {
    let Ok(node) = core.host_at(host) else { return };
    let life = node.life();
    // A port behind which nobody answers: closed without a byte.
    if !node.is_up() {
        return;
    }
    let end = core.end.clone();
    let work = async move {
        // A slow answer is worse here than a small packet.
        let _ = stream.set_nodelay(true);
        match acceptor {
            None => connection::serve(core, host, stream).await,
            Some(acceptor) => {
                if let Ok(stream) = acceptor.accept(stream).await {
                    connection::serve(core, host, stream).await;
                }
            }
        }
    };
    tokio::select! {
        () = life.cancelled() => {}
        () = end.cancelled() => {}
        () = work => {}
    }
}

fn acceptor(core: &Core, host: usize) -> Result<TlsAcceptor, SimError> {
    let node = core.host_at(host)?;
    let failure = |error: rustls::Error| SimError::Certificate(error.to_string());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(failure)?
        .with_no_client_auth()
        .with_single_cert(vec![node.certificate.clone()], node.key.clone_key())
        .map_err(failure)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
