//! What an operator or a pool can get wrong, seen from the command line: the message says what to do, the exit code
//! tells scripts, nothing is left in the pool, the repository is intact.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    missing_docs,
    reason = "a test ends with a panic, and its helpers too"
)]

mod common;

use common::{Bench, assert_fails, disk, one_vm};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde_json::json;
use std::sync::Arc;
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskSpec, Fault, FaultEffect, NbdAccess, SimOptions, SrSpec, VmSpec};

/// A refused job leaves pool and repository as they were.
fn assert_untouched(bench: &Bench) {
    bench.assert_pool_is_clean();
    assert_eq!(bench.bases(), 0);
    bench.assert_repository_intact();
}

#[test]
fn a_wrong_password() {
    let bench = Bench::start(one_vm());
    let mut program = bench.program("xenvault-datamover");
    program.arg("--json").arg("backup").args(bench.backup_arguments("web")).env("XENVAULT_PASSWORD", "not it");
    let finished = xenvault_tests::programs::finish(&mut program, "").unwrap();
    assert_fails(&finished, 3, &["refuses the user name or the password"]);
    assert!(!format!("{finished:?}").contains("not it"), "a password is never shown");
    assert_untouched(&bench);
}

#[test]
fn a_wrong_fingerprint_shows_both() {
    let bench = Bench::start(one_vm());
    let wrong = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    let mut arguments = bench.backup_arguments("web");
    let at = arguments.iter().position(|argument| argument == "--fingerprint").unwrap();
    arguments[at + 1] = wrong.to_owned();
    let finished = bench.datamover("backup", &arguments);
    assert_eq!(finished.code, Some(4), "{finished:?}");
    // Whatever separates the digits.
    let said: String = finished.stderr.to_lowercase().replace([':', ' '], "");
    assert!(said.contains(wrong), "{finished:?}");
    assert!(said.contains(&bench.pool.fingerprint()), "{finished:?}");
    assert_eq!(bench.pool.counters().calls.get("session.login_with_password"), None, "the password was not sent");
    assert_untouched(&bench);
}

/// Serves a certificate whatever key signs for it.
#[derive(Debug)]
struct Impostor(Arc<CertifiedKey>);

impl ResolvesServerCert for Impostor {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

#[test]
fn the_right_certificate_with_the_wrong_private_key() {
    let bench = Bench::start(one_vm());
    let hosts = bench.pool.records("host");
    let pem = bench
        .runtime
        .block_on(bench.pool.call("host.get_server_certificate", &[json!(hosts.keys().next().unwrap())]))
        .unwrap();
    let certificate = CertificateDer::from_pem_slice(pem.as_str().unwrap().as_bytes()).unwrap();
    let key = PrivateKeyDer::try_from(rcgen::KeyPair::generate().unwrap().serialize_der()).unwrap();
    let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
    let impostor = Impostor(Arc::new(CertifiedKey::new(vec![certificate], key)));
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(impostor));
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = bench.runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let accepted = bench.runtime.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            assert!(acceptor.accept(stream).await.is_err(), "a client went on with an impostor");
        }
    });

    let mut arguments = bench.backup_arguments("web");
    let at = arguments.iter().position(|argument| argument == "--pool").unwrap();
    arguments[at + 1] = format!("https://{address}");
    let finished = bench.datamover("backup", &arguments);
    assert_fails(&finished, 4, &["TLS handshake"]);
    assert!(!accepted.is_finished(), "the impostor got through");
    assert_untouched(&bench);
}

#[test]
fn an_unknown_vm() {
    let bench = Bench::start(one_vm());
    assert_fails(&bench.try_backup("no such VM"), 5, &["no such VM", "no VM with the name or UUID"]);
    assert_untouched(&bench);
}

#[test]
fn two_vms_of_one_name() {
    let vm = || VmSpec::new("twin").disk(disk(16 << 20, 1 << 20));
    let bench = Bench::start(SimOptions { vms: vec![vm(), vm()], ..SimOptions::default() });
    let uuids: Vec<String> = bench.pool.vms().into_iter().map(|vm| vm.uuid).collect();
    assert_fails(&bench.try_backup("twin"), 5, &[&uuids[0], &uuids[1], "use one of the UUIDs"]);
    assert_untouched(&bench);
    assert_eq!(bench.backup(&uuids[1])["vm_uuid"], uuids[1].as_str());
}

