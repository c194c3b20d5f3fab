//! Tasks: results, failures, disappearance, cancelling, and nothing left behind.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use futures::FutureExt;
use scripted::{Call, Pool, Reply, task};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use xenvault_xenapi::tasks::{WaitOptions, host_lives, wait};
use xenvault_xenapi::{CancellationToken, ErrorCode, Retry, Session, XenApiError, task as task_class, vdi, vm};

const TASK: &str = "OpaqueRef:task";

fn reference() -> task_class::Ref {
    task_class::Ref::new(TASK)
}

async fn session(script: impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static) -> (Pool, Session) {
    let pool = Pool::one(script).await;
    let session = Session::login(pool.options()).await.unwrap();
    (pool, session)
}

async fn result<T: xenvault_xenapi::tasks::FromTaskResult>(session: &Session) -> Result<T, XenApiError> {
    wait(session, reference(), WaitOptions::of("testing"), &CancellationToken::new()).await
}

/// An `event.from` without events.
fn nothing() -> Reply {
    Reply::Result(json!({"events": [], "token": "00000000000000000001,00000000000000000000", "valid_ref_counts": {}}))
}

#[tokio::test]
async fn results_are_read_from_their_fragment_and_the_task_is_destroyed() {
    for (fragment, expected) in [("<value>OpaqueRef:new</value>", "OpaqueRef:new"), ("<value></value>", ""), ("", "")] {
        let (pool, session) =
            session(move |call| (call.method == "task.get_record").then(|| task("success", fragment, &[]))).await;
        assert_eq!(result::<String>(&session).await.unwrap(), expected);
        result::<()>(&session).await.unwrap();
        assert_eq!((pool.count("task.destroy"), pool.count("task.cancel")), (2, 0));
        session.logout().await.unwrap();
    }
    let list = "<value><array><data><value>OpaqueRef:a</value><value>OpaqueRef:b</value></data></array></value>";
    let (_pool, session) =
        session(move |call| (call.method == "task.get_record").then(|| task("success", list, &[]))).await;
    assert_eq!(result::<Vec<vm::Ref>>(&session).await.unwrap().len(), 2);
    assert!(matches!(result::<bool>(&session).await, Err(XenApiError::Response { .. })));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn the_tasks_failure_is_the_error() {
    let (pool, session) = session(|call| {
        (call.method == "task.get_record").then(|| task("failure", "", &["SR_BACKEND_FAILURE_44", "", "full", ""]))
    })
    .await;
    let error = result::<()>(&session).await.unwrap_err();
    assert_eq!(error.api().unwrap().sr_backend_failure(), Some(44));
    assert!(error.to_string().contains("testing") && error.to_string().contains("full"), "{error}");
    assert_eq!(pool.count("task.destroy"), 1);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x05_a_vanished_task_is_neither_success_nor_failure() {
    let gone = |call: &Call| {
        (call.method == "task.get_record").then(|| Reply::Failure(vec!["HANDLE_INVALID", "task", "OpaqueRef:task"]))
    };
    let (pool, session) = session(gone).await;
    let error = result::<()>(&session).await.unwrap_err();
    assert!(matches!(error, XenApiError::TaskVanished { .. }), "{error:?}");
    assert_eq!(error.retry(), Retry::Later);
    assert_eq!(pool.count("task.cancel") + pool.count("task.destroy"), 0);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x05_a_task_that_goes_while_it_is_watched_is_told_by_its_event() {
    let (_pool, session) = session(|call| match call.method.as_str() {
        "task.get_record" => Some(task("pending", "", &[])),
        "event.from" => Some(Reply::Result(json!({
            "events": [{"class": "task", "operation": "del", "ref": TASK, "id": "1", "timestamp": "0.0"}],
            "token": "t", "valid_ref_counts": {}
        }))),
        _ => None,
    })
    .await;
    assert!(matches!(result::<()>(&session).await, Err(XenApiError::TaskVanished { .. })));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn events_end_the_wait_and_polling_replaces_them() {
    for events in [true, false] {
        let asked = Arc::new(AtomicUsize::new(0));
        let (pool, session) = {
            let asked = Arc::clone(&asked);
            session(move |call| match call.method.as_str() {
                "task.get_record" if events || asked.fetch_add(1, Ordering::SeqCst) < 3 => {
                    Some(task("pending", "", &[]))
                }
                "task.get_record" => Some(task("success", "", &[])),
                "event.from" if events => Some(Reply::Result(json!({
                    "events": [{"class": "task", "operation": "mod", "ref": TASK,
                                "snapshot": {"status": "success", "result": "<value>7</value>"}}],
                    "token": "t", "valid_ref_counts": {}
                }))),
                _ => None,
            })
            .await
        };
        let options = WaitOptions { poll: Duration::from_millis(1), ..WaitOptions::of("testing") };
        let result: String = wait(&session, reference(), options, &CancellationToken::new()).await.unwrap();
        assert_eq!(result, if events { "7" } else { "" });
        assert_eq!(pool.count("task.destroy"), 1);
        session.logout().await.unwrap();
    }
}

/// A pool whose task runs until it is cancelled.
fn runs_until_cancelled() -> impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static {
    let cancelled = AtomicBool::new(false);
    move |call| match call.method.as_str() {
        "task.cancel" => {
            cancelled.store(true, Ordering::SeqCst);
            None
        }
        "task.get_record" if cancelled.load(Ordering::SeqCst) => Some(task("cancelled", "", &[])),
        "task.get_record" => Some(task("pending", "", &[])),
        "event.from" => Some(nothing()),
        "Async.VM.clone" => Some(Reply::Result(json!(TASK))),
        _ => None,
    }
}

#[tokio::test]
async fn a_cancelled_wait_cancels_and_destroys_the_task() {
    let (pool, session) = session(runs_until_cancelled()).await;
    let cancel = CancellationToken::new();
    let waiting = wait::<()>(&session, reference(), WaitOptions::of("testing"), &cancel);
    let (outcome, ()) = futures::future::join(waiting, async {
        pool.saw("event.from", 1).await;
        cancel.cancel();
    })
    .await;
    assert!(matches!(outcome, Err(XenApiError::Cancelled { .. })), "{outcome:?}");
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (1, 1));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_dropped_wait_cancels_and_destroys_the_task_before_the_logout() {
    let (pool, session) = session(runs_until_cancelled()).await;
    let cancel = CancellationToken::new();
    // Even one that was never polled.
    drop(wait::<()>(&session, reference(), WaitOptions::default(), &cancel));
    session.logout().await.unwrap();
    let methods = pool.methods();
    let at = |method: &str| methods.iter().position(|seen| seen == method).unwrap();
    assert!(at("task.cancel") < at("task.destroy") && at("task.destroy") < at("session.logout"), "{methods:?}");
}

#[tokio::test]
async fn a_start_whose_answer_nobody_waits_for_leaves_no_task() {
    let (pool, session) = session(runs_until_cancelled()).await;
    let vm = vm::Ref::new("OpaqueRef:vm");
    assert!(vm::clone_async(&session, &vm, "copy").now_or_never().is_none());
    session.logout().await.unwrap();
    assert_eq!((pool.count("Async.VM.clone"), pool.count("task.destroy")), (1, 1));
}

#[tokio::test]
async fn a_start_that_is_dropped_after_its_answer_leaves_no_task() {
    let (pool, session) = session(runs_until_cancelled()).await;
    let vm = vm::Ref::new("OpaqueRef:vm");
    let mut start = Box::pin(vm::clone_async(&session, &vm, "copy"));
    assert!(futures::poll!(&mut start).is_pending());
    pool.saw("Async.VM.clone", 1).await;
    // Time for the answer to be there, unseen.
    for _ in 0..50 {
        let _ = vm::get_all(&session).await;
    }
    drop(start);
    session.logout().await.unwrap();
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (1, 1));
}

#[tokio::test]
async fn the_tasks_failure_does_not_repeat_the_session() {
    let (_pool, session) = session(|call| match call.method.as_str() {
        "task.get_record" => Some(task("failure", "", &["INTERNAL_ERROR", "GET /x?session_id=OpaqueRef:session-1&y"])),
        _ => None,
    })
    .await;
    let error = result::<()>(&session).await.unwrap_err();
    assert!(error.to_string().contains("GET /x") && !format!("{error} {error:?}").contains("session-1"), "{error:?}");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn the_tasks_failure_does_not_repeat_a_session_that_was_renewed_since() {
    let (_pool, session) = session(|call| match call.method.as_str() {
        "VM.get_all" if call.params[0] == json!("OpaqueRef:session-1") => {
            Some(Reply::Failure(vec!["SESSION_INVALID", "OpaqueRef:session-1"]))
        }
        "VM.get_all" => Some(Reply::Result(json!([]))),
        "task.get_record" => {
            let said = "GET /x?session_id=OpaqueRef:session-1&y HTTP/1.1 and \"/z?session_id=OpaqueRef:session-1\" too";
            Some(task("failure", "", &["INTERNAL_ERROR", said]))
        }
        _ => None,
    })
    .await;
    vm::get_all(&session).await.unwrap();
    assert_eq!(session.generation(), 2);
    let error = result::<()>(&session).await.unwrap_err();
    assert!(!format!("{error} {error:?}").contains("session-1"), "{error:?}");
    assert!(error.to_string().contains("&y HTTP/1.1 and \"/z?") && error.to_string().contains("\" too"), "{error}");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_task_without_progress_is_cancelled() {
    let (pool, session) = session(runs_until_cancelled()).await;
    let options = WaitOptions { progress_deadline: Duration::from_millis(50), ..WaitOptions::of("testing") };
    let error = wait::<()>(&session, reference(), options, &CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, XenApiError::TaskStalled { .. }), "{error:?}");
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (1, 1));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x08_a_lost_token_begins_again() {
    let first = AtomicBool::new(true);
    let (pool, session) = session(move |call| match call.method.as_str() {
        "task.get_record" if first.load(Ordering::SeqCst) => Some(task("pending", "", &[])),
        "task.get_record" => Some(task("success", "", &[])),
        "event.from" if call.params[2] == json!("") => Some(nothing()),
        "event.from" => {
            first.store(false, Ordering::SeqCst);
            Some(Reply::Failure(vec!["EVENTS_LOST"]))
        }
        _ => None,
    })
    .await;
    result::<()>(&session).await.unwrap();
    assert!(pool.count("event.from") >= 2);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x13_changed_blocks_are_asked_for_by_a_task() {
    let (_pool, session) = session(|call| match call.method.as_str() {
        "Async.VDI.list_changed_blocks" => Some(Reply::Result(json!(TASK))),
        "task.get_record" => Some(task("failure", "", &["SR_BACKEND_FAILURE_460", "", "unrelated", ""])),
        _ => None,
    })
    .await;
    let disk = vdi::Ref::new("OpaqueRef:vdi");
    let task = vdi::list_changed_blocks_async(&session, &disk, &disk).await.unwrap();
    let outcome = wait::<String>(&session, task, WaitOptions::of("CBT"), &CancellationToken::new()).await;
    assert_eq!(outcome.unwrap_err().code(), Some(&ErrorCode::Unknown("SR_BACKEND_FAILURE_460".into())));
    session.logout().await.unwrap();
}

/// A pool with a task that never ends on a host that has `lives` one after the other, each seen once and the last for
/// good; `live` is what its metrics say.
fn runs_on(lives: &'static [&'static str], live: bool) -> impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static {
    let looked = AtomicUsize::new(0);
    let cancelled = runs_until_cancelled();
    move |call| match call.method.as_str() {
        "host.get_record" => {
            assert_eq!(call.params[1], json!("OpaqueRef:host-7"));
            let at = looked.fetch_add(1, Ordering::SeqCst).min(lives.len() - 1);
            Some(Reply::Result(json!({
                "name_label": "xen-7", "metrics": "OpaqueRef:metrics",
                "other_config": {"boot_time": "1795368590.", "agent_start_time": lives[at]}
            })))
        }
        "host_metrics.get_record" => Some(Reply::Result(json!({"live": live}))),
        _ => cancelled(call),
    }
}

async fn waits_on_host_7(session: &Session) -> Result<(), XenApiError> {
    let options = WaitOptions {
        hosts: host_lives(session, &[xenvault_xenapi::host::Ref::new("OpaqueRef:host-7"), Default::default()]).await,
        host_check: Duration::from_millis(1),
        progress_deadline: Duration::from_secs(600),
        ..WaitOptions::of("testing")
    };
    wait(session, reference(), options, &CancellationToken::new()).await
}

#[tokio::test]
async fn x06_a_task_whose_host_is_dead_is_given_up() {
    let (pool, session) = session(runs_on(&["1795368600."], false)).await;
    let error = waits_on_host_7(&session).await.unwrap_err();
    assert!(matches!(&error, XenApiError::TaskHostGone { host, .. } if host == "xen-7"), "{error:?}");
    assert!(error.is_lost_answer());
    assert_eq!(error.retry(), Retry::Later);
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (1, 1));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x06_a_task_whose_hosts_toolstack_started_anew_is_given_up() {
    let lives = &["1795368600.", "1795368600.", "1795368600.", "1795368700."];
    let (pool, session) = session(runs_on(lives, true)).await;
    let error = waits_on_host_7(&session).await.unwrap_err();
    assert!(matches!(error, XenApiError::TaskHostGone { .. }), "{error:?}");
    assert_eq!(pool.count("host.get_record"), lives.len());
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (1, 1));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x06_a_toolstack_that_starts_anew_before_the_first_look_at_its_host_is_noticed() {
    let lives = &["1795368600.", "1795368700."];
    let (pool, session) = session(runs_on(lives, true)).await;
    let error = waits_on_host_7(&session).await.unwrap_err();
    assert!(matches!(error, XenApiError::TaskHostGone { .. }), "{error:?}");
    assert_eq!(pool.count("host.get_record"), lives.len());
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (1, 1));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x06_a_task_that_ended_well_while_it_was_given_up_counts_as_done() {
    let cancelled = AtomicBool::new(false);
    let hosts = runs_on(&["1795368600."], false);
    let (pool, session) = session(move |call| match call.method.as_str() {
        "task.cancel" => {
            cancelled.store(true, Ordering::SeqCst);
            None
        }
        "task.get_record" if cancelled.load(Ordering::SeqCst) => Some(task("success", "", &[])),
        _ => hosts(call),
    })
    .await;
    waits_on_host_7(&session).await.unwrap();
    assert_eq!(pool.count("task.destroy"), 1);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x06_a_host_that_can_not_be_looked_at_is_not_taken_for_dead() {
    let looked = AtomicUsize::new(0);
    let (pool, session) = session(move |call| match call.method.as_str() {
        "host.get_record" => {
            looked.fetch_add(1, Ordering::SeqCst);
            Some(Reply::Failure(vec!["INTERNAL_ERROR", "no"]))
        }
        "task.get_record" if looked.load(Ordering::SeqCst) >= 3 => Some(task("success", "", &[])),
        "task.get_record" => Some(task("pending", "", &[])),
        "event.from" => Some(nothing()),
        _ => None,
    })
    .await;
    waits_on_host_7(&session).await.unwrap();
    assert_eq!(pool.count("task.cancel"), 0);
    session.logout().await.unwrap();
}
