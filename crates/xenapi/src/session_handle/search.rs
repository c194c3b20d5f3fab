//! The search for the coordinator: where it was, then all places where it may be, a few at a time and with an end.
//!
//! Members are no obstacle: one that is silent, still boots, has lost its coordinator, shows a certificate that nobody
//! confirmed, or left the pool, says nothing about where the coordinator is now.

use super::directory::Directory;
use super::login::{self, Opened};
use super::{ConnectOptions, Timeouts};
use crate::error::{Phase, Retry, XenApiError};
use crate::http_client::Endpoint;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

/// Hosts that are asked at the same time.
const AT_ONCE: usize = 8;

/// How long the likeliest host is asked alone. A host that is away refuses or is unreachable sooner, as a rule.
const HEAD_START: Duration = Duration::from_secs(5);

/// How long a host may take for the answer to a login when there are others to ask, at first; it doubles with each pass.
const ANSWER: Duration = Duration::from_secs(15);

/// The least that a pass takes before it is given up as too long.
const SHORTEST_PASS: Duration = Duration::from_secs(30);

/// One pass over the places where the coordinator may be.
pub(super) struct Search {
    pub(super) options: Arc<ConnectOptions>,
    pub(super) directory: Arc<Directory>,
    /// Where the coordinator was.
    pub(super) current: Option<Endpoint>,
    /// How long hosts other than the likeliest may take for their answer.
    answer: Duration,
    /// When the pass is given up.
    until: Option<Instant>,
    /// Whether the certificates of all members are asked for before the session is used.
    pub(super) certificates: bool,
}

impl Search {
    /// For the first login of a session: without an end but those of its logins.
    pub(super) fn first(options: &Arc<ConnectOptions>, directory: &Arc<Directory>) -> Self {
        Self {
            answer: answer_limit(&options.timeouts, 0),
            options: Arc::clone(options),
            directory: Arc::clone(directory),
            current: None,
            until: None,
            certificates: true,
        }
    }

    /// For the renewal of a session whose coordinator was at `current`: pass `number` (from 0) of a search that may go
    /// on for `left`.
    pub(super) fn again(
        options: &Arc<ConnectOptions>,
        directory: &Arc<Directory>,
        current: &Endpoint,
        number: u32,
        left: Duration,
    ) -> Self {
        let answer = answer_limit(&options.timeouts, number);
        // Without time left there is one short pass all the same: the pool may be back.
        let pass = left.max(SHORTEST_PASS.min(answer.saturating_mul(2)));
        Self {
            options: Arc::clone(options),
            directory: Arc::clone(directory),
            current: Some(current.clone()),
            answer,
            until: Some(Instant::now() + pass),
            certificates: false,
        }
    }
}

fn answer_limit(timeouts: &Timeouts, pass: u32) -> Duration {
    timeouts.read_call.min(ANSWER.saturating_mul(1 << pass.min(4)))
}

/// Hosts that were asked in a pass: each is asked once, however many members name it.
#[derive(Default)]
pub(super) struct Asked(Mutex<Vec<Endpoint>>);

impl Asked {
    /// Whether it is the first time.
    pub(super) fn claim(&self, endpoint: &Endpoint) -> bool {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = !asked.contains(endpoint);
        if new {
            asked.push(endpoint.clone());
        }
        new
    }
}

/// Logs in at the first host that turns out to be the coordinator. Logins that come too late are logged out again in
/// `background`.
///
/// # Errors
/// [`XenApiError::LoginRefused`] wherever it was said; what the likeliest host said if that is not about being away;
/// otherwise the failure of the likeliest host.
pub(super) async fn run(search: Search, background: &TaskTracker) -> Result<Opened, XenApiError> {
    let search = Arc::new(search);
    let mut waiting = search.directory.candidates(search.current.as_ref()).into_iter().enumerate();
    let asked = Arc::new(Asked::default());
    let (tell, mut told) = mpsc::channel(AT_ONCE);
    let read_call = search.options.timeouts.read_call;
    let alone_until = Instant::now() + HEAD_START.min(read_call / 2);
    let (mut running, mut alone) = (0_usize, true);
    let mut first: Option<(usize, XenApiError)> = None;
    let outcome = loop {
        let room = if alone { 1 } else { AT_ONCE };
        while running < room
            && let Some((number, host)) = waiting.next()
        {
            if !asked.claim(&host) {
                continue;
            }
            let wait = if number == 0 { read_call } else { search.answer };
            let (search, asked, tell) = (Arc::clone(&search), Arc::clone(&asked), tell.clone());
            // In a task of its own, so that a session is known (and left) even if it comes too late.
            background.spawn(async move {
                let answer = login::open_at(&search, &asked, &host, wait).await;
                if let Err(mpsc::error::SendError((_, Ok(late)))) = tell.send((number, answer)).await {
                    late.leave(&search.options.limits).await;
                }
            });
            running += 1;
        }
        if running == 0 {
            let url = || search.options.url.clone();
            break Err(first.map_or_else(|| XenApiError::Url { url: url(), reason: "it names no host" }, |(_, e)| e));
        }
        let wake = [alone.then_some(alone_until), search.until].into_iter().flatten().min();
        let news = match wake {
            Some(wake) => tokio::time::timeout_at(wake, told.recv()).await,
            None => Ok(told.recv().await),
        };
        match news {
            Err(_) if search.until.is_some_and(|until| until <= Instant::now()) => {
                let host = search.current.as_ref().unwrap_or(&search.directory.given).display_host();
                let late = || XenApiError::Timeout { host, phase: Phase::Response, waited: search.answer };
                break Err(first.map_or_else(late, |(_, error)| error));
            }
            Err(_) | Ok(None) => alone = false,
            Ok(Some((_, Ok(opened)))) => break Ok(opened),
            Ok(Some((_, Err(error @ XenApiError::LoginRefused { .. })))) => break Err(error),
            // The likeliest host answers, and neither time nor another host helps.
            Ok(Some((_, Err(error)))) if alone && error.retry() != Retry::Later => break Err(error),
            Ok(Some((number, Err(error)))) => {
                tracing::debug!(%error, "this host is not the coordinator");
                (running, alone) = (running - 1, false);
                if first.as_ref().is_none_or(|(known, _)| number < *known) {
                    first = Some((number, error));
                }
            }
        }
    };
    told.close();
    while let Some((_, answer)) = told.recv().await {
        if let Ok(late) = answer {
            let search = Arc::clone(&search);
            background.spawn(async move { late.leave(&search.options.limits).await });
        }
    }
    outcome
}
