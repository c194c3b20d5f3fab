//! Logging in: at the coordinator or through a member, with a check that it is the right pool; and logging out.

use super::directory::Directory;
use super::search::{Asked, Search};
use super::{ConnectOptions, Limits, Member, State};
use crate::error::{Phase, XenApiError};
use crate::generated::ErrorCode;
use crate::http_client::{Endpoint, Failed, HttpClient, Post, normal};
use crate::rpc::{Answer, Document, Encoding, Protocol};
use crate::trust::{Sha256Fingerprint, leaf_of_pem};
use crate::unsupported::ServerVersion;
use crate::value::{FromValue, ToValue, Value};
use crate::{host, pool, session};
use bytes::Bytes;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Certificates that are asked for at the same time.
const CERTIFICATES_AT_ONCE: usize = 8;

/// How long one of them is waited for: the coordinator asks the host itself, which may be down.
const CERTIFICATE_WAIT: Duration = Duration::from_secs(15);

/// A session that was just opened.
pub(super) struct Opened {
    pub(super) client: Arc<HttpClient>,
    pub(super) encoding: Encoding,
    pub(super) reference: session::Ref,
}

impl Opened {
    fn state(&self) -> State {
        State {
            client: Arc::clone(&self.client),
            encoding: self.encoding,
            reference: self.reference.clone(),
            generation: 0,
            ended: false,
        }
    }

    /// Ends a session that nobody uses.
    pub(super) async fn leave(&self, limits: &Limits) {
        if let Err(error) = leave(&self.state(), limits).await {
            tracing::debug!(%error, "a session that is not used could not be ended");
        }
    }
}

/// Which hosts' certificates are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Certificates {
    /// All: at the first login, to notice one that was changed.
    All,
    /// Of hosts without a known one.
    Missing,
    /// None: a host that just died would be waited for.
    Known,
}

/// Sends one call to one host and reads the answer.
pub(super) async fn exchange(
    client: &HttpClient,
    document: Document,
    method: &str,
    wait: Duration,
    limits: &Limits,
) -> Result<Answer, Failed> {
    let failed = |error| Failed { error, maybe_sent: true };
    let post = Post {
        operation: method,
        path: document.path(),
        content_type: document.content_type(),
        body: Bytes::from(document.body.clone()),
        wait,
        response_limit: limits.response_bytes,
    };
    let posted = client.post(post).await?;
    if posted.status != 200 {
        let host = client.endpoint.display_host();
        return Err(failed(XenApiError::Status { host, operation: method.to_owned(), status: posted.status }));
    }
    document.decode(method, &posted.body).map_err(failed)
}

/// Logs in at one host, or at the coordinator that it names if that was not asked yet. Each may take `wait` for its
/// answer.
pub(super) async fn open_at(
    search: &Search,
    claims: &Asked,
    asked: &Endpoint,
    wait: Duration,
) -> Result<Opened, XenApiError> {
    let (options, directory) = (&search.options, &search.directory);
    let opened = match try_host(options, directory, asked, wait).await? {
        Outcome::Open(opened) => opened,
        Outcome::Member(coordinator) => {
            let follow = asked.at(&coordinator);
            if !claims.claim(&follow) {
                return Err(failing_over(&follow, "it was named as the coordinator and was asked before"));
            }
            let unconfirmed = |found| XenApiError::HostIsSlave {
                asked: asked.display_host(),
                coordinator: follow.display_host(),
                found,
            };
            match try_host(options, directory, &follow, wait).await {
                Ok(Outcome::Open(opened)) => {
                    let opened = checked(search, opened).await?;
                    return belongs(options, directory, asked, opened).await;
                }
                // Two hosts that take each other for the coordinator: a fail-over is going on.
                Ok(Outcome::Member(_)) => {
                    let says = "it was named as the coordinator and says that it is not; a fail-over may be going on";
                    return Err(failing_over(&follow, says));
                }
                Err(XenApiError::Certificate { found, .. }) if !directory.has_pin(&follow.host) => {
                    return Err(unconfirmed(Some(found)));
                }
                Err(XenApiError::UnknownHost { .. }) => return Err(unconfirmed(None)),
                Err(error) => return Err(error),
            }
        }
    };
    checked(search, opened).await
}

