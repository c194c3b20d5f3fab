//! The pool from outside, call by call.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests, of which each test uses its part"
)]

mod wire;

use serde_json::{Value, json};
use wire::Client;
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskContent, DiskSpec, Fault, FaultEffect, SimOptions, SimPool, SrSpec, VmSpec};

async fn pool(change: impl FnOnce(&mut SimOptions)) -> (SimPool, Client) {
    let mut options = SimOptions { plain_http: true, ..SimOptions::default() };
    change(&mut options);
    let pool = SimPool::start(options).await.expect("starts");
    let client = Client::login(&pool).await;
    (pool, client)
}

async fn vm_of(client: &Client, pool: &SimPool) -> String {
    let uuid = &pool.vms()[0].uuid;
    client.reference("VM.get_by_uuid", &[json!(uuid)]).await
}

async fn vdi_of(client: &Client, vm: &str) -> String {
    let vbds = client.ok("VM.get_VBDs", &[json!(vm)]).await;
    client.reference("VBD.get_VDI", &[vbds[0].clone()]).await
}

#[tokio::test]
async fn a_snapshot_copies_what_xapi_copies() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let vdi = vdi_of(&client, &vm).await;
    client.ok("VM.add_to_other_config", &[json!(vm), json!("mark"), json!("v")]).await;
    client.ok("VDI.add_to_other_config", &[json!(vdi), json!("mark"), json!("d")]).await;
    let snapshot = client.reference("VM.snapshot", &[json!(vm), json!("snap")]).await;
    let record = client.ok("VM.get_record", &[json!(snapshot)]).await;
    assert_eq!(record["is_a_snapshot"], true);
    assert_eq!(record["is_a_template"], true);
    assert_eq!(record["snapshot_of"], json!(vm));
    assert_eq!(record["other_config"]["mark"], "v");
    assert_eq!(record["name_label"], "snap");
    let copy = vdi_of(&client, &snapshot).await;
    assert_ne!(copy, vdi);
    let record = client.ok("VDI.get_record", &[json!(copy)]).await;
    assert_eq!(record["is_a_snapshot"], true);
    assert_eq!(record["snapshot_of"], json!(vdi));
    assert_eq!(record["other_config"]["mark"], "d");
    let vifs = client.ok("VM.get_VIFs", &[json!(snapshot)]).await;
    let (one, other) =
        (client.ok("VIF.get_MAC", &[vifs[0].clone()]).await, client.ok("VM.get_VIFs", &[json!(vm)]).await);
    assert_eq!(one, client.ok("VIF.get_MAC", &[other[0].clone()]).await);
    // Its record goes, its disk stays.
    client.ok("VM.destroy", &[json!(snapshot)]).await;
    assert_eq!(client.ok("VDI.get_VBDs", &[json!(copy)]).await, json!([]));
    client.ok("VDI.destroy", &[json!(copy)]).await;
    let left: Vec<_> = pool.new_objects().into_iter().filter(|(class, ..)| class != "session").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn changed_blocks_are_told_between_snapshots() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let vdi = vdi_of(&client, &vm).await;
    client.ok("VDI.enable_cbt", &[json!(vdi)]).await;
    let first = client.reference("VM.snapshot", &[json!(vm), json!("one")]).await;
    pool.guest_write(&pool.vms()[0].uuid, "0", 3 << 16, b"changed").unwrap();
    let second = client.reference("VM.snapshot", &[json!(vm), json!("two")]).await;
    let (from, to) = (vdi_of(&client, &first).await, vdi_of(&client, &second).await);
    let bitmap = client.ok("VDI.list_changed_blocks", &[json!(from), json!(to)]).await;
    assert!(bitmap.as_str().unwrap().starts_with("EAAA"), "{bitmap}");
    let (code, params) = client.failure("VDI.list_changed_blocks", &[json!(to), json!(from)]).await;
    assert_eq!(code, "SR_BACKEND_FAILURE_460", "{params:?}");
    assert_eq!(client.failure("VDI.data_destroy", &[json!(vdi)]).await.0, "OPERATION_NOT_ALLOWED");
    client.ok("VM.destroy", &[json!(first)]).await;
    client.ok("VDI.data_destroy", &[json!(from)]).await;
    assert_eq!(client.ok("VDI.get_type", &[json!(from)]).await, "cbt_metadata");
    assert_eq!(client.failure("VDI.get_nbd_info", &[json!(from)]).await.0, "VDI_INCOMPATIBLE_TYPE");
    client.ok("VDI.data_destroy", &[json!(from)]).await;
    assert_eq!(client.ok("VDI.list_changed_blocks", &[json!(from), json!(to)]).await, bitmap);
}

