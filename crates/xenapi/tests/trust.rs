//! Trust: only the confirmed certificate, only with its own key, and nothing secret before that is known.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use scripted::{Call, Look, Pool, Reply};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use xenvault_xenapi::{
    ConnectOptions, KnownPool, PinnedHosts, Retry, Session, Trust, XenApiError, event, fetch_certificates,
    vdi_nbd_server_info, vm,
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

/// Two hosts: after `moved`, host 1 is the coordinator and host 0 is away.
fn moves(moved: &Arc<AtomicBool>) -> impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static {
    let moved = Arc::clone(moved);
    move |call| {
        (call.host == 1 && call.method == "session.login_with_password" && !moved.load(Ordering::SeqCst))
            .then(|| Reply::Failure(vec!["HOST_IS_SLAVE", "127.0.0.1"]))
    }
}

#[tokio::test]
async fn x01_the_first_login_of_a_process_finds_the_coordinator_among_the_members_of_before() {
    let moved = Arc::new(AtomicBool::new(false));
    let pool = Pool::start(Look { hosts: 2, ..Look::default() }, moves(&moved)).await;
    let session = Session::login(pool.options()).await.unwrap();
    let pins = session.pinned_hosts();
    session.logout().await.unwrap();
    moved.store(true, Ordering::SeqCst);
    pool.kill_and_wait(0).await;

    let session = Session::login(pool.options_with(0, Trust::Pins(pins.clone()))).await.unwrap();
    assert_eq!(session.coordinator(), format!("127.0.0.2:{}", pool.port));
    session.logout().await.unwrap();
    // Each with its own certificate: the coordinator's is no trust in the member.
    let mut wrong = pins;
    wrong.hosts.insert("127.0.0.2".into(), pool.identities[0].fingerprint());
    let before = pool.calls().len();
    let error = Session::login(pool.options_with(0, Trust::Pins(wrong))).await.unwrap_err();
    assert!(matches!(error, XenApiError::Connection { .. } | XenApiError::Certificate { .. }), "{error:?}");
    assert_eq!(pool.calls().len(), before, "a host with another certificate was told something");
}

#[tokio::test]
async fn an_authority_vouches_for_hosts_and_known_members_are_asked_when_the_coordinator_is_silent() {
    let moved = Arc::new(AtomicBool::new(false));
    let (identities, authority) = scripted::Identity::signed(2);
    let pool = Pool::start_as(identities, Look { hosts: 2, ..Look::default() }, moves(&moved)).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca.pem");
    std::fs::write(&path, &authority).unwrap();
    let options = || pool.options_with(0, Trust::CaFile(path.clone()));

    let session = Session::login(options()).await.unwrap();
    let known = session.known_pool();
    assert_eq!(known.addresses, ["127.0.0.1", "127.0.0.2"]);
    session.logout().await.unwrap();

    moved.store(true, Ordering::SeqCst);
    pool.kill_and_wait(0).await;
    assert!(Session::login(options()).await.is_err(), "nobody knows another host");
    let session = Session::login(ConnectOptions { known: known.clone(), ..options() }).await.unwrap();
    assert_eq!(session.coordinator(), format!("127.0.0.2:{}", pool.port));
    session.logout().await.unwrap();
    let foreign = KnownPool { pool_uuid: Some("another pool".into()), ..known };
    let error = Session::login(ConnectOptions { known: foreign, ..options() }).await.unwrap_err();
    assert!(matches!(error, XenApiError::WrongPool { .. }) || error.is_silence(), "{error:?}");
}

/// What the child process of the test below does: the variables that name the system's store are read from its own
/// environment only.
const ADDRESS: &str = "XENVAULT_TEST_POOL";

#[tokio::test]
async fn the_authorities_of_the_machine_vouch_for_hosts() {
    if let Ok(url) = std::env::var(ADDRESS) {
        let options = ConnectOptions::new(&url, "root", scripted::PASSWORD, Trust::SystemRoots);
        match Session::login(options).await {
            Ok(session) => session.logout().await.unwrap(),
            Err(error) => panic!("login failed: {error:?}"),
        }
        return;
    }
    let (identities, authority) = scripted::Identity::signed(1);
    let (_, other) = scripted::Identity::signed(1);
    let pool = Pool::start_as(identities, Look::default(), |_| None).await;
    let folder = tempfile::tempdir().unwrap();
    let run = async |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let mut own = tokio::process::Command::new(std::env::current_exe().unwrap());
        own.args(["--exact", "the_authorities_of_the_machine_vouch_for_hosts", "--nocapture"]);
        own.env("SSL_CERT_FILE", path).env_remove("SSL_CERT_DIR").env(ADDRESS, pool.url(0));
        let output = own.output().await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), said)
    };
    let (ok, said) = run("right.pem", &authority).await;
    assert!(ok, "{said}");
    assert_eq!(pool.count("session.logout"), 1);
    let (ok, said) = run("other.pem", &other).await;
    assert!(!ok && said.contains("InvalidCertificate"), "{said}");
    let (ok, said) = run("empty.pem", "").await;
    assert!(!ok && said.contains("the system's store of certificates"), "{said}");
    assert_eq!(pool.count("session.login_with_password"), 1);
}

#[tokio::test]
async fn a_certificate_that_changes_in_mid_session_stops_it_with_both_fingerprints() {
    let pool = Pool::one(|call| (call.method == "VM.get_all").then(|| Reply::Result(serde_json::json!([])))).await;
    let mut options = pool.options();
    options.timeouts.outage = Duration::from_secs(60);
    let session = Session::login(options).await.unwrap();
    vm::get_all(&session).await.unwrap();
    pool.kill_and_wait(0).await;
    let found = pool.revive_with_another_certificate(0).await.fingerprint();
    let before = pool.calls().len();
    let error = vm::get_all(&session).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, XenApiError::Certificate { .. }), "{error:?}");
    for fingerprint in [pool.identities[0].fingerprint(), found] {
        assert!(text.contains(&fingerprint.to_string()), "{text}");
    }
    assert_eq!((error.retry(), pool.calls().len()), (Retry::Never, before));
    assert!(session.logout().await.is_err());
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
