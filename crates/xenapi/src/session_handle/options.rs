//! How to reach a pool: address, account, trust, and limits.

use crate::host;
use crate::rpc::Protocol;
use crate::secret::Secret;
use crate::trust::{Sha256Fingerprint, Trust};
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
    /// Handing a request to the network.
    pub send: Duration,
    /// The floor under the speed of bodies, of responses as of transfers in both directions.
    pub floor: Floor,
    /// How long calls wait for a pool that is away after a session was open (a restart of the toolstack, a fail-over in one
    /// or more steps): those that are harmless to repeat, and all that were certainly not begun. Counted from the first
    /// failure of any call, and for each call from its own; a pool that stays away longer fails at once. Zero: not at
    /// all.
    pub outage: Duration,
}

/// The least that has to move: `bytes` within every `window` that is spent waiting for the other side.
///
/// It bounds every transfer of n bytes by `n / bytes + 1` windows, however it drips.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Floor {
    /// Bytes; 0 counts as 1.
    pub bytes: u64,
    /// Time of waiting.
    pub window: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            tls: Duration::from_secs(15),
            read_call: Duration::from_secs(60),
            work_call: Duration::from_secs(600),
            send: Duration::from_secs(60),
            // Hosts that look for data in a sparse disk can be silent for a minute or two.
            floor: Floor { bytes: 256 << 10, window: Duration::from_secs(120) },
            outage: Duration::from_secs(120),
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
    /// What is known of the pool from an earlier login, for trust that does not come with it.
    pub known: KnownPool,
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
            known: KnownPool::default(),
            protocol: Protocol::default(),
            originator: "xenvault".to_owned(),
            timeouts: Timeouts::default(),
            limits: Limits::default(),
        }
    }
}

/// A pool as it was at an earlier login: where to look for its coordinator when the given address is silent.
///
/// It is no trust: each of these hosts has to be believed as the given one has. [`Trust::Pins`](crate::Trust::Pins)
/// brings hosts of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KnownPool {
    /// Its uuid; another pool is refused.
    pub pool_uuid: Option<String>,
    /// Addresses of its members.
    pub addresses: Vec<String>,
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