#[tokio::test]
async fn background_calls_have_tasks_whose_result_is_xml() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let task = client.reference("Async.VM.snapshot", &[json!(vm), json!("a")]).await;
    let record = client.wait(&task).await;
    assert_eq!(record["status"], "success", "{record}");
    let result = record["result"].as_str().unwrap();
    assert!(result.starts_with("<value>OpaqueRef:"), "{result}");
    client.ok("task.destroy", &[json!(task)]).await;
    assert_eq!(client.failure("task.get_record", &[json!(task)]).await.0, "HANDLE_INVALID");
    let task =
        client.reference("Async.VM.start_on", &[json!(vm), json!("OpaqueRef:x"), json!(false), json!(false)]).await;
    let record = client.wait(&task).await;
    assert_eq!(record["error_info"], json!(["HANDLE_INVALID", "host", "OpaqueRef:x"]));
}

#[tokio::test]
async fn a_member_sends_logins_to_the_coordinator() {
    let (pool, client) = pool(|options| options.hosts = 2).await;
    let hosts = pool.hosts();
    let params = json!(["root", "whatever", "1.0", "test"]);
    let failed = wire::raw_call(&hosts[1].url, "session.login_with_password", params).await.unwrap_err();
    assert_eq!(failed, ("HOST_IS_SLAVE".to_owned(), vec![hosts[0].address.to_string()]));
    // Both listen on the same port, so that the bare address is enough.
    assert_eq!(hosts[0].url.rsplit(':').next(), hosts[1].url.rsplit(':').next());
    // A session of the coordinator is good at a member.
    let vms = wire::raw_call(&hosts[1].url, "VM.get_all", json!([client.session])).await.unwrap();
    assert_eq!(vms.as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_running_vm_refuses_what_a_real_one_refuses() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let vdi = vdi_of(&client, &vm).await;
    pool.start_vm(&pool.vms()[0].uuid, 0).await.unwrap();
    assert_eq!(client.failure("VM.destroy", &[json!(vm)]).await.0, "VM_BAD_POWER_STATE");
    assert_eq!(
        client.failure("VDI.destroy", &[json!(vdi)]).await,
        ("VDI_IN_USE".into(), vec![vdi.clone(), "destroy".into()])
    );
    client.ok("VM.snapshot", &[json!(vm), json!("live")]).await;
    client.ok("VM.set_blocked_operations", &[json!(vm), json!({"snapshot": "by test"})]).await;
    let failed = client.failure("VM.snapshot", &[json!(vm), json!("x")]).await;
    assert_eq!(failed, ("OPERATION_BLOCKED".into(), vec![vm.clone(), "by test".into()]));
    pool.shutdown_vm(&pool.vms()[0].uuid).await.unwrap();
    assert_eq!(client.ok("VM.get_power_state", &[json!(vm)]).await, "Halted");
}

#[tokio::test]
async fn a_revert_makes_new_disks_and_brings_the_fields_back() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let vdi = vdi_of(&client, &vm).await;
    let uuid = pool.vms()[0].uuid.clone();
    pool.guest_write(&uuid, "0", 0, b"before").unwrap();
    let snapshot = client.reference("VM.snapshot", &[json!(vm), json!("s")]).await;
    client.ok("VDI.add_to_other_config", &[json!(vdi_of(&client, &snapshot).await), json!("mark"), json!("m")]).await;
    pool.guest_write(&uuid, "0", 0, b"after!").unwrap();
    client.ok("VM.set_name_label", &[json!(vm), json!("renamed")]).await;
    client.ok("VM.revert", &[json!(snapshot)]).await;
    assert_eq!(pool.guest_read(&uuid, "0", 0, 6).unwrap(), b"before");
    assert_eq!(client.ok("VM.get_name_label", &[json!(vm)]).await, "vm-1");
    let new = vdi_of(&client, &vm).await;
    assert_ne!(new, vdi);
    // The production disk now carries the mark of the snapshot.
    assert_eq!(client.ok("VDI.get_other_config", &[json!(new)]).await["mark"], "m");
    assert_eq!(client.failure("VDI.get_record", &[json!(vdi)]).await.0, "HANDLE_INVALID");
    let of = client.ok("VDI.get_snapshot_of", &[json!(vdi_of(&client, &snapshot).await)]).await;
    assert_eq!(of, json!(new));
}

#[tokio::test]
async fn a_vm_without_required_fields_is_refused() {
    let (_pool, client) = pool(|_| {}).await;
    let failed = client.failure("VM.create", &[json!({"name_label": "x"})]).await;
    assert_eq!(failed.0, "FIELD_TYPE_ERROR");
}

#[tokio::test]
async fn a_full_sr_refuses_the_snapshot_and_leaves_nothing() {
    let (pool, client) = pool(|options| {
        let mut sr = SrSpec::new("thick", SrKind::Lvm);
        sr.size = 100 << 20;
        options.srs = vec![sr];
        let content = DiskContent::Random { seed: 1, bytes: 60 << 20 };
        options.vms = vec![VmSpec::new("full").disk(DiskSpec::new(64 << 20).content(content))];
    })
    .await;
    let vm = vm_of(&client, &pool).await;
    assert_eq!(client.failure("VM.snapshot", &[json!(vm), json!("x")]).await.0, "SR_BACKEND_FAILURE_44");
    assert!(pool.new_objects().iter().all(|(class, ..)| class == "session"));
}

