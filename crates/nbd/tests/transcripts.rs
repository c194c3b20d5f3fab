//! The server's half of recorded exchanges with a real host, played to our client.
//!
//! Only exchanges that a client of the old dialect can have are played; the others are named in `NOT_OURS`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test says what is wrong by failing"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use xenvault_block::ByteRange;
use xenvault_nbd::{Connection, Endpoint, ExportName, NbdError, Timeouts};

#[path = "support/certificates.rs"]
mod certificates;
#[path = "../../../tests/support/shared.rs"]
mod shared;
#[path = "support/tls.rs"]
mod tls;

/// What a client of ours never does: beginnings of names, and why.
const NOT_OURS: [(&str, &str); 15] = [
    ("nbd.clear.bad-magic", "we send the right magic"),
    ("nbd.clear.block_status", "READ and DISC only"),
    ("nbd.clear.cache", "READ and DISC only"),
    ("nbd.clear.client-flags", "we send the flags 1"),
    ("nbd.clear.command-77", "READ and DISC only"),
    ("nbd.clear.flush", "READ and DISC only"),
    ("nbd.clear.options", "STARTTLS and EXPORT_NAME only"),
    ("nbd.clear.trim", "READ and DISC only"),
    ("nbd.clear.write", "READ and DISC only"),
    ("nbd.tls.abort-before-starttls", "STARTTLS and EXPORT_NAME only"),
    ("nbd.tls.block_status", "READ and DISC only"),
    ("nbd.tls.client-flags-0", "we send the flags 1"),
    ("nbd.tls.flush", "READ and DISC only"),
    ("nbd.tls.go-then-export-name", "STARTTLS and EXPORT_NAME only"),
    ("nbd.tls.write", "READ and DISC only"),
];
/// The same, whole names: other options, and reads of nothing.
const NOT_OURS_EITHER: [&str; 5] = [
    "nbd.clear.read.length-0",
    "nbd.tls.options-after-starttls",
    "nbd.tls.options-before-starttls",
    "nbd.tls.read.length-0",
    "nbd.tls.starttls-with-payload",
];

#[derive(Clone, Debug)]
enum Line {
    Client(Vec<u8>),
    /// The bytes that were written down, and how many there were.
    Server(Vec<u8>, usize),
    StartTls,
    Closed,
}

