//! Replays the client's side of every recording of a real xapi-nbd, and compares what the simulator's server says and
//! does: bytes, TLS, and how the connection ends.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test that meets the unexpected has failed"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use xenvault_sim::nbd::{BlockDevice, Purposes};

mod nbd_support;
#[path = "../../../tests/support/shared.rs"]
mod shared;

use nbd_support::{Host, LIMIT, Memory, Pool, client_config, handshake, noise};

const DISK_BYTES: usize = 8 << 20;

/// Recordings that are not compared, and why.
const NOT_COMPARED: &[(&str, &str)] = &[];

/// The disks of the recordings: a snapshot, its live disk, and one whose data is gone (which is not here).
const SNAPSHOT: &str = "5610a1cd-d499-4775-9453-eb29e8b99c90";

#[derive(Clone, Debug)]
enum Step {
    Send(Vec<u8>, usize),
    Receive(Vec<u8>, usize),
    Event(String),
}

/// One line with bytes: what is given of them, and how many there were.
fn bytes(line: &str) -> (Vec<u8>, usize) {
    let (hex, note) = line.split_once("  # ").unwrap_or((line, ""));
    let (hex, total) = match hex.split_once(" ... (") {
        Some((hex, total)) => (hex, total.strip_suffix(" bytes in all)").unwrap().parse().ok()),
        None => (hex, None),
    };
    let digits: Vec<u8> = hex.trim().bytes().collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let bytes: Vec<u8> = digits.chunks(2).map(byte).collect();
    let total = total.unwrap_or(bytes.len());
    assert!(total >= bytes.len(), "{note}");
    (bytes, total)
}

fn parse(text: &str) -> Vec<Step> {
    let line = |line: &str| match line.split_at_checked(2)? {
        ("> ", rest) => Some(bytes(rest)).map(|(bytes, total)| Step::Send(bytes, total)),
        ("< ", rest) => Some(bytes(rest)).map(|(bytes, total)| Step::Receive(bytes, total)),
        ("! ", rest) => Some(Step::Event(rest.split(" [t=").next().unwrap().to_owned())),
        ("# ", _) => None,
        other => panic!("unknown line {other:?}"),
    };
    text.lines().filter_map(line).collect()
}

/// What the recordings show of the disk: the first bytes at each offset that was read.
fn learn(steps: &[Step], seen: &mut BTreeMap<u64, Vec<u8>>) {
    let mut asked = Vec::new();
    for step in steps {
        match step {
            Step::Send(bytes, 28) if bytes[..8] == [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0] => {
                asked.push((bytes[8..16].to_vec(), u64::from_be_bytes(bytes[16..24].try_into().unwrap())));
            }
            Step::Receive(bytes, 16) if bytes[..8] == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] => {
                let at = asked.iter().position(|(handle, _)| *handle == bytes[8..16]).unwrap();
                asked.rotate_left(at);
            }
            Step::Receive(bytes, total) if *total >= 512 => {
                let (_, offset) = asked.remove(0);
                let known = seen.entry(offset).or_insert_with(|| bytes.clone());
                assert_eq!(known, bytes, "two recordings disagree about offset {offset}");
            }
            _ => {}
        }
    }
}

fn disk(seen: &BTreeMap<u64, Vec<u8>>) -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    disk[..3 << 20].copy_from_slice(&noise(3 << 20));
    disk[DISK_BYTES - 4096..].copy_from_slice(&noise(4096));
    for (&offset, bytes) in seen {
        let at = usize::try_from(offset).unwrap();
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }
    disk
}

