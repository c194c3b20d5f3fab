//! Transport: connections that are kept, a limit for each phase, the floor under the speed, and pools that are away for
//! a while.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use bytes::Bytes;
use scripted::{Call, Look, Pool, Reply, Step, host_ref, task};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use xenvault_xenapi::transfer::{ExportFormat, export_raw_vdi, import_raw_vdi_chunked};
use xenvault_xenapi::{Floor, Phase, Protocol, Repeat, Retry, Session, Trust, Value, XenApiError, host, vdi, vm};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
const SECOND: Duration = Duration::from_secs(1);

fn lists_vms(call: &Call) -> Option<Reply> {
    match call.method.as_str() {
        "VM.get_all" => Some(Reply::Result(json!(["OpaqueRef:vm"]))),
        "VM.clone" => Some(Reply::Result(json!("OpaqueRef:clone"))),
        _ => None,
    }
}

#[tokio::test]
async fn calls_share_the_connections_that_are_open() {
    let pool = Pool::one(lists_vms).await;
    let session = Session::login(pool.options()).await.unwrap();
    for _ in 0..50 {
        vm::get_all(&session).await.unwrap();
    }
    session.logout().await.unwrap();
    assert_eq!(pool.count("VM.get_all"), 50);
    assert_eq!(pool.connections(), 1, "login, calls and logout need one connection");

    let mut options = pool.options();
    options.limits.calls = 4;
    let session = Session::login(options).await.unwrap();
    for _ in 0..5 {
        for answer in futures::future::join_all((0..40).map(|_| vm::get_all(&session))).await {
            answer.unwrap();
        }
    }
    session.logout().await.unwrap();
    assert!(pool.connections() <= 1 + 4, "{} connections for 4 calls at a time", pool.connections());
}

#[tokio::test]
async fn a_host_that_does_not_do_tls_is_given_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let identity = scripted::Identity::new();
    let pool = Pool::one(lists_vms).await;
    let mut options = pool.options_with(0, Trust::Fingerprint(identity.fingerprint()));
    options.url = format!("https://127.0.0.1:{port}");
    options.timeouts.tls = SECOND;
    let error = Session::login(options).await.unwrap_err();
    assert!(matches!(error, XenApiError::Timeout { phase: Phase::Tls, waited: SECOND, .. }), "{error:?}");
}

fn floor(bytes: u64) -> Floor {
    Floor { bytes, window: 2 * SECOND }
}

/// A pool whose answers and transfers move one byte at a time.
fn drips(call: &Call) -> Option<Reply> {
    let drip = |head: &[u8], pause| {
        let body = Step::Repeat(b"x".to_vec(), usize::MAX, pause);
        Some(Reply::Steps(vec![Step::Send(head.to_vec()), body]))
    };
    match call.method.as_str() {
        "VM.get_all" => drip(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n", SECOND / 4),
        "VM.get_all_records" => drip(b"HTTP/1.1 200 OK\r\nx: ", SECOND / 4),
        "GET" => drip(OK, SECOND / 4),
        "PUT" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Sip(SECOND / 4)])),
        "task.get_record" => Some(task("cancelled", "", &[])),
        _ => None,
    }
}

#[tokio::test]
async fn a_server_that_sends_or_takes_a_byte_now_and_then_is_given_up() {
    let pool = Pool::one(drips).await;
    let mut options = pool.options();
    options.timeouts.floor = floor(1000);
    options.timeouts.read_call = 3 * SECOND;
    let session = Session::login(options).await.unwrap();
    let began = Instant::now();
    let slow = |error: &XenApiError, phase| {
        assert!(
            matches!(error, XenApiError::TooSlow { phase: found, least_bytes: 1000, .. } if *found == phase),
            "{error:?}"
        );
        assert_eq!(error.retry(), Retry::Later);
        assert!(error.to_string().contains("fewer than 1000 bytes moved within 2 s"), "{error}");
    };
    let error = session.call("VM.get_all", Repeat::Never, vec![]).await.unwrap_err();
    slow(&error, Phase::Body);
    // A head that does not end has the limit of the answer.
    let error = session.call("VM.get_all_records", Repeat::Never, vec![]).await.unwrap_err();
    assert!(matches!(error, XenApiError::Timeout { phase: Phase::Response, .. }), "{error:?}");

    let (host, disk) = (host::Ref::new(&host_ref(0)), vdi::Ref::new("OpaqueRef:disk"));
    let format = ExportFormat::Raw { virtual_size: 1 << 20 };
    let mut export = export_raw_vdi(&session, &host, &disk, format).await.unwrap();
    let error = loop {
        match export.next().await {
            Ok(piece) => assert!(piece.is_some()),
            Err(error) => break error,
        }
    };
    slow(&error, Phase::Body);
    drop(export);

    let mut import = import_raw_vdi_chunked(&session, &host, &disk).await.unwrap();
    let piece = Bytes::from(vec![1; 64 << 20]);
    // The task knows more than the connection, where it ended.
    let error = import.write(0, piece).await.unwrap_err();
    assert!(matches!(error, XenApiError::Api { .. }), "{error:?}");
    drop(import);
    session.logout().await.unwrap();
    assert!(began.elapsed() < 60 * SECOND, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_slow_but_honest_answer_of_256_mib_passes() {
    const PIECES: usize = 255;
    let json = |call: &Call| {
        let (begin, end) = (format!("{{\"id\":{},\"result\":\"", call.id), "\"}".to_owned());
        let length = begin.len() + (PIECES << 20) + end.len();
        vec![
            Step::Send(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{begin}").into_bytes()),
            Step::Repeat(vec![b'x'; 1 << 20], PIECES, SECOND / 50),
            Step::Send(end.into_bytes()),
        ]
    };
    let pool = Pool::one(move |call| match call.method.as_str() {
        "VM.get_all" => Some(Reply::Steps(json(call))),
        "GET" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Repeat(vec![b'x'; 1 << 20], 256, SECOND / 50)])),
        "task.get_record" => Some(task("success", "", &[])),
        _ => None,
    })
    .await;
    let mut options = pool.options();
    options.protocol = Protocol::Json;
    options.timeouts.floor = Floor { bytes: 256 << 10, window: 5 * SECOND };
    let session = Session::login(options).await.unwrap();
    match session.call("VM.get_all", Repeat::Never, vec![]).await.unwrap() {
        Value::String(text) => assert_eq!(text.len(), PIECES << 20),
        other => panic!("{}", other.kind()),
    }
    let (host, disk) = (host::Ref::new(&host_ref(0)), vdi::Ref::new("OpaqueRef:disk"));
    let format = ExportFormat::Raw { virtual_size: 256 << 20 };
    let mut export = export_raw_vdi(&session, &host, &disk, format).await.unwrap();
    while export.next().await.unwrap().is_some() {}
    assert_eq!(export.received_bytes(), 256 << 20);
    export.finish().await.unwrap();
    session.logout().await.unwrap();
}

