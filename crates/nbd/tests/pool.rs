//! Exports over hosts that are busy, mute, away, or have bad disks.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::single_range_in_vec_init,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test says what is wrong by failing"
)]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::BoxFuture;
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_nbd::{
    BoxError, Endpoint, EndpointSource, Export, ExportName, ExportOptions, FixedEndpoints, HostBudget, NbdError,
    Patience, Phase, ReadOptions, Timeouts,
};

#[path = "support/host.rs"]
mod host;

use host::{Host, Manners, pattern};

const MIB: u64 = 1 << 20;

fn options() -> ExportOptions {
    let pause = Duration::from_millis(10);
    ExportOptions {
        timeouts: Timeouts { connect: Duration::from_secs(2), ..Timeouts::default() },
        patience: Patience { first_pause: pause, longest_pause: 5 * pause, rounds: 6 },
        ..ExportOptions::default()
    }
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

fn fixed(endpoints: &[Endpoint]) -> Arc<dyn EndpointSource> {
    Arc::new(FixedEndpoints(endpoints.to_vec()))
}

async fn open(hosts: &[&Host], options: ExportOptions) -> Result<Export, NbdError> {
    let endpoints: Vec<_> = hosts.iter().map(|host| host.endpoint("/disk?session_id=secret")).collect();
    Export::open(fixed(&endpoints), options).await
}

/// Reads extents and compares every byte.
async fn check_extents(export: &Export, extents: &ExtentSet, options: ReadOptions) -> Result<(), NbdError> {
    let mut stream = export.read_extents(extents.clone(), options);
    let mut found = ExtentSet::new();
    let mut last = 0;
    while let Some(piece) = stream.next().await {
        let (offset, data) = piece?;
        assert!(offset >= last && !data.is_empty());
        last = offset + data.len() as u64;
        assert!(data == pattern(offset..last), "wrong bytes at {offset}");
        assert!(found.intersection(&ExtentSet::from_range(range(offset, last))).is_empty());
        found.insert(range(offset, last));
    }
    assert_eq!(&found, extents);
    Ok(())
}

async fn check_whole(export: &Export) -> Result<(), NbdError> {
    check_extents(export, &ExtentSet::from_range(ByteRange::up_to(export.size())), ReadOptions::default()).await
}

/// Whatever a test waits for comes within this time, or never.
async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), work).await.expect("it takes far too long")
}

