//! Sessions: login, logout, and the check before every call.

use std::sync::Arc;

use super::Call;
use crate::core::Core;
use crate::model::{Value, now};
use crate::rpc::{Failure, Outcome};

/// `SESSION_INVALID` unless the session is there.
pub(crate) fn check(core: &Core, session: &str) -> Outcome<()> {
    if core.db().exists("session", session) {
        return Ok(());
    }
    Err(Failure::new("SESSION_INVALID", [session]))
}

/// Whether name and password are right.
pub(crate) fn password_is_right(core: &Core, user: &str, password: &str) -> bool {
    user == "root" && password == core.options.password
}

/// Makes a session; the oldest of the same originator goes when there are too many.
pub(crate) fn open(core: &Arc<Core>, host: &str, user: &str, originator: &str) -> String {
    let mut db = core.db();
    let mut of_originator = db.refs_where("session", "originator", originator);
    if of_originator.len() >= core.options.session_limit {
        of_originator.sort_by_key(|session| db.text("session", session, "last_active"));
        let surplus = of_originator.len() + 1 - core.options.session_limit;
        for session in of_originator.iter().take(surplus) {
            db.destroy("session", session);
        }
    }
    db.create(
        "session",
        vec![
            ("this_host", host.into()),
            ("last_active", Value::Date(now())),
            ("validation_time", Value::Date(now())),
            ("is_local_superuser", true.into()),
            ("auth_user_name", user.into()),
            ("originator", originator.into()),
        ],
    )
}

/// Makes a session with the rights of another one, for a host.
pub(super) fn open_like(core: &Arc<Core>, host: &str, session: &str) -> String {
    let mut db = core.db();
    let copied = ["is_local_superuser", "subject", "auth_user_sid", "auth_user_name", "rbac_permissions"];
    let mut fields: Vec<(&str, Value)> =
        copied.iter().filter_map(|name| Some((*name, db.get("session", session, name).ok()?.clone()))).collect();
    fields.extend([
        ("this_host", host.into()),
        ("last_active", Value::Date(now())),
        ("validation_time", Value::Date(now())),
        ("parent", session.into()),
    ]);
    db.create("session", fields)
}

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    Some(match simple {
        "login_with_password" => login(call).await,
        "slave_local_login_with_password" => {
            if password_is_right(core, call.text(0), call.text(1)) {
                call.node().map(|node| open(core, &node.reference, call.text(0), "local").into())
            } else {
                tokio::time::sleep(core.options.wrong_password_delay).await;
                Err(Failure::new("SESSION_AUTHENTICATION_FAILED", [call.text(0), "Authentication failure"]))
            }
        }
        "logout" | "local_logout" => {
            core.db().destroy("session", &call.session);
            Ok(Value::void())
        }
        "get_all_subject_identifiers" => Ok(Value::List(Vec::new())),
        "logout_subject_identifier" => Ok(Value::void()),
        // A session may look at itself only by a reference that is there, as with any object.
        _ => return None,
    })
}

async fn login(call: &Call) -> Outcome {
    let core = &call.core;
    if call.host != core.coordinator() {
        let coordinator = core.host_at(core.coordinator())?.address.to_string();
        return Err(Failure::new("HOST_IS_SLAVE", [coordinator]));
    }
    let (user, password) = (call.text(0), call.text(1));
    if !password_is_right(core, user, password) {
        tokio::time::sleep(core.options.wrong_password_delay).await;
        return Err(Failure::new("SESSION_AUTHENTICATION_FAILED", [user, "Authentication failure"]));
    }
    Ok(open(core, &call.node()?.reference, user, call.text(3)).into())
}
