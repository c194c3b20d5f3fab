//! Finds an address that opens the export.
//!
//! IPv4 first (X24), round robin, one connection at a time for each host within the budget (X25, X26), short limits for
//! addresses that do not answer (X22), pauses for hosts that are busy, and new endpoints when the session may be gone
//! (X04).

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;

use super::ExportOptions;
use crate::budget::Place;
use crate::connection::Connection;
use crate::endpoint::{Endpoint, EndpointSource};
use crate::error::{NbdError, Retry};

/// How often the source is asked again for one connection before a close at the export name is believed.
const FRESH_ENDPOINTS: u32 = 2;
/// Rounds over the same endpoints before the source is asked again.
const ROUNDS_PER_ANSWER: u32 = 3;

/// How much a connection is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// There is none: wait for a place, try again and again.
    First,
    /// It would help: take it if an address gives one now.
    Further,
}

pub(super) struct Dialer {
    source: Arc<dyn EndpointSource>,
    endpoints: Vec<Endpoint>,
    /// Where the round robin stands.
    turn: usize,
    /// Addresses that did not even connect the last time: tried after the others.
    unreachable: HashSet<SocketAddr>,
}

/// What one round over all addresses gave, if no connection.
struct Round {
    error: NbdError,
    /// Some host closed after the export name.
    session_may_be_gone: bool,
    /// Nothing of what happened gets better by waiting.
    hopeless: bool,
}

impl Dialer {
    pub(super) fn new(source: Arc<dyn EndpointSource>) -> Self {
        Self { source, endpoints: Vec::new(), turn: 0, unreachable: HashSet::new() }
    }

    /// Opens one connection. `size` is that of the export, if it is known; `avoid` the address that failed just now.
    pub(super) async fn dial(
        &mut self,
        options: &ExportOptions,
        need: Need,
        size: Option<u64>,
        avoid: Option<SocketAddr>,
    ) -> Result<(Connection, Place), NbdError> {
        let mut pause = options.patience.first_pause;
        let mut asked_again = 0;
        let mut attempts = 0;
        for round in 1.. {
            let result = match self.ask().await {
                Ok(()) => match self.round(options, need, avoid, &mut attempts).await {
                    Ok((connection, place)) => return check_size(connection, place, size).await,
                    Err(result) => result,
                },
                // In the middle of a disk the pool's coordinator may be away for a while; at its start the caller knows
                // better what to do about it.
                Err(error) if size.is_some() => Round { error, session_may_be_gone: false, hopeless: false },
                Err(error) => return Err(error),
            };
            if result.session_may_be_gone {
                if asked_again == FRESH_ENDPOINTS {
                    return Err(result.error);
                }
                asked_again += 1;
                self.endpoints.clear();
            } else if result.hopeless {
                return Err(result.error);
            }
            if need == Need::Further || round >= options.patience.rounds {
                return Err(NbdError::Exhausted { attempts, source: Box::new(result.error) });
            }
            tracing::debug!(round, ?pause, error = %result.error, "no NBD address took a connection; trying again");
            // Hosts come and go: now and then the addresses themselves are asked for again.
            if round % ROUNDS_PER_ANSWER == 0 {
                self.endpoints.clear();
            }
            // The first new endpoints are tried at once: a new session is all that was missing.
            if asked_again != 1 || !result.session_may_be_gone {
                tokio::time::sleep(jittered(pause, round)).await;
                pause = pause.saturating_mul(2).min(options.patience.longest_pause);
            }
        }
        Err(NbdError::NoEndpoints)
    }

    /// Asks for the endpoints if none are known.
    async fn ask(&mut self) -> Result<(), NbdError> {
        if !self.endpoints.is_empty() {
            return Ok(());
        }
        let mut endpoints =
            self.source.endpoints().await.map_err(|source| NbdError::Endpoints { source: source.into() })?;
        if endpoints.is_empty() {
            return Err(NbdError::NoEndpoints);
        }
        endpoints.sort_by_key(|endpoint| endpoint.address.is_ipv6());
        self.endpoints = endpoints;
        Ok(())
    }

