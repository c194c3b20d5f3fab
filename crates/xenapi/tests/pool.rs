//! The client against the simulated pool: both encodings, tasks, transfers, faults, and nothing left behind.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

use bytes::Bytes;
use futures::FutureExt;
use std::collections::BTreeMap;
use std::time::Duration;
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskContent, DiskSpec, Fault, FaultEffect, SimOptions, SimPool, SrSpec, VmSpec};
use xenvault_xenapi::tasks::{WaitOptions, wait};
use xenvault_xenapi::transfer::{ExportFormat, export_raw_vdi, import_raw_vdi, import_raw_vdi_chunked};
use xenvault_xenapi::{
    CancellationToken, ConnectOptions, ErrorCode, Protocol, Retry, Session, Trust, XenApiError, event, host, pbd, pool,
    sr, task, vbd, vdi, vm,
};

const MIB: u64 = 1 << 20;

async fn start(options: SimOptions) -> SimPool {
    SimPool::start(options).await.unwrap()
}

fn connect(sim: &SimPool, protocol: Protocol) -> ConnectOptions {
    let trust = match sim.url().starts_with("http://") {
        true => Trust::PlainHttp,
        false => Trust::Fingerprint(sim.fingerprint().parse().unwrap()),
    };
    let mut options = ConnectOptions::new(&sim.url(), sim.user(), sim.password(), trust);
    options.protocol = protocol;
    options.originator = "xenapi-test".to_owned();
    options
}

async fn login(sim: &SimPool) -> Session {
    Session::login(connect(sim, Protocol::Auto)).await.unwrap()
}

