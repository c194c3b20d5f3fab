//! What the client does about every error code of the table: what is repeated and how often, what is redirected or
//! renewed, and what reaches the caller in which form.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use futures::StreamExt;
use scripted::{Call, Look, Pool, Reply, task};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use xenvault_xenapi::tasks::{WaitOptions, wait};
use xenvault_xenapi::{
    CancellationToken, Classified, FailureClass, Missing, Repeat, Retry, Session, Trust, Value, XenApiError,
    task as tasks,
};

/// Attempts of a call that the pool refuses because it is busy, in these tests.
const ATTEMPTS: usize = 3;

/// Codes that even work is sent again for, since the pool began nothing.
const TURNED_AWAY: [&str; 4] =
    ["HOST_STILL_BOOTING", "OTHER_OPERATION_IN_PROGRESS", "TOO_BUSY", "TOO_MANY_PENDING_TASKS"];

/// What a class means, said once more and independently of the code.
struct Expected {
    class: FailureClass,
    /// How often a call that may be repeated is sent, if the code is not one of those above.
    sent: usize,
    retry: Retry,
}

const EXPECTED: [Expected; 8] = [
    Expected { class: FailureClass::RetryNow, sent: ATTEMPTS, retry: Retry::Later },
    Expected { class: FailureClass::WhenFree, sent: 1, retry: Retry::Later },
    Expected { class: FailureClass::Later, sent: 1, retry: Retry::Later },
    Expected { class: FailureClass::Redirect, sent: 2, retry: Retry::Later },
    Expected { class: FailureClass::RenewSession, sent: 2, retry: Retry::AfterLogin },
    Expected { class: FailureClass::FallBack, sent: 1, retry: Retry::Never },
    Expected { class: FailureClass::NotSupported, sent: 1, retry: Retry::Never },
    Expected { class: FailureClass::Permanent, sent: 1, retry: Retry::Never },
];

fn expected(class: FailureClass) -> &'static Expected {
    EXPECTED.iter().find(|expected| expected.class == class).unwrap()
}

fn leaked(code: &str) -> &'static str {
    FailureClass::table().iter().find(|row| row.code == code).map_or("UNKNOWN", |row| row.code)
}

/// A pool whose calls `Test.call` fail with the code that they are given.
fn fails_as_told(call: &Call) -> Option<Reply> {
    let code = || leaked(call.params[1].as_str().unwrap());
    match call.method.as_str() {
        "Test.call" => Some(Reply::Failure(vec![code(), "first", "second"])),
        "task.get_record" => {
            let code = leaked(call.params[1].as_str().unwrap().trim_start_matches("OpaqueRef:"));
            Some(task("failure", "", &[code, "first", "second"]))
        }
        "event.from" => Some(Reply::Failure(vec!["MESSAGE_METHOD_UNKNOWN", "event.from"])),
        "host.get_all_records" => {
            let software = json!({"product_brand": "XCP-ng", "product_version": "7.6.0"});
            let host = json!({"uuid": "h", "address": "127.0.0.1", "software_version": software});
            Some(Reply::Result(json!({ scripted::host_ref(0): host })))
        }
        _ => None,
    }
}

async fn session(pool: &Pool) -> Session {
    let mut options = pool.options();
    options.limits.busy_attempts = u32::try_from(ATTEMPTS).unwrap();
    options.limits.calls = 64;
    Session::login(options).await.unwrap()
}

fn sent(pool: &Pool, code: &str, mark: &str) -> usize {
    let of = |call: &&Call| call.method == "Test.call" && call.params[1] == code && call.params[2] == mark;
    pool.calls().iter().filter(of).count()
}

fn assert_reported(row: &Classified, error: &XenApiError, operation: &str) {
    let Classified { code, class, .. } = row;
    assert_eq!(error.code().unwrap().as_str(), *code);
    assert_eq!((error.class(), error.retry()), (Some(*class), expected(*class).retry), "{code}");
    assert_eq!(FailureClass::of(code), *class);
    match error {
        XenApiError::NotSupported(unsupported) => {
            assert_eq!(*class, FailureClass::NotSupported, "{code}");
            assert_eq!(unsupported.server.to_string(), "XCP-ng 7.6.0");
            let text = error.to_string();
            assert!(text.contains("XCP-ng 7.6.0") && text.contains(code) && text.contains(operation), "{text}");
            let named = match &unsupported.missing {
                Missing::Method(name) | Missing::Feature(name) | Missing::StorageOperation(name) => name,
                other => panic!("{other:?}"),
            };
            assert!(!named.is_empty());
        }
        XenApiError::Api { .. } => assert_ne!(*class, FailureClass::NotSupported, "{code}"),
        other => panic!("{code}: {other:?}"),
    }
}

