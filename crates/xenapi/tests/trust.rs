//! Trust: only the confirmed certificate, only with its own key, and nothing secret before that is known.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use scripted::{Look, Pool, Reply};
use xenvault_xenapi::{
    ConnectOptions, PinnedHosts, Session, Trust, XenApiError, event, fetch_certificates, vdi_nbd_server_info, vm,
};

#[tokio::test]
async fn the_pinned_certificate_is_enough() {
    let pool = Pool::one(|_| None).await;
    let session = Session::login(pool.options()).await.unwrap();
    assert_eq!(session.pool_uuid(), scripted::POOL);
    let pins = session.pinned_hosts();
    assert_eq!(pins.hosts["127.0.0.1"], pool.identities[0].fingerprint());
    assert_eq!(pins.pool_uuid.as_deref(), Some(scripted::POOL));
    session.logout().await.unwrap();
    // What was learned serves as trust later.
    let session = Session::login(pool.options_with(0, Trust::Pins(pins))).await.unwrap();
    session.logout().await.unwrap();
    assert_eq!((pool.count("session.login_with_password"), pool.count("session.logout")), (2, 2));
}

#[tokio::test]
async fn another_certificate_is_refused_with_both_fingerprints() {
    let pool = Pool::one(|_| None).await;
    let other = scripted::Identity::new().fingerprint();
    let error = Session::login(pool.options_with(0, Trust::Fingerprint(other))).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, XenApiError::Certificate { .. }), "{error:?}");
    assert!(
        text.contains(&other.to_string()) && text.contains(&pool.identities[0].fingerprint().to_string()),
        "{text}"
    );
    assert!(pool.calls().is_empty());
}

#[tokio::test]
async fn the_right_certificate_with_another_key_is_refused() {
    const OLD: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12];
    const NEW: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];
    for versions in [OLD, NEW] {
        let look = Look { wrong_key: true, versions, ..Look::default() };
        let pool = Pool::start(look, |_| None).await;
        let error = Session::login(pool.options()).await.unwrap_err();
        assert!(matches!(error, XenApiError::Tls { .. }), "{error:?}");
        assert!(fetch_certificates(&pool.url(0)).await.is_err());
        assert!(pool.calls().is_empty());
    }
}

#[tokio::test]
async fn certificates_can_be_looked_at_first() {
    let pool = Pool::one(|_| None).await;
    let shown = fetch_certificates(&pool.url(0)).await.unwrap();
    assert_eq!(shown.host, format!("127.0.0.1:{}", pool.port));
    assert_eq!(shown.chain[0].fingerprint, pool.identities[0].fingerprint());
    assert!(pool.calls().is_empty());
    assert!(matches!(fetch_certificates("http://127.0.0.1").await, Err(XenApiError::Url { .. })));
}

#[tokio::test]
async fn hosts_without_a_known_certificate_are_not_asked() {
    let pool = Pool::one(|_| None).await;
    let error = Session::login(pool.options_with(0, Trust::Pins(PinnedHosts::default()))).await.unwrap_err();
    assert!(matches!(error, XenApiError::UnknownHost { .. }), "{error:?}");
}

#[tokio::test]
async fn clear_text_has_to_be_chosen() {
    let pool = Pool::one(|_| None).await;
    let fingerprint = Trust::Fingerprint(pool.identities[0].fingerprint());
    let plain = ConnectOptions::new("http://127.0.0.1:1", "root", "x", fingerprint);
    assert!(matches!(Session::login(plain).await, Err(XenApiError::Url { .. })));
    let secure = ConnectOptions::new("https://127.0.0.1:1", "root", "x", Trust::PlainHttp);
    assert!(matches!(Session::login(secure).await, Err(XenApiError::Url { .. })));
}

#[tokio::test]
async fn a_ca_file_vouches_for_names() {
    let pool = Pool::one(|_| None).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    std::fs::write(&path, pool.identities[0].pem()).unwrap();
    // The host's own certificate is a CA without a name: no CA rule accepts it as a host's.
    let error = Session::login(pool.options_with(0, Trust::CaFile(path.clone()))).await.unwrap_err();
    assert!(matches!(error, XenApiError::Tls { .. }), "{error:?}");
    std::fs::write(&path, "nothing").unwrap();
    let error = Session::login(pool.options_with(0, Trust::CaFile(path))).await.unwrap_err();
    assert!(matches!(error, XenApiError::Trust { .. }), "{error:?}");
}

#[test]
fn secrets_are_not_shown() {
    let options = ConnectOptions::new("https://x", "root", "hunter2", Trust::PlainHttp);
    assert!(!format!("{options:?}").contains("hunter2"));
    let info = vdi_nbd_server_info::Record { exportname: "/x?session_id=hunter2".into(), ..Default::default() };
    assert!(!format!("{info:?}").contains("hunter2"));
    let event = event::Event {
        class: "session".into(),
        operation: event::Operation::Add,
        reference: "OpaqueRef:hunter2".into(),
        snapshot: None,
    };
    assert!(!format!("{event:?}").contains("hunter2"));
}

#[tokio::test]
async fn failures_do_not_repeat_secrets() {
    let pool = Pool::one(|call| match call.method.as_str() {
        "VM.get_all" => Some(Reply::Failure(vec!["INTERNAL_ERROR", "read_missing(session, OpaqueRef:session-1)"])),
        "VM.get_all_records" => Some(Reply::Failure(vec!["HANDLE_INVALID", "session", "OpaqueRef:another-one"])),
        _ => None,
    })
    .await;
    let session = Session::login(pool.options()).await.unwrap();
    let first = vm::get_all(&session).await.unwrap_err();
    assert!(first.to_string().contains("read_missing") && !format!("{first:?}").contains("session-1"), "{first:?}");
    let second = vm::get_all_records(&session).await.unwrap_err();
    assert!(!format!("{second} {second:?}").contains("another-one"), "{second:?}");
    session.logout().await.unwrap();
    let echo = Pool::one(|call| match call.method.as_str() {
        "session.login_with_password" => Some(Reply::Failure(vec!["INTERNAL_ERROR", "root, correct horse"])),
        _ => None,
    })
    .await;
    let error = Session::login(echo.options()).await.unwrap_err();
    assert!(!format!("{error} {error:?}").contains(scripted::PASSWORD), "{error:?}");
}
