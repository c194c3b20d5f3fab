//! The follower: asks the pool in a loop, for as long as somebody holds the inventory.

use super::InventoryOptions;
use super::shared::Shared;
use super::state::{Answer, Question};
use crate::error::{Retry, XenApiError};
use crate::event::{self, EventBatch};
use crate::generated::ErrorCode;
use crate::model::Repeat;
use crate::session_handle::{Session, jittered};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a wait looks whether the session was renewed, which makes its question worthless.
const RENEWAL_LOOK: Duration = Duration::from_secs(1);

/// Added to the wait for the answer of a question for news. Short, since silence means that the pool is away.
const NEWS_SLACK: Duration = Duration::from_secs(15);

/// Added to the wait for the answer of a listing: a busy coordinator writes for a while on a large pool.
const LISTING_SLACK: Duration = Duration::from_secs(120);

/// From this many events on, records are read on a thread of their own.
const LARGE_BATCH: usize = 200;

/// The longest pause between attempts, and between listings because of numbers that do not fit.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The same for failures that a repetition does not cure, such as a password that was changed: attempts to log in may
/// lock the account.
const HOPELESS_PAUSE: Duration = Duration::from_secs(300);

/// Asks until the session is logged out.
pub(super) async fn follow(session: Session, shared: Arc<Shared>, options: InventoryOptions) {
    let mut follower = Follower { session, shared, classes: Vec::new(), failures: 0, listed: None, doubts: 0, options };
    follower.classes = follower.shared.lock().classes().iter().map(|class| class.name()).collect();
    follower.run().await;
    follower.shared.end();
}

struct Follower {
    session: Session,
    shared: Arc<Shared>,
    classes: Vec<&'static str>,
    options: InventoryOptions,
    /// Attempts in a row that failed.
    failures: u32,
    /// The last complete question for everything.
    listed: Option<Instant>,
    /// Listings in a row that were asked for because the pool named other numbers of objects.
    doubts: u32,
}

impl Follower {
    /// Returns when the session was logged out.
    async fn run(&mut self) {
        loop {
            // Questions for news are not repeated at another coordinator, so after a failure somebody has to look where
            // it is now: this call does.
            let outcome = match self.failures {
                0 => self.step().await,
                _ => match self.probe().await {
                    Ok(()) => self.step().await,
                    Err(error) => Err(error),
                },
            };
            match outcome {
                Ok(()) => {}
                Err(XenApiError::LoggedOut { .. }) => return,
                // Renewed already; the next question begins again.
                Err(XenApiError::SessionInvalid { .. }) if self.failures == 0 => self.shared.lock().lose_token(),
                Err(error) => self.failed(&error).await,
            }
        }
    }

    /// One question and its answer.
    async fn step(&mut self) -> Result<(), XenApiError> {
        self.decide_listing();
        let question = self.shared.lock().question(self.session.generation());
        let Some(batch) = self.ask(&question).await? else { return Ok(()) };
        let had_news = !batch.events.is_empty();
        let answer = if batch.events.len() < LARGE_BATCH {
            Answer::read(batch)
        } else {
            match tokio::task::spawn_blocking(move || Answer::read(batch)).await {
                Ok(answer) => answer,
                // The runtime is ending.
                Err(_) => return Ok(()),
            }
        };
        if self.shared.answer(&question, self.session.generation(), answer) {
            self.failures = 0;
            if question.is_listing() {
                self.listed = Some(Instant::now());
            }
        }
        if had_news {
            // Changes come in bursts: one answer for many costs the pool less than many answers.
            tokio::time::sleep(self.options.pace).await;
        }
        Ok(())
    }

    /// Asks; `None` if the session was renewed meanwhile.
    async fn ask(&mut self, question: &Question) -> Result<Option<EventBatch>, XenApiError> {
        let (repeat, wait, slack) = match question.is_listing() {
            true => (Repeat::Harmless, Duration::ZERO, LISTING_SLACK),
            // At another coordinator the token is worth nothing. After a failure any answer tells that it works again.
            false if self.failures > 0 => (Repeat::Never, Duration::ZERO, NEWS_SLACK),
            false => (Repeat::Never, self.options.wait, NEWS_SLACK),
        };
        let asking = event::ask(&self.session, &self.classes, &question.token, wait, slack, repeat);
        let renewed = async {
            while self.session.generation() == question.login {
                tokio::time::sleep(RENEWAL_LOOK).await;
            }
        };
        let answer = tokio::select! {
            answer = asking => answer,
            () = renewed => return Ok(None),
        };
        match answer {
            Ok(batch) => Ok(Some(batch)),
            Err(error) if token_is_lost(&error) && !question.is_listing() => {
                tracing::debug!(%error, "events were lost, everything is listed again");
                self.shared.lock().lose_token();
                Ok(None)
            }
            // A kept connection that was closed, or a coordinator that is gone: one look tells.
            Err(error @ (XenApiError::Connection { .. } | XenApiError::Timeout { .. })) if self.failures == 0 => {
                tracing::debug!(%error, "no answer, the pool is looked for");
                self.probe().await.map(|()| None)
            }
            Err(error) => Err(error),
        }
    }

    /// A cheap call that is repeated at another coordinator, with a new login if it has to be.
    async fn probe(&self) -> Result<(), XenApiError> {
        self.session.call("pool.get_all", Repeat::Harmless, Vec::new()).await.map(drop)
    }

    /// Drops the token when everything has to be listed again: now and then, and while numbers do not fit.
    fn decide_listing(&mut self) {
        let Some(listed) = self.listed else { return };
        let mut state = self.shared.lock();
        if state.complete {
            self.doubts = 0;
            if listed.elapsed() >= self.options.list_every {
                state.lose_token();
            }
        } else if self.doubts == 0 || listed.elapsed() >= growing(self.options.retry_pause, self.doubts, LONGEST_PAUSE)
        {
            tracing::debug!("the pool names other numbers of objects than are known, everything is listed again");
            self.doubts = self.doubts.saturating_add(1);
            state.lose_token();
        }
    }

    /// Tells that the pool can not be asked, and waits before the next attempt.
    async fn failed(&mut self, error: &XenApiError) {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(source) = cause {
            text = format!("{text}: {source}");
            cause = source.source();
        }
        tracing::debug!(error = text, "the inventory can not follow the pool");
        self.shared.trouble(&text);
        if error.api().is_some() {
            self.shared.lock().lose_token();
        }
        let limit = if error.retry() == Retry::Never { HOPELESS_PAUSE } else { LONGEST_PAUSE };
        tokio::time::sleep(jittered(growing(self.options.retry_pause, self.failures, limit))).await;
        self.failures = self.failures.saturating_add(1);
    }
}

/// `first`, doubled so many times, but not more than `limit`.
fn growing(first: Duration, times: u32, limit: Duration) -> Duration {
    first.saturating_mul(1 << times.min(16)).min(limit)
}

fn token_is_lost(error: &XenApiError) -> bool {
    matches!(error.code(), Some(ErrorCode::EventsLost | ErrorCode::EventFromTokenParseFailure))
}
