//! Transfers: success only by task and length, early ends, redirections, and no more memory than is in flight.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use bytes::Bytes;
use futures::FutureExt;
use scripted::{Call, Look, Pool, Reply, Step, address, host_ref, task};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use xenvault_xenapi::transfer::{ExportFormat, export_raw_vdi, import_raw_vdi, import_raw_vdi_chunked};
use xenvault_xenapi::{Retry, Session, Trust, XenApiError, host, vdi};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\ntask-id:OpaqueRef:own-task\r\n\r\n";
const LATE_FAILURE: &[u8] = b"HTTP/1.1 500 Internal Error\r\ncontent-length: 4\r\n\r\noops";

fn disk() -> vdi::Ref {
    vdi::Ref::new("OpaqueRef:disk")
}

fn on(host: usize) -> host::Ref {
    host::Ref::new(&host_ref(host))
}

async fn session(hosts: usize, script: impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static) -> (Pool, Session) {
    let pool = Pool::start(Look { hosts, ..Look::default() }, script).await;
    let session = Session::login(pool.options()).await.unwrap();
    (pool, session)
}

/// An export that sends `body`, and a task that ends so.
fn exports(body: Vec<u8>, status: &'static str) -> impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static {
    move |call| match call.method.as_str() {
        "GET" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Send(body.clone())])),
        "task.get_record" if status == "success" => Some(task("success", "", &[])),
        "task.get_record" => Some(task("failure", "", &["VDI_IO_ERROR", "Device I/O errors"])),
        _ => None,
    }
}

async fn all(session: &Session, format: ExportFormat) -> (Vec<u8>, Result<(), XenApiError>) {
    let mut body = export_raw_vdi(session, &on(0), &disk(), format).await.unwrap();
    let mut bytes = Vec::new();
    while let Ok(Some(piece)) = body.next().await {
        bytes.extend_from_slice(&piece);
    }
    (bytes, body.finish().await)
}

#[tokio::test]
async fn an_export_counts_only_with_task_and_length() {
    let content = vec![7; 100_000];
    let raw = |virtual_size| ExportFormat::Raw { virtual_size };

    let (pool, session_) = session(1, exports(content.clone(), "success")).await;
    let (bytes, end) = all(&session_, raw(100_000)).await;
    assert!(bytes == content && end.is_ok(), "{end:?}");
    let (_, end) = all(&session_, raw(100_001)).await;
    assert!(matches!(end, Err(XenApiError::Length { expected: 100_001, found: 100_000, .. })), "{end:?}");
    let (bytes, end) = all(&session_, raw(99_999)).await;
    assert!(bytes.len() == 99_999 && matches!(end, Err(XenApiError::Length { .. })), "{end:?}");
    assert_eq!(pool.count("task.create"), pool.count("task.destroy"));
    session_.logout().await.unwrap();

    // All bytes, but a task that failed: not believed.
    let (_pool, session_) = session(1, exports(content.clone(), "failure")).await;
    let (_, end) = all(&session_, raw(100_000)).await;
    assert_eq!(end.unwrap_err().retry(), Retry::Later);
    session_.logout().await.unwrap();
}

