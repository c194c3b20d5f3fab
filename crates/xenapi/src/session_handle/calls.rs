//! One call with everything that may happen to it: a session that ended, a busy pool, a coordinator that moved.

use super::search::{self, Search};
use super::{Session, State, login};
use crate::error::{ApiFailure, Phase, Retry, XenApiError};
use crate::failure_class::FailureClass;
use crate::generated::ErrorCode;
use crate::model::Repeat;
use crate::value::Value;
use ring::rand::SecureRandom;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The pause before the first repetition of a call that met a busy pool; it doubles each time.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What was already done about a call's failures.
#[derive(Default)]
struct Remedies {
    resent: bool,
    busy: u32,
    /// Since when the pool has been away for this call. Answers to other calls do not reset it, so that a pool that
    /// answers now and then is not waited for for ever.
    away: Option<Instant>,
    /// Passes over all hosts so far, to log in again.
    passes: u32,
}

impl Remedies {
    /// How much longer the pool is waited for; `began` is when it stopped to answer.
    fn left(&mut self, began: Instant, limit: Duration) -> Duration {
        let away = self.away.map_or(began, |away| away.min(began));
        self.away = Some(away);
        limit.saturating_sub(away.elapsed())
    }
}

impl Session {
    /// Any message by name; the session's reference is put in front of `arguments`.
    ///
    /// # Errors
    /// Those of the call, see [`XenApiError`].
    pub async fn call(&self, method: &str, repeat: Repeat, arguments: Vec<Value>) -> Result<Value, XenApiError> {
        let timeouts = &self.inner.options.timeouts;
        let wait = match method.split_once('.') {
            Some((_, name)) if name.starts_with("get_") => timeouts.read_call,
            Some(("Async", _)) => timeouts.read_call,
            _ => timeouts.work_call,
        };
        let _permit = self.inner.permits.acquire().await;
        self.call_waiting(method, repeat, arguments, wait).await
    }

