//! Connects to the hosts from here: API ports, clocks, and NBD up to the end of its TLS handshake.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::StreamExt as _;
use xenvault_nbd::{Connection, Endpoint, Timeouts};
use xenvault_xenapi::{Session, host, vdi};

use super::facts::{Facts, NbdFacts};
use crate::Engine;
use crate::backup::endpoints::{Access, access, endpoint};
use crate::backup::{FindingKind, prerequisites};

/// A host that does not take a connection within this time is out of reach.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// From the connection to the end of the TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// Hosts that are tried at the same time.
const AT_ONCE: usize = 16;

/// Fills in what only connecting tells. What can not be reached is a fact, never a failure.
pub(super) async fn connect(engine: &Engine, facts: &mut Facts) {
    let session = engine.session();
    hosts(session, facts).await;
    let access = match access(facts.networks.values(), engine.options().clear_text) {
        Ok(access) => access,
        Err(finding) => {
            // As a backup asks: a server that has no NBD is read over HTTP.
            if finding.kind == FindingKind::NbdNotEnabled {
                facts.without_nbd = without_nbd(session, facts).await;
            }
            return;
        }
    };
    let endpoints = addresses(session, facts, access).await;
    let timeouts = Timeouts { connect: CONNECT_LIMIT, handshake: HANDSHAKE_LIMIT, ..Timeouts::default() };
    let probes = endpoints.into_values().map(|endpoint| async move {
        let failure = Connection::probe(&endpoint, &timeouts).await.err().map(|error| chain(&error));
        NbdFacts { address: endpoint.address, failure }
    });
    facts.nbd = futures::stream::iter(probes).buffer_unordered(AT_ONCE).collect().await;
    facts.nbd.sort_by_key(|fact| fact.address);
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| i64::try_from(time.as_secs()).unwrap_or(i64::MAX))
}

/// What the server says if it has no NBD at all.
async fn without_nbd(session: &Session, facts: &Facts) -> Option<String> {
    let disk = facts.vms.iter().flat_map(|vm| &vm.disks).next()?;
    // A call that fails for another reason says nothing about it.
    prerequisites::without_nbd(session, disk).await.ok().flatten()
}

async fn hosts(session: &Session, facts: &mut Facts) {
    let port = port(&facts.coordinator);
    let tries = facts.hosts.iter().filter(|(_, host)| host.live).map(|(reference, host)| {
        let (reference, address) = (reference.clone(), host.record.address.clone());
        async move {
            let connected =
                tokio::time::timeout(CONNECT_LIMIT, tokio::net::TcpStream::connect((address.as_str(), port)));
            let unreachable = match connected.await {
                Ok(Ok(_)) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some(format!("no answer within {} s", CONNECT_LIMIT.as_secs())),
            };
            let before = now();
            let clock = host::get_servertime(session, &reference).await.ok();
            // The answer was made at some moment between question and answer.
            let middle = before + (now() - before) / 2;
            (reference, unreachable, clock.map(|time| time.unix_seconds() - middle))
        }
    });
    let found: Vec<_> = futures::stream::iter(tries.collect::<Vec<_>>()).buffer_unordered(AT_ONCE).collect().await;
    for (reference, unreachable, clock_ahead) in found {
        if let Some(host) = facts.hosts.get_mut(&reference) {
            host.unreachable = unreachable;
            host.clock_ahead = clock_ahead;
        }
    }
}

/// The port of a URL such as `https://192.0.2.1:8443`.
fn port(url: &str) -> u16 {
    let (scheme, rest) = url.split_once("://").unwrap_or(("https", url));
    let authority = rest.split('/').next().unwrap_or_default();
    let tail = authority.rsplit_once(']').map_or(authority, |(_, tail)| tail);
    let given = tail.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    given.unwrap_or(if scheme == "http" { 80 } else { 443 })
}

/// Every address at which the disks of the checked VMs are served, asked once an SR. IPv6 addresses are listed by the
/// pool and served by nobody, so they are not tried where an IPv4 one is there (X24).
async fn addresses(session: &Session, facts: &mut Facts, access: Access) -> BTreeMap<SocketAddr, Endpoint> {
    let mut found = BTreeMap::new();
    let mut asked = BTreeMap::new();
    for vm in &mut facts.vms {
        for (index, disk) in vm.disks.iter().enumerate() {
            let empty = match asked.get(&disk.record.sr) {
                Some(empty) => *empty,
                None => {
                    let Ok(infos) = vdi::get_nbd_info(session, &disk.reference).await else { continue };
                    let endpoints: Vec<_> = infos.iter().filter_map(|info| endpoint(info, access).ok()).collect();
                    let v4 = endpoints.iter().any(|endpoint| endpoint.address.is_ipv4());
                    found.extend(
                        endpoints
                            .into_iter()
                            .filter(|endpoint| !v4 || endpoint.address.is_ipv4())
                            .map(|endpoint| (endpoint.address, endpoint)),
                    );
                    asked.insert(disk.record.sr.clone(), infos.is_empty());
                    infos.is_empty()
                }
            };
            if empty && vm.without_address.is_none() {
                vm.without_address = Some(index);
            }
        }
    }
    found
}

/// An error with its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
