//! What can go wrong, told apart by the moment at which it happens.

use std::net::SocketAddr;
use std::sync::Arc;

use xenvault_block::ByteRange;

/// Whether it helps to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same again gives the same.
    Never,
    /// Later, or elsewhere, it can work.
    Later,
    /// With a fresh session (fresh endpoints) it can work.
    AfterLogin,
}

/// Why an export could not be opened or read. Clones share their cause: all who wait hear of the same failure.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// No endpoint was given.
    #[error("no NBD address to connect to: enable NBD on a network of the pool that this machine can reach")]
    NoEndpoints,
    /// The caller's source of endpoints failed.
    #[error("the addresses of the disk could not be asked for")]
    Endpoints {
        /// What the source says.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// TCP connect failed.
    #[error("cannot connect to the NBD server at {address}: check routing and firewall")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: Arc<std::io::Error>,
    },
    /// The host closed before it sent a byte: its 16 connections are used up, or no network of the pool (or two kinds at
    /// once) has an NBD purpose (X25).
    #[error(
        "the NBD server at {address} closed the connection at once: it is busy (16 connections serve all clients), or the NBD purposes of the pool's networks are missing or mixed"
    )]
    Refused {
        /// Where.
        address: SocketAddr,
    },
    /// The host closed while options were negotiated, before the export name.
    #[error("the NBD server at {address} closed the connection while the options were agreed on")]
    ClosedInOptions {
        /// Where.
        address: SocketAddr,
    },
    /// The host closed after the export name: session gone, VDI unknown, or the VDI can not be attached (X25).
    #[error(
        "the NBD server at {address} closed the connection while opening the disk: the session is gone, the disk is unknown or can not be attached, or TLS is demanded and was not used; the host's log has the reason"
    )]
    ClosedAtExportName {
        /// Where.
        address: SocketAddr,
    },
    /// The connection ended in the middle of the transmission: lost network, host gone, or a media error (X29).
    ///
    /// A media error looks like this because the host says "no error" before it reads the disk.
    #[error("the connection to the NBD server at {address} was lost while {range} was read")]
    Lost {
        /// Where.
        address: SocketAddr,
        /// What was asked for.
        range: ByteRange,
        /// How much of it had come; `None` if its answer had not begun, so that something else is to blame.
        received_bytes: Option<u64>,
        /// What the system says, if the end was not silent.
        source: Option<Arc<std::io::Error>>,
    },
    /// The endpoint asks for TLS and the server does not offer it. Clear text is never a fall-back.
    #[error("the NBD server at {address} refuses TLS (reply {reply:#010x}); clear text is not tried")]
    TlsRefused {
        /// Where.
        address: SocketAddr,
        /// Type of the option reply.
        reply: u32,
    },
    /// The TLS handshake failed, for example because the certificate is not the expected one.
    #[error("the TLS handshake with the NBD server at {address} failed")]
    Tls {
        /// Where.
        address: SocketAddr,
        /// What rustls says.
        source: Arc<std::io::Error>,
    },
    /// The peer speaks something else.
    #[error("the peer at {address} breaks the NBD protocol: {violation}")]
    Protocol {
        /// Where.
        address: SocketAddr,
        /// What it did.
        violation: Violation,
    },
    /// The server answered a read with an error number. Such a connection is over.
    #[error("the NBD server at {address} answered the read of {range} with error {code}")]
    ReadRefused {
        /// Where.
        address: SocketAddr,
        /// What was asked for.
        range: ByteRange,
        /// The number on the wire.
        code: u32,
    },
    /// A step took longer than its limit.
    #[error("the NBD server at {address} did not finish {phase} within {limit:?}")]
    Timeout {
        /// Where.
        address: SocketAddr,
        /// What was waited for.
        phase: Phase,
        /// The limit.
        limit: std::time::Duration,
    },
    /// The size of the export can not be worked with.
    #[error("the export at {address} claims {size} bytes: {problem}")]
    UnusableSize {
        /// Where.
        address: SocketAddr,
        /// What the server said.
        size: u64,
        /// Why it is unusable.
        problem: SizeProblem,
    },
    /// The export has another size on reconnection: it is not the disk that it was.
    #[error("the export changed its size from {before} to {after} bytes while it was read, now at {address}")]
    SizeChanged {
        /// Where.
        address: SocketAddr,
        /// Size at the first connection, in bytes.
        before: u64,
        /// Size now, in bytes.
        after: u64,
    },
    /// An export name that no server takes.
    #[error("the export name has {found} bytes, at most {limit} are possible")]
    ExportNameTooLong {
        /// Its length in bytes.
        found: usize,
        /// Longest possible name in bytes.
        limit: usize,
    },
    /// A caller asked for bytes behind the end.
    #[error("{range} pass the end of the export, which has {size} bytes")]
    OutOfRange {
        /// What was asked for.
        range: ByteRange,
        /// Size of the export in bytes.
        size: u64,
    },
    /// A caller asked for more in one request than the dialect can carry.
    #[error(
        "{range} are no single request: start and end must be multiples of 512 and the length at most {limit} bytes"
    )]
    BadRequest {
        /// What was asked for.
        range: ByteRange,
        /// Longest request in bytes.
        limit: u64,
    },
    /// The same bytes fail again and again while others can be read (X29). They are never replaced by zeros.
    #[error("the disk can not be read at {range}: {attempts} attempts failed there while other reads succeeded")]
    MediaError {
        /// The smallest range that fails; its start is the exact offset.
        range: ByteRange,
        /// Attempts at this range.
        attempts: u32,
        /// The last failure.
        source: Box<NbdError>,
    },
    /// Every address was tried as often as allowed.
    #[error("no NBD address could be opened after {attempts} attempts")]
    Exhausted {
        /// Attempts made.
        attempts: u32,
        /// The last failure.
        source: Box<NbdError>,
    },
    /// The export was closed by its user.
    #[error("the export is closed")]
    Closed,
}

