//! Sessions: login, logout, and the check before every call.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Call, rbac};
use crate::Role;
use crate::core::Core;
use crate::model::{Database, Value, now};
use crate::rpc::{Failure, Outcome};

/// How old `last_active` has to be to be set anew.
const REFRESHED_AFTER: Duration = Duration::from_secs(600);

/// When a session was last used, and when its record last said so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    last: Instant,
    told: Instant,
}

/// `SESSION_INVALID` unless the session is there and was used lately.
pub(crate) fn check(core: &Core, session: &str) -> Outcome<()> {
    let mut db = core.db();
    if db.exists("session", session) {
        let now = Instant::now();
        let mut uses = core.session_uses.lock().unwrap_or_else(PoisonError::into_inner);
        let used = uses.entry(session.to_owned()).or_insert(Use { last: now, told: now });
        if now.duration_since(used.last) <= core.options.session_timeout {
            used.last = now;
            if now.duration_since(used.told) > REFRESHED_AFTER {
                used.told = now;
                db.set("session", session, "last_active", Value::Date(crate::model::now()));
            }
            return Ok(());
        }
        uses.remove(session);
        db.destroy("session", session);
    }
    Err(Failure::new("SESSION_INVALID", [session]))
}

/// Ends the sessions that were not used for too long.
fn expire(core: &Core, db: &mut Database) {
    let mut uses = core.session_uses.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    uses.retain(|session, used| {
        let young = now.duration_since(used.last) <= core.options.session_timeout;
        if !young {
            db.destroy("session", session);
        }
        young && db.exists("session", session)
    });
}

/// Who a name and a password stand for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Identity {
    /// The local `root`.
    Root,
    /// An account with a role.
    Account(Role),
}

/// Checks name and password.
pub(crate) fn identify(core: &Core, user: &str, password: &str) -> Option<Identity> {
    if user == "root" {
        return (password == core.options.password).then_some(Identity::Root);
    }
    let mut accounts = core.options.accounts.iter();
    let account = accounts.find(|account| account.name == user && account.password == password)?;
    Some(Identity::Account(account.role))
}

/// Makes a session; the oldest of the same originator goes when there are too many.
pub(crate) fn open(core: &Arc<Core>, host: &str, user: &str, who: Identity, originator: &str) -> String {
    let mut db = core.db();
    expire(core, &mut db);
    let mut of_originator = db.refs_where("session", "originator", originator);
    if of_originator.len() >= core.options.session_limit {
        of_originator.sort_by_key(|session| db.text("session", session, "last_active"));
        let surplus = of_originator.len() + 1 - core.options.session_limit;
        for session in of_originator.iter().take(surplus) {
            db.destroy("session", session);
        }
    }
    let mut fields = vec![
        ("this_host", host.into()),
        ("last_active", Value::Date(now())),
        ("validation_time", Value::Date(now())),
        ("auth_user_name", user.into()),
        ("originator", originator.into()),
    ];
    match who {
        Identity::Root => fields.push(("is_local_superuser", true.into())),
        Identity::Account(role) => fields.extend([
            ("subject", rbac::subject(&mut db, user, role).into()),
            ("auth_user_sid", rbac::sid_of(user).into()),
            ("rbac_permissions", Value::texts(rbac::permissions(role))),
        ]),
    }
    let session = db.create("session", fields);
    let now = Instant::now();
    let mut uses = core.session_uses.lock().unwrap_or_else(PoisonError::into_inner);
    uses.insert(session.clone(), Use { last: now, told: now });
    session
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
            // Only `root` is known to a host by itself.
            if let Some(who @ Identity::Root) = identify(core, call.text(0), call.text(1)) {
                call.node().map(|node| open(core, &node.reference, call.text(0), who, "local").into())
            } else {
                tokio::time::sleep(core.options.wrong_password_delay).await;
                Err(Failure::new("SESSION_AUTHENTICATION_FAILED", [call.text(0), "Authentication failure"]))
            }
        }
        "logout" | "local_logout" => {
            core.db().destroy("session", &call.session);
            Ok(Value::void())
        }
        "get_all_subject_identifiers" => {
            let db = core.db();
            let mut found: Vec<String> =
                db.refs("session").iter().map(|session| db.text("session", session, "auth_user_sid")).collect();
            found.retain(|sid| !sid.is_empty());
            found.sort();
            found.dedup();
            Ok(Value::texts(found))
        }
        "logout_subject_identifier" => {
            let mut db = core.db();
            let sid = call.text(0);
            for session in db.refs_where("session", "auth_user_sid", sid) {
                // Never the caller's own, nor those that have no subject.
                if session != call.session && !sid.is_empty() {
                    db.destroy("session", &session);
                }
            }
            Ok(Value::void())
        }
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
    let Some(who) = identify(core, user, password) else {
        tokio::time::sleep(core.options.wrong_password_delay).await;
        return Err(Failure::new("SESSION_AUTHENTICATION_FAILED", [user, "Authentication failure"]));
    };
    Ok(open(core, &call.node()?.reference, user, who, call.text(3)).into())
}
