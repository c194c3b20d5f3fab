//! The edges of a fail-over: a coordinator that moves in steps, members that are in no state to help, and searches that end.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use futures::FutureExt;
use scripted::{Call, Look, Pool, Reply, Step};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use xenvault_xenapi::tasks::{WaitOptions, wait};
use xenvault_xenapi::{CancellationToken, KnownPool, Repeat, Retry, Session, Trust, XenApiError, task, vm};

const SECOND: Duration = Duration::from_secs(1);

/// Generous: the machine may be slow.
const PATIENT: Duration = Duration::from_secs(120);

/// Set by a test when its pool changes.
type Switch = Arc<AtomicUsize>;

fn is_login(call: &Call) -> bool {
    call.method == "session.login_with_password"
}

fn fails(code: &'static str) -> Option<Reply> {
    Some(Reply::Failure(vec![code]))
}

/// What a host says whose coordinator is host `coordinator`.
fn member_of(coordinator: usize) -> Option<Reply> {
    Some(Reply::Failure(vec!["HOST_IS_SLAVE", ["127.0.0.1", "127.0.0.2", "127.0.0.3"][coordinator]]))
}

/// A pool that lists no VMs, with these exceptions, which hear what the switch says.
async fn pool(
    hosts: usize,
    script: impl Fn(&Call, usize) -> Option<Reply> + Send + Sync + 'static,
) -> (Arc<Pool>, Switch) {
    let switch = Switch::default();
    let seen = Arc::clone(&switch);
    let answers = move |call: &Call| {
        let other = || (call.method == "VM.get_all").then(|| Reply::Result(json!([])));
        script(call, seen.load(Ordering::SeqCst)).or_else(other)
    };
    (Arc::new(Pool::start(Look { hosts, ..Look::default() }, answers).await), switch)
}

async fn login(pool: &Pool, outage: Duration) -> Session {
    let mut options = pool.options();
    options.timeouts.outage = outage;
    let session = Session::login(options).await.unwrap();
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    session
}

fn assert_at(session: &Session, pool: &Pool, host: usize) {
    assert_eq!(session.coordinator(), format!("{}:{}", scripted::address(host), pool.port));
}

/// Once the switch is set, host 0 is a member of host 1, whose logins fail as `coming_up` says, each one by its number.
fn hands_over(
    coming_up: impl Fn(usize) -> Option<Reply> + Send + Sync + 'static,
) -> impl Fn(&Call, usize) -> Option<Reply> + Send + Sync + 'static {
    let logins = AtomicUsize::new(0);
    move |call, moved| match (call.host, moved) {
        (1, 0) if is_login(call) => member_of(0),
        (0, 1) => member_of(1),
        (1, 1) if is_login(call) => coming_up(logins.fetch_add(1, Ordering::SeqCst)),
        _ => None,
    }
}