/// What the client was waiting for when a time limit passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// TCP connect.
    Connect,
    /// Greeting, options and TLS.
    Handshake,
    /// The answer to the export name.
    Open,
    /// Progress of a read.
    Read,
    /// The close after DISC.
    Disconnect,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connect => "the connection",
            Self::Handshake => "the handshake",
            Self::Open => "opening the disk",
            Self::Read => "a read",
            Self::Disconnect => "closing the disk",
        })
    }
}

/// How a peer breaks the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The greeting is not that of NBD.
    #[error("the greeting is not that of an NBD server")]
    Greeting,
    /// The greeting is of the oldest kind.
    #[error("it is an old-style server without options")]
    OldStyle,
    /// Fixed newstyle is not offered.
    #[error("it does not offer the fixed newstyle handshake")]
    NotFixedNewstyle,
    /// A reply to an option has a wrong magic number or names another option.
    #[error("an option reply does not fit the option that was sent")]
    OptionReply,
    /// A reply to an option is longer than any sensible one.
    #[error("an option reply claims {0} bytes")]
    OptionReplyLength(u32),
    /// The answer to the export name is not padded with zeros: the two sides are out of step.
    #[error("the answer to the export name is not followed by 124 zero bytes")]
    Padding,
    /// A reply to a request has a wrong magic number.
    #[error("a reply begins with {0:#010x}")]
    ReplyMagic(u32),
    /// A reply has a handle that no request in flight has.
    #[error("a reply has a handle that was not asked for")]
    Handle,
}

/// Why a size is unusable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum SizeProblem {
    /// 2^63 or more.
    #[error("that is more than any disk has")]
    TooLarge,
    /// No multiple of a sector.
    #[error("that is no multiple of 512, so its end could not be read")]
    NotSectors,
}

impl NbdError {
    /// Whether and when to try again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Connect { .. }
            | Self::Refused { .. }
            | Self::ClosedInOptions { .. }
            | Self::Lost { .. }
            | Self::Timeout { .. }
            | Self::Endpoints { .. } => Retry::Later,
            Self::ClosedAtExportName { .. } => Retry::AfterLogin,
            Self::Exhausted { source, .. } => source.retry(),
            Self::NoEndpoints
            | Self::TlsRefused { .. }
            | Self::Tls { .. }
            | Self::Protocol { .. }
            | Self::ReadRefused { .. }
            | Self::UnusableSize { .. }
            | Self::SizeChanged { .. }
            | Self::ExportNameTooLong { .. }
            | Self::OutOfRange { .. }
            | Self::BadRequest { .. }
            | Self::MediaError { .. }
            | Self::Closed => Retry::Never,
        }
    }
}
