//! Who may use a transfer: a session in the query or a cookie, or name and password.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::request::Request;
use crate::core::Core;
use crate::methods::{fail, session};
use crate::rpc::Failure;

/// A session that ends with the request if it was made for it.
pub(super) struct Access {
    core: Arc<Core>,
    temporary: Option<String>,
}

impl Drop for Access {
    fn drop(&mut self) {
        if let Some(session) = &self.temporary {
            self.core.db().destroy("session", session);
        }
    }
}

/// Checks; `None` means 401, and the task that the client named has failed.
pub(super) fn check(core: &Arc<Core>, host: usize, request: &Request) -> Option<Access> {
    let access = |temporary| Access { core: Arc::clone(core), temporary };
    if let Some(given) = request.param("session_id") {
        if session::check(core, given).is_ok() {
            return Some(access(None));
        }
    } else if let Some((user, password)) = request.authorization.as_deref().and_then(basic)
        && session::password_is_right(core, &user, &password)
    {
        let reference = core.host_at(host).map(|host| host.reference.clone()).unwrap_or_default();
        return Some(access(Some(session::open(core, &reference, &user, "unknown using Basic auth"))));
    }
    if let Some(task) = request.param("task_id") {
        fail(core, task, &Failure::bare("SESSION_AUTHENTICATION_FAILED"));
    }
    None
}

fn basic(header: &str) -> Option<(String, String)> {
    let decoded = STANDARD.decode(header.strip_prefix("Basic ")?.trim()).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}