#[test]
fn a_vm_without_disks() {
    let mut with_cd = VmSpec::new("only a cd");
    with_cd.cd = true;
    let bench = Bench::start(SimOptions { vms: vec![VmSpec::new("empty"), with_cd], ..SimOptions::default() });
    assert_fails(&bench.try_backup("empty"), 6, &["has no disk", "nothing to back up"]);
    assert_fails(&bench.try_backup("only a cd"), 6, &["has no disk", "CD"]);
    assert_untouched(&bench);
}

#[test]
fn a_vm_with_a_cd_is_backed_up_without_it() {
    let mut options = one_vm();
    options.vms[0].cd = true;
    let bench = Bench::start(options);
    let report = bench.backup("web");
    assert_eq!(report["disks"].as_array().unwrap().len(), 1);
    assert!(report["skipped"][0]["reason"].as_str().unwrap().contains("CD"), "{report}");
    bench.assert_pool_is_clean();
    bench.assert_repository_intact();
}

#[test]
fn a_disk_on_an_sr_without_cbt_is_read_as_a_whole_each_time() {
    let bench = Bench::start(one_vm());
    // What xapi answers for an SR type without the feature.
    let sr = bench.pool.srs().remove(0).uuid;
    let effect = FaultEffect::Error { code: "SR_OPERATION_NOT_SUPPORTED".to_owned(), params: vec![sr] };
    bench.pool.fault(Fault::always("VDI.enable_cbt", effect));
    for _ in 0..2 {
        let report = bench.backup("web");
        assert_eq!(report["level"], "FULL", "{report}");
        bench.assert_pool_is_clean();
        assert_eq!(bench.bases(), 0);
        let point = report["point"].as_str().unwrap();
        assert!(bench.restored_disk(point, "0") == bench.guest_disk("web", "0", 64 << 20));
    }
}

#[test]
fn a_licence_without_cbt() {
    let bench = Bench::start(SimOptions { restrictions: vec!["restrict_cbt".to_owned()], ..one_vm() });
    bench.backup("web");
    let report = bench.backup("web");
    assert_eq!(report["disks"][0]["reason"], "cbt-unsupported", "{report}");
    bench.assert_pool_is_clean();
    bench.assert_repository_intact();
}

#[test]
fn a_raw_disk_that_can_not_be_snapshotted() {
    let srs = vec![SrSpec::new("raw", SrKind::LvmRaw)];
    let bench = Bench::start(SimOptions { srs, ..one_vm() });
    assert_fails(&bench.try_backup("web"), 6, &["makes no snapshot", "raw disks"]);
    assert_untouched(&bench);
}

#[test]
fn nbd_is_not_enabled_on_any_network() {
    let bench = Bench::start(SimOptions { nbd: NbdAccess::Off, ..one_vm() });
    assert_fails(&bench.try_backup("web"), 6, &["nbd", "xe network-param-add"]);
    assert_untouched(&bench);
}

#[test]
fn nbd_in_clear_text_needs_consent() {
    let bench = Bench::start(SimOptions { nbd: NbdAccess::Insecure, ..one_vm() });
    assert_fails(&bench.try_backup("web"), 6, &["clear text"]);
    assert_untouched(&bench);
    let mut arguments = bench.backup_arguments("web");
    arguments.push("--accept-clear-text".to_owned());
    let accepted = bench.datamover("backup", &arguments);
    assert_eq!(accepted.code, Some(0), "{accepted:?}");
}

#[test]
fn the_sr_is_full_at_the_snapshot() {
    // A thick SR: the snapshot of a 64 MiB disk needs another 64 MiB.
    let thick = SrSpec { size: 100 << 20, ..SrSpec::new("thick", SrKind::Lvm) };
    let bench = Bench::start(SimOptions { srs: vec![thick], ..one_vm() });
    assert_fails(&bench.try_backup("web"), 6, &["space"]);
    assert_untouched(&bench);
}

#[test]
fn the_base_snapshot_is_gone() {
    let bench = Bench::start(one_vm());
    bench.backup("web");
    assert_eq!(bench.bases(), 1);
    for (reference, record) in bench.pool.records("VDI") {
        if record["type"] == "cbt_metadata" {
            bench.runtime.block_on(bench.pool.call("VDI.destroy", &[json!(reference)])).unwrap();
        }
    }
    let report = bench.backup("web");
    assert_eq!(report["level"], "FULL");
    assert_eq!(report["disks"][0]["reason"], "base-gone", "{report}");
    bench.assert_pool_is_clean();
    assert_eq!(bench.bases(), 1);
    bench.assert_repository_intact();
}