/// Not an answer: the hosts do not agree yet on who is the coordinator.
fn failing_over(host: &Endpoint, says: &'static str) -> XenApiError {
    XenApiError::Connection { host: host.display_host(), phase: Phase::Response, source: says.into() }
}

/// What a host says to a login.
enum Outcome {
    Open(Opened),
    /// It is a member; the coordinator's address.
    Member(String),
}

async fn try_host(
    options: &ConnectOptions,
    directory: &Directory,
    endpoint: &Endpoint,
    wait: Duration,
) -> Result<Outcome, XenApiError> {
    let tls = directory.tls_for(endpoint)?;
    let client = Arc::new(HttpClient::new(endpoint.clone(), tls, options.timeouts.clone()));
    let encodings: &[Encoding] = match options.protocol {
        Protocol::Auto => &[Encoding::Json, Encoding::Xml],
        Protocol::Json => &[Encoding::Json],
        Protocol::Xml => &[Encoding::Xml],
    };
    let method = "session.login_with_password";
    let mut answer = Err(XenApiError::Cancelled { operation: method.to_owned() });
    let mut used = Encoding::Xml;
    for encoding in encodings {
        let arguments =
            [options.user.as_str(), options.password.expose(), "1.0", options.originator.as_str()].map(Value::from);
        let document = Document::new(*encoding, method, arguments.to_vec(), options.password.clone())?;
        answer = exchange(&client, document, method, wait, &options.limits).await.map_err(|failed| failed.error);
        used = *encoding;
        // Hosts without JSON-RPC answer its path with a status, or with something that is not JSON.
        if !matches!(answer, Err(XenApiError::Status { .. } | XenApiError::Response { .. })) {
            break;
        }
    }
    match answer? {
        Ok(value) => {
            directory.confirm(endpoint);
            let reference = session::Ref::from_value(value).map_err(|source| XenApiError::decode(method, source))?;
            Ok(Outcome::Open(Opened { client, encoding: used, reference }))
        }
        Err(failure) => match failure.code {
            ErrorCode::HostIsSlave => {
                directory.confirm(endpoint);
                Ok(Outcome::Member(failure.params.into_iter().next().unwrap_or_default()))
            }
            ErrorCode::SessionAuthenticationFailed => Err(XenApiError::LoginRefused { host: endpoint.display_host() }),
            _ => Err(XenApiError::of_failure(method, failure, &ServerVersion::default())),
        },
    }
}

/// Checks that it is the known pool and learns its hosts; logs out again if that fails.
async fn checked(search: &Search, opened: Opened) -> Result<Opened, XenApiError> {
    let certificates = if search.certificates { Certificates::All } else { Certificates::Known };
    match learn(&opened.state(), &search.options, &search.directory, certificates).await {
        Ok(()) => Ok(opened),
        Err(error) => {
            opened.leave(&search.options.limits).await;
            Err(error)
        }
    }
}

/// Checks that the pool that was followed to has the host that was asked, by certificate or by address.
async fn belongs(
    options: &ConnectOptions,
    directory: &Directory,
    asked: &Endpoint,
    opened: Opened,
) -> Result<Opened, XenApiError> {
    let pin = directory.pins().hosts.get(&asked.host).copied();
    let members = directory.members();
    let by_address = members.iter().any(|member| normal(&member.address) == asked.host);
    let by_certificate = pin.is_some() && members.iter().any(|member| member.fingerprint == pin);
    // A name can only be compared by certificate; without pins the CA vouches for it, or nothing does.
    let is_name = asked.host.parse::<std::net::IpAddr>().is_err();
    if by_address || by_certificate || (is_name && !directory.is_pinned()) {
        return Ok(opened);
    }
    let host = opened.client.endpoint.display_host();
    opened.leave(&options.limits).await;
    Err(XenApiError::WrongPool {
        host,
        expected: format!("the one of {}", asked.display_host()),
        found: directory.pool_uuid().unwrap_or_default(),
    })
}

