//! Against the servers of others: nbdkit and qemu-nbd, in clear text and with TLS.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test says what is wrong by failing"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use ring::digest::{Context, SHA256};
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_nbd::{
    Connection, Endpoint, Export, ExportOptions, FixedEndpoints, NbdError, Patience, ReadOptions, SizeProblem, Timeouts,
};

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/server.rs"]
mod server;
#[path = "support/tls.rs"]
mod tls;

use server::{Server, nbdkit_certificates, qemu_certificates};

const MIB: u64 = 1 << 20;

/// For tests in which the client leaves with requests under way: with several workers on one connection nbdkit 1.32 can
/// die there ("raw_send_socket: Assertion `sock >= 0' failed"), and no client reads from a dead server. One request after
/// the other is also how a pool's host serves.
const ONE_WORKER: &str = "--threads=1";

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

async fn open(endpoint: Endpoint, options: ExportOptions) -> Result<Export, NbdError> {
    let pause = Duration::from_millis(20);
    let patience = Patience { first_pause: pause, longest_pause: 5 * pause, rounds: 6 };
    Export::open(Arc::new(FixedEndpoints(vec![endpoint])), ExportOptions { patience, ..options }).await
}

async fn sha256(export: &Export) -> String {
    let mut context = Context::new(&SHA256);
    let mut stream =
        export.read_extents(ExtentSet::from_range(ByteRange::up_to(export.size())), ReadOptions::default());
    while let Some(piece) = stream.next().await {
        context.update(&piece.unwrap().1);
    }
    hex(context)
}

