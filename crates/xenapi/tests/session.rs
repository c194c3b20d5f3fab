//! Sessions: following the coordinator, renewal, a busy pool, and a logout on every path.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use scripted::{Call, Look, Pool, Reply, host_ref};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use xenvault_xenapi::{Protocol, Repeat, Retry, Session, Trust, XenApiError, vdi, vm};

fn member_of_host_0(call: &Call) -> Option<Reply> {
    (call.host == 1 && call.method == "session.login_with_password")
        .then(|| Reply::Failure(vec!["HOST_IS_SLAVE", "127.0.0.1"]))
}

#[tokio::test]
async fn x01_a_member_leads_to_the_coordinator_that_is_known() {
    let pool = Pool::start(Look { hosts: 2, ..Look::default() }, member_of_host_0).await;
    let session = Session::login(pool.options()).await.unwrap();
    let pins = session.pinned_hosts();
    assert_eq!(pins.hosts.len(), 2, "the member's certificate was learned from the coordinator");
    session.logout().await.unwrap();

    let session = Session::login(pool.options_with(1, Trust::Pins(pins.clone()))).await.unwrap();
    assert_eq!(session.coordinator(), format!("127.0.0.1:{}", pool.port));
    session.logout().await.unwrap();

    let mut foreign = pins;
    foreign.pool_uuid = Some("another".into());
    let error = Session::login(pool.options_with(1, Trust::Pins(foreign))).await.unwrap_err();
    assert!(matches!(error, XenApiError::WrongPool { .. }), "{error:?}");
    assert_eq!(pool.count("session.logout"), 3, "the session at the wrong pool was closed too");
}

#[tokio::test]
async fn x01_an_unconfirmed_coordinator_gets_no_password() {
    let pool = Pool::start(Look { hosts: 2, ..Look::default() }, member_of_host_0).await;
    let only_member = Trust::Fingerprint(pool.identities[1].fingerprint());
    let error = Session::login(pool.options_with(1, only_member)).await.unwrap_err();
    match &error {
        XenApiError::HostIsSlave { coordinator, found, .. } => {
            assert_eq!(*coordinator, format!("127.0.0.1:{}", pool.port));
            assert_eq!(*found, Some(pool.identities[0].fingerprint()));
        }
        other => panic!("{other:?}"),
    }
    assert!(pool.calls().iter().all(|call| call.host == 1));
    assert_eq!(error.retry(), Retry::Never);
}

#[tokio::test]
async fn x01_when_the_coordinator_is_gone_its_members_are_asked() {
    let failed_over = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&failed_over);
    let script = move |call: &Call| match (call.host, seen.load(Ordering::SeqCst)) {
        (1, 0) => member_of_host_0(call),
        _ => (call.method == "VM.get_all").then(|| Reply::Result(json!([]))),
    };
    let pool = Pool::start(Look { hosts: 2, ..Look::default() }, script).await;
    let session = Session::login(pool.options()).await.unwrap();
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    failed_over.store(1, Ordering::SeqCst);
    pool.kill(0);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_eq!(session.generation(), 2);
    assert_eq!(session.coordinator(), format!("127.0.0.2:{}", pool.port));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x01_a_member_that_can_not_be_verified_does_not_end_the_search() {
    let failed_over = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&failed_over);
    let script = move |call: &Call| match (call.method.as_str(), call.host, seen.load(Ordering::SeqCst)) {
        // Host 1 was down when the certificates were learned.
        ("host.get_server_certificate", _, _) if call.params[1] == json!(host_ref(1)) => {
            Some(Reply::Failure(vec!["HOST_OFFLINE"]))
        }
        (_, 2, 0) => member_of_host_0(call),
        ("VM.get_all", _, _) => Some(Reply::Result(json!([]))),
        _ => None,
    };
    let pool = Pool::start(Look { hosts: 3, ..Look::default() }, script).await;
    let session = Session::login(pool.options()).await.unwrap();
    failed_over.store(1, Ordering::SeqCst);
    pool.kill(0);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_eq!(session.coordinator(), format!("127.0.0.3:{}", pool.port));
    assert!(pool.calls().iter().all(|call| call.host != 1), "a stranger was told the password");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_logout_over_a_connection_that_just_closed_is_repeated() {
    let dropped = AtomicUsize::new(0);
    let pool = Pool::one(move |call| {
        (call.method == "session.logout" && dropped.fetch_add(1, Ordering::SeqCst) == 0).then(|| Reply::Steps(vec![]))
    })
    .await;
    let session = Session::login(pool.options()).await.unwrap();
    session.logout().await.unwrap();
    assert_eq!(pool.count("session.logout"), 2);
}