/// One read in a session that is not shared yet.
async fn read<T: FromValue>(
    state: &State,
    options: &ConnectOptions,
    method: &str,
    arguments: &[Value],
    wait: Duration,
) -> Result<T, XenApiError> {
    let document = state.document(method, arguments)?;
    let answer = exchange(&state.client, document, method, wait, &options.limits).await.map_err(|f| f.error)?;
    // At the first login the version is not known yet.
    let value = answer.map_err(|failure| XenApiError::of_failure(method, failure, &ServerVersion::default()))?;
    T::from_value(value).map_err(|source| XenApiError::decode(method, source))
}

/// Learns pool and hosts, with their certificates where those count.
pub(super) async fn learn(
    state: &State,
    options: &ConnectOptions,
    directory: &Directory,
    certificates: Certificates,
) -> Result<(), XenApiError> {
    let wait = options.timeouts.read_call;
    let pools: BTreeMap<pool::Ref, pool::Record> = read(state, options, "pool.get_all_records", &[], wait).await?;
    let (found, master) = pools.into_values().next().map(|pool| (pool.uuid, pool.master)).unwrap_or_default();
    if let Some(expected) = directory.pool_uuid()
        && expected != found
    {
        return Err(XenApiError::WrongPool { host: state.client.endpoint.display_host(), expected, found });
    }
    let hosts: BTreeMap<host::Ref, host::Record> = read(state, options, "host.get_all_records", &[], wait).await?;
    // Older members of a pool that is being upgraded follow the coordinator, so that one counts.
    let server = hosts.get(&master).map(|host| ServerVersion::of(&host.software_version)).unwrap_or_default();
    let members: Vec<Member> = futures::stream::iter(hosts)
        .map(|(host, record)| async move {
            let known = directory.pin_of(&record.address);
            let ask = directory.is_pinned()
                && match certificates {
                    Certificates::All => true,
                    Certificates::Missing => known.is_none(),
                    Certificates::Known => false,
                };
            let fingerprint = if ask { certificate_of(state, options, &host).await } else { known };
            Member { host, uuid: record.uuid, name: record.name_label, address: record.address, fingerprint }
        })
        .buffered(CERTIFICATES_AT_ONCE)
        .collect()
        .await;
    directory.learn(found, server, members);
    Ok(())
}

/// A host's certificate, told by the coordinator. A host that is down can not be asked, which is no failure.
async fn certificate_of(state: &State, options: &ConnectOptions, host: &host::Ref) -> Option<Sha256Fingerprint> {
    let wait = CERTIFICATE_WAIT.min(options.timeouts.read_call);
    let pem: Result<String, _> = read(state, options, "host.get_server_certificate", &[host.to_value()], wait).await;
    match pem {
        Ok(pem) => leaf_of_pem(&pem).map(|der| Sha256Fingerprint::of(&der)),
        Err(error) => {
            tracing::debug!(%error, "the certificate of a host could not be learned");
            None
        }
    }
}

/// Ends a session. One that had ended already is no failure.
pub(super) async fn leave(state: &State, limits: &Limits) -> Result<(), XenApiError> {
    let method = "session.logout";
    let wait = state.client.timeouts.read_call;
    let send = || async {
        let document = state.document(method, &[])?;
        exchange(&state.client, document, method, wait, limits).await.map_err(|failed| failed.error)
    };
    let answer = match send().await {
        // A kept connection that the host was just closing; a session that is left twice is no failure.
        Err(XenApiError::Connection { phase: Phase::Response | Phase::Body, .. }) => send().await?,
        other => other?,
    };
    match answer {
        Ok(_) => Ok(()),
        Err(failure) if failure.code == ErrorCode::SessionInvalid => Ok(()),
        Err(failure) => Err(XenApiError::Api { operation: method.to_owned(), failure }),
    }
}