#[tokio::test]
async fn faults_meet_their_calls() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let error =
        FaultEffect::Error { code: "SR_BACKEND_FAILURE_82".into(), params: vec!["".into(), "t".into(), "".into()] };
    pool.fault(Fault::once("VM.snapshot", error));
    let task = client.reference("Async.VM.snapshot", &[json!(vm), json!("x")]).await;
    assert_eq!(client.wait(&task).await["error_info"][0], "SR_BACKEND_FAILURE_82");
    client.ok("VM.snapshot", &[json!(vm), json!("x")]).await;
    pool.fault(Fault::once("VM.get_all", FaultEffect::Drop));
    let body = json!({"method": "VM.get_all", "params": [client.session], "id": 1}).to_string();
    assert!(wire::exchange(&client.url, &wire::post("/jsonrpc", &body)).await.start.is_empty());
    assert_eq!(pool.counters().calls["VM.snapshot"], 2);
}

#[tokio::test]
async fn licence_and_age_show() {
    let (pool, client) = pool(|options| options.restrictions = vec!["restrict_cbt".into()]).await;
    let vdi = vdi_of(&client, &vm_of(&client, &pool).await).await;
    assert_eq!(client.failure("VDI.enable_cbt", &[json!(vdi)]).await.0, "LICENSE_RESTRICTION");
    let (pool, client) = self::pool(|options| options.older_server = true).await;
    let vdi = vdi_of(&client, &vm_of(&client, &pool).await).await;
    assert_eq!(client.failure("VDI.enable_cbt", &[json!(vdi)]).await.0, "MESSAGE_METHOD_UNKNOWN");
    assert!(client.ok("VDI.get_record", &[json!(vdi)]).await.get("cbt_enabled").is_none());
}

#[tokio::test]
async fn a_crash_halts_and_makes_the_log_suspect() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let vdi = vdi_of(&client, &vm).await;
    client.ok("VDI.enable_cbt", &[json!(vdi)]).await;
    let uuid = pool.vms()[0].uuid.clone();
    pool.start_vm(&uuid, 0).await.unwrap();
    let before = pool.record("host", &pool.hosts()[0].uuid).unwrap()["other_config"]["boot_time"].clone();
    pool.crash_host(0).await.unwrap();
    let after = pool.record("host", &pool.hosts()[0].uuid).unwrap()["other_config"]["boot_time"].clone();
    assert_ne!(before, after);
    assert_eq!(pool.record("VM", &uuid).unwrap()["power_state"], "Halted");
    // The next start throws the log away and says so.
    pool.start_vm(&uuid, 0).await.unwrap();
    assert_eq!(client.ok("VDI.get_cbt_enabled", &[json!(vdi)]).await, false);
    let messages = client.ok("message.get_all_records", &[]).await;
    let named = |message: &Value| message["name"] == "VDI_CBT_METADATA_INCONSISTENT";
    assert!(messages.as_object().unwrap().values().any(named), "{messages}");
}

#[tokio::test]
async fn events_tell_of_changes_and_ends() {
    let (pool, client) = pool(|_| {}).await;
    let vm = vm_of(&client, &pool).await;
    let first = client.ok("event.from", &[json!(["vm"]), json!(""), json!(1.0)]).await;
    assert_eq!(first["events"].as_array().unwrap().len(), 2);
    let token = first["token"].clone();
    let quiet = client.ok("event.from", &[json!(["vm"]), token.clone(), json!("0.01")]).await;
    assert_eq!(quiet["events"], json!([]));
    assert_eq!(quiet["token"], token);
    client.ok("VM.set_name_label", &[json!(vm), json!("n")]).await;
    let next = client.ok("event.from", &[json!(["VM"]), token, json!(5.0)]).await;
    assert_eq!(next["events"][0]["operation"], "mod");
    assert_eq!(next["events"][0]["snapshot"]["name_label"], "n");
}

#[tokio::test]
async fn generated_content_is_the_same_for_the_same_seed() {
    let disk = || DiskSpec::new(8 << 20).content(DiskContent::Random { seed: 7, bytes: 1 << 20 });
    let (pool, _client) =
        pool(|options| options.vms = vec![VmSpec::new("a").disk(disk()), VmSpec::new("b").disk(disk())]).await;
    let vms = pool.vms();
    let read = |vm: usize| pool.guest_read(&vms[vm].uuid, "0", 0, 2 << 20).unwrap();
    assert_eq!(read(0), read(1));
    assert!(read(0)[..1 << 20].iter().any(|byte| *byte != 0));
    assert!(read(0)[1 << 20..].iter().all(|byte| *byte == 0));
}
