//! Storage repositories as a client sees them: base copies and merges, thick volumes, operations in progress, attach
//! and detach, SRs that not every host sees, and change logs that fail.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail loudly"
)]

mod wire;

use std::time::Duration;

use serde_json::{Value, json};
use wire::Client;
use xenvault_sim::storage::{CbtFault, SrKind};
use xenvault_sim::{DiskSpec, GarbageCollection, SimOptions, SimPool, SrSpec, VmSpec};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn one_disk(kind: SrKind, sr_size: u64, size: u64) -> SimOptions {
    SimOptions {
        plain_http: true,
        srs: vec![SrSpec { size: sr_size, ..SrSpec::new("sr", kind) }],
        vms: vec![VmSpec::new("vm").disk(DiskSpec::new(size))],
        ..SimOptions::default()
    }
}

async fn start(options: SimOptions) -> (SimPool, Client) {
    let pool = SimPool::start(options).await.expect("starts");
    let client = Client::login(&pool).await;
    (pool, client)
}

async fn vm(client: &Client) -> Value {
    client.ok("VM.get_by_name_label", &[json!("vm")]).await[0].clone()
}

async fn sr(client: &Client) -> Value {
    client.ok("SR.get_by_name_label", &[json!("sr")]).await[0].clone()
}

async fn disk(pool: &SimPool, client: &Client) -> Value {
    client.ok("VDI.get_by_uuid", &[json!(pool.vm("vm").unwrap().disks[0].vdi)]).await
}

/// Uuids of the hidden base copies, with what stands in their records.
fn base_copies(pool: &SimPool) -> Vec<Value> {
    let all = pool.records("VDI").into_iter().map(|(_, record)| record);
    all.filter(|record| record["managed"] == false).collect()
}

/// A write and a snapshot that goes again, so many times: base copies with nothing but each other.
async fn backlog(pool: &SimPool, client: &Client, rounds: u64) {
    for round in 0..rounds {
        pool.guest_write("vm", "0", round % 4 * 2 * MIB, &[1; 512]).unwrap();
        let snapshot = client.ok("VDI.snapshot", &[disk(pool, client).await, json!({})]).await;
        client.ok("VDI.destroy", &[snapshot]).await;
    }
}

#[tokio::test]
async fn base_copies_stand_in_listings_until_they_are_merged() {
    let options = SimOptions { garbage_collection: GarbageCollection::OnOrder, ..one_disk(SrKind::Ext, GIB, 8 * MIB) };
    let (pool, client) = start(options).await;
    backlog(&pool, &client, 2).await;
    let bases = base_copies(&pool);
    assert_eq!(bases.len(), 2);
    let names: Vec<&str> = bases.iter().map(|base| base["uuid"].as_str().unwrap()).collect();
    for base in &bases {
        let seen = [&base["name_label"], &base["read_only"], &base["type"], &base["is_a_snapshot"]];
        assert_eq!(seen, [&json!("base copy"), &json!(true), &json!("user"), &json!(false)]);
        assert_eq!((&base["location"], &base["virtual_size"]), (&base["uuid"], &json!(8 * MIB)));
        assert!(base["allowed_operations"].as_array().unwrap().contains(&json!("copy")), "as recorded");
    }
    let live = pool.record("VDI", &pool.vm("vm").unwrap().disks[0].vdi).unwrap();
    let parent = live["sm_config"]["vhd-parent"].as_str().unwrap().to_owned();
    let upper = bases.iter().find(|base| base["uuid"] == parent.as_str()).expect("the disk stands on one of them");
    let lower = upper["sm_config"]["vhd-parent"].as_str().unwrap().to_owned();
    assert!(names.contains(&lower.as_str()) && lower != parent);
    assert!(pool.new_objects().iter().all(|(class, ..)| class == "session"), "no leak of a client's");

    let used = || async { client.ok("SR.get_physical_utilisation", &[sr(&client).await]).await.as_u64().unwrap() };
    let before = used().await;
    let work = pool.step_coalesce("sr").await.unwrap().work.unwrap();
    assert_eq!((work.vdi.to_string(), work.onto.to_string()), (parent, lower.clone()));
    assert_eq!(used().await, before + work.extra_bytes);
    assert_eq!(base_copies(&pool).len(), 2);
    pool.step_coalesce("sr").await.unwrap();
    assert!(used().await < before);
    let left = base_copies(&pool);
    assert_eq!((left.len(), &left[0]["uuid"]), (1, &json!(lower)));
    let live = pool.record("VDI", &pool.vm("vm").unwrap().disks[0].vdi).unwrap();
    assert_eq!(live["sm_config"]["vhd-parent"], json!(lower));
    // An administrator can forbid the last step.
    client.ok("SR.add_to_other_config", &[sr(&client).await, json!("leaf-coalesce"), json!("false")]).await;
    assert_eq!(pool.step_coalesce("sr").await.unwrap().work, None);
    client.ok("SR.remove_from_other_config", &[sr(&client).await, json!("leaf-coalesce")]).await;
    assert!(pool.step_coalesce("sr").await.unwrap().work.unwrap().leaf);
    pool.step_coalesce("sr").await.unwrap();
    assert_eq!(base_copies(&pool), [] as [Value; 0]);
    let live = pool.record("VDI", &pool.vm("vm").unwrap().disks[0].vdi).unwrap();
    assert_eq!(live["sm_config"], json!({}));
}