fn parse(text: &str) -> Vec<Line> {
    let hex = |text: &str| -> (Vec<u8>, usize) {
        let digits = text.split_whitespace().next().unwrap_or("");
        let bytes: Vec<u8> =
            (0..digits.len() / 2).map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap()).collect();
        let total = text.split_once("... (").map(|(_, rest)| rest.split(' ').next().unwrap().parse().unwrap());
        let total = total.unwrap_or(bytes.len());
        (bytes, total)
    };
    text.lines()
        .filter_map(|line| match line.get(..2)? {
            "> " => Some(Line::Client(hex(&line[2..]).0)),
            "< " => {
                let (bytes, total) = hex(&line[2..]);
                Some(Line::Server(bytes, total))
            }
            "! " if line.contains("TLS handshake starts") => Some(Line::StartTls),
            "! " if line.contains("closed by the server") => Some(Line::Closed),
            _ => None,
        })
        .collect()
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// TLS as the hosts have it: 1.2 on secp384r1.
fn acceptor(folder: &Path) -> tokio_rustls::TlsAcceptor {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.kx_groups = vec![rustls::crypto::ring::kx_group::SECP384R1];
    let certificate = CertificateDer::from_pem_file(folder.join("server-cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join("server-key.pem")).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

async fn play(listener: TcpListener, lines: Vec<Line>, acceptor: tokio_rustls::TlsAcceptor) -> std::io::Result<()> {
    let (stream, _) = listener.accept().await?;
    let mut stream: Box<dyn Stream> = Box::new(stream);
    let mut handles = std::collections::VecDeque::new();
    for line in lines {
        match line {
            Line::Client(expected) => {
                let mut found = vec![0; expected.len()];
                stream.read_exact(&mut found).await?;
                if found.starts_with(b"\x25\x60\x95\x13") {
                    handles.push_back(found[8..16].to_vec());
                } else {
                    assert_eq!(found, expected, "the handshake is the recorded one, byte for byte");
                }
            }
            Line::Server(mut bytes, total) => {
                if bytes.len() == 16 && bytes.starts_with(b"\x67\x44\x66\x98") {
                    bytes.splice(8.., handles.pop_front().unwrap());
                }
                bytes.resize(total, 0);
                stream.write_all(&bytes).await?;
                stream.flush().await?;
            }
            Line::StartTls => stream = Box::new(acceptor.accept(stream).await?),
            Line::Closed => {
                stream.shutdown().await?;
                // What is still on its way must not turn the polite end into a reset.
                let _ = stream.read_to_end(&mut Vec::new()).await;
                return Ok(());
            }
        }
    }
    let _ = stream.read_to_end(&mut Vec::new()).await;
    Ok(())
}

/// A word for each thing that happens to the client.
async fn outcome(endpoint: &Endpoint, lines: &[Line]) -> Vec<String> {
    let connection = match Connection::open(endpoint, &Timeouts::default()).await {
        Ok(connection) => connection,
        Err(error) => return vec![word(&error)],
    };
    let mut words = vec![format!("open {}", connection.size())];
    let mut reads = Vec::new();
    for line in lines {
        let Line::Client(bytes) = line else { continue };
        if bytes.len() != 28 || bytes[7] != 0 {
            continue;
        }
        let offset = u64::from_be_bytes(bytes[16..24].try_into().unwrap());
        let length = u64::from(u32::from_be_bytes(bytes[24..28].try_into().unwrap()));
        let asked = ByteRange::with_length(offset, length).ok().filter(|range| {
            range.start() % 512 == 0 && !range.is_empty() && range.len() % 512 == 0 && range.end() <= connection.size()
        });
        // What our client refuses to send is replaced by something that it sends: the server's answer is what counts.
        let instead = if length > 512 && length % 512 == 0 && length <= connection.size() { length } else { 512 };
        reads.push(connection.read(asked.unwrap_or(ByteRange::up_to(instead))));
    }
    // DISC goes out behind the requests; a host answers them first.
    let (results, end) = tokio::join!(futures::future::join_all(reads), connection.disconnect());
    for result in results {
        words.push(match result {
            Ok(data) => format!("{} bytes from {:02x}{:02x}", data.len(), data[0], data[1]),
            Err(error) => word(&error),
        });
    }
    words.push(match end {
        Ok(()) => "closed".to_owned(),
        Err(error) => word(&error),
    });
    words
}

fn word(error: &NbdError) -> String {
    match error {
        NbdError::Refused { .. } => "refused".to_owned(),
        NbdError::ClosedAtExportName { .. } => "closed at export name".to_owned(),
        NbdError::Lost { received_bytes, .. } => format!("lost {received_bytes:?}"),
        NbdError::ReadRefused { code, .. } => format!("error {code}"),
        NbdError::Tls { .. } => "tls".to_owned(),
        other => format!("{other:?}"),
    }
}

fn expected(name: &str) -> Vec<&str> {
    let open = "open 8388608";
    match name.trim_start_matches("nbd.").trim_start_matches("clear.").trim_start_matches("tls.") {
        "refused.17th-connection" | "refused.no-nbd-network" => vec!["refused"],
        "export-name.right" => vec![open, "65536 bytes from 38b4", "512 bytes from 1068", "closed"],
        "export-name.extra-parameter" | "export-name.live-vdi" | "export-name.session-id-percent-encoded" => {
            vec![open, "512 bytes from 38b4", "closed"]
        }
        "export-name.vdi-plugged-read-write" => vec![open, "closed"],
        "server-killed.term" => vec![open, "512 bytes from 38b4", "closed"],
        "session-logged-out-while-open" => vec![open, "512 bytes from 38b4", "4096 bytes from c367", "closed"],
        "disc.with-requests-before" => vec![open, "512 bytes from 38b4", "512 bytes from b500", "closed"],
        "read.several-in-flight" => {
            let starts = ["38b4", "c367", "f065", "017b", "18b8", "6645", "99a5", "38d4"];
            let reads = starts.map(|start| &*format!("65536 bytes from {start}").leak());
            [&[open][..], &reads, &["closed"]].concat()
        }
        "read.unaligned-length" | "read.unaligned-offset" | "read.with-flags" => {
            // Nothing of the kind is ever sent; here it is the server's answer to something else.
            vec![open, "error 22", "lost None"]
        }
        "read.across-end-1M" => vec![open, "lost Some(1048576)", "closed"],
        "read.across-end"
        | "read.past-end"
        | "read.offset-2e63"
        | "read.length-0x80000000"
        | "read.length-0xfffffe00" => {
            vec![open, "lost Some(0)", "closed"]
        }
        "only-1.3-offered" => vec!["tls"],
        other if other.starts_with("export-name") => vec!["closed at export name"],
        other => panic!("{other} is new: say what should happen"),
    }
}

#[tokio::test]
async fn recorded_hosts_are_understood() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    let certificates = tempfile::tempdir().unwrap();
    certificates::write(certificates.path());
    let mut played = 0;
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(".txt").map(str::to_owned))
        .filter(|name| name.starts_with("nbd."))
        .collect();
    names.sort();
    for name in names {
        if NOT_OURS.iter().any(|(not, _)| name.starts_with(not)) || NOT_OURS_EITHER.contains(&name.as_str()) {
            continue;
        }
        let lines = parse(&std::fs::read_to_string(folder.join(format!("{name}.txt"))).unwrap());
        let export_name = lines.iter().find_map(|line| match line {
            Line::Client(bytes) if bytes.starts_with(b"IHAVEOPT\0\0\0\x01") => {
                Some(String::from_utf8(bytes[16..].to_vec()).unwrap())
            }
            _ => None,
        });
        let with_tls = lines.iter().any(|line| matches!(line, Line::StartTls));
        let mut tls = with_tls.then(|| tls::pinned(&certificates.path().join("server-cert.pem")));
        if name.ends_with("only-1.3-offered") {
            tls = Some(only_tls13());
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let server = tokio::spawn(play(listener, lines.clone(), acceptor(certificates.path())));
        let export_name = ExportName::new(export_name.unwrap_or_default());
        let found = outcome(&Endpoint { address, tls, export_name }, &lines).await;
        let expected = expected(&name);
        assert_eq!(found[..expected.len().min(found.len())], expected, "{name}");
        server.abort();
        if let Err(error) = server.await {
            assert!(!error.is_panic(), "{name}: {error}");
        }
        played += 1;
    }
    assert!(played >= 30, "{played}");
}

fn only_tls13() -> xenvault_nbd::Tls {
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    xenvault_nbd::Tls { config: Arc::new(config), server_name: "localhost".try_into().unwrap() }
}