/// A pool that ends the first session after login.
fn ends_first_session(call: &Call) -> Option<Reply> {
    let own = ["VM.get_all", "VM.clone", "VM.get_record"].contains(&call.method.as_str());
    if own && call.params[0] == json!("OpaqueRef:session-1") {
        return Some(Reply::Failure(vec!["SESSION_INVALID", "OpaqueRef:session-1"]));
    }
    match call.method.as_str() {
        "VM.get_all" => Some(Reply::Result(json!(["OpaqueRef:vm"]))),
        "VM.clone" => Some(Reply::Result(json!("OpaqueRef:clone"))),
        _ => None,
    }
}

#[tokio::test]
async fn x03_a_read_is_repeated_after_a_new_login() {
    let pool = Pool::one(ends_first_session).await;
    let session = Session::login(pool.options()).await.unwrap();
    assert_eq!(session.generation(), 1);
    // Many calls that find it out at once log in once.
    let reads = (0..10).map(|_| vm::get_all(&session));
    for read in futures::future::join_all(reads).await {
        assert_eq!(read.unwrap(), [vm::Ref::new("OpaqueRef:vm")]);
    }
    assert_eq!(session.generation(), 2);
    assert_eq!(pool.count("session.login_with_password"), 2);
    session.logout().await.unwrap();
    assert!(matches!(vm::get_all(&session).await, Err(XenApiError::LoggedOut { .. })));
}