fn hex(context: Context) -> String {
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash of nbdkit's pattern: each 8 bytes are their own offset.
fn pattern_sha256(size: u64) -> String {
    let mut context = Context::new(&SHA256);
    for start in (0..size).step_by(1 << 20) {
        let end = (start + (1 << 20)).min(size);
        let words: Vec<u8> = (start / 8..end.div_ceil(8)).flat_map(|word| (word * 8).to_be_bytes()).collect();
        context.update(&words[..(end - start) as usize]);
    }
    hex(context)
}

/// Opens, reads everything, compares, closes.
async fn check(endpoint: Endpoint, size: u64, expected: &str) {
    let export = open(endpoint, ExportOptions::default()).await.unwrap();
    assert_eq!(export.size(), size);
    assert_eq!(sha256(&export).await, expected);
    export.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_in_clear_text_with_few_and_with_all_features() {
    let size = 40 * MIB + 1536;
    let parameter = format!("size={size}");
    for features in [&["--mask-handshake=1"][..], &[], &["--filter=multi-conn", "--filter=noextents"]] {
        let server = Server::nbdkit(&[features, &["pattern", &parameter]].concat());
        check(server.endpoint(None), size, &pattern_sha256(size)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_with_tls() {
    let folder = tempfile::tempdir().unwrap();
    certificates::write(folder.path());
    let tls = tls::pinned(&folder.path().join("server-cert.pem"));
    let certificates = nbdkit_certificates(folder.path());
    for features in [&["--mask-handshake=1"][..], &[]] {
        let arguments = [features, &["--tls=require", &certificates, "pattern", "size=24M"]].concat();
        let server = Server::nbdkit(&arguments);
        check(server.endpoint(Some(tls.clone())), 24 * MIB, &pattern_sha256(24 * MIB)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x28_tls_that_does_not_fit_is_an_error_and_never_clear_text() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificates::write(folder.path());
    certificates::write(other.path());
    let certificates = nbdkit_certificates(folder.path());
    let wrong = tls::pinned(&other.path().join("server-cert.pem"));

    let secured = Server::nbdkit(&["--tls=require", &certificates, "pattern", "size=1M"]);
    let error = open(secured.endpoint(Some(wrong.clone())), ExportOptions::default()).await.unwrap_err();
    assert!(matches!(error, NbdError::Tls { .. }), "{error:?}");
    let error = open(secured.endpoint(None), ExportOptions::default()).await.unwrap_err();
    assert!(matches!(error, NbdError::ClosedAtExportName { .. }), "{error:?}");

    let clear = Server::nbdkit(&["--tls=off", "pattern", "size=1M"]);
    let error = open(clear.endpoint(Some(wrong)), ExportOptions::default()).await.unwrap_err();
    assert!(matches!(error, NbdError::TlsRefused { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_in_clear_text_and_with_tls() {
    let folder = tempfile::tempdir().unwrap();
    certificates::write(folder.path());
    let tls = tls::pinned(&folder.path().join("server-cert.pem"));
    let image = folder.path().join("disk.raw");
    // Data, a hole, and a tail that ends in the middle of a page.
    let size = 48 * MIB + 512;
    let mut disk = vec![0; size as usize];
    for (at, byte) in disk.iter_mut().enumerate().take(20 << 20) {
        *byte = (at * 7 + at / 4096) as u8;
    }
    disk[size as usize - 1] = 0xEE;
    std::fs::write(&image, &disk).unwrap();
    let mut context = Context::new(&SHA256);
    context.update(&disk);
    let expected = hex(context);
    let image = image.to_str().unwrap();

    let server = Server::qemu_nbd(&["--format=raw", image]);
    check(server.endpoint(None), size, &expected).await;
    let object = qemu_certificates(folder.path());
    let server = Server::qemu_nbd(&["--format=raw", "--object", &object, "--tls-creds", "tls", image]);
    check(server.endpoint(Some(tls)), size, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_export_is_told_by_the_moment_of_the_close() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.raw");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let server = Server::qemu_nbd(&["--format=raw", "--export-name=right", image.to_str().unwrap()]);
    let error = open(server.named("wrong"), ExportOptions::default()).await.unwrap_err();
    assert!(matches!(error, NbdError::ClosedAtExportName { .. }), "{error:?}");
    let export = open(server.named("right"), ExportOptions::default()).await.unwrap();
    assert_eq!(export.read(range(5, 15)).await.unwrap()[..], [1; 10]);
    export.close().await.unwrap();
}

#[tokio::test]
async fn a_size_that_is_no_multiple_of_a_sector_is_refused() {
    let server = Server::nbdkit(&["data", "1 2 3", "size=1000"]);
    let error = Connection::open(&server.endpoint(None), &Timeouts::default()).await.unwrap_err();
    assert!(matches!(error, NbdError::UnusableSize { size: 1000, problem: SizeProblem::NotSectors, .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sparse_memory_reads_as_zeros_and_data_where_it_is() {
    let server = Server::nbdkit(&["data", "@0x3ffffffe00 \"end\"", "size=256G"]);
    let export = open(server.endpoint(None), ExportOptions::default()).await.unwrap();
    let at = 0x3f_ffff_fe00;
    assert_eq!(export.size(), at + 512);
    let data = export.read(range(at - 4, at + 4)).await.unwrap();
    assert_eq!(&data[..], b"\0\0\0\0end\0");
    export.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_pass_are_made_up_for() {
    // Every twentieth read or so fails; the connection is left each time.
    let server = Server::nbdkit(&[
        ONE_WORKER,
        "--filter=error",
        "pattern",
        "size=64M",
        "error-pread=EIO",
        "error-pread-rate=5%",
    ]);
    let export = open(server.endpoint(None), ExportOptions::default()).await.unwrap();
    assert_eq!(sha256(&export).await, pattern_sha256(64 * MIB));
    export.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn x29_a_place_that_a_server_can_not_read_is_named_exactly() {
    let bad = 777 * 4096;
    let pread = format!(
        "pread=if [ $4 -le {bad} ] && [ $(($4 + $3)) -gt {bad} ]; then echo EIO bad place >&2; exit 1; \
         else head -c $3 /dev/zero; fi"
    );
    let server = Server::nbdkit(&[ONE_WORKER, "eval", "get_size=echo 8388608", &pread]);
    let export = open(server.endpoint(None), ExportOptions::default()).await.unwrap();
    let error = export.read(range(0, 8 * MIB)).await.unwrap_err();
    let NbdError::MediaError { range: found, source, .. } = error else { panic!("{error:?}") };
    assert_eq!(found, range(bad, bad + 4096));
    assert!(matches!(*source, NbdError::ReadRefused { code: 5, .. }), "{source:?}");
    export.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn small_extents_are_asked_for_together() {
    // One after the other, 2000 reads of 10 ms would take 20 s.
    let server = Server::nbdkit(&["--filter=delay", "pattern", "size=4G", "rdelay=10ms"]);
    let export = open(server.endpoint(None), ExportOptions::default()).await.unwrap();
    let extents: ExtentSet = (0..2000).map(|n| range(n * 2 * MIB, n * 2 * MIB + 65_536)).collect();
    let start = Instant::now();
    let mut stream = export.read_extents(extents.clone(), ReadOptions::default());
    let mut bytes = 0;
    while let Some(piece) = stream.next().await {
        let (offset, data) = piece.unwrap();
        assert_eq!(data[..8], offset.to_be_bytes());
        bytes += data.len() as u64;
    }
    assert_eq!(bytes, extents.total_bytes());
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    export.close().await.unwrap();
}
