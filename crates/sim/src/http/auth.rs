//! Who may use a transfer: a session in the query or a cookie, or name and password.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::request::Request;
use super::response;
use crate::core::Core;
use crate::methods::{fail, rbac, session};
use crate::rpc::Failure;

/// A session that ends with the request if it was made for it.
pub(super) struct Access {
    core: Arc<Core>,
    session: String,
    temporary: bool,
}

impl Drop for Access {
    fn drop(&mut self) {
        if self.temporary {
            self.core.db().destroy("session", &self.session);
        }
    }
}

/// Checks who asks and what they may: the page to answer is 401 or 403, and the task that the client named has failed
/// then. `action` is the handler's name in permissions and in the realm of a 401, such as `get_export`.
pub(super) fn check(core: &Arc<Core>, host: usize, request: &Request, action: &str) -> Result<Access, Vec<u8>> {
    let access = known(core, host, request).ok_or_else(|| response::unauthorised(action))?;
    match rbac::check(core, &access.session, &format!("http/{action}")) {
        Ok(()) => Ok(access),
        Err(failure) => {
            if let Some(task) = request.param("task_id") {
                fail(core, task, &failure);
            }
            Err(response::forbidden())
        }
    }
}

fn known(core: &Arc<Core>, host: usize, request: &Request) -> Option<Access> {
    let access = |session: String, temporary| Access { core: Arc::clone(core), session, temporary };
    if let Some(given) = request.param("session_id") {
        if session::check(core, given).is_ok() {
            return Some(access(given.to_owned(), false));
        }
    } else if let Some((user, password)) = request.authorization.as_deref().and_then(basic)
        && let Some(who) = session::identify(core, &user, &password)
    {
        let reference = core.host_at(host).map(|host| host.reference.clone()).unwrap_or_default();
        return Some(access(session::open(core, &reference, &user, who, "unknown using Basic auth"), true));
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