#[tokio::test]
async fn a_chain_of_thirty_refuses_snapshots_until_a_scan_lets_the_collector_work() {
    let timed = GarbageCollection::Timed { quiet: Duration::ZERO, merge: Duration::ZERO, bytes_per_second: None };
    let (pool, client) = start(SimOptions { garbage_collection: timed, ..one_disk(SrKind::Ext, GIB, 8 * MIB) }).await;
    pool.stop_coalesce("sr").unwrap();
    backlog(&pool, &client, 29).await;
    let refused = client.failure("VDI.snapshot", &[disk(&pool, &client).await, json!({})]).await;
    assert_eq!(
        (refused.0.as_str(), refused.1[1].as_str()),
        ("SR_BACKEND_FAILURE_109", "The snapshot chain is too long")
    );
    // The collector may work again, and a scan is what makes it look.
    pool.start_coalesce("sr").unwrap();
    client.ok("SR.scan", &[sr(&client).await]).await;
    let mut token = json!("");
    while !base_copies(&pool).is_empty() {
        let batch = client.ok("event.from", &[json!(["vdi"]), token, json!(1.0)]).await;
        token = batch["token"].clone();
    }
    client.ok("VDI.snapshot", &[disk(&pool, &client).await, json!({})]).await;
    let tasks = pool.records("task");
    let collection = tasks.values().find(|task| task["name_label"] == "Garbage Collection").expect("it has a task");
    let uuid = pool.srs()[0].uuid.clone();
    assert_eq!(collection["name_description"], format!("Garbage collection for SR {uuid}"));
}

#[tokio::test]
async fn a_collector_without_space_says_so_once_until_it_has_some() {
    let options = SimOptions { garbage_collection: GarbageCollection::OnOrder, ..one_disk(SrKind::Ext, GIB, 8 * MIB) };
    let (pool, client) = start(options).await;
    backlog(&pool, &client, 2).await;
    // A disk's own layer without data could always be merged.
    pool.guest_write("vm", "0", 4 * MIB, &[1; 512]).unwrap();
    pool.set_foreign_use("sr", GIB).unwrap();
    for _ in 0..2 {
        let step = pool.step_coalesce("sr").await.unwrap();
        assert_eq!((step.work, step.no_space.len()), (None, 2));
    }
    let messages: Vec<Value> = pool.records("message").into_iter().map(|(_, record)| record).collect();
    let [message] = messages.as_slice() else { panic!("{messages:?}") };
    let uuid = pool.srs()[0].uuid.clone();
    let seen = ["name", "cls", "obj_uuid", "priority", "body"].map(|field| message[field].clone());
    let body = format!("Unable to perform data coalesce due to a lack of space in SR {uuid}");
    assert_eq!(seen, [json!("SM_GC_NO_SPACE"), json!("SR"), json!(uuid), json!(3), json!(body)]);
    pool.set_foreign_use("sr", 0).unwrap();
    while pool.step_coalesce("sr").await.unwrap().work.is_some() {
        pool.step_coalesce("sr").await.unwrap();
    }
    assert!(pool.records("message").is_empty());
    assert!(base_copies(&pool).is_empty());
}