#[tokio::test]
async fn x01_a_new_coordinator_that_still_boots_is_waited_for() {
    let (pool, moved) = pool(2, hands_over(|login| if login < 3 { fails("HOST_STILL_BOOTING") } else { None })).await;
    let session = login(&pool, PATIENT).await;
    moved.store(1, Ordering::SeqCst);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 1);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x01_work_that_was_sent_away_waits_for_the_new_coordinator_too() {
    let boots = hands_over(|login| if login < 3 { fails("HOST_STILL_BOOTING") } else { None });
    let (pool, moved) = pool(2, move |call, moved| match call.method.as_str() {
        "VM.clone" if call.host == 1 => Some(Reply::Result(json!("OpaqueRef:clone"))),
        _ => boots(call, moved),
    })
    .await;
    let session = login(&pool, PATIENT).await;
    moved.store(1, Ordering::SeqCst);
    vm::clone(&session, &vm::Ref::new("OpaqueRef:vm"), "copy").await.unwrap();
    let asked: Vec<usize> =
        pool.calls().iter().filter(|call| call.method == "VM.clone").map(|call| call.host).collect();
    assert_eq!(asked, [0, 1]);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x01_a_new_coordinator_whose_port_is_closed_is_waited_for() {
    let (pool, moved) = pool(2, hands_over(|_| None)).await;
    let session = login(&pool, PATIENT).await;
    pool.kill_and_wait(1).await;
    moved.store(1, Ordering::SeqCst);
    let revived = async {
        // The old one has sent it away, and the new one does not listen yet.
        pool.saw("VM.get_all", 2).await;
        pool.saw("session.login_with_password", 3).await;
        pool.revive(1).await;
    };
    let (read, ()) = tokio::join!(vm::get_all(&session), revived);
    assert!(read.unwrap().is_empty());
    assert_at(&session, &pool, 1);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_session_that_ended_is_renewed_when_the_pool_is_back() {
    let ended = AtomicUsize::new(0);
    let (pool, switch) = pool(1, move |call, on| {
        let first = call.params.first() == Some(&json!("OpaqueRef:session-1"));
        match call.method.as_str() {
            "VM.get_all" if on == 1 && first => Some(Reply::Failure(vec!["SESSION_INVALID", "OpaqueRef:session-1"])),
            // The toolstack goes away for a moment.
            "session.login_with_password" if on == 1 && ended.fetch_add(1, Ordering::SeqCst) < 3 => {
                Some(Reply::Steps(vec![]))
            }
            _ => None,
        }
    })
    .await;
    let session = login(&pool, PATIENT).await;
    switch.store(1, Ordering::SeqCst);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_eq!(session.generation(), 2);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_pool_that_comes_back_in_steps_is_waited_for() {
    let cut = AtomicUsize::new(0);
    let (pool, steps) = pool(1, move |call, on| {
        let cuts = call.method == "VM.get_all" && on == 1 && cut.fetch_add(1, Ordering::SeqCst) < 5;
        cuts.then(|| Reply::Steps(vec![]))
    })
    .await;
    let session = login(&pool, PATIENT).await;
    steps.store(1, Ordering::SeqCst);
    // Logins work, the first calls after them are cut.
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert!(session.generation() > 2);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x01_a_host_that_boots_for_longer_than_a_busy_pool_is_asked_does_not_hide_the_new_coordinator() {
    let (pool, moved) = pool(2, |call, moved| match (call.host, moved) {
        (1, 0) if is_login(call) => member_of(0),
        (0, 1) => fails("HOST_STILL_BOOTING"),
        _ => None,
    })
    .await;
    let mut options = pool.options();
    options.timeouts.outage = PATIENT;
    options.limits.busy_attempts = 2;
    let session = Session::login(options).await.unwrap();
    moved.store(1, Ordering::SeqCst);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 1);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_coordinator_that_boots_is_waited_for_longer_than_a_busy_pool_is_asked() {
    let asked = AtomicUsize::new(0);
    let (pool, boots) = pool(1, move |_, on| {
        let still = on == 1 && asked.fetch_add(1, Ordering::SeqCst) < 12;
        still.then(|| Reply::Failure(vec!["HOST_STILL_BOOTING"]))
    })
    .await;
    let session = login(&pool, PATIENT).await;
    boots.store(1, Ordering::SeqCst);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_pool_that_boots_for_ever_is_given_up_with_what_it_says() {
    let (pool, boots) = pool(1, |_, on| if on == 1 { fails("HOST_STILL_BOOTING") } else { None }).await;
    let mut options = pool.options();
    options.timeouts.outage = SECOND;
    options.limits.busy_attempts = 1;
    let session = Session::login(options).await.unwrap();
    boots.store(1, Ordering::SeqCst);
    let began = Instant::now();
    let error = vm::get_all(&session).await.unwrap_err();
    assert_eq!(error.code().unwrap().as_str(), "HOST_STILL_BOOTING");
    assert!(began.elapsed() >= SECOND, "{:?}", began.elapsed());
    // It is waited for once and not by every call.
    let asked = pool.count("session.login_with_password");
    vm::get_all(&session).await.unwrap_err();
    assert_eq!(pool.count("session.login_with_password"), asked);
}

/// The coordinator is dead, host 1 says `code` to everything, host 2 has taken over.
async fn finds_host_2_past(code: &'static str) {
    let (pool, moved) = pool(3, move |call, moved| match (call.host, moved) {
        (1 | 2, 0) if is_login(call) => member_of(0),
        (1, 1) => fails(code),
        _ => None,
    })
    .await;
    let session = login(&pool, PATIENT).await;
    moved.store(1, Ordering::SeqCst);
    pool.kill_and_wait(0).await;
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 2);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x01_a_member_in_emergency_mode_does_not_end_the_search() {
    for code in ["HOST_STILL_BOOTING", "HOST_IN_EMERGENCY_MODE", "HA_HOST_CANNOT_SEE_PEERS", "INTERNAL_ERROR"] {
        finds_host_2_past(code).await;
    }
}

#[tokio::test]
async fn x01_a_coordinator_that_lost_its_pool_is_left_for_the_new_one() {
    let (pool, moved) = pool(2, |call, moved| match (call.host, moved) {
        (1, 0) if is_login(call) => member_of(0),
        (0, 1) => fails("HA_HOST_CANNOT_ACCESS_STATEFILE"),
        _ => None,
    })
    .await;
    let session = login(&pool, PATIENT).await;
    moved.store(1, Ordering::SeqCst);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 1);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x01_a_member_with_a_new_certificate_does_not_end_the_search() {
    let (pool, moved) = pool(3, |call, moved| match (call.host, moved) {
        (1 | 2, 0) if is_login(call) => member_of(0),
        _ => None,
    })
    .await;
    let session = login(&pool, PATIENT).await;
    pool.kill_and_wait(1).await;
    pool.revive_with_another_certificate(1).await;
    let told = |host: usize| pool.calls().iter().filter(|call| call.host == host).count();
    let before = told(1);
    moved.store(1, Ordering::SeqCst);
    pool.kill_and_wait(0).await;
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 2);
    assert_eq!(told(1), before, "a host with an unknown certificate is told nothing");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x01_a_remembered_host_that_left_the_pool_does_not_end_the_search() {
    let (pool, _) = pool(3, |call, _| match (call.host, call.method.as_str()) {
        // Host 1 was put out and is a pool of its own now.
        (1, "pool.get_all_records") => Some(Reply::Result(json!({"OpaqueRef:pool": {"uuid": "its own"}}))),
        _ => None,
    })
    .await;
    let known = login(&pool, Duration::ZERO).await;
    let pins = known.pinned_hosts();
    known.logout().await.unwrap();
    pool.kill_and_wait(0).await;
    let session = Session::login(pool.options_with(0, Trust::Pins(pins))).await.unwrap();
    assert_at(&session, &pool, 2);
    session.logout().await.unwrap();
    assert_eq!(pool.count("session.logout"), pool.count("session.login_with_password"), "also of the other pool");
}

#[tokio::test]
async fn a_wrong_password_ends_the_search() {
    let (pool, _) = pool(2, |call, _| {
        let refused = call.host == 1 && is_login(call);
        refused.then(|| Reply::Failure(vec!["SESSION_AUTHENTICATION_FAILED", "root"]))
    })
    .await;
    let mut pins = xenvault_xenapi::PinnedHosts::default();
    for host in 0..2 {
        pins.hosts.insert(scripted::address(host), pool.identities[host].fingerprint());
    }
    pool.kill_and_wait(0).await;
    let mut options = pool.options_with(0, Trust::Pins(pins));
    options.known = KnownPool { pool_uuid: Some(scripted::POOL.to_owned()), addresses: vec![] };
    let error = Session::login(options).await.unwrap_err();
    assert!(matches!(error, XenApiError::LoginRefused { .. }), "{error:?}");
    assert_eq!((pool.count("session.login_with_password"), error.retry()), (1, Retry::Never));
}

#[tokio::test]
async fn a_search_among_silent_members_ends_in_time_also_for_many_calls() {
    let (pool, gone) = pool(9, |_, gone| (gone == 1).then(|| Reply::Steps(vec![Step::Hang]))).await;
    let mut options = pool.options();
    options.timeouts.outage = 4 * SECOND;
    options.timeouts.read_call = 4 * SECOND;
    let session = Session::login(options).await.unwrap();
    gone.store(1, Ordering::SeqCst);
    let began = Instant::now();
    for read in futures::future::join_all((0..8).map(|_| vm::get_all(&session))).await {
        assert!(matches!(read, Err(XenApiError::Timeout { .. })), "{read:?}");
    }
    // One silent call, and the passes of one search: not one for each member or call.
    assert!(began.elapsed() < 30 * SECOND, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_silent_coordinator_does_not_hold_up_the_search_among_its_members() {
    let (pool, moved) = pool(4, |call, moved| match (call.host, moved) {
        (1..=3, 0) if is_login(call) => member_of(0),
        (0 | 1, 1) => Some(Reply::Steps(vec![Step::Hang])),
        // It has not heard of the new coordinator yet.
        (2, 1) if is_login(call) => member_of(0),
        _ => None,
    })
    .await;
    let mut options = pool.options();
    options.timeouts.outage = PATIENT;
    options.timeouts.read_call = 8 * SECOND;
    let session = Session::login(options).await.unwrap();
    moved.store(1, Ordering::SeqCst);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 3);
    let asked = |host| pool.calls().iter().filter(|call| call.host == host && is_login(call)).count();
    assert_eq!((asked(0), asked(1)), (2, 1), "once in the search, however many members name it");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_login_that_comes_too_late_is_logged_out() {
    let (pool, moved) = pool(2, |call, moved| match (call.host, moved) {
        (1, 0) if is_login(call) => member_of(0),
        // The old coordinator is slow, not dead: it lets us in when the new one already did.
        (0, 1) if is_login(call) => {
            let answer = json!({"jsonrpc": "2.0", "result": "OpaqueRef:late", "id": call.id}).to_string();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
            Some(Reply::Steps(vec![Step::Repeat(Vec::new(), 1, 8 * SECOND), Step::Send((head + &answer).into_bytes())]))
        }
        (0, 1) if call.method == "VM.get_all" => Some(Reply::Steps(vec![])),
        _ => None,
    })
    .await;
    let session = login(&pool, PATIENT).await;
    moved.store(1, Ordering::SeqCst);
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 1);
    session.logout().await.unwrap();
    let late = |call: &Call| call.method == "session.logout" && call.params[0] == json!("OpaqueRef:late");
    assert!(pool.calls().iter().any(late), "{:?}", pool.methods());
}

#[tokio::test]
async fn a_renewal_waits_for_no_certificates_and_learns_missing_ones_afterwards() {
    let (pool, moved) = pool(3, |call, moved| match (call.method.as_str(), moved) {
        ("session.login_with_password", 0) if call.host > 0 => member_of(0),
        // Host 2 was down at the first login.
        ("host.get_server_certificate", 0) if call.params[1] == json!(scripted::host_ref(2)) => fails("HOST_OFFLINE"),
        // Host 0 has just died: the new coordinator waits for it.
        ("host.get_server_certificate", 1) if call.params[1] == json!(scripted::host_ref(0)) => {
            Some(Reply::Steps(vec![Step::Hang]))
        }
        _ => None,
    })
    .await;
    let session = login(&pool, PATIENT).await;
    let pinned = || session.pinned_hosts().hosts.len();
    assert_eq!((pinned(), pool.count("host.get_server_certificate")), (2, 3));
    moved.store(1, Ordering::SeqCst);
    pool.kill_and_wait(0).await;
    assert!(vm::get_all(&session).await.unwrap().is_empty());
    assert_at(&session, &pool, 1);
    assert!(session.members()[0].fingerprint.is_some());
    pool.saw("host.get_server_certificate", 4).await;
    let learned = async {
        while pinned() < 3 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENT, learned).await.unwrap();
    let asked = pool.calls().into_iter().filter(|call| call.method == "host.get_server_certificate");
    let hosts: Vec<_> = asked.skip(3).map(|call| call.params[1].clone()).collect();
    assert_eq!(hosts, [json!(scripted::host_ref(2))]);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x06_the_wait_for_a_task_goes_through_a_fail_over_in_two_phases_and_does_not_cancel_the_task() {
    let boots = hands_over(|login| if login < 3 { fails("HOST_STILL_BOOTING") } else { None });
    let (pool, moved) = pool(2, move |call, moved| match (call.host, call.method.as_str()) {
        (1, "task.get_record") => Some(scripted::task("success", "<value>OpaqueRef:snapshot</value>", &[])),
        (0, "task.get_record") if moved == 0 => Some(scripted::task("pending", "", &[])),
        (0, "event.from") if moved == 0 => {
            Some(Reply::Result(json!({"events": [], "token": "1", "valid_ref_counts": {}})))
        }
        (1, "event.from") => fails("EVENT_FROM_TOKEN_PARSE_FAILURE"),
        _ => boots(call, moved),
    })
    .await;
    let session = login(&pool, PATIENT).await;
    let cancel = CancellationToken::new();
    let task = task::Ref::new("OpaqueRef:task");
    let waiting = wait::<vm::Ref>(&session, task, WaitOptions::of("VM.snapshot"), &cancel);
    let moving = async {
        pool.saw("event.from", 1).await;
        moved.store(1, Ordering::SeqCst);
    };
    let (done, ()) = tokio::join!(waiting.boxed(), moving);
    assert_eq!(done.unwrap(), vm::Ref::new("OpaqueRef:snapshot"));
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (0, 1));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_call_is_not_repeated_for_ever_by_a_pool_that_lets_in_and_sends_away() {
    let (pool, moved) = pool(1, |call, on| {
        (on == 1 && !is_login(call) && call.method.starts_with("VM."))
            .then(|| Reply::Failure(vec!["HOST_IS_SLAVE", "127.0.0.1"]))
    })
    .await;
    let session = login(&pool, SECOND).await;
    moved.store(1, Ordering::SeqCst);
    let error = session.call("VM.get_all", Repeat::Harmless, vec![]).await.unwrap_err();
    assert_eq!(error.code().unwrap().as_str(), "HOST_IS_SLAVE");
    assert!(pool.count("VM.get_all") < 10, "{}", pool.count("VM.get_all"));
    session.logout().await.unwrap();
}
