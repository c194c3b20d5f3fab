//! x
use crate::error::XenApiError;
use crate::model::Repeat;
use crate::rpc::Protocol;
use crate::secret::Secret;
use crate::trust::{PinnedHosts, Sha256Fingerprint, Trust};
use crate::value::{FromValue, Value};
use crate::{host, task};
use std::sync::Arc;
use std::time::Duration;

/// Time limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Opening a TCP connection.
    pub connect: Duration,
    /// The TLS handshake.
    pub tls: Duration,
    /// The answer to a login, a logout or a read.
    pub read_call: Duration,
    /// The answer to a call that does work.
    pub work_call: Duration,
    /// A transfer during which not one byte moves.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            tls: Duration::from_secs(15),
            read_call: Duration::from_secs(60),
            work_call: Duration::from_secs(600),
            stall: Duration::from_secs(120),
        }
    }
}

/// Limits of amounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Calls at the same time; waiting for events is not counted.
    pub calls: usize,
    /// Bytes of one response.
    pub response_bytes: usize,
    /// Attempts of a call that the pool refuses because it is busy.
    pub busy_attempts: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { calls: 16, response_bytes: 256 << 20, busy_attempts: 6 }
    }
}

/// How to reach a pool.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// `https://HOST[:PORT]`; `http://` only with [`Trust::PlainHttp`].
    pub url: String,
    /// User name.
    pub user: String,
    /// Password.
    pub password: Secret,
    /// Whom to believe.
    pub trust: Trust,
    /// Encoding of calls.
    pub protocol: Protocol,
    /// Who we are; the server limits sessions by it.
    pub originator: String,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Limits of amounts.
    pub limits: Limits,
}

impl ConnectOptions {
    /// Options with everything else at its default.
    pub fn new(url: &str, user: &str, password: impl Into<Secret>, trust: Trust) -> Self {
        Self {
            url: url.to_owned(),
            user: user.to_owned(),
            password: password.into(),
            trust,
            protocol: Protocol::default(),
            originator: "xenvault".to_owned(),
            timeouts: Timeouts::default(),
            limits: Limits::default(),
        }
    }
}

/// A host of the pool, as it was learned at login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its object.
    pub host: host::Ref,
    /// Its uuid.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// Its certificate, where the trust needs one and it could be learned.
    pub fingerprint: Option<Sha256Fingerprint>,
}

/// A session at a pool; cloning gives another handle of the same session.
///
/// It ends with [`Session::logout`], or in the background when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Session {
    inner: Arc<()>,
}

impl Session {
    /// Opens a session. The future may be dropped at any time: a session that was opened is closed again.
    ///
    /// # Errors
    /// [`XenApiError::LoginRefused`], [`XenApiError::Certificate`], [`XenApiError::HostIsSlave`],
    /// [`XenApiError::WrongPool`], [`XenApiError::Connection`], [`XenApiError::Timeout`].
    pub async fn login(_options: ConnectOptions) -> Result<Self, XenApiError> {
        todo!()
    }

    /// Ends the session for all its handles, after what was cancelled has been cleaned up.
    ///
    /// # Errors
    /// Those of the call; the session is not used any more in any case.
    pub async fn logout(&self) -> Result<(), XenApiError> {
        todo!()
    }

    /// Counts logins: changes when the session had ended and was renewed, so that references can be looked up again.
    pub fn generation(&self) -> u64 {
        todo!()
    }

    /// The pool's uuid.
    pub fn pool_uuid(&self) -> String {
        todo!()
    }

    /// The host (without port) that calls go to: the coordinator.
    pub fn coordinator(&self) -> String {
        todo!()
    }

    /// The pool's hosts, as they were learned at login.
    pub fn members(&self) -> Vec<Member> {
        todo!()
    }

    /// Every certificate that is confirmed or was learned, to be kept for the next login ([`Trust::Pins`]).
    pub fn pinned_hosts(&self) -> PinnedHosts {
        todo!()
    }

    /// The session's own reference, a secret.
    pub fn reference(&self) -> crate::session::Ref {
        todo!()
    }

    /// Any message by name; the session's reference is put in front of `arguments`.
    ///
    /// # Errors
    /// Those of the call, see [`XenApiError`].
    pub async fn call(&self, _method: &str, _repeat: Repeat, _arguments: Vec<Value>) -> Result<Value, XenApiError> {
        let _ = &self.inner;
        todo!()
    }

    pub(crate) async fn invoke<T: FromValue>(
        &self,
        method: &str,
        repeat: Repeat,
        arguments: Vec<Value>,
    ) -> Result<T, XenApiError> {
        let value = self.call(method, repeat, arguments).await?;
        T::from_value(value).map_err(|source| XenApiError::decode(method, source))
    }

    pub(crate) async fn start(&self, _method: &str, _arguments: Vec<Value>) -> Result<task::Ref, XenApiError> {
        todo!()
    }
}
