//! What can go wrong, for two readers: the operator (text) and the scheduler ([`Retry`]).

use crate::failure_class::{FailureClass, began_nothing, is_away};
use crate::generated::ErrorCode;
use crate::session_handle::Floor;
use crate::trust::Sha256Fingerprint;
use crate::unsupported::{ServerVersion, Unsupported};
use crate::value::DecodeError;
use std::fmt;
use std::time::Duration;

/// The cause of an error, of whatever type.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a scheduler does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Trying again gives the same; a person or the caller's logic has to act.
    Never,
    /// The pool or the network is busy or away; the same may work later.
    Later,
    /// The session ended; it works after a new login, once references that are held were looked up again.
    AfterLogin,
}

/// The part of an exchange that took too long or broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Opening the TCP connection.
    Connect,
    /// The TLS handshake.
    Tls,
    /// Sending the request.
    Send,
    /// Waiting for the head of the response.
    Response,
    /// Reading the body of the response.
    Body,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connecting",
            Self::Tls => "the TLS handshake",
            Self::Send => "sending the request",
            Self::Response => "waiting for the response",
            Self::Body => "reading the response",
        })
    }
}

/// An error that the pool itself reported.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiFailure {
    /// What failed.
    pub code: ErrorCode,
    /// Its parameters; their meaning depends on the code.
    pub params: Vec<String>,
}

impl ApiFailure {
    /// From an error description: the code, then its parameters.
    pub(crate) fn from_description(description: Vec<String>) -> Self {
        let mut parts = description.into_iter();
        let code = ErrorCode::from(parts.next().unwrap_or_default());
        // The only parameter is the reference itself: as good as a password, even if it ended.
        let params = if code == ErrorCode::SessionInvalid { Vec::new() } else { parts.collect() };
        let mut failure = Self { code, params };
        if failure.code == ErrorCode::HandleInvalid && failure.params.first().is_some_and(|class| class == "session") {
            failure.params.truncate(1);
        }
        failure.params.iter_mut().for_each(hide_sessions);
        failure
    }

    /// The same without this text: pools repeat in some messages what they were sent.
    pub(crate) fn without(mut self, secret: &str) -> Self {
        if !secret.is_empty() {
            for param in self.params.iter_mut().filter(|param| param.contains(secret)) {
                *param = param.replace(secret, "<hidden>");
            }
        }
        self
    }

    /// The number in `SR_BACKEND_FAILURE_n`, if it is such a code.
    pub fn sr_backend_failure(&self) -> Option<u32> {
        self.code.as_str().strip_prefix("SR_BACKEND_FAILURE_")?.parse().ok()
    }

    /// What is done about it, from the table of all codes.
    pub fn class(&self) -> FailureClass {
        FailureClass::of(self.code.as_str())
    }

    /// Whether the pool said that it is busy with something else and began nothing.
    pub fn is_busy(&self) -> bool {
        began_nothing(self.code.as_str())
    }

    /// Whether the host that was asked can not serve anything at the moment, or is not the coordinator (any more):
    /// nothing was begun.
    pub(crate) fn is_away(&self) -> bool {
        self.class() == FailureClass::Redirect || is_away(self.code.as_str())
    }
}

/// Hides the sessions in addresses of handlers: also one that ended since is not for everybody.
fn hide_sessions(text: &mut String) {
    const KEY: &str = "session_id=";
    let mut shown = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once(KEY) {
        shown.push_str(before);
        shown.push_str(KEY);
        shown.push_str("<hidden>");
        let is_end =
            |c: char| c.is_whitespace() || c.is_control() || matches!(c, '&' | '#' | '"' | '\'' | ';' | '<' | ')');
        rest = after.find(is_end).and_then(|end| after.get(end..)).unwrap_or_default();
    }
    if !shown.is_empty() {
        shown.push_str(rest);
        *text = shown;
    }
}