#[tokio::test]
async fn x34_a_second_response_in_the_body_is_no_content() {
    let late = [vec![7; 1000], LATE_FAILURE.to_vec()].concat();
    let (_pool, session) = session(1, exports(late, "failure")).await;
    let (bytes, end) = all(&session, ExportFormat::Raw { virtual_size: 1000 }).await;
    assert_eq!(bytes, vec![7; 1000]);
    assert!(matches!(end, Err(XenApiError::Api { .. })), "{end:?}");
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x33_a_vhd_stream_ends_with_its_footer() {
    let footer = [b"conectix".to_vec(), vec![1; 504]].concat();
    let whole = [footer.clone(), vec![0; 5000], footer.clone()].concat();
    for (stream, good) in [(whole.clone(), true), (whole[..whole.len() - 1].to_vec(), false)] {
        let (_pool, session) = session(1, exports(stream, "success")).await;
        let (_, end) = all(&session, ExportFormat::Vhd { base: None }).await;
        assert_eq!(end.is_ok(), good, "{end:?}");
        session.logout().await.unwrap();
    }
}

#[tokio::test]
async fn x33_the_head_alone_can_be_read() {
    let (pool, session) = session(1, |call| match call.method.as_str() {
        "GET" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Send(vec![1; 4096]), Step::Hang])),
        "task.get_record" => Some(task("failure", "", &["VDI_IO_ERROR", "Device I/O errors"])),
        _ => None,
    })
    .await;
    let mut body = export_raw_vdi(&session, &on(0), &disk(), ExportFormat::Vhd { base: None }).await.unwrap();
    assert!(!body.next().await.unwrap().unwrap().is_empty());
    body.close().await.unwrap();
    // Dropping it does the same in the background.
    drop(export_raw_vdi(&session, &on(0), &disk(), ExportFormat::Vhd { base: Some(disk()) }).await.unwrap());
    session.logout().await.unwrap();
    assert_eq!((pool.count("task.create"), pool.count("task.destroy")), (2, 2));
    let gets: Vec<Call> = pool.calls().into_iter().filter(|call| call.method == "GET").collect();
    assert!(gets[0].target.contains("format=vhd") && gets[1].target.contains("base=OpaqueRef:disk"));
    assert!(gets.iter().all(|call| call.head.len() < 1000));
}

#[tokio::test]
async fn x02_redirections_are_followed_to_members_only() {
    let script = |call: &Call| match (call.method.as_str(), call.host) {
        ("GET" | "PUT", 0) => {
            let target = if call.target.contains("stranger") { "127.0.0.9".to_owned() } else { address(1) };
            let location = format!("https://{target}/export_raw_vdi?session_id=OpaqueRef:session-1");
            Some(Reply::Http(302, vec![("location", location)], vec![]))
        }
        ("GET", _) => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Send(vec![3; 10])])),
        ("PUT", _) => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Read(10)])),
        ("task.get_record", _) => Some(task("success", "", &[])),
        _ => None,
    };
    let (pool, session) = session(2, script).await;
    let (bytes, end) = all(&session, ExportFormat::Raw { virtual_size: 10 }).await;
    assert!(bytes == [3; 10] && end.is_ok(), "{end:?}");
    let mut import = import_raw_vdi(&session, &on(0), &disk(), 10).await.unwrap();
    import.write(Bytes::from_static(b"0123456789")).await.unwrap();
    import.finish().await.unwrap();
    assert_eq!(pool.uploads(), b"0123456789");

    let stranger = vdi::Ref::new("OpaqueRef:stranger");
    let error = export_raw_vdi(&session, &on(0), &stranger, ExportFormat::Raw { virtual_size: 1 }).await.unwrap_err();
    assert!(matches!(&error, XenApiError::UnknownHost { host } if host == "127.0.0.9"), "{error:?}");
    assert!(!format!("{error:?}").contains("session-1"));
    session.logout().await.unwrap();
    // One task for each transfer, wherever it ended up; the one that was never begun is ended by us.
    assert_eq!((pool.count("task.create"), pool.count("task.destroy")), (3, 3));
    assert_eq!((pool.count("task.set_status"), pool.count("task.cancel")), (1, 0));
}

#[tokio::test]
async fn chunks_go_out_as_hosts_want_them() {
    let (pool, session) = session(1, |call| match call.method.as_str() {
        "PUT" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::ReadChunks])),
        "task.get_record" => Some(task("success", "<value>OpaqueRef:disk</value>", &[])),
        _ => None,
    })
    .await;
    let mut import = import_raw_vdi_chunked(&session, &on(0), &disk()).await.unwrap();
    import.write(1 << 40, Bytes::from_static(b"abc")).await.unwrap();
    import.write(0, Bytes::new()).await.unwrap();
    assert_eq!(import.sent_bytes(), 3);
    import.finish().await.unwrap();
    let mut expected = (1_u64 << 40).to_le_bytes().to_vec();
    expected.extend([3, 0, 0, 0]);
    expected.extend(b"abc");
    expected.extend([0; 12]);
    assert_eq!(pool.uploads(), expected);
    let put = pool.calls().into_iter().find(|call| call.method == "PUT").unwrap();
    let head = put.head.to_lowercase();
    assert!(!head.contains("transfer-encoding") && !head.contains("content-length"), "{head}");
    assert!(put.target.contains("chunked=true"));
    session.logout().await.unwrap();
}