/// Waits until neither sessions of ours nor tasks are left.
async fn is_clean(sim: &SimPool) {
    let waiting = async {
        loop {
            let ours = |class: &str, field: &str, text: &str| {
                sim.records(class).values().filter(|record| record[field].as_str().unwrap_or("").contains(text)).count()
            };
            let sessions = ours("session", "originator", "xenapi-test");
            if sessions == 0 && sim.records("task").is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let limit = Duration::from_secs(120);
    let clean = tokio::time::timeout(limit, waiting).await;
    assert!(clean.is_ok(), "left: {:?} {:?}", sim.records("session"), sim.records("task"));
}

fn one_disk(size: u64, random: u64) -> SimOptions {
    let content = DiskContent::Random { seed: 7, bytes: random };
    SimOptions { vms: vec![VmSpec::new("vm-1").disk(DiskSpec::new(size).content(content))], ..SimOptions::default() }
}

async fn first_disk(session: &Session, sim: &SimPool) -> vdi::Ref {
    vdi::get_by_uuid(session, &sim.vms()[0].disks[0].vdi).await.unwrap()
}

async fn any_host(session: &Session) -> host::Ref {
    pool::get_all_records(session).await.unwrap().into_values().next().unwrap().master
}

#[tokio::test]
async fn both_encodings_see_the_same_pool() {
    let sim = start(SimOptions { hosts: 2, ..SimOptions::default() }).await;
    let xml = Session::login(connect(&sim, Protocol::Xml)).await.unwrap();
    let json = Session::login(connect(&sim, Protocol::Json)).await.unwrap();
    macro_rules! equal {
        ($($module:ident),*) => {$(
            let (of_xml, of_json) = (
                xenvault_xenapi::$module::get_all_records(&xml).await.unwrap(),
                xenvault_xenapi::$module::get_all_records(&json).await.unwrap(),
            );
            assert_eq!(of_xml, of_json);
        )*};
    }
    equal!(vm, vdi, vbd, vif, sr, pbd, host, pool, network, pif, sm);
    assert_eq!(xml.members().len(), 2);
    assert_eq!(xml.pinned_hosts(), json.pinned_hosts());
    assert!(xml.members().iter().all(|member| member.fingerprint.is_some()));
    let unknown = vm::Ref::new("OpaqueRef:nobody");
    let (of_xml, of_json) = (vm::get_record(&xml, &unknown).await, vm::get_record(&json, &unknown).await);
    let failure = |outcome: Result<vm::Record, XenApiError>| outcome.unwrap_err().api().cloned().unwrap();
    let failure_of_xml = failure(of_xml);
    assert_eq!(failure_of_xml, failure(of_json));
    assert_eq!(failure_of_xml.code, ErrorCode::HandleInvalid);
    xml.logout().await.unwrap();
    json.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn plain_http_works_where_it_is_chosen() {
    let sim = start(SimOptions { plain_http: true, ..SimOptions::default() }).await;
    let session = login(&sim).await;
    assert_eq!(vm::get_by_name_label(&session, "vm-1").await.unwrap().len(), 1);
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn x01_every_member_leads_to_the_coordinator() {
    let sim = start(SimOptions { hosts: 3, ..SimOptions::default() }).await;
    let session = login(&sim).await;
    let pins = session.pinned_hosts();
    let coordinator = session.coordinator();
    session.logout().await.unwrap();
    for member in sim.hosts() {
        let mut options = connect(&sim, Protocol::Auto);
        options.url = member.url;
        options.trust = Trust::Pins(pins.clone());
        let session = Session::login(options).await.unwrap();
        assert_eq!(session.coordinator(), coordinator);
        session.logout().await.unwrap();
    }
    let mut options = connect(&sim, Protocol::Auto);
    options.url.clone_from(&sim.hosts()[1].url);
    options.trust = Trust::Fingerprint(sim.hosts()[1].fingerprint.parse().unwrap());
    let error = Session::login(options).await.unwrap_err();
    assert!(matches!(error, XenApiError::HostIsSlave { found: Some(_), .. }), "{error:?}");
    is_clean(&sim).await;
}

#[tokio::test]
async fn wrong_passwords_and_wrong_fingerprints_are_told_apart() {
    let sim = start(SimOptions::default()).await;
    let mut options = connect(&sim, Protocol::Auto);
    options.password = "wrong".into();
    assert!(matches!(Session::login(options).await, Err(XenApiError::LoginRefused { .. })));
    let mut options = connect(&sim, Protocol::Auto);
    options.trust = Trust::Fingerprint("00".repeat(32).parse().unwrap());
    assert!(matches!(Session::login(options).await, Err(XenApiError::Certificate { .. })));
    is_clean(&sim).await;
}

#[tokio::test]
async fn snapshots_as_tasks_and_what_they_leave() {
    let sim = start(SimOptions { task_delay: Duration::from_millis(100), ..SimOptions::default() }).await;
    let session = login(&sim).await;
    let cancel = CancellationToken::new();
    let vm = vm::get_by_name_label(&session, "vm-1").await.unwrap().remove(0);
    let task = vm::snapshot_async(&session, &vm, "snap", &[]).await.unwrap();
    let snapshot: vm::Ref = wait(&session, task, WaitOptions::of("snapshot"), &cancel).await.unwrap();
    let record = vm::get_record(&session, &snapshot).await.unwrap();
    assert!(record.is_a_snapshot && record.snapshot_of == vm && record.name_label == "snap");
    assert!(sim.records("task").is_empty());

    let disk = vbd::get_record(&session, &record.vbds[0]).await.unwrap().vdi;
    let task = vdi::enable_cbt_async(&session, &disk).await.unwrap();
    let error = wait::<()>(&session, task, WaitOptions::of("CBT"), &cancel).await.unwrap_err();
    assert_eq!(error.code(), Some(&ErrorCode::OperationNotAllowed));

    vm::destroy(&session, &snapshot).await.unwrap();
    vdi::destroy(&session, &disk).await.unwrap();
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn a_dropped_wait_leaves_no_task() {
    let sim = start(SimOptions { task_delay: Duration::from_millis(300), ..SimOptions::default() }).await;
    let session = login(&sim).await;
    let vm = vm::get_by_name_label(&session, "vm-1").await.unwrap().remove(0);
    let task = vm::snapshot_async(&session, &vm, "snap", &[]).await.unwrap();
    let cancel = CancellationToken::new();
    let waiting = wait::<vm::Ref>(&session, task, WaitOptions::of("snapshot"), &cancel);
    assert!(waiting.now_or_never().is_none());
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn objects_are_made_with_what_a_client_may_set() {
    let sim = start(SimOptions::default()).await;
    let session = login(&sim).await;
    let (target, _) = sr::get_all_records(&session)
        .await
        .unwrap()
        .into_iter()
        .find(|(_, sr)| sr.name_label == "Local storage")
        .unwrap();
    let disk = vdi::Record {
        name_label: "made here".into(),
        sr: target,
        virtual_size: i64::try_from(8 * MIB).unwrap(),
        type_: vdi::Type::User,
        other_config: BTreeMap::from([("key".to_owned(), "a <b> & c".to_owned())]),
        ..vdi::Record::default()
    };
    for protocol in [Protocol::Xml, Protocol::Json] {
        let session = Session::login(connect(&sim, protocol)).await.unwrap();
        let made = vdi::create(&session, &disk).await.unwrap();
        vdi::add_to_other_config(&session, &made, "second", "2").await.unwrap();
        let found = vdi::get_record(&session, &made).await.unwrap();
        assert_eq!((found.name_label.as_str(), found.virtual_size), ("made here", 8 << 20));
        assert_eq!(found.other_config["key"], "a <b> & c");
        assert_eq!(found.other_config["second"], "2");
        let again = vdi::add_to_other_config(&session, &made, "second", "2").await.unwrap_err();
        assert_eq!(again.code(), Some(&ErrorCode::MapDuplicateKey));
        vdi::destroy(&session, &made).await.unwrap();
        session.logout().await.unwrap();
    }
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn disks_go_out_and_in_again() {
    let sim = start(one_disk(16 * MIB, 3 * MIB)).await;
    let session = login(&sim).await;
    let (host, disk) = (any_host(&session).await, first_disk(&session, &sim).await);
    let uuid = sim.vms()[0].disks[0].vdi.clone();
    let content = sim.vdi_read(&uuid, 0, 16 * MIB).unwrap();

    let mut export =
        export_raw_vdi(&session, &host, &disk, ExportFormat::Raw { virtual_size: 16 * MIB }).await.unwrap();
    let mut received = Vec::new();
    while let Some(piece) = export.next().await.unwrap() {
        received.extend_from_slice(&piece);
    }
    export.finish().await.unwrap();
    assert!(received == content);

    let mut export = export_raw_vdi(&session, &host, &disk, ExportFormat::Vhd { base: None }).await.unwrap();
    while export.next().await.unwrap().is_some() {}
    export.finish().await.unwrap();

    // Chunks: only what was sent changes.
    let mut expected = content.clone();
    let mut import = import_raw_vdi_chunked(&session, &host, &disk).await.unwrap();
    let (low, high) = (Bytes::from(vec![1; 4096]), Bytes::from(vec![2; usize::try_from(2 * MIB).unwrap()]));
    import.write(MIB, low.clone()).await.unwrap();
    import.write(14 * MIB, high.clone()).await.unwrap();
    import.finish().await.unwrap();
    expected[usize::try_from(MIB).unwrap()..][..low.len()].copy_from_slice(&low);
    expected[usize::try_from(14 * MIB).unwrap()..][..high.len()].copy_from_slice(&high);
    assert!(sim.vdi_read(&uuid, 0, 16 * MIB).unwrap() == expected);

    // From begin to end.
    let mut import = import_raw_vdi(&session, &host, &disk, 16 * MIB).await.unwrap();
    for piece in content.chunks(1_000_000) {
        import.write(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    import.finish().await.unwrap();
    assert!(sim.vdi_read(&uuid, 0, 16 * MIB).unwrap() == content);
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn x33_the_head_of_an_export_is_cheap_and_leaves_nothing() {
    let sim = start(one_disk(64 * MIB, 32 * MIB)).await;
    let session = login(&sim).await;
    let (host, disk) = (any_host(&session).await, first_disk(&session, &sim).await);
    let mut export = export_raw_vdi(&session, &host, &disk, ExportFormat::Vhd { base: None }).await.unwrap();
    let mut head = Vec::new();
    while head.len() < 2048 {
        head.extend_from_slice(&export.next().await.unwrap().unwrap());
    }
    assert!(head.starts_with(b"conectix"));
    export.close().await.unwrap();
    drop(export_raw_vdi(&session, &host, &disk, ExportFormat::Vhd { base: None }).await.unwrap());
    session.logout().await.unwrap();
    is_clean(&sim).await;
    assert!(sim.records("VBD").values().all(|vbd| vbd["currently_attached"] == false));
}

#[tokio::test]
async fn x34_a_transfer_that_ends_early_is_no_success() {
    let sim = start(one_disk(16 * MIB, 16 * MIB)).await;
    let session = login(&sim).await;
    let (host, disk) = (any_host(&session).await, first_disk(&session, &sim).await);
    sim.fault(Fault::once("http/export_raw_vdi", FaultEffect::Truncate(5 * MIB)));
    let mut export =
        export_raw_vdi(&session, &host, &disk, ExportFormat::Raw { virtual_size: 16 * MIB }).await.unwrap();
    while let Ok(Some(_)) = export.next().await {}
    let error = export.finish().await.unwrap_err();
    assert!(matches!(error, XenApiError::Api { .. } | XenApiError::Length { .. }), "{error:?}");

    sim.fault(Fault::once("http/import_raw_vdi", FaultEffect::Truncate(5 * MIB)));
    let outcome = async {
        let mut import = import_raw_vdi(&session, &host, &disk, 16 * MIB).await?;
        for _ in 0..16 {
            import.write(Bytes::from(vec![9; 1 << 20])).await?;
        }
        import.finish().await
    };
    let error = outcome.await.unwrap_err();
    assert_eq!(error.retry(), Retry::Later, "{error:?}");
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn x02_a_host_without_the_sr_sends_to_one_that_has_it() {
    let srs = vec![SrSpec { local_to: Some(1), ..SrSpec::new("on the second host", SrKind::Ext) }];
    let sim = start(SimOptions { hosts: 2, srs, ..one_disk(4 * MIB, 4 * MIB) }).await;
    let session = login(&sim).await;
    let (first, disk) = (any_host(&session).await, first_disk(&session, &sim).await);
    let mut export =
        export_raw_vdi(&session, &first, &disk, ExportFormat::Raw { virtual_size: 4 * MIB }).await.unwrap();
    while export.next().await.unwrap().is_some() {}
    export.finish().await.unwrap();
    let mut import = import_raw_vdi_chunked(&session, &first, &disk).await.unwrap();
    import.write(0, Bytes::from_static(&[5; 512])).await.unwrap();
    import.finish().await.unwrap();
    assert_eq!(sim.vdi_read(&sim.vms()[0].disks[0].vdi, 0, 512).unwrap(), [5; 512]);
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn x07_faults_of_a_busy_pool_pass() {
    let sim = start(SimOptions::default()).await;
    let session = login(&sim).await;
    let vm = vm::get_by_name_label(&session, "vm-1").await.unwrap().remove(0);
    let busy = FaultEffect::Error { code: "OTHER_OPERATION_IN_PROGRESS".into(), params: vec!["VM".into(), "x".into()] };
    sim.fault(Fault { count: 2, ..Fault::once("VM.set_name_label", busy) });
    vm::set_name_label(&session, &vm, "renamed").await.unwrap();
    assert_eq!(vm::get_name_label(&session, &vm).await.unwrap(), "renamed");
    // A read whose connection breaks is repeated, before or after it was done.
    for effect in [FaultEffect::Drop, FaultEffect::DropAfter] {
        sim.fault(Fault::once("VM.get_name_label", effect));
        assert_eq!(vm::get_name_label(&session, &vm).await.unwrap(), "renamed");
    }
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn x03_a_session_that_the_pool_ended_is_renewed() {
    let sim = start(SimOptions::default()).await;
    let session = login(&sim).await;
    // Somebody else ends it.
    let reference = session.reference();
    let control = login(&sim).await;
    let ended = FaultEffect::Error { code: "SESSION_INVALID".into(), params: vec![reference.as_str().to_owned()] };
    sim.fault(Fault::once("VM.get_all", ended));
    assert_eq!(vm::get_all(&session).await.unwrap().len(), vm::get_all(&control).await.unwrap().len());
    assert_eq!((session.generation(), control.generation()), (2, 1));
    session.logout().await.unwrap();
    control.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn x01_reads_and_the_wait_for_a_task_go_through_a_fail_over_that_takes_a_while() {
    let options = SimOptions { hosts: 3, task_delay: Duration::from_secs(600), ..SimOptions::default() };
    let sim = start(options).await;
    let session = login(&sim).await;
    let vm = vm::get_by_name_label(&session, "vm-1").await.unwrap().remove(0);
    for (host, old_one_dies) in [(1, false), (2, true)] {
        let task = vm::snapshot_async(&session, &vm, "snap", &[]).await.unwrap();
        let cancel = CancellationToken::new();
        let waiting = tokio::spawn({
            let (session, cancel) = (session.clone(), cancel.clone());
            async move { wait::<vm::Ref>(&session, task, WaitOptions::of("snapshot"), &cancel).await }
        });
        let calls = |method: &str| sim.counters().calls.get(method).copied().unwrap_or(0);
        let (events, logins) = (calls("event.from"), calls("session.login_with_password"));
        while calls("event.from") == events {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if old_one_dies {
            sim.stop_host(1).await.unwrap();
        }
        let moving = tokio::spawn({
            let sim = sim.clone();
            async move { sim.fail_over(host, Duration::from_secs(4)).await }
        });
        while sim.url() != sim.hosts()[host].url {
            tokio::task::yield_now().await;
        }
        let reads = futures::future::join_all((0..4).map(|_| vm::get_name_label(&session, &vm))).await;
        for read in reads {
            assert_eq!(read.unwrap(), "vm-1");
        }
        moving.await.unwrap().unwrap();
        // Nobody goes on with the snapshot: that is what the wait has to say, and not that the pool was away.
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, XenApiError::TaskVanished { .. }), "{error:?}");
        assert_eq!(format!("https://{}", session.coordinator()), sim.hosts()[host].url);
        // It was refused at first.
        assert!(calls("session.login_with_password") >= logins + 2);
    }
    assert_eq!(session.generation(), 3, "one login for each fail-over");
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn events_tell_what_changed() {
    let sim = start(SimOptions::default()).await;
    let session = login(&sim).await;
    let vm = vm::get_by_name_label(&session, "vm-1").await.unwrap().remove(0);
    let all = event::from(&session, &["vm"], "", Duration::from_secs(30)).await.unwrap();
    let seen = all.events.iter().find(|event| event.reference == vm.as_str()).unwrap();
    assert_eq!(seen.operation, event::Operation::Add);
    assert_eq!(seen.record::<vm::Record>().unwrap().unwrap().name_label, "vm-1");
    let (batch, renamed) = futures::future::join(
        event::from(&session, &["vm"], &all.token, Duration::from_secs(60)),
        vm::set_name_label(&session, &vm, "renamed"),
    )
    .await;
    renamed.unwrap();
    let batch = batch.unwrap();
    assert_eq!(batch.events.last().unwrap().record::<vm::Record>().unwrap().unwrap().name_label, "renamed");
    let quiet = event::from(&session, &["vm"], &batch.token, Duration::from_millis(100)).await.unwrap();
    assert!(quiet.events.is_empty());
    // X08: a token that is not understood.
    let error = event::from(&session, &["vm"], "garbage", Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(error.code(), Some(&ErrorCode::EventFromTokenParseFailure));
    session.logout().await.unwrap();
    is_clean(&sim).await;
}

#[tokio::test]
async fn sessions_are_closed_on_every_way_out() {
    let sim = start(SimOptions::default()).await;
    drop(login(&sim).await);
    is_clean(&sim).await;
    // Dropped while logging in, at several moments.
    for wait in [0, 1, 2, 5, 10, 20] {
        let _ = tokio::time::timeout(Duration::from_millis(wait), login(&sim)).await;
    }
    is_clean(&sim).await;
    // Failed on the way.
    let broken = FaultEffect::Error { code: "INTERNAL_ERROR".into(), params: vec!["x".into()] };
    sim.fault(Fault::once("host.get_all_records", broken));
    assert!(Session::login(connect(&sim, Protocol::Auto)).await.is_err());
    is_clean(&sim).await;
}

#[tokio::test]
async fn pbds_and_tasks_read_as_they_are() {
    let sim = start(SimOptions::default()).await;
    let session = login(&sim).await;
    assert!(pbd::get_all_records(&session).await.unwrap().values().all(|pbd| pbd.currently_attached));
    let own = task::create(&session, "own", "of a test").await.unwrap();
    assert_eq!(task::get_record(&session, &own).await.unwrap().status, task::StatusType::Pending);
    // A pool only notes that a pending task is to be destroyed: it goes once it has ended.
    task::destroy(&session, &own).await.unwrap();
    assert_eq!(task::get_record(&session, &own).await.unwrap().status, task::StatusType::Pending);
    task::set_status(&session, &own, &task::StatusType::Cancelled).await.unwrap();
    let error = wait::<()>(&session, own, WaitOptions::of("nothing"), &CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, XenApiError::TaskVanished { .. }), "{error:?}");
    session.logout().await.unwrap();
    is_clean(&sim).await;
}