    /// The endpoints in the order in which they are worth a try.
    fn order(&mut self, avoid: Option<SocketAddr>) -> Vec<Endpoint> {
        let turn = self.turn;
        self.turn = self.turn.wrapping_add(1);
        let (v4, v6): (Vec<_>, Vec<_>) =
            self.endpoints.iter().cloned().partition(|endpoint| endpoint.address.is_ipv4());
        let mut order = Vec::with_capacity(self.endpoints.len());
        for mut family in [v4, v6] {
            if !family.is_empty() {
                let by = turn % family.len();
                family.rotate_left(by);
            }
            order.append(&mut family);
        }
        // Stable: the order among equals stays.
        order.sort_by_key(|endpoint| {
            let address = endpoint.address;
            (address.is_ipv6(), self.unreachable.contains(&address), Some(address) == avoid)
        });
        order
    }

    /// Tries every address once.
    async fn round(
        &mut self,
        options: &ExportOptions,
        need: Need,
        avoid: Option<SocketAddr>,
        attempts: &mut u32,
    ) -> Result<(Connection, Place), Round> {
        let order = self.order(avoid);
        let mut place = match need {
            Need::First => self.any_place(options, &order).await,
            Need::Further => None,
        };
        let mut round = Round { error: NbdError::NoEndpoints, session_may_be_gone: false, hopeless: true };
        for endpoint in &order {
            let address = endpoint.address;
            let here = match place.take_if(|(at, _)| *at == address) {
                Some((_, place)) => Some(place),
                None => options.budget.try_place(address),
            };
            let Some(here) = here else {
                // Full by our own connections: not an error of the address, only no place for one more.
                round.hopeless = false;
                continue;
            };
            *attempts += 1;
            let opened = {
                let _turn = options.budget.turn(address).await;
                Connection::open(endpoint, &options.timeouts).await
            };
            match opened {
                Ok(connection) => {
                    self.unreachable.remove(&address);
                    return Ok((connection, here));
                }
                Err(error) => {
                    tracing::debug!(%address, %error, "an NBD address did not open the export");
                    self.note(address, error, &mut round);
                }
            }
        }
        Err(round)
    }

    /// If no address has a free place, waits for the first one that gets free.
    async fn any_place(&self, options: &ExportOptions, order: &[Endpoint]) -> Option<(SocketAddr, Place)> {
        for endpoint in order {
            if let Some(place) = options.budget.try_place(endpoint.address) {
                return Some((endpoint.address, place));
            }
        }
        let mut places: FuturesUnordered<_> = order
            .iter()
            .map(|endpoint| endpoint.address)
            .map(|address| async move { Some((address, options.budget.place(address).await?)) })
            .collect();
        places.next().await.flatten()
    }

    fn note(&mut self, address: SocketAddr, error: NbdError, round: &mut Round) {
        if matches!(error, NbdError::Connect { .. } | NbdError::Timeout { .. }) {
            self.unreachable.insert(address);
        }
        round.session_may_be_gone |= error.retry() == Retry::AfterLogin;
        round.hopeless &= error.retry() == Retry::Never;
        // That a listed IPv6 address does not answer is normal and tells nothing (X24).
        if address.is_ipv4() || matches!(round.error, NbdError::NoEndpoints) {
            round.error = error;
        }
    }
}

async fn check_size(connection: Connection, place: Place, size: Option<u64>) -> Result<(Connection, Place), NbdError> {
    match size {
        Some(before) if before != connection.size() => {
            let (address, after) = (connection.address(), connection.size());
            // The finding counts, however the close goes.
            let _ = connection.disconnect().await;
            drop(place);
            Err(NbdError::SizeChanged { address, before, after })
        }
        _ => Ok((connection, place)),
    }
}

/// Between half and all of the pause, so that many clients do not come back at the same moment.
fn jittered(pause: Duration, round: u32) -> Duration {
    // Good enough for spreading: the standard library's hasher has a random key.
    use std::hash::{BuildHasher, RandomState};
    let percent = RandomState::new().hash_one(round) % 50;
    let part = u32::try_from(percent).unwrap_or(0) + 50;
    pause.saturating_mul(part) / 100
}