#[tokio::test]
async fn x34_a_reset_during_an_import_has_the_tasks_reason() {
    let (pool, session) = session(1, |call| match call.method.as_str() {
        "PUT" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Read(1000)])),
        "task.get_record" => Some(task("failure", "", &["VDI_IO_ERROR", "Device I/O errors"])),
        _ => None,
    })
    .await;
    let mut import = import_raw_vdi_chunked(&session, &on(0), &disk()).await.unwrap();
    let error = loop {
        if let Err(error) = import.write(0, Bytes::from(vec![0; 1 << 20])).await {
            break error;
        }
    };
    assert!(error.to_string().contains("VDI_IO_ERROR"), "{error:?}");
    assert!(import.write(0, Bytes::from_static(b"x")).await.is_err());
    assert!(import.finish().await.is_err());
    session.logout().await.unwrap();
    assert_eq!((pool.count("task.create"), pool.count("task.destroy")), (1, 1));
}

#[tokio::test]
async fn x34_a_host_that_does_not_read_holds_the_sender_back() {
    let pool = Pool::one(|call| match call.method.as_str() {
        "PUT" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Hang])),
        "task.get_record" => Some(task("cancelled", "", &[])),
        _ => None,
    })
    .await;
    let mut options = pool.options();
    options.timeouts.floor.window = Duration::from_secs(4);
    let session = Session::login(options).await.unwrap();
    let mut import = import_raw_vdi(&session, &on(0), &disk(), 1 << 40).await.unwrap();
    let piece = Bytes::from(vec![0; 1 << 20]);
    let mut pieces = 0;
    let error = loop {
        match import.write(piece.clone()).await {
            Ok(()) => pieces += 1,
            Err(error) => break error,
        }
    };
    assert!(pieces < 64, "{pieces} MiB were taken although nobody read them");
    assert!(matches!(error, XenApiError::TooSlow { .. } | XenApiError::Api { .. }), "{error:?}");
    drop(import);
    session.logout().await.unwrap();
}

#[tokio::test]
async fn nothing_is_sent_behind_a_write_that_was_dropped_half_way() {
    let (pool, session) = session(1, |call| match call.method.as_str() {
        "PUT" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Read(12), Step::Hang])),
        "task.get_record" => Some(task("cancelled", "", &[])),
        _ => None,
    })
    .await;
    let huge = Bytes::from(vec![1; 64 << 20]);
    let mut chunks = import_raw_vdi_chunked(&session, &on(0), &disk()).await.unwrap();
    tokio::select! {
        biased;
        _ = chunks.write(0, huge.clone()) => panic!("nobody read it"),
        () = async { while pool.uploads().len() < 12 { tokio::time::sleep(Duration::from_millis(5)).await } } => {}
    }
    let next = chunks.write(1 << 20, Bytes::from_static(b"x")).now_or_never();
    assert!(matches!(next, Some(Err(_))), "{next:?}");
    assert!(chunks.finish().await.is_err());
    let mut raw = import_raw_vdi(&session, &on(0), &disk(), 1 << 30).await.unwrap();
    assert!(raw.write(huge).now_or_never().is_none());
    let next = raw.write(Bytes::from_static(b"x")).now_or_never();
    assert!(matches!(next, Some(Err(_))), "{next:?}");
    assert!(raw.finish().await.is_err());
    session.logout().await.unwrap();
    assert_eq!((pool.count("task.create"), pool.count("task.destroy")), (2, 2));
}

