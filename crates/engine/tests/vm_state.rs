//! What a VM's state means for its backup: something else that goes on with it, a passed-through USB device, a move to
//! another host.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Lab, MIB, Recorder, data_disk, name, noise};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use xenvault_engine::{BackupRequest, Engine, EngineError, EngineOptions, FindingKind, Level};
use xenvault_sim::{SimOptions, SimPool, SrSpec, VmSpec, storage::SrKind};
use xenvault_store::{Repository, Secret};
use xenvault_xenapi::{ConnectOptions, Session, Trust};

/// A pool without TLS on its API, so that a test can be one of its clients byte by byte.
async fn plain_lab(operation_wait: Duration) -> Lab {
    let vm = VmSpec::new("vm-1").disk(data_disk(64 * MIB, 64 * MIB));
    let sim = SimPool::start(SimOptions { vms: vec![vm], plain_http: true, ..Default::default() }).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = ConnectOptions::new(&sim.url(), sim.user(), sim.password(), Trust::PlainHttp);
    let session = Session::login(options).await.unwrap();
    let secret = Secret::new("passphrase");
    let repository = Repository::init(&folder.path().join("repo"), &secret, Default::default()).await.unwrap();
    let monitor = Arc::new(Recorder::default());
    let mut options = EngineOptions::new(folder.path().join("state")).with_monitor(Arc::clone(&monitor) as _);
    options.operation_wait = operation_wait;
    let engine = Engine::open(session.clone(), Some(repository.clone()), options).unwrap();
    Lab { sim, session, repository, engine, monitor, folder }
}

/// Another client exports the VM and does not read on, so that the export lasts as long as this connection.
async fn export_of_another_client(lab: &Lab) -> TcpStream {
    let login = base64_of(&format!("{}:{}", lab.sim.user(), lab.sim.password()));
    let authority = lab.sim.url().trim_start_matches("http://").trim_end_matches('/').to_owned();
    let mut stream = TcpStream::connect(&authority).await.unwrap();
    let uuid = lab.sim.vm("vm-1").unwrap().uuid;
    let head = format!("GET /export?uuid={uuid} HTTP/1.1\r\nHost: {authority}\r\nAuthorization: Basic {login}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.0 200");
    assert_eq!(operations(lab).len(), 1);
    stream
}

fn base64_of(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut encoded = String::new();
    for group in text.as_bytes().chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, at| (bits << 8) | u32::from(group.get(at).copied().unwrap_or(0)));
        for digit in 0..4 {
            let letter = char::from(DIGITS[(bits >> (18 - 6 * digit)) as usize & 63]);
            encoded.push(if digit <= group.len() { letter } else { '=' });
        }
    }
    encoded
}

/// What goes on with the VM.
fn operations(lab: &Lab) -> Vec<String> {
    let record = lab.sim.record("VM", &lab.sim.vm("vm-1").unwrap().uuid).unwrap();
    let running = record["current_operations"].as_object().unwrap();
    running.values().map(|name| name.as_str().unwrap().to_owned()).collect()
}

/// The finding that a backup is refused with.
async fn refusal(lab: &Lab) -> (String, String) {
    match lab.fails().await {
        EngineError::Prerequisite { finding } => {
            assert_eq!(finding.kind, FindingKind::SnapshotNotAllowed, "{finding:?}");
            (finding.text, finding.remedy)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x32_what_goes_on_with_a_vm_is_waited_for_before_its_snapshot() {
    // The wait is ended by the other client, never by this limit.
    let lab = plain_lab(Duration::from_secs(3600)).await;
    let stream = export_of_another_client(&lab).await;
    let other = async {
        // Asked, refused, and asked again.
        while lab.calls("VM.update_allowed_operations") < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!((operations(&lab), lab.calls("VM.snapshot")), (vec!["export".to_owned()], 0));
        drop(stream);
    };
    let (report, ()) = tokio::join!(lab.incremental(), other);
    assert_eq!((report.level, report.warnings.len()), (Level::Full, 0), "{:?}", report.warnings);
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x32_a_vm_that_stays_busy_is_refused_after_the_wait_with_what_goes_on() {
    let lab = plain_lab(Duration::from_secs(2)).await;
    let stream = export_of_another_client(&lab).await;
    let (text, remedy) = refusal(&lab).await;
    assert!(text.contains("while it does export"), "{text}");
    assert!(remedy.contains("wait"), "{remedy}");
    assert!(lab.calls("VM.update_allowed_operations") >= 2, "it was asked once only");
    assert_eq!(lab.calls("VM.snapshot"), 0);
    assert_eq!(lab.points().await, 0);
    drop(stream);
    // The host notices at its next write.
    while !operations(&lab).is_empty() {
        tokio::task::yield_now().await;
    }
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn x32_a_usb_device_that_is_passed_through_is_named_and_its_remedy_helps() {
    let lab = Lab::small().await;
    let uuid = lab.sim.vm("vm-1").unwrap().uuid;
    let vm = lab.reference("VM", &uuid).await;
    let device = lab.call("VUSB.create", &[vm, json!("OpaqueRef:of-a-usb-group"), json!({})]).await;
    let (text, remedy) = refusal(&lab).await;
    assert!(text.contains("USB device"), "{text}");
    assert!(remedy.contains(&format!("xe vusb-list vm-uuid={uuid}")) && remedy.contains("xe vusb-destroy"), "{remedy}");
    assert_eq!(lab.calls("VM.snapshot"), 0);
    lab.call("VUSB.destroy", &[device]).await;
    let report = lab.incremental().await;
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn x20_a_move_between_hosts_that_share_the_sr_keeps_the_base() {
    let options = SimOptions {
        hosts: 2,
        srs: vec![SrSpec::new("shared", SrKind::Ext)],
        vms: vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 4 * MIB)).running()],
        ..Default::default()
    };
    let lab = Lab::new(options).await;
    let place = || lab.sim.record("VM", &lab.sim.vm("vm-1").unwrap().uuid).unwrap()["resident_on"].clone();
    lab.incremental().await;
    let before: Value = place();
    lab.write(MIB, &noise(1, 100_000));
    lab.sim.migrate_vm("vm-1", if before == host(&lab, 0).await { 1 } else { 0 }).await.unwrap();
    assert_ne!(place(), before);
    lab.write(9 * MIB, &noise(2, 100_000));
    let report = lab.engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap();
    assert_eq!((report.level, report.reason.as_str()), (Level::Incremental, "changed-blocks"));
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

async fn host(lab: &Lab, index: usize) -> Value {
    lab.reference("host", &lab.sim.hosts()[index].uuid).await
}