    /// As [`Session::call`] with a limit of its own for the answer, and not counted among the calls at the same time.
    pub(crate) async fn call_waiting(
        &self,
        method: &str,
        repeat: Repeat,
        arguments: Vec<Value>,
        wait: Duration,
    ) -> Result<Value, XenApiError> {
        let mut remedies = Remedies::default();
        loop {
            let state = self.current(method)?;
            let document = state.document(method, &arguments)?;
            let answer = login::exchange(&state.client, document, method, wait, &self.inner.options.limits).await;
            // A host that says that it can not serve is as good as one that is silent.
            if answer.as_ref().is_ok_and(|answer| !answer.as_ref().is_err_and(ApiFailure::is_away)) {
                self.inner.outage.over();
            }
            match answer {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(failure)) => self.after_failure(method, repeat, &state, failure, &mut remedies).await?,
                Err(failed) => self.after_silence(repeat, &state, failed, &mut remedies).await?,
            }
        }
    }

    /// Returns if the call is to be sent again.
    async fn after_failure(
        &self,
        method: &str,
        repeat: Repeat,
        state: &State,
        failure: ApiFailure,
        remedies: &mut Remedies,
    ) -> Result<(), XenApiError> {
        let operation = || method.to_owned();
        if failure.is_away() {
            // The clock starts here.
            self.left(remedies);
        }
        match failure.code {
            ErrorCode::SessionInvalid if self.may_renew(remedies) => {
                self.renew_patiently(state, method, remedies).await?;
                match repeat {
                    Repeat::Harmless => Ok(()),
                    Repeat::Never => Err(XenApiError::SessionInvalid { operation: operation() }),
                }
            }
            ErrorCode::SessionInvalid => Err(XenApiError::SessionInvalid { operation: operation() }),
            // A former coordinator that is a member now begins nothing.
            ErrorCode::HostIsSlave if self.may_renew(remedies) => self.renew_patiently(state, method, remedies).await,
            _ if goes_again(&failure, repeat) && remedies.busy + 1 < self.inner.options.limits.busy_attempts => {
                let pause = jittered(pause_before(remedies.busy));
                remedies.busy += 1;
                tracing::debug!(method, %failure, ?pause, "the pool is busy");
                tokio::time::sleep(pause).await;
                Ok(())
            }
            // It began nothing and can not serve; by now, or soon, another host may be the coordinator.
            _ if failure.is_away() && !self.left(remedies).is_zero() => {
                let renewed = self.renew_patiently(state, method, remedies).await;
                renewed.map_err(|cause| match cause.retry() {
                    Retry::Later => XenApiError::of_failure(method, failure, &self.server()),
                    _ => cause,
                })
            }
            _ => Err(XenApiError::of_failure(method, failure, &self.server())),
        }
    }

    /// Returns if the call is to be sent again.
    async fn after_silence(
        &self,
        repeat: Repeat,
        state: &State,
        failed: crate::http_client::Failed,
        remedies: &mut Remedies,
    ) -> Result<(), XenApiError> {
        let error = failed.error;
        if !error.is_silence() || (failed.maybe_sent && repeat == Repeat::Never) {
            return Err(error);
        }
        if failed.maybe_sent && matches!(error, XenApiError::Connection { .. }) && !remedies.resent {
            remedies.resent = true;
            return Ok(());
        }
        if !self.may_renew(remedies) {
            return Err(error);
        }
        tracing::debug!(%error, "the coordinator does not answer, its members are asked");
        // What went wrong first says more than what goes wrong while looking for another coordinator.
        self.renew_patiently(state, "login", remedies).await.map_err(|_| error)
    }

    /// How much longer a call waits for a pool that is away.
    fn left(&self, remedies: &mut Remedies) -> Duration {
        remedies.left(self.inner.outage.began(), self.inner.options.timeouts.outage)
    }

    /// Whether a call may log in (again): once in any case, and then as long as the pool is waited for.
    fn may_renew(&self, remedies: &mut Remedies) -> bool {
        remedies.passes == 0 || !self.left(remedies).is_zero()
    }

    /// Logs in again, pass after pass over all hosts while the pool is away. The time counts from before the first one.
    async fn renew_patiently(&self, state: &State, method: &str, remedies: &mut Remedies) -> Result<(), XenApiError> {
        loop {
            let left = self.left(remedies);
            let number = remedies.passes;
            remedies.passes = number.saturating_add(1);
            if let Some(before) = number.checked_sub(1) {
                tokio::time::sleep(jittered(pause_before(before)).min(left)).await;
            }
            match self.renew(state, method, number, self.left(remedies)).await {
                Ok(()) => return Ok(()),
                // Logged out, refused, another pool: no time helps.
                Err(cause) if cause.retry() != Retry::Later || self.left(remedies).is_zero() => return Err(cause),
                Err(cause) => tracing::debug!(%cause, "the pool is out of reach; it is asked again"),
            }
        }
    }

    fn current(&self, method: &str) -> Result<State, XenApiError> {
        let state = self.inner.lock().clone();
        if state.ended {
            return Err(XenApiError::LoggedOut { operation: method.to_owned() });
        }
        Ok(state)
    }

    /// Logs in again, unless another call did so since `generation`.
    pub(crate) async fn renew_since(&self, generation: u64, method: &str) -> Result<(), XenApiError> {
        let mut state = self.current(method)?;
        state.generation = generation;
        self.renew_patiently(&state, method, &mut Remedies::default()).await
    }

    /// One pass over all hosts, at most one at a time: whoever waited for one that failed takes its result.
    async fn renew(&self, seen: &State, method: &str, number: u32, left: Duration) -> Result<(), XenApiError> {
        let session = self.clone();
        let (seen, method) = (seen.clone(), method.to_owned());
        let failed_before = self.inner.failed_passes.load(Ordering::SeqCst);
        // In a task of its own: a session that was opened is put in place even if the caller is gone, and a logout
        // waits for it.
        let renewal = async move {
            let mut last_failure = session.inner.renewing.lock().await;
            if session.current(&method)?.generation != seen.generation {
                return Ok(());
            }
            let (options, directory) = (&session.inner.options, &session.inner.directory);
            if session.inner.failed_passes.load(Ordering::SeqCst) != failed_before {
                let host = seen.client.endpoint.display_host();
                let source = last_failure.as_str().into();
                return Err(XenApiError::Connection { host, phase: Phase::Response, source });
            }
            let search = Search::again(options, directory, &seen.client.endpoint, number, left);
            let opened = match search::run(search, &session.inner.background).await {
                Ok(opened) => opened,
                Err(error) => {
                    if error.retry() == Retry::Later {
                        *last_failure = error.to_string();
                        session.inner.failed_passes.fetch_add(1, Ordering::SeqCst);
                    }
                    return Err(error);
                }
            };
            let renewed = State {
                client: opened.client,
                encoding: opened.encoding,
                reference: opened.reference,
                generation: seen.generation + 1,
                ended: false,
            };
            let old = {
                let mut state = session.inner.lock();
                if state.ended {
                    // Logged out meanwhile: the new session goes the same way.
                    renewed.clone()
                } else {
                    let old =
                        State { client: Arc::clone(&renewed.client), encoding: renewed.encoding, ..state.clone() };
                    *state = renewed;
                    old
                }
            };
            tracing::debug!(generation = seen.generation + 1, "logged in again");
            // It let us in and told its hosts: other calls do not inherit the time of this outage.
            session.inner.outage.over();
            // The pool may still know the old session.
            let limits = options.limits.clone();
            session.background(async move {
                let _ = login::leave(&old, &limits).await;
            });
            if directory.lacks_pins() {
                session.learn_certificates();
            }
            Ok(())
        };
        let renewing = self.inner.background.spawn_on(renewal, &self.inner.runtime);
        renewing.await.unwrap_or_else(|_| Err(XenApiError::Cancelled { operation: "login".to_owned() }))
    }
}

/// The pause before repetition `number`, from 0.
fn pause_before(number: u32) -> Duration {
    BUSY_PAUSE.saturating_mul(1 << number.min(10)).min(LONGEST_PAUSE)
}

/// Whether the same call can be sent again after a pause: nothing was begun, or it passes and doing it twice is harmless.
fn goes_again(failure: &ApiFailure, repeat: Repeat) -> bool {
    failure.is_busy() || (failure.class() == FailureClass::RetryNow && repeat == Repeat::Harmless)
}

/// Between a half and the whole of `pause`, so that many callers do not come back at the same moment.
pub(crate) fn jittered(pause: Duration) -> Duration {
    let mut byte = [0_u8; 1];
    let share = match ring::rand::SystemRandom::new().fill(&mut byte) {
        Ok(()) => u32::from(byte[0]),
        Err(_) => 255,
    };
    pause / 2 + (pause / 2).saturating_mul(share) / 255
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_call_counts_from_its_first_failure_whatever_other_calls_meet() {
        let limit = Duration::from_secs(100);
        let mut remedies = Remedies::default();
        let first = Instant::now();
        assert!(remedies.left(first, limit) <= limit);
        // Another call was answered meanwhile, so that the outage of the session counts anew.
        let later = first + Duration::from_secs(60);
        assert!(remedies.left(later, limit) <= limit);
        assert_eq!(remedies.away, Some(first));
        assert_eq!(remedies.left(later, Duration::ZERO), Duration::ZERO);
    }
}
