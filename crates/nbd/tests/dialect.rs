//! One connection against servers that follow a script: every moment of silence, every breach of the protocol.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what is wrong by failing"
)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use xenvault_block::ByteRange;
use xenvault_nbd::{Connection, Endpoint, ExportName, NbdError, Phase, SizeProblem, Timeouts, Tls, Violation};

#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/tls.rs"]
mod tls;

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x01";
const ACK: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0";
const SIZE: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Step {
    Send(Vec<u8>),
    /// Waits for so many bytes.
    Take(usize),
    /// Says nothing more and keeps the connection.
    Silence,
    /// A hard end instead of a polite one.
    Reset,
}

use Step::{Reset, Send, Silence, Take};

fn send(bytes: impl AsRef<[u8]>) -> Step {
    Send(bytes.as_ref().to_vec())
}

/// Flags and the export name.
fn take_name() -> Step {
    Take(4 + 16 + "name".len())
}

/// Flags and STARTTLS.
fn take_starttls() -> Step {
    Take(4 + 16)
}

fn export(size: u64) -> Vec<u8> {
    let mut answer = size.to_be_bytes().to_vec();
    answer.extend([0, 3]);
    answer.resize(134, 0);
    answer
}

fn reply(error: u32, handle: u64) -> Vec<u8> {
    [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &handle.to_be_bytes()].concat()
}

fn opened() -> Vec<Step> {
    vec![send(GREETING), take_name(), send(export(SIZE))]
}

async fn serve(script: Vec<Step>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let _ = follow(stream, script).await;
    });
    address
}

async fn follow(mut stream: TcpStream, script: Vec<Step>) -> std::io::Result<()> {
    for step in script {
        match step {
            Send(bytes) => stream.write_all(&bytes).await?,
            Take(count) => {
                stream.read_exact(&mut vec![0; count]).await?;
            }
            Silence => std::future::pending().await,
            // Closing with bytes unread makes the kernel send a reset.
            Reset => {
                stream.peek(&mut [0]).await?;
                return Ok(());
            }
        }
    }
    stream.shutdown().await?;
    // A polite end: what the client still sends is taken.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.map(|_| ())
}

fn limits() -> Timeouts {
    let short = Duration::from_millis(300);
    Timeouts { handshake: short, open: short, progress: short, disconnect: short, ..Timeouts::default() }
}

async fn open(script: Vec<Step>, tls: Option<Tls>, timeouts: &Timeouts) -> Result<Connection, NbdError> {
    let endpoint = Endpoint { address: serve(script).await, tls, export_name: ExportName::new("name") };
    Connection::open(&endpoint, timeouts).await
}

/// What opening ends with.
async fn failure(script: Vec<Step>, tls: Option<Tls>) -> NbdError {
    match open(script, tls, &Timeouts::default()).await {
        Ok(connection) => panic!("it opened: {connection:?}"),
        Err(error) => error,
    }
}