#[tokio::test(flavor = "multi_thread")]
async fn x27_only_the_old_dialect_is_spoken_and_requests_are_aligned() {
    let size = 9 * MIB + 512 * 3;
    let host = Host::start(Manners { size, ..Manners::default() }).await;
    let export = open(&[&host], options()).await.unwrap();
    assert_eq!(export.size(), size);
    soon(check_whole(&export)).await.unwrap();
    for (start, end) in [(0, 1), (4095, 4097), (511, 3 * MIB + 7), (size - 1, size), (size - 513, size - 1), (5, 5)] {
        assert!(export.read(range(start, end)).await.unwrap() == pattern(start..end), "{start}..{end}");
    }
    let past = export.read(range(size - 1, size + 1)).await.unwrap_err();
    assert!(matches!(past, NbdError::OutOfRange { .. }), "{past}");
    soon(export.close()).await.unwrap();
    let seen = host.seen();
    assert_eq!(seen.foul, Vec::<String>::new());
    assert_eq!(seen.disconnects, seen.opened);
    assert!(matches!(export.read(range(0, 1)).await, Err(NbdError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn extents_of_any_shape_come_in_order_and_nothing_else_is_read() {
    let host = Host::start(Manners { size: 64 * MIB, ..Manners::default() }).await;
    let export = open(&[&host], options()).await.unwrap();
    let extents: ExtentSet = [
        range(3, 5),
        range(4095, 4097),
        range(65_536, 131_072),
        range(131_073, 5 * MIB + 1),
        range(20 * MIB, 20 * MIB + 65_536),
        range(64 * MIB - 1, 64 * MIB),
    ]
    .into_iter()
    .collect();
    for window_bytes in [0, 70_000, 32 * MIB] {
        soon(check_extents(&export, &extents, ReadOptions { window_bytes })).await.unwrap();
    }
    let touched = extents.align_outward(4096, 64 * MIB);
    for (offset, length) in host.seen().requests {
        let request = ExtentSet::from_range(range(offset, offset + length));
        assert_eq!(request.intersection(&touched), request, "{offset}+{length} was not asked for");
    }
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_rests_is_not_overrun() {
    let host = Host::start(Manners { size: 256 * MIB, ..Manners::default() }).await;
    let export = open(&[&host], options()).await.unwrap();
    let window_bytes = 8 * MIB;
    let mut stream =
        export.read_extents(ExtentSet::from_range(ByteRange::up_to(256 * MIB)), ReadOptions { window_bytes });
    soon(stream.next()).await.unwrap().unwrap();
    // All that fits the window arrives without a poll; nothing more may ever be asked for.
    soon(host.until(|seen| seen.requests.len() as u64 == window_bytes / MIB)).await;
    let asked: u64 = host.seen().requests.iter().map(|(_, length)| length).sum();
    assert_eq!(asked, window_bytes);
    drop(stream);
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn x26_connections_are_opened_one_by_one_and_only_while_they_help() {
    let opening = Duration::from_millis(40);
    let host = Host::start(Manners { size: 64 * MIB, opening, ..Manners::default() }).await;
    let budget = HostBudget::new(5);
    let shared = || ExportOptions { budget: budget.clone(), ..options() };
    let first = open(&[&host], shared()).await.unwrap();
    let second = open(&[&host], shared()).await.unwrap();
    // A small read needs no second connection.
    first.read(range(0, 4096)).await.unwrap();
    assert_eq!(host.seen().opened, 2);
    let (a, b) = soon(futures::future::join(check_whole(&first), check_whole(&second))).await;
    a.and(b).unwrap();
    let seen = host.seen();
    assert_eq!(seen.most_opening, 1);
    assert!(seen.most_open > 2 && seen.most_open <= 5, "{seen:?}");
    assert_eq!(seen.opened, seen.most_open, "connections are kept for the whole disk");
    soon(first.close()).await.unwrap();
    soon(second.close()).await.unwrap();
    assert_eq!(host.seen().open_now, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn x25_a_busy_host_is_asked_again_and_a_further_connection_is_no_need() {
    let host = Host::start(Manners { size: 32 * MIB, refusals: 3, places: 2, ..Manners::default() }).await;
    let export = soon(open(&[&host], options())).await.unwrap();
    soon(check_whole(&export)).await.unwrap();
    let seen = host.seen();
    assert!(seen.refused >= 3 && seen.most_open == 2, "{seen:?}");
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn x25_a_host_that_stays_busy_is_told_from_a_disk_that_does_not_open() {
    let busy = Host::start(Manners { size: MIB, refusals: usize::MAX, ..Manners::default() }).await;
    let error = soon(open(&[&busy], options())).await.unwrap_err();
    let NbdError::Exhausted { attempts: 6, source } = &error else { panic!("{error:?}") };
    assert!(matches!(**source, NbdError::Refused { .. }), "{error:?}");

    let names = Some(HashSet::new());
    let unknown = Host::start(Manners { size: MIB, names, ..Manners::default() }).await;
    let error = soon(open(&[&unknown], options())).await.unwrap_err();
    assert!(matches!(error, NbdError::ClosedAtExportName { .. }), "{error:?}");
    // Neither the text nor the debug form gives the secret away.
    assert!(!format!("{error} {error:?} {:?}", unknown.endpoint("/x?session_id=secret")).contains("secret"));

    // With a host that is not busy, the busy one does not matter.
    let good = Host::start(Manners { size: MIB, ..Manners::default() }).await;
    let export = soon(open(&[&busy, &good], options())).await.unwrap();
    soon(check_whole(&export)).await.unwrap();
    soon(export.close()).await.unwrap();
}

/// Gives a new session each time it is asked.
struct Sessions {
    address: SocketAddr,
    asked: AtomicUsize,
}

impl EndpointSource for Sessions {
    fn endpoints(&self) -> BoxFuture<'_, Result<Vec<Endpoint>, BoxError>> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let export_name = ExportName::new(format!("session-{number}"));
        Box::pin(async move { Ok(vec![Endpoint { address: self.address, tls: None, export_name }]) })
    }
}

/// Gives these export names one after the other; `None` is a coordinator that is away.
struct Shaky {
    address: SocketAddr,
    answers: Mutex<Vec<Option<&'static str>>>,
}

impl Shaky {
    fn new(host: &Host, mut answers: Vec<Option<&'static str>>) -> Arc<Self> {
        answers.reverse();
        Arc::new(Self { address: host.address, answers: Mutex::new(answers) })
    }
}

impl EndpointSource for Shaky {
    fn endpoints(&self) -> BoxFuture<'_, Result<Vec<Endpoint>, BoxError>> {
        let answer = match self.answers.lock().unwrap().pop().expect("it is not asked more often") {
            Some(name) => Ok(vec![Endpoint { address: self.address, tls: None, export_name: ExportName::new(name) }]),
            None => Err("the coordinator is away".into()),
        };
        Box::pin(async move { answer })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x04_a_coordinator_that_is_away_ends_no_disk_in_the_middle() {
    let host = Host::start(Manners { size: 16 * MIB, cut_after: vec![5 * MIB], ..Manners::default() }).await;
    let error = Export::open(Shaky::new(&host, vec![None]), options()).await.unwrap_err();
    assert!(matches!(error, NbdError::Endpoints { .. }), "{error:?}");

    let source = Shaky::new(&host, vec![Some("old"), None, None, Some("new")]);
    let export = Export::open(source.clone(), ExportOptions { connections: 1, ..options() }).await.unwrap();
    host.manners.lock().unwrap().names = only("new");
    soon(check_whole(&export)).await.unwrap();
    assert!(source.answers.lock().unwrap().is_empty());
    soon(export.close()).await.unwrap();
}

fn only(name: &str) -> Option<HashSet<String>> {
    Some(HashSet::from([name.to_owned()]))
}

#[tokio::test(flavor = "multi_thread")]
async fn x04_a_session_that_is_gone_is_asked_for_again() {
    let host = Host::start(Manners { size: 16 * MIB, names: only("session-2"), ..Manners::default() }).await;
    let source = Arc::new(Sessions { address: host.address, asked: AtomicUsize::new(0) });
    let export = soon(Export::open(source.clone(), options())).await.unwrap();
    assert_eq!(source.asked.load(Ordering::SeqCst), 2);
    // The session goes, the open export stays; only after the connection is lost a new name is needed.
    {
        let mut manners = host.manners.lock().unwrap();
        manners.names = only("session-3");
        manners.cut_after = vec![MIB + 100];
    }
    let single = export.read(range(0, 4096)).await.unwrap();
    assert!(single == pattern(0..4096));
    soon(check_whole(&export)).await.unwrap();
    assert_eq!(source.asked.load(Ordering::SeqCst), 3);
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn x22_addresses_that_do_not_answer_cost_a_short_limit_once() {
    let host = Host::start(Manners { size: 32 * MIB, ..Manners::default() }).await;
    // Nobody listens there, and nobody answers at an address for documentation.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent = SocketAddr::from(([192, 0, 2, 1], 10809));
    let dead = |address| Endpoint { address, tls: None, export_name: ExportName::new("") };
    let endpoints = [dead(silent), dead(closed), host.endpoint("")];
    let limited =
        ExportOptions { timeouts: Timeouts { connect: Duration::from_millis(300), ..options().timeouts }, ..options() };
    let start = Instant::now();
    let export = soon(Export::open(fixed(&endpoints), limited)).await.unwrap();
    soon(check_whole(&export)).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn x22_no_address_at_all_is_said_so() {
    let error = Export::open(fixed(&[]), options()).await.unwrap_err();
    assert!(matches!(error, NbdError::NoEndpoints), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn x24_ipv6_is_tried_last_and_its_failure_says_nothing() {
    let v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, 1));
    let dead = Endpoint { address: v6, tls: None, export_name: ExportName::new("") };
    let host = Host::start(Manners { size: MIB, ..Manners::default() }).await;
    let export = soon(Export::open(fixed(&[dead.clone(), host.endpoint("")]), options())).await.unwrap();
    soon(check_whole(&export)).await.unwrap();
    soon(export.close()).await.unwrap();

    host.manners.lock().unwrap().names = only("another");
    let error = soon(Export::open(fixed(&[dead, host.endpoint("")]), options())).await.unwrap_err();
    assert!(matches!(error, NbdError::ClosedAtExportName { address } if address == host.address), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_connections_are_made_up_for_where_they_stopped() {
    let cuts = vec![3 * MIB + 5, 0, 700_000, 5 * MIB, 1];
    let flaky = Host::start(Manners { size: 48 * MIB, cut_after: cuts, ..Manners::default() }).await;
    let other = Host::start(Manners { size: 48 * MIB, ..Manners::default() }).await;
    let export = open(&[&flaky, &other], options()).await.unwrap();
    soon(check_whole(&export)).await.unwrap();
    let counters = export.counters();
    assert!(counters.lost_connections >= 1, "{counters:?}");
    // What had come before is not read again.
    assert!(counters.read_bytes < 60 * MIB, "{counters:?}");
    assert!(other.seen().opened > 0);
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_goes_away_is_replaced_by_another() {
    let first = Host::start(Manners { size: 64 * MIB, ..Manners::default() }).await;
    let second = Host::start(Manners { size: 64 * MIB, ..Manners::default() }).await;
    let export = open(&[&first, &second], ExportOptions { connections: 1, ..options() }).await.unwrap();
    export.read(range(0, MIB)).await.unwrap();
    assert_eq!((first.seen().opened, second.seen().opened), (1, 0));
    first.manners.lock().unwrap().refusals = usize::MAX;
    first.manners.lock().unwrap().dead_disk = true;
    soon(check_whole(&export)).await.unwrap();
    assert_eq!(second.seen().opened, 1);
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn x29_a_bad_place_is_a_media_error_with_its_exact_offset_and_never_zeros() {
    let at = 37 * MIB + 5 * 4096;
    for connections in [1, 4] {
        let bad = vec![at + 100..at + 101];
        let first = Host::start(Manners { size: 64 * MIB, bad: bad.clone(), ..Manners::default() }).await;
        let second = Host::start(Manners { size: 64 * MIB, bad, ..Manners::default() }).await;
        let export = open(&[&first, &second], ExportOptions { connections, ..options() }).await.unwrap();
        let error = soon(check_whole(&export)).await.unwrap_err();
        let NbdError::MediaError { range: found, attempts, .. } = error else { panic!("{error:?}") };
        assert_eq!((found, attempts), (range(at, at + 4096), 3));
        // All around it can still be read.
        for around in [range(0, MIB), range(at - 4096, at), range(at + 4096, at + 65_536)] {
            let data = soon(export.read(around)).await.unwrap();
            assert!(data == pattern(around.start()..around.end()));
        }
        assert!(second.seen().opened > 0, "the other host was asked too");
        soon(export.close()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x29_bad_places_at_both_ends_are_found() {
    for (at, size) in [(0, 8 * MIB), (8 * MIB - 512, 8 * MIB), (8 * MIB, 8 * MIB + 512)] {
        let host = Host::start(Manners { size, bad: vec![at..at + 1], ..Manners::default() }).await;
        let export = open(&[&host], options()).await.unwrap();
        let error = soon(check_whole(&export)).await.unwrap_err();
        assert!(matches!(&error, NbdError::MediaError { range, .. } if range.contains(at)), "{at}: {error:?}");
        soon(export.close()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x29_a_disk_of_which_nothing_can_be_read_is_no_media_error() {
    for dead in [
        Manners { size: 8 * MIB, bad: vec![0..8 * MIB], ..Manners::default() },
        Manners { size: 8 * MIB, dead_disk: true, ..Manners::default() },
    ] {
        let host = Host::start(dead).await;
        let export = open(&[&host], options()).await.unwrap();
        let error = soon(check_whole(&export)).await.unwrap_err();
        assert!(matches!(error, NbdError::Lost { .. }), "{error:?}");
        soon(export.close()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn x29_a_host_that_goes_silent_is_left_after_the_progress_limit() {
    let progress = Duration::from_millis(400);
    let limited = ExportOptions { timeouts: Timeouts { progress, ..Timeouts::default() }, connections: 1, ..options() };
    let mute = Host::start(Manners { size: 8 * MIB, mute_after: Some(2), ..Manners::default() }).await;
    let good = Host::start(Manners { size: 8 * MIB, ..Manners::default() }).await;
    let export = open(&[&mute, &good], limited).await.unwrap();
    // Without a request nothing is due, so resting is no failure.
    tokio::time::sleep(2 * progress).await;
    soon(check_whole(&export)).await.unwrap();
    let counters = export.counters();
    assert_eq!((counters.lost_connections, counters.opened_connections), (1, 2), "{counters:?}");
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_changes_its_size_is_not_read_on() {
    let host = Host::start(Manners { size: 32 * MIB, cut_after: vec![5 * MIB], ..Manners::default() }).await;
    let export = open(&[&host], ExportOptions { connections: 1, ..options() }).await.unwrap();
    host.manners.lock().unwrap().size = 32 * MIB + 512;
    let error = soon(check_whole(&export)).await.unwrap_err();
    let sizes = (32 * MIB, 32 * MIB + 512);
    assert!(matches!(error, NbdError::SizeChanged { before, after, .. } if (before, after) == sizes), "{error:?}");
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_waits_until_the_host_has_detached_the_disk() {
    let closing = Duration::from_millis(300);
    let host = Host::start(Manners { size: 64 * MIB, closing, ..Manners::default() }).await;
    let export = open(&[&host], options()).await.unwrap();
    soon(check_whole(&export)).await.unwrap();
    assert!(host.seen().open_now > 1);
    soon(export.close()).await.unwrap();
    let seen = host.seen();
    assert_eq!((seen.open_now, seen.disconnects), (0, seen.opened));
    soon(export.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_that_does_not_come_is_told_after_its_limit() {
    let host = Host::start(Manners { size: MIB, never_closes: true, ..Manners::default() }).await;
    let disconnect = Duration::from_millis(100);
    let limited = ExportOptions { timeouts: Timeouts { disconnect, ..Timeouts::default() }, ..options() };
    let export = open(&[&host], limited).await.unwrap();
    let error = soon(export.close()).await.unwrap_err();
    assert!(matches!(error, NbdError::Timeout { phase: Phase::Disconnect, .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_an_export_says_goodbye_in_the_background() {
    let host = Host::start(Manners { size: 16 * MIB, ..Manners::default() }).await;
    let export = open(&[&host], options()).await.unwrap();
    let mut stream = export.read_extents(ExtentSet::from_range(ByteRange::up_to(16 * MIB)), ReadOptions::default());
    soon(stream.next()).await.unwrap().unwrap();
    drop(export);
    // The stream holds the pool; it goes on.
    soon(stream.next()).await.unwrap().unwrap();
    drop(stream);
    soon(host.until(|seen| seen.opened > 0 && seen.open_now == 0)).await;
    assert_eq!(host.seen().foul, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_while_reading_ends_the_reads() {
    let host = Host::start(Manners { size: 256 * MIB, ..Manners::default() }).await;
    let export = open(&[&host], options()).await.unwrap();
    let reads = Mutex::new(Vec::new());
    let reading = async {
        let result = check_whole(&export).await;
        reads.lock().unwrap().push(result);
    };
    let closing = async {
        host.until(|seen| seen.requests.len() > 3).await;
        export.close().await.unwrap();
    };
    soon(futures::future::join(reading, closing)).await;
    let results = reads.into_inner().unwrap();
    assert!(matches!(results[..], [Err(NbdError::Closed)]), "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_connection_is_made_up_for_while_a_further_one_is_sought_in_vain() {
    let host = Host::start(Manners { size: 32 * MIB, ..Manners::default() }).await;
    // Connects and then says nothing: the search for a further connection ends here.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mute = Endpoint { address: silent.local_addr().unwrap(), ..host.endpoint("/disk") };
    let mut options = ExportOptions { budget: HostBudget::new(1), connections: 2, ..options() };
    options.timeouts.handshake = Duration::from_secs(1);
    host.manners.lock().unwrap().cut_after = vec![2 * MIB];
    // The mute one is tried first, and from then on last.
    let export = Export::open(fixed(&[mute, host.endpoint("/disk")]), options).await.unwrap();
    soon(check_whole(&export)).await.unwrap();
    assert_eq!((host.seen().opened, export.counters().lost_connections), (2, 1));
    soon(export.close()).await.unwrap();
}
