//! Tasks: background calls, and the tasks that clients make for transfers.

use std::future::Future;
use std::sync::{Arc, PoisonError};

use tokio_util::sync::CancellationToken;

use super::{Call, rbac};
use crate::core::Core;
use crate::model::{Value, now};
use crate::rpc::{Failure, Outcome, xml_fragment};

/// How many owners of tasks are kept before those of tasks that are gone are looked for.
const OWNERS_KEPT: usize = 4096;

/// Makes a pending task.
pub(crate) fn new_task(core: &Core, host: usize, label: &str, description: &str) -> String {
    let resident = core.host_at(host).map(|host| host.reference.clone()).unwrap_or_default();
    core.db().create(
        "task",
        vec![
            ("name_label", label.into()),
            ("name_description", description.into()),
            ("created", Value::Date(now())),
            ("status", "pending".into()),
            ("resident_on", resident.into()),
        ],
    )
}

/// Notes whose a task is.
pub(super) fn own(core: &Core, task: &str, session: &str) {
    let mut owners = core.task_owners.lock().unwrap_or_else(PoisonError::into_inner);
    if owners.len() >= OWNERS_KEPT {
        let db = core.db();
        owners.retain(|task, _| db.exists("task", task));
    }
    owners.insert(task.to_owned(), session.to_owned());
}

/// `RBAC_PERMISSION_DENIED` for the task of another account, unless the role allows it. A task whose session has ended
/// is nobody's, not even that account's.
fn check_owner(call: &Call, task: &str) -> Outcome<()> {
    let core = &call.core;
    let owners = core.task_owners.lock().unwrap_or_else(PoisonError::into_inner);
    let owner = owners.get(task).cloned().unwrap_or_default();
    drop(owners);
    let same = {
        let db = core.db();
        let sid = |session: &str| db.text("session", session, "auth_user_sid");
        db.exists("session", &owner) && sid(&owner) == sid(&call.session)
    };
    if same { Ok(()) } else { rbac::check(core, &call.session, "task.destroy/any") }
}

/// Ends a task with success. The result is an XML fragment whatever the client speaks.
pub(crate) fn complete(core: &Core, task: &str, result: Option<&Value>) {
    let mut db = core.db();
    if db.text("task", task, "status") != "pending" {
        return;
    }
    if let Some(result) = result {
        db.set("task", task, "result", xml_fragment(result));
    }
    finish(&mut db, task, "success");
}

/// Ends a task with a failure.
pub(crate) fn fail(core: &Core, task: &str, failure: &Failure) {
    let mut db = core.db();
    if db.text("task", task, "status") != "pending" {
        return;
    }
    db.set("task", task, "error_info", Value::texts(failure.description()));
    let status = if failure.code == "TASK_CANCELLED" { "cancelled" } else { "failure" };
    finish(&mut db, task, status);
}

fn finish(db: &mut crate::model::Database, task: &str, status: &str) {
    db.set("task", task, "progress", 1.0);
    db.set("task", task, "finished", Value::Date(now()));
    let unwanted = db.map_value("task", task, "current_operations", "task").as_deref() == Some("destroy");
    db.set("task", task, "current_operations", Value::Map(Vec::new()));
    db.set("task", task, "status", status);
    if unwanted {
        db.destroy("task", task);
    }
}

/// Runs work under a task. It can be cancelled as long as it has not begun to take effect, which is during the
/// delay that every background task has.
pub(super) fn in_background(core: &Arc<Core>, task: &str, work: impl Future<Output = Outcome> + Send + 'static) {
    let token = CancellationToken::new();
    let cancels = |core: &Core, change: &mut dyn FnMut(&mut std::collections::HashMap<String, CancellationToken>)| {
        change(&mut core.cancels.lock().unwrap_or_else(PoisonError::into_inner));
    };
    cancels(core, &mut |cancels| {
        cancels.insert(task.to_owned(), token.clone());
    });
    let core = Arc::clone(core);
    let task = task.to_owned();
    let life = core.host_at(core.coordinator()).map(crate::core::HostNode::life).unwrap_or_default();
    let guarded = async move {
        let delay = core.options.task_delay;
        let cancelled = tokio::select! {
            () = token.cancelled() => true,
            () = tokio::time::sleep(delay), if !delay.is_zero() => false,
            () = std::future::ready(()), if delay.is_zero() => false,
        };
        cancels(&core, &mut |cancels| {
            cancels.remove(&task);
        });
        if cancelled {
            fail(&core, &task, &Failure::new("TASK_CANCELLED", [task.as_str()]));
            return;
        }
        match work.await {
            Ok(value) => complete(&core, &task, Some(&value)),
            Err(failure) => fail(&core, &task, &failure),
        }
    };
    // What a toolstack was doing ends with it; nobody goes on with it, and nobody ends the task.
    tokio::spawn(async move { life.run_until_cancelled_owned(guarded).await });
}

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    let core = &call.core;
    if simple == "create" {
        let task = new_task(core, call.host, call.text(0), call.text(1));
        own(core, &task, &call.session);
        return Some(Ok(task.into()));
    }
    let task = call.text(0);
    if !matches!(simple, "destroy" | "cancel" | "set_status" | "set_progress" | "set_result" | "set_error_info") {
        return None;
    }
    let known = core.db().check("task", task);
    if let Err(failure) = known.and_then(|()| check_owner(call, task)) {
        return Some(Err(failure));
    }
    match simple {
        "destroy" => destroy(core, task),
        "cancel" => cancel(core, task),
        "set_status" => {
            let status = call.text(1);
            let mut db = core.db();
            if status == "pending" { db.set("task", task, "status", status) } else { finish(&mut db, task, status) }
        }
        "set_progress" => core.db().set("task", task, "progress", call.value(1)),
        "set_result" => core.db().set("task", task, "result", call.value(1)),
        _ => core.db().set("task", task, "error_info", call.value(1)),
    }
    Some(Ok(Value::void()))
}

/// A task that has not ended is only marked; a real coordinator collects it at the next round after its end, here it
/// goes with its end.
fn destroy(core: &Core, task: &str) {
    let mut db = core.db();
    if matches!(db.text("task", task, "status").as_str(), "success" | "failure" | "cancelled") {
        db.destroy("task", task);
    } else {
        db.put("task", task, "current_operations", "task", "destroy");
    }
}

/// Answers at once; the task ends when its work notices, which transfers never do.
fn cancel(core: &Core, task: &str) {
    let mut db = core.db();
    if db.text("task", task, "status") != "pending" {
        return;
    }
    let key = format!("DummyRef:|{}|task.cancel", crate::model::new_uuid());
    db.put("task", task, "current_operations", &key, "cancel");
    drop(db);
    if let Some(token) = core.cancels.lock().unwrap_or_else(PoisonError::into_inner).get(task) {
        token.cancel();
    }
}
