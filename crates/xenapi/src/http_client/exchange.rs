//! Requests over `hyper`: calls over kept connections, and downloads over a connection of their own.

use super::{Blocked, Endpoint, Pace, Stream, TooSlow, USER_AGENT, Watched, check_request_head, connect};
use crate::error::{Phase, XenApiError};
use crate::session_handle::Timeouts;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A kept connection that was idle for longer may already be closed by the host.
const IDLE_LIMIT: Duration = Duration::from_secs(15);

/// Kept connections of one host.
const IDLE_CONNECTIONS: usize = 8;

/// One side of a connection that requests are sent on.
struct Sender {
    requests: SendRequest<Full<Bytes>>,
    blocked: Blocked,
}

/// A failed exchange.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: XenApiError,
    /// Whether the host may have seen the request.
    pub(crate) maybe_sent: bool,
}

impl Failed {
    fn before(error: XenApiError) -> Self {
        Self { error, maybe_sent: false }
    }

    fn after(error: XenApiError) -> Self {
        Self { error, maybe_sent: true }
    }
}

/// What a POST gave; the body may hold a session's reference, so there is no `Debug`.
pub(crate) struct Posted {
    pub(crate) status: u16,
    pub(crate) body: Bytes,
}

/// HTTP to one host.
pub(crate) struct HttpClient {
    pub(crate) endpoint: Endpoint,
    pub(crate) tls: Option<Arc<ClientConfig>>,
    pub(crate) timeouts: Timeouts,
    idle: Mutex<Vec<(Sender, Instant)>>,
}

impl std::fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpClient").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// A request body and what describes it.
pub(crate) struct Post<'a> {
    pub(crate) operation: &'a str,
    pub(crate) path: &'a str,
    pub(crate) content_type: &'a str,
    pub(crate) body: Bytes,
    /// For the head of the answer.
    pub(crate) wait: Duration,
    pub(crate) response_limit: usize,
}

impl HttpClient {
    pub(crate) fn new(endpoint: Endpoint, tls: Option<Arc<ClientConfig>>, timeouts: Timeouts) -> Self {
        Self { endpoint, tls, timeouts, idle: Mutex::new(Vec::new()) }
    }

    /// A connection that nothing was sent on.
    pub(crate) async fn open(&self) -> Result<Box<dyn Stream>, XenApiError> {
        connect(&self.endpoint, self.tls.as_ref(), &self.timeouts).await
    }

    /// Sends one POST. A kept connection that turns out to be dead before the request was sent is replaced.
    pub(crate) async fn post(&self, post: Post<'_>) -> Result<Posted, Failed> {
        let length = post.body.len().to_string();
        let host = self.endpoint.display_host();
        let headers = [
            ("host", host.as_str()),
            ("user-agent", USER_AGENT),
            ("content-type", post.content_type),
            ("content-length", length.as_str()),
        ];
        let mut request =
            build(&Method::POST, post.operation, post.path, &headers, post.body).map_err(Failed::before)?;
        let deadline = tokio::time::Instant::now() + post.wait;
        let late = || XenApiError::Timeout { host: host.clone(), phase: Phase::Response, waited: post.wait };
        loop {
            let (mut sender, kept) = match self.take_idle() {
                Some(sender) => (sender, true),
                None => (self.connect_http().await.map_err(Failed::before)?, false),
            };
            let blocked = sender.blocked.clone();
            let sent = {
                let sending = async {
                    match sender.requests.ready().await {
                        Ok(()) => {
                            let sending = sender.requests.try_send_request(request);
                            sending.await.map_err(|mut error| (error.take_message(), error.into_error()))
                        }
                        Err(error) => Err((Some(request), error)),
                    }
                };
                tokio::pin!(sending);
                let limit = self.timeouts.send.min(post.wait);
                match tokio::time::timeout(limit, &mut sending).await {
                    Err(_) if blocked.is_set() => {
                        let error = XenApiError::Timeout { host, phase: Phase::Send, waited: limit };
                        return Err(Failed::after(error));
                    }
                    // It has the request and thinks about the answer.
                    Err(_) => tokio::time::timeout_at(deadline, &mut sending).await,
                    answered => answered,
                }
            };
            match sent {
                Err(_) => return Err(Failed::after(late())),
                Ok(Ok(response)) => {
                    let status = response.status().as_u16();
                    let body = self.read_body(post.operation, response, post.response_limit).await?;
                    self.keep(sender);
                    return Ok(Posted { status, body });
                }
                Ok(Err((Some(unsent), _))) if kept => request = unsent,
                Ok(Err((unsent, error))) => {
                    let maybe_sent = unsent.is_none();
                    let phase = if maybe_sent { Phase::Response } else { Phase::Send };
                    let error = XenApiError::Connection { host, phase, source: Box::new(error) };
                    return Err(Failed { error, maybe_sent });
                }
            }
        }
    }

