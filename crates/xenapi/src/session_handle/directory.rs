//! What is known of the pool's hosts: who they are, where, and which certificate each must show.

use super::{ConnectOptions, Member};
use crate::error::XenApiError;
use crate::host;
use crate::http_client::{Endpoint, Scheme, normal};
use crate::trust::{PinnedHosts, Sha256Fingerprint, Trust, ca_config, pinned_config, system_config};
use crate::unsupported::ServerVersion;
use rustls::ClientConfig;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Hosts and trust of one pool. Certificates that were confirmed are never replaced by others.
pub(super) struct Directory {
    /// The address that was given.
    pub(super) given: Endpoint,
    believed: Believed,
    known: Mutex<Known>,
}

/// The kind of trust.
enum Believed {
    /// Fingerprints by host; for others this one, if there is one.
    Pins(Option<Sha256Fingerprint>),
    Ca(Arc<ClientConfig>),
    Plain,
}

#[derive(Default)]
struct Known {
    pins: PinnedHosts,
    members: Vec<Member>,
    /// Addresses of members at an earlier login.
    remembered: Vec<String>,
    server: ServerVersion,
}

impl Directory {
    pub(super) fn new(options: &ConnectOptions) -> Result<Self, XenApiError> {
        let given = Endpoint::parse(&options.url)?;
        let plain = matches!(options.trust, Trust::PlainHttp);
        if plain != (given.scheme == Scheme::Http) {
            let reason = if plain {
                "plain HTTP was chosen, so it must begin with http://"
            } else {
                "http:// sends the password in clear text and has to be allowed explicitly"
            };
            return Err(XenApiError::Url { url: options.url.clone(), reason });
        }
        let mut pins = PinnedHosts::default();
        let believed = match &options.trust {
            Trust::Fingerprint(fingerprint) => Believed::Pins(Some(*fingerprint)),
            Trust::Pins(known) => {
                pins.pool_uuid.clone_from(&known.pool_uuid);
                pins.hosts.extend(known.hosts.iter().map(|(host, pin)| (normal(host), *pin)));
                Believed::Pins(None)
            }
            Trust::CaFile(path) => Believed::Ca(ca_config(path)?),
            Trust::SystemRoots => Believed::Ca(system_config()?),
            Trust::PlainHttp => Believed::Plain,
        };
        if pins.pool_uuid.is_none() {
            pins.pool_uuid.clone_from(&options.known.pool_uuid);
        }
        let remembered = options.known.addresses.clone();
        Ok(Self { given, believed, known: Mutex::new(Known { pins, remembered, ..Known::default() }) })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to secure a connection to this host; an error if nothing is known that it could be believed by.
    pub(super) fn tls_for(&self, endpoint: &Endpoint) -> Result<Option<Arc<ClientConfig>>, XenApiError> {
        match &self.believed {
            Believed::Plain => Ok(None),
            Believed::Ca(config) => Ok(Some(Arc::clone(config))),
            Believed::Pins(other) => {
                let pin = self.lock().pins.hosts.get(&endpoint.host).copied().or(*other);
                let pin = pin.ok_or_else(|| XenApiError::UnknownHost { host: endpoint.display_host() })?;
                pinned_config(pin).map(Some)
            }
        }
    }

    /// Whether hosts are told apart by their own certificates.
    pub(super) fn is_pinned(&self) -> bool {
        matches!(self.believed, Believed::Pins(_))
    }

    /// Notes the certificate of a host that was just talked to successfully.
    pub(super) fn confirm(&self, endpoint: &Endpoint) {
        if let Believed::Pins(Some(fingerprint)) = &self.believed {
            self.lock().pins.hosts.entry(endpoint.host.clone()).or_insert(*fingerprint);
        }
    }

    /// Whether a certificate is known for this host.
    pub(super) fn has_pin(&self, host: &str) -> bool {
        self.pin_of(host).is_some()
    }

    /// The certificate that is known for this host.
    pub(super) fn pin_of(&self, host: &str) -> Option<Sha256Fingerprint> {
        self.lock().pins.hosts.get(&normal(host)).copied()
    }

    /// Whether there is a member whose certificate counts and is not known.
    pub(super) fn lacks_pins(&self) -> bool {
        self.is_pinned() && self.members().iter().any(|member| !self.has_pin(&member.address))
    }

    /// Takes over what the coordinator says about the pool's hosts. A certificate that contradicts a known one is not
    /// taken: talking to that host then fails with both fingerprints.
    pub(super) fn learn(&self, pool_uuid: String, server: ServerVersion, members: Vec<Member>) {
        let mut known = self.lock();
        known.pins.pool_uuid = Some(pool_uuid);
        if self.is_pinned() {
            for member in &members {
                if let Some(fingerprint) = member.fingerprint {
                    let pin = *known.pins.hosts.entry(normal(&member.address)).or_insert(fingerprint);
                    if pin != fingerprint {
                        tracing::warn!(
                            host = member.address, confirmed = %pin, now = %fingerprint,
                            "the pool names another certificate for this host than the confirmed one"
                        );
                    }
                }
            }
        }
        known.members = members;
        known.server = server;
    }

    pub(super) fn server(&self) -> ServerVersion {
        self.lock().server.clone()
    }

    pub(super) fn pool_uuid(&self) -> Option<String> {
        self.lock().pins.pool_uuid.clone()
    }

    pub(super) fn members(&self) -> Vec<Member> {
        self.lock().members.clone()
    }

    pub(super) fn pins(&self) -> PinnedHosts {
        self.lock().pins.clone()
    }

    pub(super) fn address_of(&self, host: &host::Ref) -> Option<String> {
        self.lock().members.iter().find(|member| member.host == *host).map(|member| member.address.clone())
    }

    pub(super) fn is_member(&self, address: &str) -> bool {
        let address = normal(address);
        self.lock().members.iter().any(|member| normal(&member.address) == address)
    }

    /// Whether enough is known of a member to talk to it.
    pub(super) fn is_ready(&self, address: &str) -> bool {
        self.is_member(address) && (!self.is_pinned() || self.has_pin(address))
    }

    /// Where the coordinator may be, the likeliest first.
    pub(super) fn candidates(&self, current: Option<&Endpoint>) -> Vec<Endpoint> {
        let mut found: Vec<Endpoint> = current.into_iter().chain([&self.given]).cloned().collect();
        let known = self.lock();
        let addresses = known.members.iter().map(|member| member.address.clone());
        let remembered = known.pins.hosts.keys().cloned().chain(known.remembered.iter().cloned());
        found.extend(addresses.chain(remembered).map(|address| self.given.at(&address)));
        drop(known);
        let mut unique: Vec<Endpoint> = Vec::new();
        for endpoint in found {
            if !endpoint.host.is_empty() && !unique.contains(&endpoint) {
                unique.push(endpoint);
            }
        }
        unique
    }
}
