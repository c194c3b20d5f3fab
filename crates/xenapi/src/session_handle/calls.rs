//! One call with everything that may happen to it: a session that ended, a busy pool, a coordinator that moved.

use super::{Session, State, login};
use crate::error::{ApiFailure, Retry, XenApiError};
use crate::failure_class::FailureClass;
use crate::generated::ErrorCode;
use crate::model::Repeat;
use crate::value::Value;
use ring::rand::SecureRandom;
use std::sync::Arc;
use std::time::Duration;

/// The pause before the first repetition of a call that met a busy pool; it doubles each time.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What was already done about a call's failures: each remedy is tried once.
#[derive(Default)]
struct Remedies {
    renewed: bool,
    resent: bool,
    searched: bool,
    busy: u32,
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
            if answer.is_ok() {
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
        match failure.code {
            ErrorCode::SessionInvalid if !remedies.renewed => {
                remedies.renewed = true;
                self.renew(state, method).await?;
                match repeat {
                    Repeat::Harmless => Ok(()),
                    Repeat::Never => Err(XenApiError::SessionInvalid { operation: operation() }),
                }
            }
            ErrorCode::SessionInvalid => Err(XenApiError::SessionInvalid { operation: operation() }),
            // A former coordinator that is a member now begins nothing.
            ErrorCode::HostIsSlave if !remedies.searched => {
                remedies.searched = true;
                self.renew(state, method).await
            }
            _ if goes_again(&failure, repeat) && remedies.busy + 1 < self.inner.options.limits.busy_attempts => {
                let pause = jittered(pause_before(remedies.busy));
                remedies.busy += 1;
                tracing::debug!(method, %failure, ?pause, "the pool is busy");
                tokio::time::sleep(pause).await;
                Ok(())
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
        if remedies.searched {
            return Err(error);
        }
        tracing::debug!(%error, "the coordinator does not answer, its members are asked");
        let mut pauses = 0;
        loop {
            let renewed = self.renew(state, "login").await;
            let limit = self.inner.options.timeouts.outage;
            match renewed {
                Ok(()) => {
                    remedies.searched = true;
                    return Ok(());
                }
                // Logged out, refused, another pool: no time helps.
                Err(cause) if cause.retry() != Retry::Later => return Err(error),
                // What went wrong first says more than what goes wrong while looking for another coordinator.
                Err(_) if self.inner.outage.began().elapsed() >= limit => return Err(error),
                Err(cause) => tracing::debug!(%cause, "the pool is out of reach; it is asked again"),
            }
            let left = limit.saturating_sub(self.inner.outage.began().elapsed());
            tokio::time::sleep(jittered(pause_before(pauses)).min(left)).await;
            pauses += 1;
        }
    }

    fn current(&self, method: &str) -> Result<State, XenApiError> {
        let state = self.inner.lock().clone();
        if state.ended {
            return Err(XenApiError::LoggedOut { operation: method.to_owned() });
        }
        Ok(state)
    }

    /// Logs in again, unless another call did so since `seen`.
    pub(crate) async fn renew_since(&self, generation: u64, method: &str) -> Result<(), XenApiError> {
        let mut state = self.current(method)?;
        state.generation = generation;
        self.renew(&state, method).await
    }

    async fn renew(&self, seen: &State, method: &str) -> Result<(), XenApiError> {
        let session = self.clone();
        let (seen, method) = (seen.clone(), method.to_owned());
        // In a task of its own: a session that was opened is put in place even if the caller is gone, and a logout
        // waits for it.
        let renewal = async move {
            let _turn = session.inner.renewing.lock().await;
            if session.current(&method)?.generation != seen.generation {
                return Ok(());
            }
            let (options, directory) = (&session.inner.options, &session.inner.directory);
            let opened = login::reopen(options, directory, Some(&seen.client.endpoint)).await?;
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
            // The pool may still know the old session.
            let limits = options.limits.clone();
            session.background(async move {
                let _ = login::leave(&old, &limits).await;
            });
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