#[tokio::test]
async fn base_copies_refuse_what_disks_can_do() {
    let (pool, client) = start(one_disk(SrKind::Ext, GIB, 8 * MIB)).await;
    client.ok("VDI.snapshot", &[disk(&pool, &client).await, json!({})]).await;
    let base = client.ok("VDI.get_by_uuid", &[base_copies(&pool)[0]["uuid"].clone()]).await;
    for (method, code) in [("VDI.snapshot", "82"), ("VDI.clone", "81")] {
        let refused = client.failure(method, &[base.clone(), json!({})]).await;
        assert_eq!(refused.0, format!("SR_BACKEND_FAILURE_{code}"));
    }
    assert_eq!(client.failure("VDI.destroy", &[base]).await.0, "SR_BACKEND_FAILURE_80");
}

#[tokio::test]
async fn a_snapshot_of_a_running_vm_on_a_thick_sr_takes_its_full_size() {
    for (kind, sr_size) in [(SrKind::Lvm, 3 * GIB), (SrKind::Ext, 3 * GIB)] {
        let mut options = one_disk(kind, sr_size, GIB);
        options.vms[0].running = true;
        let (pool, client) = start(options).await;
        // Data in every place, so that the base copy stays as large as the disk.
        for block in 0..512 {
            pool.guest_write("vm", "0", block * 2 * MIB, &[1; 512]).unwrap();
        }
        let used = || async { client.ok("SR.get_physical_utilisation", &[sr(&client).await]).await.as_u64().unwrap() };
        let before = used().await;
        client.ok("VM.snapshot", &[vm(&client).await, json!("first")]).await;
        let grown = used().await - before;
        if kind == SrKind::Ext {
            assert!(grown < MIB);
            continue;
        }
        assert!(grown > GIB && grown < GIB + 32 * MIB, "{grown}");
        for block in 0..512 {
            pool.guest_write("vm", "0", block * 2 * MIB, &[2; 512]).unwrap();
        }
        let before = used().await;
        let refused = client.failure("VM.snapshot", &[vm(&client).await, json!("second")]).await;
        assert_eq!(
            (refused.0.as_str(), refused.1[1].as_str()),
            ("SR_BACKEND_FAILURE_44", "There is insufficient space")
        );
        assert_eq!(used().await, before);
        let record = client.ok("SR.get_sm_config", &[sr(&client).await]).await;
        assert_eq!(record, json!({"allocation": "thick"}));
    }
}

