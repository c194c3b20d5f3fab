//! Disks over HTTP: `/export_raw_vdi` and `/import_raw_vdi`.
//!
//! The host says `200` before it has touched the disk, and the end of a connection says nothing. Every transfer
//! therefore has a task of its own, and counts as done only when the task has ended well and the lengths agree.

mod export;
mod import;

pub use export::{ExportBody, ExportFormat, export_raw_vdi};
pub use import::{ChunkedImport, RawImport, import_raw_vdi, import_raw_vdi_chunked};

use crate::error::XenApiError;
use crate::http_client::{Endpoint, HttpClient};
use crate::session_handle::Session;
use crate::task;
use crate::tasks::{TaskGuard, WaitOptions};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often a transfer is sent on to another member.
const REDIRECTS: usize = 3;

/// How long the task may take to end once the host has ended the connection.
const TASK_END_LIMIT: Duration = Duration::from_secs(120);

/// What stays as it is in a query.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b':');

/// One request to a handler: its path, and its query without session and task.
#[derive(Clone, Debug)]
struct Handler {
    path: &'static str,
    query: Vec<(&'static str, String)>,
}

impl Handler {
    /// Path and query with everything. Holds the session's reference, so it is never logged.
    fn target(&self, session: &Session, task: &task::Ref) -> String {
        let reference = session.reference();
        let own = [("session_id", reference.as_str()), ("task_id", task.as_str())];
        let all = own.into_iter().chain(self.query.iter().map(|(name, value)| (*name, value.as_str())));
        let mut target = self.path.to_owned();
        for (at, (name, value)) in all.enumerate() {
            target.push(if at == 0 { '?' } else { '&' });
            target.push_str(name);
            target.push('=');
            target.extend(utf8_percent_encode(value, QUERY));
        }
        target
    }
}

/// What a host answered to the head of a request.
enum Reply<T> {
    Accepted(T),
    /// To be asked at this address instead.
    Elsewhere(String),
    Refused(u16),
}

/// Makes a transfer's own task and starts the transfer at `host`, or at the members that it is sent on to; a host that
/// sends a request on leaves its task as it is.
///
/// A session that ended is renewed once: nothing was transferred then.
async fn start<T, F>(
    session: &Session,
    host: &crate::host::Ref,
    handler: &Handler,
    send: impl Fn(HttpClient, String) -> F,
) -> Result<(T, TaskGuard), XenApiError>
where
    F: Future<Output = Result<Reply<T>, XenApiError>>,
{
    let operation = handler.path;
    let mut renewed = false;
    let mut redirects = 0;
    let mut client = session.client_of(host).await?;
    let mut generation = session.generation();
    let mut guard = create_task(session, operation).await?;
    loop {
        let at = client.endpoint.clone();
        match send(client, handler.target(session, &guard.reference())).await? {
            Reply::Accepted(transfer) => {
                guard.begun();
                return Ok((transfer, guard));
            }
            Reply::Elsewhere(location) if redirects < REDIRECTS => {
                redirects += 1;
                client = session.client_at(&redirect_host(&at, &location)?).await?;
                tracing::debug!(host = client.endpoint.display_host(), "the transfer was sent on to another member");
            }
            Reply::Refused(401) if !renewed => {
                renewed = true;
                session.renew_since(generation, operation).await?;
                generation = session.generation();
                guard = create_task(session, operation).await?;
                client = session.client_at(&at.host).await?;
            }
            Reply::Refused(401) => return Err(XenApiError::SessionInvalid { operation: operation.to_owned() }),
            Reply::Elsewhere(_) => return Err(refusal(&at, operation, 302, guard).await),
            Reply::Refused(status) => return Err(refusal(&at, operation, status, guard).await),
        }
    }
}

async fn create_task(session: &Session, operation: &str) -> Result<TaskGuard, XenApiError> {
    let label = format!("xenvault {}", operation.trim_start_matches('/'));
    // In the background, so that a task whose reference nobody waits for any more is destroyed.
    let (found, waiting) = tokio::sync::oneshot::channel();
    let own = session.clone();
    session.background(async move {
        let made = task::create(&own, &label, own.task_note()).await.map(|task| TaskGuard::own(&own, task));
        // An unwanted guard destroys its task when it is dropped.
        let _ = found.send(made);
    });
    waiting.await.unwrap_or_else(|_| Err(XenApiError::Cancelled { operation: operation.to_owned() }))
}

/// The host in a redirection. Everything else of it is known better here.
fn redirect_host(from: &Endpoint, location: &str) -> Result<String, XenApiError> {
    let authority = location.split(['?', '#']).next().unwrap_or_default();
    let end = authority.find("://").map_or(0, |at| at + 3);
    let (scheme, rest) = authority.split_at_checked(end).unwrap_or(("", authority));
    let authority = rest.split('/').next().unwrap_or_default();
    let target = Endpoint::parse(&format!("{scheme}{authority}"));
    match target {
        Ok(target) if target.scheme == from.scheme => Ok(target.host),
        // Not shown: it may repeat the session's reference.
        _ => Err(XenApiError::UnknownHost { host: "the target of a redirection".to_owned() }),
    }
}

/// Why a host refused: the task knows more than the status.
async fn refusal(at: &Endpoint, operation: &str, status: u16, guard: TaskGuard) -> XenApiError {
    let status = XenApiError::Status { host: at.display_host(), operation: operation.to_owned(), status };
    // A task that was never begun stays pending, so this wait is short.
    reason(operation, guard, Duration::from_secs(2)).await.unwrap_or(status)
}

/// The failure of a transfer's task, if it ends as one within `limit`.
async fn reason(operation: &str, guard: TaskGuard, limit: Duration) -> Option<XenApiError> {
    let options = WaitOptions::of(operation);
    match tokio::time::timeout(limit, guard.ended(&options, &CancellationToken::new())).await {
        Ok(Err(error)) if error.api().is_some() => Some(error),
        _ => None,
    }
}

/// Waits for the success of a transfer that the host has ended or will end by itself.
async fn success(operation: &str, guard: TaskGuard) -> Result<(), XenApiError> {
    let options = WaitOptions { progress_deadline: TASK_END_LIMIT, ..WaitOptions::of(operation) };
    guard.ended(&options, &CancellationToken::new()).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn x02_only_the_host_of_a_redirection_counts() {
        let from = Endpoint::parse("https://10.0.0.1").unwrap();
        let host = |location: &str| redirect_host(&from, location).ok();
        assert_eq!(host("https://10.0.0.2/export_raw_vdi?session_id=OpaqueRef:1").as_deref(), Some("10.0.0.2"));
        assert_eq!(host("https://[2001:db8::2]/x").as_deref(), Some("2001:db8::2"));
        assert_eq!(host("http://10.0.0.2/x"), None);
        assert_eq!(host("/export_raw_vdi"), None);
        let refused = redirect_host(&from, "ftp://x?session_id=OpaqueRef:secret").unwrap_err();
        assert!(!format!("{refused:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn no_redirection_panics(location in "(https?://)?\\PC{0,40}") {
            let from = Endpoint::parse("https://10.0.0.1").unwrap();
            let _ = redirect_host(&from, &location);
        }
    }
}