/// The states of a toolstack that restarts: refusing connections is done by killing the host.
const UP: usize = 0;
const CLOSES: usize = 1;
const BOOTS: usize = 2;
const BACK: usize = 3;

/// A pool that is in one of these states. The first session ends with the restart.
async fn restarting() -> (Arc<Pool>, Arc<AtomicUsize>) {
    let state = Arc::new(AtomicUsize::new(UP));
    let seen = Arc::clone(&state);
    let script = move |call: &Call| match seen.load(Ordering::SeqCst) {
        CLOSES => Some(Reply::Steps(vec![])),
        BOOTS => Some(Reply::Failure(vec!["HOST_STILL_BOOTING"])),
        BACK if call.method.starts_with("VM.") && call.params[0] == json!("OpaqueRef:session-1") => {
            Some(Reply::Failure(vec!["SESSION_INVALID", "OpaqueRef:session-1"]))
        }
        _ => lists_vms(call),
    };
    (Arc::new(Pool::start(Look::default(), script).await), state)
}

#[tokio::test]
async fn a_restart_of_the_toolstack_is_waited_out_and_the_session_renewed_once() {
    let (pool, state) = restarting().await;
    let mut options = pool.options();
    options.timeouts.outage = 60 * SECOND;
    let session = Session::login(options).await.unwrap();
    let course = {
        let (pool, state) = (Arc::clone(&pool), Arc::clone(&state));
        async move {
            tokio::time::sleep(SECOND / 2).await;
            state.store(CLOSES, Ordering::SeqCst);
            pool.revive(0).await;
            tokio::time::sleep(SECOND / 2).await;
            state.store(BOOTS, Ordering::SeqCst);
            tokio::time::sleep(SECOND / 2).await;
            state.store(BACK, Ordering::SeqCst);
        }
    };
    pool.kill_and_wait(0).await;
    let course = tokio::spawn(course);
    let reads = futures::future::join_all((0..8).map(|_| vm::get_all(&session)));
    for read in reads.await {
        assert_eq!(read.unwrap().len(), 1);
    }
    course.await.unwrap();
    assert_eq!(session.generation(), 2, "one login for all of them");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn work_that_was_not_sent_waits_too_and_work_that_may_have_been_is_reported() {
    let (pool, state) = restarting().await;
    let mut options = pool.options();
    options.timeouts.outage = 60 * SECOND;
    let session = Session::login(options).await.unwrap();
    let vm = vm::Ref::new("OpaqueRef:vm");
    state.store(CLOSES, Ordering::SeqCst);
    let error = vm::clone(&session, &vm, "copy").await.unwrap_err();
    assert!(matches!(error, XenApiError::Connection { .. }), "{error:?}");
    assert_eq!((pool.count("VM.clone"), error.retry()), (1, Retry::Later));

    pool.kill_and_wait(0).await;
    let (seen, again) = (Arc::clone(&state), Arc::clone(&pool));
    let back = tokio::spawn(async move {
        tokio::time::sleep(SECOND).await;
        seen.store(UP, Ordering::SeqCst);
        again.revive(0).await;
    });
    vm::clone(&session, &vm, "copy").await.unwrap();
    assert_eq!(pool.count("VM.clone"), 2);
    back.await.unwrap();
    session.logout().await.unwrap();
}

#[tokio::test]
async fn a_pool_that_stays_away_is_waited_for_once_and_not_by_every_call() {
    let (pool, _) = restarting().await;
    let mut options = pool.options();
    options.timeouts.outage = 2 * SECOND;
    let session = Session::login(options).await.unwrap();
    pool.kill_and_wait(0).await;
    let began = Instant::now();
    let error = vm::get_all(&session).await.unwrap_err();
    assert!(matches!(error, XenApiError::Connection { .. }), "{error:?}");
    assert!(began.elapsed() >= 2 * SECOND, "{:?}", began.elapsed());
    let began = Instant::now();
    for _ in 0..20 {
        vm::get_all(&session).await.unwrap_err();
    }
    assert!(began.elapsed() < 20 * SECOND, "{:?}", began.elapsed());
    // It counts anew once the pool has answered.
    pool.revive(0).await;
    vm::get_all(&session).await.unwrap();
    session.logout().await.unwrap();
}