#[tokio::test]
async fn imports_of_another_length_are_refused() {
    let (pool, session) = session(1, |call| match call.method.as_str() {
        "PUT" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Hang])),
        "task.get_record" => Some(task("cancelled", "", &[])),
        _ => None,
    })
    .await;
    let mut import = import_raw_vdi(&session, &on(0), &disk(), 5).await.unwrap();
    assert!(matches!(import.write(Bytes::from_static(b"123456")).await, Err(XenApiError::Length { .. })));
    import.write(Bytes::from_static(b"1234")).await.unwrap();
    assert!(matches!(import.finish().await, Err(XenApiError::Length { expected: 5, found: 4, .. })));
    session.logout().await.unwrap();
    assert_eq!((pool.count("task.cancel"), pool.count("task.destroy")), (1, 1));
}

#[tokio::test]
async fn refusals_tell_the_tasks_reason() {
    let (_pool, session_) = session(1, |call| match call.method.as_str() {
        "GET" => Some(Reply::Http(500, vec![], vec![])),
        "task.get_record" => Some(task("failure", "", &["HANDLE_INVALID", "VDI", "OpaqueRef:disk"])),
        _ => None,
    })
    .await;
    let format = ExportFormat::Raw { virtual_size: 1 };
    let error = export_raw_vdi(&session_, &on(0), &disk(), format.clone()).await.unwrap_err();
    assert!(error.to_string().contains("HANDLE_INVALID"), "{error:?}");

    let long = vdi::Ref::new(&"x".repeat(2000));
    let error = export_raw_vdi(&session_, &on(0), &long, format.clone()).await.unwrap_err();
    assert!(matches!(error, XenApiError::RequestHead { limit: 1000, .. }), "{error:?}");
    let stranger = host::Ref::new("OpaqueRef:nobody");
    let error = export_raw_vdi(&session_, &stranger, &disk(), format).await.unwrap_err();
    assert!(matches!(error, XenApiError::UnknownHost { .. }), "{error:?}");
    session_.logout().await.unwrap();
}

#[tokio::test]
async fn x03_a_session_that_ended_is_renewed_before_a_transfer() {
    let refused = AtomicUsize::new(0);
    let (pool, session) = session(1, move |call| match call.method.as_str() {
        "GET" if call.target.contains("session-1") => {
            refused.fetch_add(1, Ordering::SeqCst);
            Some(Reply::Http(401, vec![], vec![]))
        }
        "GET" => Some(Reply::Steps(vec![Step::Send(OK.to_vec()), Step::Send(vec![3; 10])])),
        "task.get_record" => Some(task("success", "", &[])),
        _ => None,
    })
    .await;
    let (bytes, end) = all(&session, ExportFormat::Raw { virtual_size: 10 }).await;
    assert!(bytes == [3; 10] && end.is_ok(), "{end:?}");
    assert_eq!(session.generation(), 2);
    session.logout().await.unwrap();
    assert_eq!(pool.count("task.create"), pool.count("task.destroy"));
}

#[tokio::test]
async fn a_members_changed_certificate_is_an_error_with_both_fingerprints() {
    let pool = Pool::start(Look { hosts: 2, ..Look::default() }, |_| None).await;
    let session = Session::login(pool.options()).await.unwrap();
    let mut pins = session.pinned_hosts();
    session.logout().await.unwrap();
    // What was confirmed once is not replaced by what the coordinator says now.
    let confirmed = scripted::Identity::new().fingerprint();
    pins.hosts.insert(address(1), confirmed);
    let session = Session::login(pool.options_with(0, Trust::Pins(pins))).await.unwrap();
    let format = ExportFormat::Raw { virtual_size: 1 };
    let error = export_raw_vdi(&session, &on(1), &disk(), format).await.unwrap_err();
    match error {
        XenApiError::Certificate { expected, found, .. } => {
            assert_eq!((expected, found), (Some(confirmed), pool.identities[1].fingerprint()));
        }
        other => panic!("{other:?}"),
    }
    assert!(pool.calls().iter().all(|call| call.host == 0));
    session.logout().await.unwrap();
    assert_eq!(pool.count("task.create"), pool.count("task.destroy"));
}