#[tokio::test]
async fn x07_every_code_is_repeated_as_often_as_its_class_says_and_reported_as_what_it_is() {
    let pool = Pool::one(fails_as_told).await;
    let session = session(&pool).await;
    let own = [FailureClass::Redirect, FailureClass::RenewSession];
    let rows = || FailureClass::table().iter().filter(|row| !own.contains(&row.class));
    let both = rows().flat_map(|row| [(row, Repeat::Harmless, "harmless"), (row, Repeat::Never, "work")]);
    let checks = futures::stream::iter(both).map(|(row, repeat, mark)| {
        let (pool, session) = (&pool, &session);
        async move {
            let arguments = vec![Value::from(row.code), Value::from(mark)];
            let error = session.call("Test.call", repeat, arguments).await.unwrap_err();
            assert_reported(row, &error, "Test.call");
            let times = match (TURNED_AWAY.contains(&row.code), repeat) {
                (true, _) => ATTEMPTS,
                (false, Repeat::Harmless) => expected(row.class).sent,
                (false, Repeat::Never) => 1,
            };
            assert_eq!(sent(pool, row.code, mark), times, "{} ({mark})", row.code);
        }
    });
    assert_eq!(checks.buffer_unordered(64).count().await, 2 * rows().count());
    assert_eq!(session.generation(), 1, "none of these asks for a login");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn failures_of_tasks_have_the_same_classes() {
    let pool = Pool::one(fails_as_told).await;
    let session = session(&pool).await;
    let checks = futures::stream::iter(FailureClass::table()).map(|row| {
        let session = &session;
        async move {
            let reference = tasks::Ref::new(&format!("OpaqueRef:{}", row.code));
            let options = WaitOptions::of("VDI.enable_cbt");
            let error = wait::<()>(session, reference, options, &CancellationToken::new()).await.unwrap_err();
            assert_reported(row, &error, "VDI.enable_cbt");
        }
    });
    assert_eq!(checks.buffer_unordered(16).count().await, FailureClass::table().len());
    assert_eq!(session.generation(), 1);
    session.logout().await.unwrap();
}

/// A pool that fails the first `times` calls with `code` and then gives a result.
async fn fails_first(code: &'static str, times: usize) -> Pool {
    let left = Arc::new(AtomicUsize::new(times));
    let script = move |call: &Call| {
        let failing = || left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        (call.method == "Test.call").then(|| match failing() {
            true => Reply::Failure(vec![code, "127.0.0.1"]),
            false => Reply::Result(json!("done")),
        })
    };
    Pool::start(Look::default(), script).await
}

#[tokio::test]
async fn what_passes_by_itself_is_not_seen_by_the_caller() {
    for code in TURNED_AWAY.into_iter().chain(["SR_BACKEND_FAILURE_201", "HOST_IS_SLAVE", "SESSION_INVALID"]) {
        let pool = fails_first(code, 1).await;
        let session = session(&pool).await;
        let done = session.call("Test.call", Repeat::Harmless, vec![]).await;
        assert_eq!(done.unwrap(), Value::from("done"), "{code}");
        assert_eq!(pool.count("Test.call"), 2, "{code}");
        session.logout().await.unwrap();
    }
}

#[tokio::test]
async fn x01_a_coordinator_that_became_a_member_begins_nothing_so_even_work_goes_to_the_new_one() {
    let moved = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&moved);
    let script = move |call: &Call| {
        let coordinator = seen.load(Ordering::SeqCst);
        let asks = ["session.login_with_password", "Test.call"].contains(&call.method.as_str());
        match (asks && call.host != coordinator, call.method.as_str()) {
            (true, _) => {
                Some(Reply::Failure(vec!["HOST_IS_SLAVE", if coordinator == 0 { "127.0.0.1" } else { "127.0.0.2" }]))
            }
            (false, "Test.call") => Some(Reply::Result(json!("done"))),
            _ => None,
        }
    };
    let pool = Pool::start(Look { hosts: 2, ..Look::default() }, script).await;
    let session = session(&pool).await;
    moved.store(1, Ordering::SeqCst);
    assert_eq!(session.call("Test.call", Repeat::Never, vec![]).await.unwrap(), Value::from("done"));
    let asked: Vec<usize> =
        pool.calls().iter().filter(|call| call.method == "Test.call").map(|call| call.host).collect();
    assert_eq!(asked, [0, 1]);
    assert_eq!((session.generation(), session.coordinator()), (2, format!("127.0.0.2:{}", pool.port)));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn redirection_and_renewal_end_after_one_try_each() {
    let pool = fails_first("HOST_IS_SLAVE", usize::MAX).await;
    let one = session(&pool).await;
    let error = one.call("Test.call", Repeat::Harmless, vec![]).await.unwrap_err();
    assert_eq!((error.class(), error.retry()), (Some(FailureClass::Redirect), Retry::Later));
    let of = expected(FailureClass::Redirect);
    assert_eq!((pool.count("Test.call"), pool.count("session.login_with_password")), (of.sent, 2));
    one.logout().await.unwrap();

    let pool = fails_first("SESSION_INVALID", usize::MAX).await;
    let one = session(&pool).await;
    let error = one.call("Test.call", Repeat::Harmless, vec![]).await.unwrap_err();
    assert!(matches!(error, XenApiError::SessionInvalid { .. }), "{error:?}");
    let of = expected(FailureClass::RenewSession);
    assert_eq!((pool.count("Test.call"), pool.count("session.login_with_password")), (of.sent, 2));
    assert_eq!(error.retry(), of.retry);
    // Work is not repeated by itself.
    let error = one.call("Test.call", Repeat::Never, vec![]).await.unwrap_err();
    assert!(matches!(error, XenApiError::SessionInvalid { .. }), "{error:?}");
    assert_eq!(pool.count("Test.call"), of.sent + 1);
    one.logout().await.unwrap();
}

#[tokio::test]
async fn x09_a_login_that_the_licence_forbids_is_not_supported_before_the_version_is_known() {
    let pool = Pool::one(|call| {
        (call.method == "pool.get_all_records").then(|| Reply::Failure(vec!["LICENSE_RESTRICTION", "RBAC"]))
    })
    .await;
    let trust = Trust::Fingerprint(pool.identities[0].fingerprint());
    let error = Session::login(pool.options_with(0, trust)).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("a server of unknown version") && text.contains("does not include RBAC"), "{text}");
}

#[test]
fn every_class_is_expected_once_and_used() {
    let mut used: BTreeMap<FailureClass, usize> = BTreeMap::new();
    for row in FailureClass::table() {
        *used.entry(row.class).or_default() += 1;
    }
    assert_eq!(used.len(), EXPECTED.len());
    assert!(EXPECTED.iter().all(|expected| used.contains_key(&expected.class)));
}