/// The client's end of a connection.
enum Client {
    Clear(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Client {
    async fn send(&mut self, bytes: &[u8]) {
        match self {
            Self::Clear(stream) => stream.write_all(bytes).await.unwrap(),
            Self::Tls(stream) => {
                stream.write_all(bytes).await.unwrap();
                stream.flush().await.unwrap();
            }
        }
    }

    async fn receive(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let read = async {
            match self {
                Self::Clear(stream) => stream.read_exact(&mut bytes).await,
                Self::Tls(stream) => stream.read_exact(&mut bytes).await,
            }
        };
        tokio::time::timeout(LIMIT, read).await.expect("the server answers in time").unwrap();
        bytes
    }

    async fn end(&mut self) -> std::io::Result<Vec<u8>> {
        match self {
            Self::Clear(stream) => nbd_support::rest(stream).await,
            Self::Tls(stream) => nbd_support::rest(stream.as_mut()).await,
        }
    }
}

fn session_of(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes).replace("%3A", ":");
    let start = text.find("session_id=")? + "session_id=".len();
    Some(text[start..].split('&').next()?.to_owned())
}

async fn replay(name: &str, steps: &[Step], disk: &Arc<dyn BlockDevice>) {
    let pool = Pool::default();
    let clear = name.starts_with("nbd.clear.");
    let closed_network = name == "nbd.refused.no-nbd-network.txt";
    *pool.purposes.lock().unwrap() = Purposes { nbd: !clear && !closed_network, insecure_nbd: clear };
    *pool.close_delay.lock().unwrap() = Duration::from_millis(30);
    for vdi in [SNAPSHOT, "910bef8b-eb6a-4f3b-8b4c-e644f66a4de3"] {
        pool.disks.lock().unwrap().insert(vdi.to_owned(), (Arc::clone(disk), DISK_BYTES as u64));
    }
    // The pool knows the session of the recording, unless the recording is about one that it does not know.
    if !name.contains("bad-session") && !name.contains("logged-out-session") {
        let sessions = steps.iter().filter_map(|step| match step {
            Step::Send(bytes, _) => session_of(bytes),
            _ => None,
        });
        pool.sessions.lock().unwrap().extend(sessions);
    }
    let mut host = Some(Host::with(Arc::new(pool)));
    let mut idle = Vec::new();
    if name == "nbd.refused.17th-connection.txt" {
        for _ in 0..16 {
            let mut stream = host.as_ref().unwrap().connect().await;
            nbd_support::greet(&mut stream).await;
            idle.push(stream);
        }
    }
    let pool = Arc::clone(&host.as_ref().unwrap().pool);
    let mut client: Option<Client> = None;
    let mut opened = false;
    let mut shutdown = None;
    for (at, step) in steps.iter().enumerate() {
        match step {
            Step::Send(bytes, total) => {
                let mut bytes = bytes.clone();
                bytes.resize(*total, 0);
                client.as_mut().unwrap().send(&bytes).await;
            }
            Step::Receive(bytes, total) => {
                let found = client.as_mut().unwrap().receive(*total).await;
                assert_eq!(found[..bytes.len()], bytes[..], "{name}, line {at}");
                opened |= *total == 134;
            }
            Step::Event(event) => match event.as_str() {
                "connected" => client = Some(Client::Clear(host.as_ref().unwrap().connect().await)),
                "TLS handshake starts" => {
                    let Some(Client::Clear(stream)) = client.take() else { panic!("{name}") };
                    let old = name != "nbd.tls.only-1.3-offered.txt";
                    let version = if old { &rustls::version::TLS12 } else { &rustls::version::TLS13 };
                    match handshake(client_config(&[version], None), stream).await {
                        Ok(stream) => client = Some(Client::Tls(Box::new(stream))),
                        Err(error) => {
                            assert!(!old, "{name}: {error}");
                            assert!(error.to_string().contains("ProtocolVersion"), "{error}");
                        }
                    }
                }
                up if up.starts_with("TLS up") => {
                    let Some(Client::Tls(stream)) = &client else { panic!("{name}") };
                    let (_, tls) = stream.get_ref();
                    let suite = format!("{:?}", tls.negotiated_cipher_suite().unwrap().suite());
                    assert_eq!(tls.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_2));
                    assert!(suite == "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384" || up == "TLS up", "{suite}");
                }
                alert if alert.contains("TLSV1_ALERT_PROTOCOL_VERSION") => assert!(client.is_none()),
                open if open.starts_with("open; size 8388608") => assert!(opened),
                "closed: ConnectionResetError" => {
                    let error = client.as_mut().unwrap().end().await.unwrap_err();
                    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{name}");
                }
                closed if closed.starts_with("closed by the server") => {
                    let end = client.as_mut().unwrap().end().await;
                    // Inside TLS an export ends with close_notify, which rustls asks for; a killed server sends none.
                    let clean = clear || (opened && shutdown.is_none());
                    assert!(end.as_ref().is_ok_and(Vec::is_empty) || (!clean && end.is_err()), "{name}: {end:?}");
                    assert_eq!(pool.vbds.load(std::sync::atomic::Ordering::SeqCst), 0, "{name}: closed too early");
                }
                "client closes" => client = None,
                "xapi-nbd gets SIGTERM" => shutdown = Some(tokio::spawn(host.take().unwrap().server.shutdown())),
                logout if logout.starts_with("session.logout") => pool.sessions.lock().unwrap().clear(),
                other => panic!("{name}: unknown event {other}"),
            },
        }
    }
    if let Some(shutdown) = shutdown {
        tokio::time::timeout(LIMIT, shutdown).await.unwrap().unwrap();
    }
    let ends_open = steps.iter().rev().find_map(|step| match step {
        Step::Event(event) => {
            Some(!event.contains("closed") && !event.contains("closes") && !event.contains("SSLError"))
        }
        _ => None,
    });
    assert!(opened || ends_open.is_some(), "{name}");
}

#[tokio::test]
async fn every_recording_is_answered_as_the_real_server_did() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    let mut recordings = BTreeMap::new();
    for entry in std::fs::read_dir(Path::new(&folder)).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("nbd.") {
            recordings.insert(name, parse(&std::fs::read_to_string(entry.path()).unwrap()));
        }
    }
    assert!(recordings.len() >= 58, "{}", recordings.len());
    let left_out: BTreeSet<&str> = NOT_COMPARED.iter().map(|(name, _)| *name).collect();
    for name in &left_out {
        assert!(recordings.contains_key(*name), "{name} is left out but not there");
    }
    let mut seen = BTreeMap::new();
    recordings.values().for_each(|steps| learn(steps, &mut seen));
    assert!(seen.len() >= 12);
    let disk: Arc<dyn BlockDevice> = Arc::new(Memory(disk(&seen)));
    for (name, steps) in recordings.iter().filter(|(name, _)| !left_out.contains(name.as_str())) {
        println!("{name}");
        tokio::time::timeout(LIMIT, replay(name, steps, &disk)).await.unwrap_or_else(|_| panic!("{name} hangs"));
    }
}