    /// Sends a GET over a connection of its own and gives the response with its body unread.
    pub(crate) async fn get(
        &self,
        operation: &str,
        path: &str,
        wait: Duration,
    ) -> Result<Response<Incoming>, XenApiError> {
        let host = self.endpoint.display_host();
        let headers = [("host", host.as_str()), ("user-agent", USER_AGENT)];
        let request = build(&Method::GET, operation, path, &headers, Bytes::new())?;
        let mut sender = self.connect_http().await?;
        match tokio::time::timeout(wait, sender.requests.send_request(request)).await {
            Err(_) => Err(XenApiError::Timeout { host, phase: Phase::Response, waited: wait }),
            Ok(Err(error)) => Err(XenApiError::Connection { host, phase: Phase::Response, source: Box::new(error) }),
            Ok(Ok(response)) => Ok(response),
        }
    }

    async fn connect_http(&self) -> Result<Sender, XenApiError> {
        let (stream, blocked) = Watched::new(self.open().await?);
        let (requests, connection) = Builder::new().handshake(TokioIo::new(stream)).await.map_err(|error| {
            let host = self.endpoint.display_host();
            XenApiError::Connection { host, phase: Phase::Connect, source: Box::new(error) }
        })?;
        // Ends by itself when the sender and the body are dropped, or the host closes.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Sender { requests, blocked })
    }

    async fn read_body(&self, operation: &str, response: Response<Incoming>, limit: usize) -> Result<Bytes, Failed> {
        let too_large = || Failed::after(XenApiError::ResponseTooLarge { operation: operation.to_owned(), limit });
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        let mut pace = Pace::new(&self.timeouts.floor);
        loop {
            let host = || self.endpoint.display_host();
            match pace.wait(body.frame()).await {
                Err(TooSlow) => {
                    return Err(Failed::after(XenApiError::too_slow(host(), Phase::Body, &self.timeouts.floor)));
                }
                Ok(None) => return Ok(Bytes::from(bytes)),
                Ok(Some(Err(error))) => {
                    let source = Box::new(error);
                    return Err(Failed::after(XenApiError::Connection { host: host(), phase: Phase::Body, source }));
                }
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        pace.moved(data.len());
                        if bytes.len().saturating_add(data.len()) > limit {
                            return Err(too_large());
                        }
                        bytes.extend_from_slice(&data);
                    }
                }
            }
        }
    }

    fn take_idle(&self) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(sender, since)| !sender.requests.is_closed() && since.elapsed() < IDLE_LIMIT);
        idle.pop().map(|(sender, _)| sender)
    }

    fn keep(&self, sender: Sender) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_CONNECTIONS && !sender.requests.is_closed() {
            idle.push((sender, Instant::now()));
        }
    }
}

/// A request whose whole head is known and short enough.
fn build(
    method: &Method,
    operation: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Request<Full<Bytes>>, XenApiError> {
    let line = method.as_str().len() + path.len() + " ".len() + " HTTP/1.1\r\n".len();
    let fields: usize = headers.iter().map(|(name, value)| name.len() + value.len() + ": \r\n".len()).sum();
    check_request_head(operation, line + fields + "\r\n".len())?;
    let mut builder = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder
        .body(Full::new(body))
        .map_err(|source| XenApiError::Response { operation: operation.to_owned(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http_client::Scheme;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_host_that_does_not_take_the_request_is_told_from_one_that_does_not_answer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Takes connections and reads nothing.
        let host = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((tcp, _)) = listener.accept().await {
                open.push(tcp);
            }
        });
        let endpoint = Endpoint { scheme: Scheme::Http, host: "127.0.0.1".to_owned(), port };
        let timeouts = Timeouts { send: Duration::from_secs(2), ..Timeouts::default() };
        let client = HttpClient::new(endpoint, None, timeouts);
        for (length, phase, limit) in [(64 << 20, Phase::Send, 2), (10, Phase::Response, 4)] {
            let post = Post {
                operation: "test",
                path: "/",
                content_type: "text/plain",
                body: Bytes::from(vec![b'x'; length]),
                wait: Duration::from_secs(4),
                response_limit: 1000,
            };
            let failed = client.post(post).await.err().unwrap();
            assert!(failed.maybe_sent);
            match failed.error {
                XenApiError::Timeout { phase: found, waited, .. } => {
                    assert_eq!((found, waited), (phase, Duration::from_secs(limit)));
                }
                other => panic!("{other:?}"),
            }
        }
        host.abort();
    }
}