#[tokio::test]
async fn x03_work_is_not_repeated_by_itself() {
    let pool = Pool::one(ends_first_session).await;
    let session = Session::login(pool.options()).await.unwrap();
    let vm = vm::Ref::new("OpaqueRef:vm");
    let error = vm::clone(&session, &vm, "copy").await.unwrap_err();
    assert!(matches!(error, XenApiError::SessionInvalid { .. }), "{error:?}");
    assert_eq!(error.retry(), Retry::AfterLogin);
    assert!(!format!("{error:?} {error}").contains("session-1"));
    assert_eq!(pool.count("VM.clone"), 1);
    vm::clone(&session, &vm, "copy").await.unwrap();
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x07_a_busy_pool_is_asked_again_but_not_for_ever() {
    let left = Arc::new(AtomicUsize::new(2));
    let script = {
        let left = Arc::clone(&left);
        move |call: &Call| match call.method.as_str() {
            "VM.clone" if left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() => {
                Some(Reply::Failure(vec!["OTHER_OPERATION_IN_PROGRESS", "VM", "OpaqueRef:vm"]))
            }
            "VM.clone" => Some(Reply::Result(json!("OpaqueRef:clone"))),
            _ => None,
        }
    };
    let pool = Pool::one(script).await;
    let mut options = pool.options();
    options.limits.busy_attempts = 3;
    let session = Session::login(options).await.unwrap();
    let vm = vm::Ref::new("OpaqueRef:vm");
    vm::clone(&session, &vm, "copy").await.unwrap();
    assert_eq!(pool.count("VM.clone"), 3);
    left.store(100, Ordering::SeqCst);
    let error = vm::clone(&session, &vm, "copy").await.unwrap_err();
    assert_eq!(error.retry(), Retry::Later);
    assert_eq!(pool.count("VM.clone"), 6);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x07_calls_at_the_same_time_are_limited() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let script = {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        move |call: &Call| {
            (call.method == "VM.get_all").then(|| {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::yield_now();
                now.fetch_sub(1, Ordering::SeqCst);
                Reply::Result(json!([]))
            })
        }
    };
    let pool = Pool::one(script).await;
    let mut options = pool.options();
    options.limits.calls = 2;
    let session = Session::login(options).await.unwrap();
    futures::future::join_all((0..20).map(|_| vm::get_all(&session))).await;
    assert!(most.load(Ordering::SeqCst) <= 2);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn wrong_passwords_are_told_apart() {
    let pool = Pool::one(|call| {
        (call.method == "session.login_with_password")
            .then(|| Reply::Failure(vec!["SESSION_AUTHENTICATION_FAILED", "root", "Authentication failure"]))
    })
    .await;
    let error = Session::login(pool.options()).await.unwrap_err();
    assert!(matches!(error, XenApiError::LoginRefused { .. }), "{error:?}");
    assert_eq!(pool.count("session.login_with_password"), 1);
}

#[tokio::test]
async fn every_way_out_logs_out() {
    let pool = Pool::one(|_| None).await;
    // Dropped.
    let session = Session::login(pool.options()).await.unwrap();
    let other = session.clone();
    drop(session);
    assert_eq!(pool.count("session.logout"), 0);
    drop(other);
    pool.saw("session.logout", 1).await;
    // Cancelled during the login.
    let login = Session::login(pool.options());
    tokio::select! {
        biased;
        _ = login => {}
        () = pool.saw("session.login_with_password", 2) => {}
    }
    pool.saw("session.logout", 2).await;
    // Failed after the login.
    let bad =
        Pool::one(|call| (call.method == "host.get_all_records").then(|| Reply::Failure(vec!["INTERNAL_ERROR"]))).await;
    assert!(Session::login(bad.options()).await.is_err());
    assert_eq!(bad.count("session.logout"), 1);
}

#[tokio::test]
async fn hosts_without_json_are_spoken_to_in_xml() {
    let xml = |value: &str| {
        format!(
            "<?xml version=\"1.0\"?><methodResponse><params><param><value><struct><member><name>Status</name>\
             <value>Success</value></member><member><name>Value</name>{value}</member></struct></value></param></params>\
             </methodResponse>"
        )
        .into_bytes()
    };
    let pool = Pool::one(move |call| {
        let body = match (call.target.as_str(), call.method.as_str()) {
            ("/jsonrpc", _) => return Some(Reply::Http(404, vec![], vec![])),
            (_, "pool.get_all_records") => {
                "<value><struct><member><name>OpaqueRef:p</name><value><struct><member><name>uuid</name>\
                 <value>u</value></member></struct></value></member></struct></value>"
            }
            (_, "host.get_all_records") => "<value><struct></struct></value>",
            (_, "VM.get_all") => "<value><array><data><value>OpaqueRef:vm</value></data></array></value>",
            (_, "session.login_with_password") => "<value>OpaqueRef:session</value>",
            _ => "<value></value>",
        };
        Some(Reply::Http(200, vec![], xml(body)))
    })
    .await;
    let session = Session::login(pool.options()).await.unwrap();
    assert_eq!(vm::get_all(&session).await.unwrap().len(), 1);
    session.logout().await.unwrap();
    let mut only_json = pool.options();
    only_json.protocol = Protocol::Json;
    assert!(matches!(Session::login(only_json).await, Err(XenApiError::Status { status: 404, .. })));
}

#[tokio::test]
async fn responses_and_waits_are_bounded() {
    let pool = Pool::one(|call| match call.method.as_str() {
        "VM.get_all" => Some(Reply::Result(json!("x".repeat(100_000)))),
        "VDI.get_all" => Some(Reply::Steps(vec![scripted::Step::Hang])),
        _ => None,
    })
    .await;
    let mut options = pool.options();
    options.limits.response_bytes = 10_000;
    let session = Session::login(options).await.unwrap();
    let error = vm::get_all(&session).await.unwrap_err();
    assert!(matches!(error, XenApiError::ResponseTooLarge { limit: 10_000, .. }), "{error:?}");
    session.logout().await.unwrap();

    let mut options = pool.options();
    options.timeouts.read_call = Duration::from_secs(4);
    let session = Session::login(options).await.unwrap();
    let error = vdi::get_all(&session).await.unwrap_err();
    assert!(matches!(error, XenApiError::Timeout { .. }), "{error:?}");
    assert_eq!(error.retry(), Retry::Later);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_broken_connection_repeats_reads_only() {
    let pool =
        Pool::one(|call| ["VM.get_all", "VM.clone"].contains(&call.method.as_str()).then(|| Reply::Steps(vec![])))
            .await;
    let session = Session::login(pool.options()).await.unwrap();
    assert!(vm::get_all(&session).await.is_err());
    assert!(pool.count("VM.get_all") >= 2);
    let error = session.call("VM.clone", Repeat::Never, vec![]).await.unwrap_err();
    assert!(matches!(error, XenApiError::Connection { .. }), "{error:?}");
    assert_eq!(pool.count("VM.clone"), 1);
    session.logout().await.unwrap();
}