impl fmt::Display for ApiFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.as_str())?;
        for (at, param) in self.params.iter().filter(|param| !param.is_empty()).enumerate() {
            write!(f, "{}{param}", if at == 0 { ": " } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Debug for ApiFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Every failure of this crate. No text holds a password or a session reference.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum XenApiError {
    /// The pool refused or failed the call, or the task ended with this.
    #[error("{operation}: the pool says {failure}")]
    Api {
        /// The call.
        operation: String,
        /// What the pool said.
        failure: ApiFailure,
    },
    /// The server, its licence or its storage can not do what was asked.
    #[error("{0}")]
    NotSupported(Box<Unsupported>),
    /// User name or password are wrong.
    #[error("{host} refuses the user name or the password")]
    LoginRefused {
        /// The host that was asked.
        host: String,
    },
    /// The host that was asked is a member, and the coordinator's certificate is not among the confirmed ones.
    #[error(
        "{asked} is a member of a pool whose coordinator is {coordinator}, and nobody has confirmed the coordinator's \
         certificate{}: run `xenvault-datamover pin https://{coordinator}`, compare the fingerprint on its console, and use \
         that address", shown(.found)
    )]
    HostIsSlave {
        /// The host that was asked.
        asked: String,
        /// The coordinator, as the member named it.
        coordinator: String,
        /// What the coordinator shows, if it could be asked.
        found: Option<Sha256Fingerprint>,
    },
    /// Following a member led into another pool than the one that is known.
    #[error(
        "{host} belongs to pool {found}, but {expected} was expected; if that is right, remove the stored pins and pin again"
    )]
    WrongPool {
        /// The host that was asked.
        host: String,
        /// The pool that is known.
        expected: String,
        /// The pool that answered.
        found: String,
    },
    /// The session ended at the server (idle for too long, logged out, toolstack restarted), and repeating the call
    /// might do its work twice. A new session is in place.
    #[error("{operation}: the session had ended; a new one is open, but the call was not repeated by itself")]
    SessionInvalid {
        /// The call.
        operation: String,
    },
    /// This handle was logged out.
    #[error("{operation}: this session was logged out")]
    LoggedOut {
        /// The call.
        operation: String,
    },
    /// The task is gone before its result was seen: neither success nor failure is known (the server forgets old tasks).
    #[error("{operation}: the task disappeared before its result was seen; look at the object to learn what happened")]
    TaskVanished {
        /// What the task was for.
        operation: String,
    },
    /// The task made no progress for too long, and was cancelled.
    #[error("{operation}: the task made no progress for {} s and was cancelled", .waited.as_secs())]
    TaskStalled {
        /// What the task was for.
        operation: String,
        /// For how long nothing changed.
        waited: Duration,
    },
    /// A host that the task needed died, or its toolstack started anew: the task would have stayed pending for ever and was
    /// given up. Whether its work was done is not known.
    #[error(
        "{operation}: host {host} died or its toolstack was restarted while the task was running, so the task was given up; \
         look at the object to learn what happened"
    )]
    TaskHostGone {
        /// What the task was for.
        operation: String,
        /// Name of the host, or its reference.
        host: String,
    },
    /// The caller cancelled.
    #[error("{operation}: cancelled")]
    Cancelled {
        /// What was cancelled.
        operation: String,
    },
    /// The host shows another certificate than the confirmed one, or none is confirmed for it.
    #[error(
        "{host} shows a certificate with fingerprint {found}, {}: if the certificate was changed on purpose, compare the new \
         fingerprint on its console and pin it again; otherwise someone is between you and the pool", wanted(.expected)
    )]
    Certificate {
        /// The host.
        host: String,
        /// What was confirmed, if anything.
        expected: Option<Sha256Fingerprint>,
        /// What it shows.
        found: Sha256Fingerprint,
    },
    /// No certificate is known for this host, so it was not even asked.
    #[error("{host} is not a known member of the pool, so it is not followed")]
    UnknownHost {
        /// The host.
        host: String,
    },
    /// The TLS handshake failed for another reason than the certificate's fingerprint.
    #[error("the TLS handshake with {host} failed")]
    Tls {
        /// The host.
        host: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The host could not be reached, or the connection broke.
    #[error("{host}: the connection failed while {phase}")]
    Connection {
        /// The host.
        host: String,
        /// What was going on.
        phase: Phase,
        /// The cause.
        source: BoxError,
    },
    /// The host did not answer in time.
    #[error("{host}: no progress within {} s while {phase}", .waited.as_secs())]
    Timeout {
        /// The host.
        host: String,
        /// What was going on.
        phase: Phase,
        /// The limit.
        waited: Duration,
    },
    /// The host sends or takes bytes, but fewer than the floor.
    #[error(
        "{host}: fewer than {least_bytes} bytes moved within {} s while {phase}: the network or the host is too slow, or \
         something on the way holds the connection open", .window.as_secs()
    )]
    TooSlow {
        /// The host.
        host: String,
        /// What was going on.
        phase: Phase,
        /// What had to move at least.
        least_bytes: u64,
        /// The window.
        window: Duration,
    },
    /// Host and client have no version or key exchange of TLS in common.
    #[error(
        "{host} offers no TLS that is safe enough: at least TLS 1.2 with an ECDHE key exchange is needed, which Citrix \
         Hypervisor 8.1, XCP-ng 8.1 and all later versions have; update the host, or put a proxy with a current TLS in \
         front of it"
    )]
    TlsTooOld {
        /// The host.
        host: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The host answered with a status that is not a success.
    #[error("{operation}: {host} answers with HTTP status {status}")]
    Status {
        /// The host.
        host: String,
        /// The call or path.
        operation: String,
        /// The status.
        status: u16,
    },
    /// The head of the request would be longer than hosts accept.
    #[error(
        "{operation}: the request's head has {length} bytes, hosts accept {limit}: shorten the originator or the parameters"
    )]
    RequestHead {
        /// The call or path.
        operation: String,
        /// How long it is.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The response is larger than allowed.
    #[error(
        "{operation}: the response is larger than {limit} bytes; raise `Limits::response_bytes` if the pool is that large"
    )]
    ResponseTooLarge {
        /// The call or path.
        operation: String,
        /// The limit.
        limit: usize,
    },
    /// The response is not what the protocol says.
    #[error("{operation}: the response can not be read")]
    Response {
        /// The call or path.
        operation: String,
        /// The cause.
        source: BoxError,
    },
    /// A transfer ended with another number of bytes than it had to.
    #[error("{operation}: {found} bytes were transferred instead of {expected}")]
    Length {
        /// The transfer.
        operation: String,
        /// The length that it must have.
        expected: u64,
        /// The length that it had.
        found: u64,
    },
    /// An address that can not be used.
    #[error("`{url}` is not an address of a pool: {reason}")]
    Url {
        /// The address.
        url: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A certificate, CA file or fingerprint that can not be used.
    #[error("{what}: {reason}")]
    Trust {
        /// What was given.
        what: String,
        /// What is wrong.
        reason: String,
    },
}

