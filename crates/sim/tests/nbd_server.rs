//! Limits, endings, faults and counters of the NBD server that recordings do not show.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test that meets the unexpected has failed"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use uuid::Uuid;
use xenvault_block::{ByteRange, WriteAt};
use xenvault_sim::nbd::{Fault, FaultOrder, Purposes};
use xenvault_sim::storage::{SrKind, Storage};

mod nbd_support;

use nbd_support::{
    Host, LIMIT, Memory, client_config, greet, handshake, noise, open, option, read, reply, request, rest,
};

const MIB: u64 = 1 << 20;

fn order(fault: Fault) -> FaultOrder {
    FaultOrder { fault, host: None, vdi: None, skip: 0, times: Some(1) }
}

/// A clear host with one disk of noise, and an open connection to it.
async fn opened(length: usize) -> (Host, Uuid, Vec<u8>, TcpStream, String) {
    let host = Host::start(false);
    let bytes = noise(length);
    let (vdi, name) = host.add(Arc::new(Memory(bytes.clone())), length as u64);
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    assert_eq!(open(&mut stream, &name).await.unwrap(), length as u64);
    (host, vdi, bytes, stream, name)
}

async fn tls(host: &Host) -> TlsStream<TcpStream> {
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    option(&mut stream, 5, &[]).await;
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[12..16], [0, 0, 0, 1]);
    handshake(client_config(&[&rustls::version::TLS12], None), stream).await.unwrap()
}

async fn disconnect<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    request(stream, 2, 0, 0, 0).await;
    assert_eq!(rest(stream).await.unwrap(), [0_u8; 0]);
}

#[tokio::test]
async fn the_seventeenth_connection_is_closed_and_a_free_place_is_usable_at_once() {
    let host = Host::start(false);
    let mut streams = Vec::new();
    for _ in 0..16 {
        let mut stream = host.connect().await;
        greet(&mut stream).await;
        streams.push(stream);
    }
    for _ in 0..3 {
        let mut stream = host.connect().await;
        assert_eq!(rest(&mut stream).await.unwrap(), [0_u8; 0]);
    }
    streams.pop();
    host.until(|host| host.counters.snapshot().hosts[&host.id].open_connections == 15).await;
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    let counts = host.counters.snapshot().hosts[&host.id];
    assert_eq!((counts.refused_connections, counts.peak_connections), (3, 16));
}

#[tokio::test]
async fn contradicting_purposes_close_before_a_byte() {
    let host = Host::start(false);
    *host.pool.purposes.lock().unwrap() = Purposes { nbd: true, insecure_nbd: true };
    let mut stream = host.connect().await;
    assert_eq!(rest(&mut stream).await.unwrap(), [0_u8; 0]);
    // They are asked anew for each connection.
    *host.pool.purposes.lock().unwrap() = Purposes { nbd: false, insecure_nbd: true };
    greet(&mut host.connect().await).await;
}

#[tokio::test]
async fn only_p384_is_spoken() {
    let host = Host::start(true);
    for (groups, works) in [(vec!["X25519", "secp256r1"], false), (vec!["X25519", "secp384r1"], true)] {
        let mut stream = host.connect().await;
        greet(&mut stream).await;
        option(&mut stream, 5, &[]).await;
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).await.unwrap();
        let config = client_config(&[&rustls::version::TLS12, &rustls::version::TLS13], Some(&groups));
        assert_eq!(config.crypto_provider().kx_groups.len(), 2);
        match handshake(config, stream).await {
            Ok(_) => assert!(works),
            Err(error) => assert!(!works && error.to_string().contains("HandshakeFailure"), "{error}"),
        }
    }
}

#[tokio::test]
async fn a_host_with_the_wrong_key_can_be_played() {
    let pool = nbd_support::Pool::default();
    *pool.purposes.lock().unwrap() = Purposes { nbd: true, insecure_nbd: false };
    let host = Host::with_key(Arc::new(pool), nbd_support::new_key());
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    option(&mut stream, 5, &[]).await;
    stream.read_exact(&mut [0; 20]).await.unwrap();
    let error = handshake(client_config(&[&rustls::version::TLS12], None), stream).await.unwrap_err();
    assert!(error.to_string().contains("BadSignature"), "{error}");
}

#[tokio::test]
async fn a_vanished_client_leaves_no_vbd() {
    let host = Host::start(true);
    let (vdi, name) = host.add(Arc::new(Memory(noise(MIB as usize))), MIB);
    let mut stream = tls(&host).await;
    open(&mut stream, &name).await.unwrap();
    assert_eq!(host.vbds(), 1);
    // In the middle of a read, without a goodbye.
    request(&mut stream, 0, 1, 0, 1 << 20).await;
    drop(stream);
    host.until(|host| host.vbds() == 0).await;
    host.until(|host| host.counters.snapshot().vdis[&vdi].closes == 1).await;
}

#[tokio::test]
async fn the_close_waits_for_the_vbd() {
    let (host, _, _, mut stream, _) = opened(512).await;
    *host.pool.close_delay.lock().unwrap() = Duration::from_millis(200);
    let start = Instant::now();
    disconnect(&mut stream).await;
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(host.vbds(), 0);
}