#[tokio::test]
async fn an_sr_does_one_thing_at_a_time_and_shows_it() {
    let mut options = one_disk(SrKind::Ext, GIB, 8 * MIB);
    options.sr_delay = Duration::from_secs(2);
    let (pool, client) = start(options).await;
    let allowed = || async { client.ok("SR.get_allowed_operations", &[sr(&client).await]).await };
    let contains = |list: &Value, name: &str| list.as_array().unwrap().contains(&json!(name));
    let before = allowed().await;
    for name in ["scan", "plug", "unplug", "vdi_snapshot", "vdi_create", "vdi_destroy", "vdi_list_changed_blocks"] {
        assert!(contains(&before, name), "{name}");
    }
    for name in ["destroy", "forget", "vdi_introduce", "vdi_revert"] {
        assert!(!contains(&before, name), "{name}");
    }
    let scan = client.reference("Async.SR.scan", &[sr(&client).await]).await;
    let busy = loop {
        let record = client.ok("SR.get_record", &[sr(&client).await]).await;
        if record["current_operations"] != json!({}) {
            break record;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(busy["current_operations"], json!({scan.clone(): "scan"}));
    assert_eq!(busy["allowed_operations"], json!([]), "a scan goes with nothing, not even a plug");
    // A snapshot waits for its turn and gets it.
    let snapshot = client.reference("Async.VDI.snapshot", &[disk(&pool, &client).await, json!({})]).await;
    assert_eq!(client.wait(&scan).await["status"], "success");
    assert_eq!(client.wait(&snapshot).await["status"], "success");
    let after = client.ok("SR.get_record", &[sr(&client).await]).await;
    assert_eq!((&after["current_operations"], &after["allowed_operations"]), (&json!({}), &before));
}

#[tokio::test]
async fn an_sr_is_detached_and_attached_again() {
    let mut options = one_disk(SrKind::Ext, GIB, 8 * MIB);
    options.vms[0].running = true;
    let (pool, client) = start(options).await;
    let (sr, vdi) = (sr(&client).await, disk(&pool, &client).await);
    let pbd = client.ok("SR.get_PBDs", std::slice::from_ref(&sr)).await[0].clone();
    let refused = client.failure("PBD.unplug", std::slice::from_ref(&pbd)).await;
    assert_eq!(refused, ("VDI_IN_USE".to_owned(), vec![vdi.as_str().unwrap().to_owned()]));
    assert_eq!(client.failure("SR.forget", std::slice::from_ref(&sr)).await.0, "SR_HAS_PBD");
    pool.shutdown_vm("vm").await.unwrap();
    client.ok("PBD.unplug", std::slice::from_ref(&pbd)).await;
    client.ok("PBD.unplug", std::slice::from_ref(&pbd)).await;
    for (method, params) in [
        ("VDI.snapshot", vec![vdi.clone(), json!({})]),
        ("VDI.enable_cbt", vec![vdi.clone()]),
        ("SR.scan", vec![sr.clone()]),
    ] {
        assert_eq!(
            client.failure(method, &params).await,
            ("SR_HAS_NO_PBDS".to_owned(), vec![sr.as_str().unwrap().to_owned()])
        );
    }
    assert_eq!(client.ok("VDI.get_nbd_info", std::slice::from_ref(&vdi)).await, json!([]));
    assert_eq!(
        client.failure("VM.start", &[vm(&client).await, json!(false), json!(false)]).await.0,
        "NO_HOSTS_AVAILABLE"
    );
    let allowed = client.ok("SR.get_allowed_operations", std::slice::from_ref(&sr)).await;
    assert!(allowed.as_array().unwrap().contains(&json!("forget")));
    // The PBD is an object like any other while it is not plugged.
    let record = client.ok("PBD.get_record", std::slice::from_ref(&pbd)).await;
    client.ok("PBD.destroy", std::slice::from_ref(&pbd)).await;
    let record = json!({"host": record["host"], "SR": sr, "device_config": record["device_config"]});
    let pbd = client.ok("PBD.create", std::slice::from_ref(&record)).await;
    assert_eq!(client.ok("PBD.create", &[record]).await, pbd, "one for a host and an SR");
    client.ok("PBD.plug", std::slice::from_ref(&pbd)).await;
    client.ok("VDI.snapshot", &[vdi, json!({})]).await;
    let refused = client.failure("PBD.destroy", &[pbd]).await;
    assert_eq!(refused, ("OPERATION_NOT_ALLOWED".to_owned(), vec!["PBD is currently attached".to_owned()]));
}

#[tokio::test]
async fn an_sr_that_some_hosts_see_is_served_by_those_alone() {
    let seen = SrSpec::new("sr", SrKind::Ext).seen_by(&[0, 2]);
    let local = SrSpec { local_to: Some(1), ..SrSpec::new("local", SrKind::Ext) };
    let options = SimOptions {
        hosts: 3,
        plain_http: true,
        srs: vec![seen, local],
        vms: vec![
            VmSpec::new("vm").disk(DiskSpec::new(8 * MIB)),
            VmSpec::new("both").disk(DiskSpec::new(8 * MIB)).disk(DiskSpec::new(8 * MIB).on("local")),
        ],
        ..SimOptions::default()
    };
    let (pool, client) = start(options).await;
    let hosts = pool.hosts();
    let vdi = disk(&pool, &client).await;
    let addresses = |info: Value| {
        let of = |entry: &Value| entry["address"].as_str().unwrap().to_owned();
        let mut all: Vec<String> = info.as_array().unwrap().iter().map(of).collect();
        all.sort();
        all
    };
    let info = client.ok("VDI.get_nbd_info", std::slice::from_ref(&vdi)).await;
    assert_eq!(addresses(info), [hosts[0].address.to_string(), hosts[2].address.to_string()]);
    let uuid = pool.vm("vm").unwrap().disks[0].vdi.clone();
    let path = format!("/export_raw_vdi?session_id={}&vdi={uuid}&format=raw", client.session);
    let get = |url: String, path: String| async move {
        wire::exchange(&url, format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await
    };
    // A host without the SR sends the client to one that has it, and that one serves.
    let answer = get(hosts[1].url.clone(), path.clone()).await;
    assert_eq!(answer.start, "HTTP/1.1 302 Found");
    let location = answer.header("Location").unwrap().to_owned();
    let leads_to = |host: usize| location.starts_with(&format!("{}/", hosts[host].url));
    assert!(leads_to(0) || leads_to(2), "{location}");
    for host in [0, 2] {
        let answer = get(hosts[host].url.clone(), path.clone()).await;
        assert_eq!((answer.start.as_str(), answer.body.len() as u64), ("HTTP/1.1 200 OK", 8 * MIB));
    }
    // It leads to hosts that live: here to the last one, once the first is no longer attached.
    let sr_ref = sr(&client).await;
    for pbd in client.ok("SR.get_PBDs", &[sr_ref]).await.as_array().unwrap() {
        if client.ok("PBD.get_host", std::slice::from_ref(pbd)).await
            != client.ok("host.get_by_uuid", &[json!(hosts[2].uuid)]).await
        {
            client.ok("PBD.unplug", std::slice::from_ref(pbd)).await;
        }
    }
    let answer = get(hosts[1].url.clone(), path.clone()).await;
    assert!(answer.header("Location").unwrap().starts_with(&format!("{}/", hosts[2].url)));
    // Work of the storage manager on a shared SR is the coordinator's, which does not see it any more.
    assert_eq!(client.failure("VDI.snapshot", &[vdi, json!({})]).await.0, "SR_HAS_NO_PBDS");
    pool.stop_host(2).await.unwrap();
    let answer = get(hosts[1].url.clone(), path).await;
    assert_eq!(answer.start, "HTTP/1.1 500 Internal Error");
    assert!(answer.text().contains("NO_HOSTS_AVAILABLE"), "{}", answer.text());
    // A VM whose disks no host sees together can not be exported anywhere.
    let both = pool.vm("both").unwrap().uuid;
    let task = client.reference("task.create", &[json!("t"), json!("")]).await;
    let path = format!("/export?session_id={}&uuid={both}&task_id={task}", client.session);
    let answer = get(hosts[0].url.clone(), path).await;
    assert_eq!(answer.start, "HTTP/1.1 500 Internal Error");
    assert_eq!(client.wait(&task).await["error_info"], json!(["NO_HOSTS_AVAILABLE"]));
}

#[tokio::test]
async fn change_logs_fail_on_order_with_the_messages_of_a_real_server() {
    let mut options = one_disk(SrKind::Lvm, 16 * GIB, 8 * MIB);
    options.vms[0].disks[0].cbt = true;
    let (pool, client) = start(options).await;
    let uuid = pool.vm("vm").unwrap().disks[0].vdi.clone();
    let vdi = disk(&pool, &client).await;
    let enabled = || async { client.ok("VDI.get_cbt_enabled", std::slice::from_ref(&vdi)).await == json!(true) };
    let told = |name: &'static str, body: String| {
        let all = pool.records("message");
        let found: Vec<&Value> =
            all.values().filter(|message| message["name"] == name && message["body"] == body).collect();
        let [message] = found.as_slice() else { panic!("{name}: {all:?}") };
        let seen = ["cls", "obj_uuid", "priority"].map(|field| message[field].clone());
        assert_eq!(seen, [json!("VDI"), json!(uuid), json!(3)]);
    };
    let again = || async { client.ok("VDI.enable_cbt", std::slice::from_ref(&vdi)).await };

    pool.fail_cbt(&uuid, CbtFault::Resize).unwrap();
    client.ok("VDI.resize", &[vdi.clone(), json!(16 * MIB)]).await;
    told("VDI_CBT_RESIZE_FAILED", format!("Resizing of CBT metadata for disk {uuid} failed."));
    assert!(!enabled().await, "the resize succeeds, without tracking");
    assert_eq!(client.ok("VDI.get_virtual_size", std::slice::from_ref(&vdi)).await, json!(16 * MIB));
    again().await;

    for (fault, body) in [
        (CbtFault::Snapshot, format!("Creating CBT metadata log for disk {uuid} failed.")),
        (CbtFault::SnapshotOnHost, format!("Creating CBT snapshot for {uuid} failed")),
    ] {
        let first = client.ok("VDI.snapshot", &[vdi.clone(), json!({})]).await;
        pool.guest_write("vm", "0", 0, &[1; 512]).unwrap();
        pool.fail_cbt(&uuid, fault).unwrap();
        let second = client.ok("VDI.snapshot", &[vdi.clone(), json!({})]).await;
        told("VDI_CBT_SNAPSHOT_FAILED", body);
        assert!(!enabled().await);
        assert_eq!(client.ok("VDI.get_cbt_enabled", std::slice::from_ref(&second)).await, json!(true));
        // The snapshot has the old log: what led to it can be asked, what comes after can not.
        client.ok("VDI.list_changed_blocks", &[first, second.clone()]).await;
        let refused = client.failure("VDI.list_changed_blocks", &[second, vdi.clone()]).await;
        assert_eq!(refused.0, "SR_BACKEND_FAILURE_460");
        again().await;
    }

    pool.fail_cbt(&uuid, CbtFault::Inconsistent).unwrap();
    assert!(enabled().await, "nobody looks before the next start");
    pool.start_vm("vm", 0).await.unwrap();
    told("VDI_CBT_METADATA_INCONSISTENT", format!("Changed Block Tracking metadata is inconsistent for disk {uuid}."));
    assert!(!enabled().await);
    again().await;
    pool.shutdown_vm("vm").await.unwrap();
    pool.start_vm("vm", 0).await.unwrap();
    assert!(enabled().await, "an order counts once");
}

#[tokio::test]
async fn the_control_interface_has_the_same_levers() {
    let options = SimOptions { garbage_collection: GarbageCollection::OnOrder, ..one_disk(SrKind::Ext, GIB, 8 * MIB) };
    let (pool, client) = start(options).await;
    backlog(&pool, &client, 2).await;
    let (sr, vdi) = (pool.srs()[0].uuid.clone(), pool.vm("vm").unwrap().disks[0].vdi.clone());
    let post = |path: String| {
        let url = pool.control_url();
        async move {
            wire::exchange(&url, format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").as_bytes())
                .await
        }
    };
    let answer = post(format!("/srs/{sr}/garbage-collector/step")).await;
    let step: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(step["work"]["leaf"], json!(false), "{step}");
    for path in ["stop", "start", "run"] {
        assert_eq!(post(format!("/srs/{sr}/garbage-collector/{path}")).await.start, "HTTP/1.1 200 OK");
    }
    assert!(base_copies(&pool).is_empty());
    assert_eq!(post(format!("/srs/{sr}/foreign-use?bytes={}", 2 * GIB)).await.start, "HTTP/1.1 200 OK");
    assert_eq!(
        client.failure("VDI.snapshot", &[disk(&pool, &client).await, json!({})]).await.0,
        "SR_BACKEND_FAILURE_44"
    );
    for fault in ["resize", "snapshot", "snapshot-on-host", "inconsistent"] {
        assert_eq!(post(format!("/vdis/{vdi}/cbt-faults/{fault}")).await.start, "HTTP/1.1 200 OK");
    }
    assert_eq!(post(format!("/vdis/{vdi}/cbt-faults/other")).await.start, "HTTP/1.1 404 Not Found");
    assert_eq!(post(format!("/srs/{vdi}/garbage-collector/run")).await.start, "HTTP/1.1 409 Conflict");
}