fn shown(found: &Option<Sha256Fingerprint>) -> String {
    found.as_ref().map(|found| format!(" (it shows {found})")).unwrap_or_default()
}

fn wanted(expected: &Option<Sha256Fingerprint>) -> String {
    match expected {
        Some(expected) => format!("but {expected} was confirmed"),
        None => "but none was confirmed for it".to_owned(),
    }
}

impl XenApiError {
    /// What a scheduler does about it.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Api { failure, .. } => failure.class().retry(),
            Self::SessionInvalid { .. } => Retry::AfterLogin,
            Self::Connection { .. }
            | Self::Timeout { .. }
            | Self::TooSlow { .. }
            | Self::TaskVanished { .. }
            | Self::TaskStalled { .. }
            | Self::TaskHostGone { .. }
            | Self::Tls { .. } => Retry::Later,
            Self::Status { status, .. } if *status >= 500 => Retry::Later,
            _ => Retry::Never,
        }
    }

    /// What the pool said, if it was the pool that failed the call or the task.
    pub fn api(&self) -> Option<&ApiFailure> {
        match self {
            Self::Api { failure, .. } => Some(failure),
            Self::NotSupported(unsupported) => Some(&unsupported.failure),
            _ => None,
        }
    }

    /// The class of what the pool said, if it was the pool that failed the call or the task.
    pub fn class(&self) -> Option<FailureClass> {
        self.api().map(ApiFailure::class)
    }

    /// What the pool said about `operation`, as an error.
    pub(crate) fn of_failure(operation: &str, failure: ApiFailure, server: &ServerVersion) -> Self {
        let operation = operation.to_owned();
        match failure.class() {
            FailureClass::NotSupported => {
                Self::NotSupported(Box::new(Unsupported::new(operation, failure, server.clone())))
            }
            _ => Self::Api { operation, failure },
        }
    }

    /// The pool's error code, if it was the pool that failed the call or the task.
    pub fn code(&self) -> Option<&ErrorCode> {
        self.api().map(|failure| &failure.code)
    }

    pub(crate) fn too_slow(host: String, phase: Phase, floor: &Floor) -> Self {
        Self::TooSlow { host, phase, least_bytes: floor.bytes.max(1), window: floor.window }
    }

    /// Whether the host was out of reach or silent: another host, or the same one later, may answer.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Connection { .. } | Self::Timeout { .. } | Self::TooSlow { .. })
    }

    /// Whether the pool is away: silent, still starting, or without a coordinator that is known.
    pub(crate) fn is_away(&self) -> bool {
        self.is_silence() || self.api().is_some_and(ApiFailure::is_away)
    }

    /// Whether the answer was lost: nobody knows whether the pool did what it was asked for, and the object itself has to
    /// be looked at, or the work done again where that is harmless.
    pub fn is_lost_answer(&self) -> bool {
        self.is_silence()
            || matches!(self, Self::SessionInvalid { .. } | Self::TaskVanished { .. } | Self::TaskHostGone { .. })
    }

    pub(crate) fn decode(operation: &str, source: DecodeError) -> Self {
        Self::Response { operation: operation.to_owned(), source: Box::new(source) }
    }
}