fn some_tls() -> Option<Tls> {
    let folder = tempfile::tempdir().unwrap();
    certificates::write(folder.path());
    Some(tls::pinned(&folder.path().join("server-cert.pem")))
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

macro_rules! check {
    ($value:expr, $pattern:pat $(if $guard:expr)?) => {
        match $value {
            $pattern $(if $guard)? => {}
            other => panic!("{other:?} is not {}", stringify!($pattern)),
        }
    };
}

#[tokio::test]
async fn x25_the_moment_of_a_silent_close_tells_its_cause() {
    check!(failure(vec![], None).await, NbdError::Refused { .. });
    check!(failure(vec![], some_tls()).await, NbdError::Refused { .. });
    check!(failure(vec![send(&GREETING[..5])], None).await, NbdError::ClosedInOptions { .. });
    check!(failure(vec![send(GREETING), take_starttls()], some_tls()).await, NbdError::ClosedInOptions { .. });
    check!(failure(vec![send(GREETING), take_name()], None).await, NbdError::ClosedAtExportName { .. });
    let half = vec![send(GREETING), take_name(), send(&export(SIZE)[..10])];
    check!(failure(half, None).await, NbdError::ClosedAtExportName { .. });
    let reset = vec![send(GREETING), Take(10), Reset];
    check!(failure(reset, None).await, NbdError::ClosedAtExportName { .. });
    check!(failure(vec![send(GREETING), take_starttls(), send(ACK)], some_tls()).await, NbdError::Tls { .. });
}

#[tokio::test]
async fn every_silence_has_its_limit() {
    let phase = async |script, tls| match open(script, tls, &limits()).await {
        Err(NbdError::Timeout { phase, .. }) => phase,
        other => panic!("{other:?}"),
    };
    assert_eq!(phase(vec![Silence], None).await, Phase::Handshake);
    assert_eq!(phase(vec![send(&GREETING[..9]), Silence], None).await, Phase::Handshake);
    assert_eq!(phase(vec![send(GREETING), Silence], some_tls()).await, Phase::Handshake);
    assert_eq!(phase(vec![send(GREETING), take_starttls(), send(ACK), Silence], some_tls()).await, Phase::Handshake);
    assert_eq!(phase(vec![send(GREETING), Silence], None).await, Phase::Open);
}

#[tokio::test]
async fn x26_opening_may_take_much_longer_than_the_handshake() {
    let patient = Timeouts { open: Duration::from_secs(60), ..limits() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(GREETING).await.unwrap();
        stream.read_exact(&mut [0; 24]).await.unwrap();
        tokio::time::sleep(3 * limits().handshake).await;
        stream.write_all(&export(SIZE)).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let endpoint = Endpoint { address, tls: None, export_name: ExportName::new("name") };
    assert_eq!(Connection::open(&endpoint, &patient).await.unwrap().size(), SIZE);
}

#[tokio::test]
async fn strange_greetings_and_replies_are_named() {
    let violation = async |script, tls| match failure(script, tls).await {
        NbdError::Protocol { violation, .. } => violation,
        other => panic!("{other:?}"),
    };
    assert_eq!(violation(vec![send("HTTP/1.1 400 Bad Request\r\n\r\n")], None).await, Violation::Greeting);
    assert_eq!(violation(vec![send("SSH-2.0-x\r\n")], None).await, Violation::Greeting);
    assert_eq!(violation(vec![send(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0")], None).await, Violation::OldStyle);
    assert_eq!(violation(vec![send(b"NBDMAGICIHAVEOPT\0\0")], None).await, Violation::NotFixedNewstyle);
    let mut other_option = ACK.to_vec();
    other_option[11] = 7;
    let script = vec![send(GREETING), take_starttls(), send(other_option)];
    assert_eq!(violation(script, some_tls()).await, Violation::OptionReply);
    let mut long = ACK.to_vec();
    long[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    let script = vec![send(GREETING), take_starttls(), send(long)];
    assert_eq!(violation(script, some_tls()).await, Violation::OptionReplyLength(u32::MAX));
    let mut unpadded = export(SIZE);
    unpadded[77] = 1;
    let script = vec![send(GREETING), take_name(), send(unpadded)];
    assert_eq!(violation(script, None).await, Violation::Padding);
}

#[tokio::test]
async fn refused_tls_is_never_replaced_by_clear_text() {
    let mut refusal = ACK.to_vec();
    refusal[12..16].copy_from_slice(&0x8000_0002_u32.to_be_bytes());
    // Were the name sent in clear, the script would answer it.
    let script = vec![send(GREETING), take_starttls(), send(refusal), Take(20), send(export(SIZE)), Silence];
    check!(failure(script, some_tls()).await, NbdError::TlsRefused { reply: 0x8000_0002, .. });
    // What a stranger slips in before the handshake never counts as an answer.
    let script = vec![send(GREETING), take_starttls(), send([ACK, &export(SIZE)].concat()), Silence];
    check!(failure(script, some_tls()).await, NbdError::Tls { .. });
}

#[tokio::test]
async fn sizes_that_no_disk_has_are_refused() {
    for (size, expected) in [
        (1 << 63, SizeProblem::TooLarge),
        (u64::MAX, SizeProblem::TooLarge),
        (1000, SizeProblem::NotSectors),
        (SIZE + 1, SizeProblem::NotSectors),
    ] {
        let error = failure(vec![send(GREETING), take_name(), send(export(size))], None).await;
        check!(error, NbdError::UnusableSize { size: found, problem, .. } if (found, problem) == (size, expected));
    }
    for size in [0, (1 << 63) - 512] {
        let connection = open(vec![send(GREETING), take_name(), send(export(size)), Silence], None, &limits()).await;
        assert_eq!(connection.unwrap().size(), size);
    }
}

#[tokio::test]
async fn a_name_that_no_server_takes_is_not_sent() {
    let address = serve(vec![send(GREETING), Silence]).await;
    let endpoint = Endpoint { address, tls: None, export_name: ExportName::new("x".repeat(4097)) };
    let error = Connection::open(&endpoint, &Timeouts::default()).await.unwrap_err();
    check!(error, NbdError::ExportNameTooLong { found: 4097, .. });
}

/// Two reads are in flight when the rest of the script begins.
async fn two_reads(rest: Vec<Step>, timeouts: &Timeouts) -> [Result<usize, NbdError>; 2] {
    let script = [opened(), vec![Take(2 * 28)], rest].concat();
    let connection = open(script, None, timeouts).await.unwrap();
    let (first, second) = (connection.read(range(0, 4096)), connection.read(range(4096, 12_288)));
    let (first, second) = tokio::join!(first, second);
    // After a failure the connection says so at once and for ever.
    if first.is_err() {
        assert!(connection.read(range(0, 512)).await.is_err());
    }
    [first, second].map(|result| result.map(|data| data.len()))
}

fn data(count: usize) -> Step {
    Send(vec![7; count])
}

#[tokio::test]
async fn x29_a_hang_up_in_mid_payload_blames_the_read_that_was_being_answered() {
    let patient = Timeouts::default();
    let [first, second] = two_reads(vec![send(reply(0, 1)), data(1000)], &patient).await;
    check!(first, Err(NbdError::Lost { received_bytes: Some(1000), .. }));
    check!(second, Err(NbdError::Lost { received_bytes: None, .. }));
    let [first, second] = two_reads(vec![send(reply(0, 1)), data(4096), send(reply(0, 2))], &patient).await;
    check!(first, Ok(4096));
    check!(second, Err(NbdError::Lost { received_bytes: Some(0), .. }));
    let [first, second] = two_reads(vec![], &patient).await;
    check!(first, Err(NbdError::Lost { received_bytes: None, .. }));
    check!(second, Err(NbdError::Lost { received_bytes: None, .. }));
}

#[tokio::test]
async fn answers_are_matched_by_their_handle() {
    let [first, second] =
        two_reads(vec![send(reply(0, 2)), data(8192), send(reply(0, 1)), data(4096), Silence], &Timeouts::default())
            .await;
    check!((first, second), (Ok(4096), Ok(8192)));
}

#[tokio::test]
async fn an_error_reply_ends_the_connection_and_its_data_is_not_believed() {
    let steps = vec![send(reply(0xffff_ffea, 1)), data(4096), send(reply(0, 2)), data(8192), Silence];
    let [first, second] = two_reads(steps, &Timeouts::default()).await;
    check!(first, Err(NbdError::ReadRefused { code: 0xffff_ffea, .. }));
    check!(second, Err(NbdError::Lost { received_bytes: None, .. }));
}

#[tokio::test]
async fn payloads_of_another_length_put_the_connection_to_an_end() {
    // Longer than it was asked for: what follows is no reply.
    let steps = vec![send(reply(0, 1)), data(4096 + 100), send(reply(0, 2)), data(8192), Silence];
    let [first, second] = two_reads(steps, &Timeouts::default()).await;
    check!(first, Ok(4096));
    check!(second, Err(NbdError::Protocol { violation: Violation::ReplyMagic(0x0707_0707), .. }));
    // Shorter: nothing in the protocol tells until the next reply is due, and then all that waits fails.
    let steps = vec![send(reply(0, 1)), data(4096 - 16), send(reply(0, 2)), data(8192), Silence];
    let [_, second] = two_reads(steps, &Timeouts::default()).await;
    check!(second, Err(NbdError::Protocol { violation: Violation::ReplyMagic(0x0707_0707), .. }));
}

#[tokio::test]
async fn replies_that_nobody_asked_for_end_the_connection() {
    let mut structured = reply(0, 1);
    structured[..4].copy_from_slice(&0x668e_33ef_u32.to_be_bytes());
    for (steps, expected) in [
        (vec![send(reply(0, 99))], Violation::Handle),
        (vec![send(reply(0, 0))], Violation::Handle),
        (vec![send(structured)], Violation::ReplyMagic(0x668e_33ef)),
        (vec![send("garbage that goes on and on")], Violation::ReplyMagic(0x6761_7262)),
    ] {
        for result in two_reads(steps, &Timeouts::default()).await {
            check!(result, Err(NbdError::Protocol { violation, .. }) if violation == expected);
        }
    }
    // The same answer twice.
    let [first, second] = two_reads(vec![send(reply(0, 1)), data(4096), send(reply(0, 1))], &Timeouts::default()).await;
    check!(first, Ok(4096));
    check!(second, Err(NbdError::Protocol { violation: Violation::Handle, .. }));
}

#[tokio::test]
async fn x29_a_byte_that_is_due_must_come_within_the_limit() {
    let start = Instant::now();
    for steps in [
        vec![Silence],
        vec![send(reply(0, 1)), Silence],
        vec![send(&reply(0, 1)[..7]), Silence],
        vec![send(reply(0, 1)), data(4000), Silence],
    ] {
        let [first, second] = two_reads(steps, &limits()).await;
        check!(first, Err(NbdError::Timeout { phase: Phase::Read, .. }));
        check!(second, Err(NbdError::Lost { received_bytes: None, .. }));
    }
    assert!(start.elapsed() >= 4 * limits().progress);
}

#[tokio::test]
async fn slow_but_steady_progress_is_no_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let progress = Duration::from_secs(1);
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&[GREETING, &export(SIZE)].concat()).await.unwrap();
        stream.read_exact(&mut [0; 24 + 28]).await.unwrap();
        stream.write_all(&reply(0, 1)).await.unwrap();
        for _ in 0..16 {
            tokio::time::sleep(progress / 8).await;
            stream.write_all(&[7; 256]).await.unwrap();
        }
        stream.read_exact(&mut [0; 28]).await.unwrap();
    });
    let endpoint = Endpoint { address, tls: None, export_name: ExportName::new("name") };
    let connection = Connection::open(&endpoint, &Timeouts { progress, ..Timeouts::default() }).await.unwrap();
    assert_eq!(connection.read(range(0, 4096)).await.unwrap().len(), 4096);
    connection.disconnect().await.unwrap();
}

#[tokio::test]
async fn x27_reads_that_a_host_would_hang_up_on_are_not_sent() {
    let connection = open([opened(), vec![Silence]].concat(), None, &limits()).await.unwrap();
    for (start, end) in [(1, 513), (0, 100), (512, 512)] {
        check!(connection.read(range(start, end)).await, Err(NbdError::BadRequest { .. }));
    }
    check!(connection.read(range(SIZE, SIZE + 512)).await, Err(NbdError::OutOfRange { .. }));
    let large = open(vec![send(GREETING), take_name(), send(export(1 << 40)), Silence], None, &limits()).await.unwrap();
    check!(large.read(range(0, (32 << 20) + 512)).await, Err(NbdError::BadRequest { .. }));
}

#[tokio::test]
async fn a_read_that_is_given_up_does_not_disturb_the_next() {
    let rest = vec![Take(2 * 28), send(reply(0, 1)), data(4096), send(reply(0, 2)), data(512), Take(28)];
    let connection = open([opened(), rest].concat(), None, &Timeouts::default()).await.unwrap();
    drop(connection.read(range(0, 4096)));
    assert_eq!(connection.read(range(0, 512)).await.unwrap().len(), 512);
    connection.disconnect().await.unwrap();
}

#[tokio::test]
async fn a_read_whose_connection_is_dropped_ends() {
    let mut script = opened();
    script.extend([Take(28), Silence]);
    let connection = open(script, None, &Timeouts::default()).await.unwrap();
    let read = connection.read(range(0, 4096));
    drop(connection);
    let end = tokio::time::timeout(Duration::from_secs(20), read).await.expect("it waits for ever");
    assert!(matches!(end, Err(NbdError::Lost { .. })), "{end:?}");
}

#[tokio::test]
async fn leaving_waits_for_the_end_of_file() {
    let connection = open([opened(), vec![Take(28)]].concat(), None, &limits()).await.unwrap();
    connection.disconnect().await.unwrap();
    let connection = open([opened(), vec![Take(28), Silence]].concat(), None, &limits()).await.unwrap();
    check!(connection.disconnect().await, Err(NbdError::Timeout { phase: Phase::Disconnect, .. }));
    // A server that begins anew after DISC, as tapdisk does, is no host of ours.
    let connection = open([opened(), vec![Take(28), send(GREETING), Silence]].concat(), None, &limits()).await.unwrap();
    check!(connection.disconnect().await, Err(NbdError::Protocol { .. }));
}

#[tokio::test]
async fn nobody_there_is_a_failed_connect() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = Endpoint { address, tls: None, export_name: ExportName::new("name") };
    check!(Connection::open(&endpoint, &limits()).await, Err(NbdError::Connect { .. }));
}

#[test]
fn the_texts_say_what_to_do_and_keep_secrets() {
    let address: SocketAddr = "192.0.2.7:10809".parse().unwrap();
    let texts = [
        NbdError::Refused { address },
        NbdError::ClosedAtExportName { address },
        NbdError::TlsRefused { address, reply: 0x8000_0002 },
    ]
    .map(|error| error.to_string());
    assert!(texts[0].contains("16 connections") && texts[0].contains("purposes"), "{}", texts[0]);
    assert!(texts[1].contains("host's log"), "{}", texts[1]);
    assert!(texts[2].contains("clear text is not tried"), "{}", texts[2]);
    assert_eq!(format!("{:?}", ExportName::new("/x?session_id=OpaqueRef:1")), "ExportName(..)");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_server_sends_the_client_ends_in_order(
        noise in proptest::collection::vec(any::<u8>(), 0..300), good in 0_usize..3, error in any::<u32>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut bytes = Vec::new();
            if good > 0 { bytes.extend(GREETING); }
            if good > 1 { bytes.extend(export(SIZE)); bytes.extend(reply(error % 3, 1)); }
            bytes.extend(noise);
            let (ours, mut theirs) = tokio::io::duplex(1 << 16);
            theirs.write_all(&bytes).await.unwrap();
            tokio::spawn(async move {
                theirs.shutdown().await.unwrap();
                let _ = theirs.read_to_end(&mut Vec::new()).await;
            });
            let address = SocketAddr::from(([127, 0, 0, 1], 1));
            let endpoint = Endpoint { address, tls: None, export_name: ExportName::new("name") };
            if let Ok(connection) = Connection::open_stream(ours, &endpoint, &Timeouts::default()).await {
                if connection.size() >= 4096 {
                    let _ = connection.read(range(0, 4096)).await;
                    let _ = connection.read(range(0, 512)).await;
                }
                let _ = connection.disconnect().await;
            }
        });
    }
}
