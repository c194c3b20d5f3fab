//! Logging in: at the coordinator or through a member, with a check that it is the right pool; and logging out.

use super::directory::Directory;
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

/// A session that was just opened.
pub(super) struct Opened {
    pub(super) client: Arc<HttpClient>,
    pub(super) encoding: Encoding,
    pub(super) reference: session::Ref,
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

/// Logs in at the first of the places where the coordinator may be that answers.
pub(super) async fn open(options: &ConnectOptions, directory: &Directory) -> Result<Opened, XenApiError> {
    reopen(options, directory, None).await
}

/// As [`open`]; `current` is where the coordinator was.
pub(super) async fn reopen(
    options: &ConnectOptions,
    directory: &Directory,
    current: Option<&Endpoint>,
) -> Result<Opened, XenApiError> {
    let mut first_error = None;
    for candidate in directory.candidates(current) {
        match open_at(options, directory, &candidate).await {
            Ok(opened) => return Ok(opened),
            // Only silence is a reason to ask another host: a refusal stays one everywhere.
            Err(error) if error.is_silence() => {
                tracing::debug!(%error, "this host does not answer");
                first_error.get_or_insert(error);
            }
            // A member whose certificate was never learned can not be told from a stranger: it is not the one to ask.
            Err(error @ (XenApiError::Certificate { .. } | XenApiError::UnknownHost { .. }))
                if first_error.is_some() && directory.is_pinned() && !directory.has_pin(&candidate.host) =>
            {
                tracing::debug!(%error, "this host can not be verified");
            }
            Err(error) => return Err(first_error.unwrap_or(error)),
        }
    }
    Err(first_error.unwrap_or(XenApiError::Url { url: options.url.clone(), reason: "it names no host" }))
}

/// Logs in at one host, or at the coordinator that it names.
async fn open_at(options: &ConnectOptions, directory: &Directory, asked: &Endpoint) -> Result<Opened, XenApiError> {
    let opened = match try_host(options, directory, asked).await? {
        Outcome::Open(opened) => opened,
        Outcome::Member(coordinator) => {
            let follow = asked.at(&coordinator);
            let unconfirmed = |found| XenApiError::HostIsSlave {
                asked: asked.display_host(),
                coordinator: follow.display_host(),
                found,
            };
            match try_host(options, directory, &follow).await {
                Ok(Outcome::Open(opened)) => {
                    let opened = checked(options, directory, opened).await?;
                    return belongs(options, directory, asked, opened).await;
                }
                // Two hosts that take each other for the coordinator: a fail-over is going on.
                Ok(Outcome::Member(_)) => {
                    return Err(XenApiError::Connection {
                        host: follow.display_host(),
                        phase: Phase::Response,
                        source: "it was named as the coordinator and says that it is not; a fail-over may be going on"
                            .into(),
                    });
                }
                Err(XenApiError::Certificate { found, .. }) if !directory.has_pin(&follow.host) => {
                    return Err(unconfirmed(Some(found)));
                }
                Err(XenApiError::UnknownHost { .. }) => return Err(unconfirmed(None)),
                Err(error) => return Err(error),
            }
        }
    };
    checked(options, directory, opened).await
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
        let wait = options.timeouts.read_call;
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
async fn checked(options: &ConnectOptions, directory: &Directory, opened: Opened) -> Result<Opened, XenApiError> {
    let state = state_of(&opened);
    match learn(&state, options, directory).await {
        Ok(()) => Ok(opened),
        Err(error) => {
            let _ = leave(&state, &options.limits).await;
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
    let _ = leave(&state_of(&opened), &options.limits).await;
    Err(XenApiError::WrongPool {
        host: opened.client.endpoint.display_host(),
        expected: format!("the one of {}", asked.display_host()),
        found: directory.pool_uuid().unwrap_or_default(),
    })
}

fn state_of(opened: &Opened) -> State {
    State {
        client: Arc::clone(&opened.client),
        encoding: opened.encoding,
        reference: opened.reference.clone(),
        generation: 0,
        ended: false,
    }
}

/// One read in a session that is not shared yet.
async fn read<T: FromValue>(
    state: &State,
    options: &ConnectOptions,
    method: &str,
    arguments: &[Value],
) -> Result<T, XenApiError> {
    let document = state.document(method, arguments)?;
    let wait = options.timeouts.read_call;
    let answer = exchange(&state.client, document, method, wait, &options.limits).await.map_err(|f| f.error)?;
    // At the first login the version is not known yet.
    let value = answer.map_err(|failure| XenApiError::of_failure(method, failure, &ServerVersion::default()))?;
    T::from_value(value).map_err(|source| XenApiError::decode(method, source))
}

/// Learns pool and hosts, with their certificates where those count.
pub(super) async fn learn(state: &State, options: &ConnectOptions, directory: &Directory) -> Result<(), XenApiError> {
    let pools: BTreeMap<pool::Ref, pool::Record> = read(state, options, "pool.get_all_records", &[]).await?;
    let (found, master) = pools.into_values().next().map(|pool| (pool.uuid, pool.master)).unwrap_or_default();
    if let Some(expected) = directory.pool_uuid()
        && expected != found
    {
        return Err(XenApiError::WrongPool { host: state.client.endpoint.display_host(), expected, found });
    }
    let hosts: BTreeMap<host::Ref, host::Record> = read(state, options, "host.get_all_records", &[]).await?;
    // Older members of a pool that is being upgraded follow the coordinator, so that one counts.
    let server = hosts.get(&master).map(|host| ServerVersion::of(&host.software_version)).unwrap_or_default();
    let members: Vec<Member> = futures::stream::iter(hosts)
        .map(|(host, record)| async move {
            let fingerprint = match directory.is_pinned() {
                true => certificate_of(state, options, &host).await,
                false => None,
            };
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
    let pem: Result<String, _> = read(state, options, "host.get_server_certificate", &[host.to_value()]).await;
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