#[tokio::test]
async fn a_failed_open_inside_tls_ends_with_close_notify() {
    let host = Host::start(true);
    let mut stream = tls(&host).await;
    option(&mut stream, 1, b"/no-such-disk?session_id=OpaqueRef:good").await;
    assert_eq!(rest(&mut stream).await.unwrap(), [0_u8; 0]);
    // Giving up before that ends without one.
    let mut stream = tls(&host).await;
    option(&mut stream, 2, &[]).await;
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(rest(&mut stream).await.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    assert_eq!(host.counters.snapshot().hosts[&host.id].failed_opens, 1);
}

#[tokio::test]
async fn long_and_negative_option_lengths_do_no_harm() {
    let host = Host::start(false);
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    option(&mut stream, 99, &vec![1; 3 << 20]).await;
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer[12..16], 0x8000_0001_u32.to_be_bytes());
    stream.write_all(b"IHAVEOPT\x00\x00\x00\x01\xff\xff\xff\xff").await.unwrap();
    assert_eq!(rest(&mut stream).await.unwrap(), [0_u8; 0]);
}

#[tokio::test]
async fn termination_takes_the_vbds_away_and_then_closes() {
    let (host, _, _, mut stream, _) = opened(512).await;
    let mut idle = host.connect().await;
    greet(&mut idle).await;
    let pool = Arc::clone(&host.pool);
    let ended = tokio::spawn(host.server.shutdown());
    assert_eq!(rest(&mut stream).await.unwrap(), [0_u8; 0]);
    assert_eq!(pool.vbds.load(Ordering::SeqCst), 0);
    // A reset, if the client's flags had not been read.
    assert_eq!(rest(&mut idle).await.unwrap_or_default(), [0_u8; 0]);
    tokio::time::timeout(LIMIT, ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_kill_leaves_the_vbds() {
    let (host, _, _, mut stream, _) = opened(512).await;
    let pool = Arc::clone(&host.pool);
    drop(host);
    let _ = rest(&mut stream).await;
    assert_eq!(pool.vbds.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn many_requests_in_flight_are_answered_in_order() {
    let (host, vdi, bytes, mut stream, _) = opened(4 << 20).await;
    for n in 0..32_u64 {
        request(&mut stream, 0, n, n * 65_536, 65_536).await;
    }
    for n in 0..32_u64 {
        assert_eq!(reply(&mut stream, n).await.unwrap(), 0);
        let mut data = vec![0; 65_536];
        stream.read_exact(&mut data).await.unwrap();
        let at = n as usize * 65_536;
        assert!(data == bytes[at..at + 65_536]);
    }
    disconnect(&mut stream).await;
    let counts = host.counters.snapshot().vdis[&vdi];
    assert_eq!((counts.opens, counts.closes, counts.reads, counts.sent_bytes), (1, 1, 32, 2 << 20));
    assert_eq!(host.counters.snapshot().sent_bytes(), 2 << 20);
    host.counters.reset();
    assert_eq!(host.counters.snapshot().sent_bytes(), 0);
}

#[tokio::test]
async fn ordered_drops_break_the_connection_after_so_many_bytes() {
    let (host, vdi, _, mut first, name) = opened(4 << 20).await;
    host.faults.order(order(Fault::DropAfter(700_000)));
    // Not on connections that are open already.
    read(&mut first, 0, 1 << 20).await.unwrap();
    host.counters.reset();
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    open(&mut stream, &name).await.unwrap();
    let error = read(&mut stream, 0, 1 << 20).await.unwrap_err();
    assert!(matches!(error.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::UnexpectedEof), "{error}");
    assert_eq!(host.counters.snapshot().vdis[&vdi].sent_bytes, 700_000);
    host.until(|host| host.vbds() == 1).await;
    assert!(host.faults.orders().is_empty());
}

#[tokio::test]
async fn an_ordered_stall_stays_open_and_silent() {
    let (host, _, _, _first, name) = opened(1 << 20).await;
    host.faults.order(order(Fault::StallAfter(4_096)));
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    open(&mut stream, &name).await.unwrap();
    request(&mut stream, 0, 1, 0, 8_192).await;
    assert_eq!(reply(&mut stream, 1).await.unwrap(), 0);
    let mut data = vec![0; 4_096];
    stream.read_exact(&mut data).await.unwrap();
    let more = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut data)).await;
    assert!(more.is_err());
    drop(stream);
    host.until(|host| host.vbds() == 1).await;
}

#[tokio::test]
async fn a_media_error_sends_the_pieces_before_it_and_hangs_up() {
    let (host, _, bytes, mut stream, name) = opened(4 << 20).await;
    let bad = ByteRange::with_length(MIB + 4_096, 512).unwrap();
    host.faults.order(FaultOrder { times: None, ..order(Fault::MediaError(bad)) });
    request(&mut stream, 0, 1, 512 * 1024, 2 << 20).await;
    assert_eq!(reply(&mut stream, 1).await.unwrap(), 0);
    let came = rest(&mut stream).await.unwrap();
    assert!(came == bytes[512 * 1024..1024 * 1024]);
    // What lies around it can be read.
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    open(&mut stream, &name).await.unwrap();
    read(&mut stream, MIB, 4_096).await.unwrap();
    read(&mut stream, MIB + 4_608, 512).await.unwrap();
    request(&mut stream, 0, 2, MIB + 4_096, 512).await;
    assert_eq!(reply(&mut stream, 2).await.unwrap(), 0);
    assert_eq!(rest(&mut stream).await.unwrap(), [0_u8; 0]);
}

#[tokio::test]
async fn refusals_and_delays_strike_where_they_were_ordered() {
    let (host, vdi, _, mut first, name) = opened(512).await;
    host.faults.order(FaultOrder { host: Some(Uuid::new_v4()), ..order(Fault::Refuse) });
    greet(&mut host.connect().await).await;
    host.faults.clear();
    host.faults.order(FaultOrder { skip: 1, ..order(Fault::Refuse) });
    greet(&mut host.connect().await).await;
    assert_eq!(rest(&mut host.connect().await).await.unwrap(), [0_u8; 0]);
    // An open that is refused, then one that takes its time.
    host.faults.order(FaultOrder { vdi: Some(vdi), ..order(Fault::RefuseOpen) });
    host.faults.order(order(Fault::OpenDelay(Duration::from_millis(120))));
    host.faults.order(order(Fault::ReadDelay(Duration::from_millis(120))));
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    open(&mut stream, &name).await.unwrap_err();
    let start = Instant::now();
    let silent = host.faults.order(order(Fault::Silence));
    host.faults.withdraw(silent);
    let mut stream = host.connect().await;
    greet(&mut stream).await;
    open(&mut stream, &name).await.unwrap();
    read(&mut stream, 0, 512).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(120));
    read(&mut first, 0, 512).await.unwrap();
    host.faults.order(order(Fault::Silence));
    let mut stream = host.connect().await;
    let mut byte = [0];
    assert!(tokio::time::timeout(Duration::from_millis(100), stream.read(&mut byte)).await.is_err());
}

#[tokio::test]
async fn a_disk_of_the_storage_is_served_as_it_was_when_opened() {
    let storage = Storage::new().unwrap();
    let (sr, vdi) = (Uuid::new_v4(), Uuid::new_v4());
    storage.create_sr(sr, SrKind::Ext, 4 << 40);
    storage.create_vdi(sr, vdi, 2040 << 30).unwrap();
    let disk = storage.disk(vdi).unwrap();
    let last = (2040 << 30) - 4_096;
    disk.write_all_at(&[9; 4_096], last).unwrap();
    let host = Host::start(true);
    let (_, name) = host.add(Arc::new(disk), 2040 << 30);
    let mut stream = tls(&host).await;
    assert_eq!(open(&mut stream, &name).await.unwrap(), 2040 << 30);
    assert_eq!(read(&mut stream, last, 4_096).await.unwrap(), [9; 4_096]);
    assert!(read(&mut stream, 1 << 40, 4 << 20).await.unwrap().iter().all(|&byte| byte == 0));
    disconnect(&mut stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_client_reads_the_same_bytes() {
    let tool = |name: &str| std::process::Command::new(name).arg("--version").output().is_ok();
    if !tool("nbdcopy") || !tool("nbdinfo") {
        println!("left out: nbdinfo and nbdcopy are not installed");
        return;
    }
    let host = Host::start(true);
    let bytes = noise(9 << 20);
    let (vdi, name) = host.add(Arc::new(Memory(bytes.clone())), bytes.len() as u64);
    let folder = tempfile::tempdir().unwrap();
    let pem = pem(&nbd_support::IDENTITY.0);
    std::fs::write(folder.path().join("ca-cert.pem"), pem).unwrap();
    let copy = folder.path().join("copy.raw");
    // The whole name, slash and all, is the export's: the URI's own slash before it is dropped.
    let name = name.replace('?', "%3F");
    let uri = format!("nbds://{}/{name}?tls-certificates={}", host.address(), folder.path().display());
    let run = |program: &'static str, arguments: Vec<std::ffi::OsString>| async move {
        let run = tokio::process::Command::new(program).args(arguments).output();
        tokio::time::timeout(LIMIT, run).await.unwrap().unwrap()
    };
    let info = run("nbdinfo", vec!["--size".into(), uri.clone().into()]).await;
    assert!(info.status.success(), "{}", String::from_utf8_lossy(&info.stderr));
    assert_eq!(String::from_utf8_lossy(&info.stdout).trim(), bytes.len().to_string());
    let copied = run("nbdcopy", vec![uri.into(), copy.clone().into()]).await;
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    assert!(std::fs::read(copy).unwrap() == bytes);
    host.until(|host| host.vbds() == 0).await;
    assert_eq!(host.counters.snapshot().vdis[&vdi].sent_bytes, bytes.len() as u64);
}

fn pem(certificate: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}
