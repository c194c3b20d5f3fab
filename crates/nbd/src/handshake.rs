//! From a connected socket to an open export. The moment of a silent close tells its cause (X25).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::connection::Timeouts;
use crate::endpoint::{Endpoint, ExportName};
use crate::error::{NbdError, Phase, Violation};
use crate::protocol::{self, ClientOption, ExportAnswer};

/// Any stream that carries NBD.
pub(crate) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// Ciphertext is taken from the kernel in pieces of this size: rustls itself asks for 4 KiB at a time.
const CIPHERTEXT_BUFFER_BYTES: usize = 256 * 1024;
/// Heads of replies come with what follows them; payloads go past this buffer.
const REPLY_BUFFER_BYTES: usize = 16 * 1024;

/// One TLS record: more never comes at once, and the transport clears what it is given before it fills it.
const TLS_PIECE_BYTES: usize = 16 * 1024;

/// An export that was opened.
pub(crate) struct Opened {
    pub(crate) transport: Box<dyn Transport>,
    pub(crate) size: u64,
    /// How many bytes to ask the transport for at once.
    pub(crate) piece_bytes: usize,
}

pub(crate) async fn open<T: Transport + 'static>(
    stream: T,
    endpoint: &Endpoint,
    timeouts: &Timeouts,
) -> Result<Opened, NbdError> {
    let address = endpoint.address;
    let handshake = within(timeouts.handshake, Phase::Handshake, address, negotiate(stream, endpoint));
    let mut transport = handshake.await?;
    let opening = export(&mut transport, address, &endpoint.export_name);
    let size = within(timeouts.open, Phase::Open, address, opening).await?;
    let piece_bytes = if endpoint.tls.is_some() { TLS_PIECE_BYTES } else { usize::MAX };
    Ok(Opened { transport, size, piece_bytes })
}

pub(crate) async fn within<T>(
    limit: Duration,
    phase: Phase,
    address: SocketAddr,
    work: impl Future<Output = Result<T, NbdError>>,
) -> Result<T, NbdError> {
    timeout(limit, work).await.unwrap_or(Err(NbdError::Timeout { address, phase, limit }))
}

/// Greeting, client flags, and TLS if the endpoint wants it.
async fn negotiate<T: Transport + 'static>(mut stream: T, endpoint: &Endpoint) -> Result<Box<dyn Transport>, NbdError> {
    let address = endpoint.address;
    let mut greeting = [0; protocol::GREETING_BYTES];
    match read_message(&mut stream, &mut greeting).await {
        Ok(()) => {}
        // What came instead of a greeting tells more than its end.
        Err(end) if end.got >= 8 && !greeting.starts_with(b"NBDMAGIC") => {
            return Err(NbdError::Protocol { address, violation: Violation::Greeting });
        }
        Err(end) if end.got == 0 => return Err(NbdError::Refused { address }),
        Err(_) => return Err(NbdError::ClosedInOptions { address }),
    }
    let violation = |violation| NbdError::Protocol { address, violation };
    protocol::check_greeting(&greeting).map_err(violation)?;

    let closed = |_| NbdError::ClosedInOptions { address };
    stream.write_all(&protocol::CLIENT_FLAGS).await.map_err(closed)?;
    let Some(tls) = &endpoint.tls else {
        return Ok(Box::new(BufReader::with_capacity(REPLY_BUFFER_BYTES, stream)));
    };

    stream.write_all(&protocol::option(ClientOption::StartTls, &[])).await.map_err(closed)?;
    stream.flush().await.map_err(closed)?;
    let mut reply = [0; protocol::OPTION_REPLY_BYTES];
    let ended = |_: MessageEnd| NbdError::ClosedInOptions { address };
    read_message(&mut stream, &mut reply).await.map_err(ended)?;
    let reply = protocol::option_reply(&reply, ClientOption::StartTls).map_err(violation)?;
    if let Some(reply) = reply.refused {
        return Err(NbdError::TlsRefused { address, reply });
    }
    let mut text = vec![0; usize::try_from(reply.text_bytes).unwrap_or(0)];
    read_message(&mut stream, &mut text).await.map_err(ended)?;

    // No byte in clear was read ahead: whatever a stranger slipped in fails inside the TLS handshake.
    let connector = TlsConnector::from(tls.config.clone());
    let stream = BufReader::with_capacity(CIPHERTEXT_BUFFER_BYTES, stream);
    let secured = connector.connect(tls.server_name.clone(), stream).await;
    let secured = secured.map_err(|source| NbdError::Tls { address, source: Arc::new(source) })?;
    Ok(Box::new(secured))
}

/// Greets, secures the connection, and takes leave without an export.
pub(crate) async fn greet<T: Transport + 'static>(
    stream: T,
    endpoint: &Endpoint,
    timeouts: &Timeouts,
) -> Result<(), NbdError> {
    let address = endpoint.address;
    let negotiation = negotiate(stream, endpoint);
    let mut transport = within(timeouts.handshake, Phase::Handshake, address, negotiation).await?;
    let leave = async {
        let closed = |_| NbdError::ClosedInOptions { address };
        transport.write_all(&protocol::option(ClientOption::Abort, &[])).await.map_err(closed)?;
        transport.flush().await.map_err(closed)
    };
    within(timeouts.handshake, Phase::Handshake, address, leave).await
}

/// Asks for the export and gives its size.
async fn export(transport: &mut Box<dyn Transport>, address: SocketAddr, name: &ExportName) -> Result<u64, NbdError> {
    let name = name.reveal().as_bytes();
    if name.len() > protocol::MAX_NAME_BYTES {
        return Err(NbdError::ExportNameTooLong { found: name.len(), limit: protocol::MAX_NAME_BYTES });
    }
    let closed = |_| NbdError::ClosedAtExportName { address };
    transport.write_all(&protocol::option(ClientOption::ExportName, name)).await.map_err(closed)?;
    transport.flush().await.map_err(closed)?;
    let mut answer = [0; protocol::EXPORT_BYTES];
    read_message(transport, &mut answer).await.map_err(|_| NbdError::ClosedAtExportName { address })?;
    match protocol::export_answer(&answer) {
        ExportAnswer::Size(size) => Ok(size),
        ExportAnswer::Unusable(size, problem) => Err(NbdError::UnusableSize { address, size, problem }),
        ExportAnswer::Violation(violation) => Err(NbdError::Protocol { address, violation }),
    }
}

/// The stream ended, politely or not, inside a message.
struct MessageEnd {
    got: usize,
}

async fn read_message<R: AsyncRead + Unpin>(stream: &mut R, message: &mut [u8]) -> Result<(), MessageEnd> {
    let mut got = 0;
    while let Some(rest) = message.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest).await {
            Ok(0) => return Err(MessageEnd { got }),
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(MessageEnd { got }),
        }
    }
    Ok(())
}