/// Stops a backup in its middle with SIGKILL, so that its snapshot stays behind with our marks.
fn leave_a_snapshot(bench: &Bench) {
    bench.pool.fault(Fault::always("nbd/read", FaultEffect::Hang));
    let mut child = bench.program("xenvault-datamover");
    let mut child = child.arg("backup").args(bench.backup_arguments("web")).spawn().unwrap();
    while !bench.pool.records("VDI").values().any(is_our_snapshot) {
        assert!(child.try_wait().unwrap().is_none(), "the backup ended before it had a snapshot");
        std::thread::yield_now();
    }
    // Tagging follows creation; the export is opened after it.
    while bench.pool.counters().nbd.values().all(|disk| disk.opens == 0) {
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    bench.pool.clear_faults();
}

fn is_our_snapshot(vdi: &serde_json::Value) -> bool {
    vdi["is_a_snapshot"] == true && vdi["other_config"].get("xenvault:instance").is_some()
}

#[test]
fn a_production_disk_that_carries_our_marks_after_a_revert_is_left_alone() {
    let mut bench = Bench::start(one_vm());
    leave_a_snapshot(&bench);
    let (reference, _) = bench
        .pool
        .records("VM")
        .into_iter()
        .find(|(_, vm)| vm["is_a_snapshot"] == true)
        .expect("the killed backup left its snapshot");
    bench.runtime.block_on(bench.pool.call("VM.revert", &[json!(reference)])).unwrap();
    let production = bench.pool.vm("web").unwrap().disks[0].vdi.clone();
    let marks = bench.pool.record("VDI", &production).unwrap();
    assert!(marks["other_config"].get("xenvault:instance").is_some(), "the revert copied our marks: {marks}");

    let plan = bench.sweep(&["--dry-run"]);
    assert!(!plan["remove"].to_string().contains(&production), "{plan}");
    bench.sweep(&[]);
    assert!(bench.pool.record("VDI", &production).is_ok(), "the production disk is still there");

    // Another installation's sweep sees nothing of its own.
    bench.installation = "another installation".to_owned();
    bench.sweep(&[]);
    assert!(bench.pool.record("VDI", &production).is_ok());
    bench.installation = "installation".to_owned();
    let report = bench.backup("web");
    let point = report["point"].as_str().unwrap();
    assert!(bench.restored_disk(point, "0") == bench.guest_disk("web", "0", 64 << 20));
}

#[test]
fn another_installations_snapshots_are_left_alone() {
    let mut bench = Bench::start(one_vm());
    leave_a_snapshot(&bench);
    let left = bench.left_over();
    assert!(!left.is_empty());

    bench.installation = "another installation".to_owned();
    let plan = bench.sweep(&[]);
    assert_eq!(plan["removed"], 0, "{plan}");
    for object in left.iter().filter(|object| !object.starts_with("session") && !object.starts_with("VBD")) {
        assert!(bench.left_over().contains(object), "{object} is gone");
    }
    // The next backup of the installation that it belongs to takes it away.
    bench.installation = "installation".to_owned();
    bench.backup("web");
    let left = bench.left_over();
    assert!(left.iter().all(|object| object.starts_with("session")), "{left:?}");
}

#[test]
fn a_pool_that_does_not_answer() {
    let bench = Bench::start(one_vm());
    let mut arguments = bench.backup_arguments("web");
    let at = arguments.iter().position(|argument| argument == "--pool").unwrap();
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    arguments[at + 1] = format!("https://{unused}");
    assert_fails(&bench.datamover("backup", &arguments), 10, &["cannot log in"]);
    assert_untouched(&bench);
}

#[test]
fn arguments_without_trust_or_secret() {
    let bench = Bench::start(one_vm());
    let mut arguments = bench.backup_arguments("web");
    let at = arguments.iter().position(|argument| argument == "--fingerprint").unwrap();
    arguments.drain(at..at + 2);
    assert_fails(&bench.datamover("backup", &arguments), 2, &["xenvault-datamover pin"]);
    let mut program = bench.program("xenvault-datamover");
    program.arg("--json").arg("backup").args(bench.backup_arguments("web")).env_remove("XENVAULT_PASSWORD");
    let finished = xenvault_tests::programs::finish(&mut program, "").unwrap();
    assert_fails(&finished, 2, &["--password-file", "XENVAULT_PASSWORD"]);
    assert_untouched(&bench);
}

#[test]
fn a_disk_that_was_never_written_is_a_disk_too() {
    let vms = vec![VmSpec::new("web").disk(DiskSpec::new(64 << 20))];
    let bench = Bench::start(SimOptions { vms, ..SimOptions::default() });
    let report = bench.backup("web");
    let point = report["point"].as_str().unwrap();
    assert!(bench.restored_disk(point, "0").iter().all(|byte| *byte == 0));
    bench.assert_pool_is_clean();
}
