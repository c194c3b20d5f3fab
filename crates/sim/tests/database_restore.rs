//! A pool's database out of a dump, and imports of records alone: what is checked, what is changed, what is left.
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
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use wire::{Answer, Client, exchange, read_answer};
use xenvault_sim::{DiskSpec, SimOptions, SimPool, VmSpec};

const SIZE: u64 = 8 << 20;

/// Generous: the machine may be slow.
const LONG: Duration = Duration::from_secs(60);

async fn pool(hosts: usize) -> (SimPool, Client) {
    let options = SimOptions {
        hosts,
        plain_http: true,
        vms: vec![VmSpec::new("vm").disk(DiskSpec::new(SIZE))],
        restore_fuse: Duration::ZERO,
        ..SimOptions::default()
    };
    let pool = SimPool::start(options).await.expect("starts");
    let client = Client::login(&pool).await;
    (pool, client)
}

async fn get(client: &Client, path: &str) -> Answer {
    let request = format!("GET {path}session_id={} HTTP/1.1\r\nHost: x\r\n\r\n", client.session);
    exchange(&client.url, request.as_bytes()).await
}

/// Sends a body; gives the answer and all that stands behind its headers.
async fn put(client: &Client, path: &str, body: &[u8]) -> Answer {
    let session = &client.session;
    let head = format!("PUT {path}session_id={session} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut stream = TcpStream::connect(client.url.strip_prefix("http://").unwrap()).await.unwrap();
    // A server that refuses closes while we still send: the answer tells why.
    let _ = stream.write_all(&[head.as_bytes(), body].concat()).await;
    read_answer(&mut stream).await
}

/// Imports records; gives the task's end.
async fn import(client: &Client, query: &str, body: &[u8]) -> Value {
    let task = client.reference("task.create", &[json!("t"), json!("")]).await;
    put(client, &format!("/import_metadata?{query}task_id={task}&"), body).await;
    let record = client.wait(&task).await;
    client.ok("task.destroy", &[json!(task)]).await;
    record
}

/// Everything but what comes and goes with calls.
fn everything(pool: &SimPool) -> Vec<(&'static str, serde_json::Map<String, Value>)> {
    ["VM", "VDI", "VBD", "VIF", "SR", "network", "host", "PIF"].map(|class| (class, pool.records(class))).to_vec()
}

#[tokio::test]
async fn a_dump_is_only_looked_at_in_a_dry_run() {
    let (pool, client) = pool(2).await;
    let dump = get(&client, "/pool/xmldbdump?").await.text();
    client
        .ok(
            "VM.set_name_label",
            &[client.ok("VM.get_by_name_label", &[json!("vm")]).await[0].clone(), json!("renamed")],
        )
        .await;
    let before = everything(&pool);
    let answer = put(&client, "/pool/xmldbdump?dry_run=true&", dump.as_bytes()).await;
    assert_eq!((answer.start.as_str(), answer.text().as_str()), ("HTTP/1.1 200 OK", ""));
    // What is wrong is told behind the 200, as with every transfer.
    let schema = dump.replace("value=\"798\"", "value=\"700\"");
    let device = dump.replace(" device=\"eth0\"", " device=\"eth9\"");
    let table = "<?xml version=\"1.0\"?><html>no dump</html>".to_owned();
    for (body, code) in [
        (schema, "RESTORE_INCOMPATIBLE_VERSION"),
        (device, "RESTORE_TARGET_MISSING_DEVICE"),
        (dump[..dump.len() / 2].to_owned(), "INTERNAL_ERROR"),
        (table, "INTERNAL_ERROR"),
    ] {
        for query in ["dry_run=true&", ""] {
            let answer = put(&client, &format!("/pool/xmldbdump?{query}"), body.as_bytes()).await;
            assert_eq!(answer.start, "HTTP/1.1 200 OK");
            assert!(answer.text().starts_with("HTTP/1.1 500 Internal Error\r\n"), "{}", answer.text());
            assert!(answer.text().contains(code), "{code}: {}", answer.text());
        }
    }
    assert_eq!(everything(&pool), before);
    let address = client.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("PUT /pool/xmldbdump?session_id={} HTTP/1.1\r\nHost: x\r\n\r\n", client.session);
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut stream).await.start, "HTTP/1.1 400 Bad Request");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"PUT /pool/xmldbdump HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    assert_eq!(read_answer(&mut stream).await.start, "HTTP/1.1 401 Unauthorised");
}

#[tokio::test]
async fn a_restored_dump_brings_the_pool_back_as_it_was_with_one_host() {
    let (pool, client) = pool(2).await;
    let vm = client.ok("VM.get_by_name_label", &[json!("vm")]).await[0].clone();
    let (uuid, disk) = (pool.vm("vm").unwrap().uuid, pool.vm("vm").unwrap().disks[0].vdi.clone());
    pool.guest_write("vm", "0", 0, b"before").unwrap();
    let dump = get(&client, "/pool/xmldbdump?").await.text();
    // Later: another name, another disk, a VM that goes.
    let later = client.ok("VM.clone", &[vm.clone(), json!("later")]).await;
    let later = client.ok("VM.get_uuid", &[later]).await;
    client.ok("VM.destroy", std::slice::from_ref(&vm)).await;
    pool.start_vm(later.as_str().unwrap(), 0).await.unwrap();
    let boot = pool.record("host", &pool.hosts()[0].uuid).unwrap()["other_config"]["boot_time"].clone();
    let answer = put(&client, "/pool/xmldbdump?", dump.as_bytes()).await;
    assert_eq!((answer.start.as_str(), answer.text().as_str()), ("HTTP/1.1 200 OK", ""));
    let back = tokio::time::timeout(LONG, async {
        while pool.vm(&uuid).is_err() {
            tokio::task::yield_now().await;
        }
    });
    back.await.expect("it boots into the dump");
    // The sessions are gone with the old database.
    let client = tokio::time::timeout(LONG, async {
        loop {
            let params = json!([pool.user(), pool.password(), "1.0", "test"]);
            let body = json!({"jsonrpc": "2.0", "method": "session.login_with_password", "params": params, "id": 1});
            let answer = exchange(&pool.url(), &wire::post("/jsonrpc", &body.to_string())).await;
            if !answer.start.is_empty() {
                return Client::login(&pool).await;
            }
            tokio::task::yield_now().await;
        }
    });
    let client = client.await.expect("it answers");
    assert_eq!(client.ok("VM.get_name_label", &[vm]).await, json!("vm"));
    assert!(pool.vm(later.as_str().unwrap()).is_err());
    assert_eq!(pool.vm(&uuid).unwrap().disks[0].vdi, disk);
    assert_eq!(pool.guest_read(&uuid, "0", 0, 6).unwrap(), b"before");
    let hosts = pool.records("host");
    assert_eq!(hosts.len(), 1, "the other host is no member any more");
    let host = hosts.values().next().unwrap();
    assert_eq!(host["uuid"], json!(pool.hosts()[0].uuid));
    assert_ne!(host["other_config"]["boot_time"], boot, "it has booted");
    // The disk that was made later is not in the dump; a scan finds it.
    let disks = client.ok("VDI.get_all", &[]).await.as_array().unwrap().len();
    client.ok("SR.scan", &[client.ok("SR.get_all", &[]).await[0].clone()]).await;
    assert_eq!(client.ok("VDI.get_all", &[]).await.as_array().unwrap().len(), disks + 1);
    client.ok("VM.snapshot", &[client.ok("VM.get_by_uuid", &[json!(uuid)]).await, json!("works")]).await;
}

#[tokio::test]
async fn a_dry_run_of_an_import_tells_what_would_fail_and_makes_nothing() {
    let (pool, client) = pool(1).await;
    let vm = pool.vm("vm").unwrap();
    let reference = client.ok("VM.get_by_uuid", &[json!(vm.uuid)]).await;
    let records = get(&client, &format!("/export_metadata?uuid={}&", vm.uuid)).await.body;
    let before = everything(&pool);
    let task = import(&client, "dry_run=true&", &records).await;
    assert_eq!(
        (&task["status"], &task["result"]),
        (&json!("success"), &json!("<value><array><data></data></array></value>"))
    );
    let task = import(&client, "dry_run=true&restore=true&", &records).await;
    assert_eq!(task["error_info"], json!(["VM_TO_IMPORT_IS_NOT_NEWER_VERSION", reference, "0", "0"]));
    let task = import(&client, "dry_run=true&restore=true&force=true&", &records).await;
    assert_eq!(task["status"], "success", "{task}");
    assert_eq!(everything(&pool), before);
    pool.start_vm("vm", 0).await.unwrap();
    let before = everything(&pool);
    let task = import(&client, "dry_run=true&restore=true&", &records).await;
    assert_eq!(task["error_info"], json!(["VM_BAD_POWER_STATE", reference, "Halted", "Running"]));
    // Forced, one that runs is left alone: in earnest too.
    for query in ["dry_run=true&restore=true&force=true&", "restore=true&force=true&"] {
        let task = import(&client, query, &records).await;
        assert_eq!(
            (&task["status"], &task["result"]),
            (&json!("success"), &json!("<value><array><data></data></array></value>"))
        );
        assert_eq!(everything(&pool), before);
    }
    // Records of an attached disk that is not there can not be taken, forced or not.
    let running = get(&client, &format!("/export_metadata?uuid={}&", vm.uuid)).await.body;
    pool.shutdown_vm("vm").await.unwrap();
    client.ok("VM.destroy", &[reference]).await;
    client.ok("VDI.destroy", &[client.ok("VDI.get_by_uuid", &[json!(vm.disks[0].vdi)]).await]).await;
    let before = everything(&pool);
    for (query, code) in [
        ("dry_run=true&", "VDI_LOCATION_MISSING"),
        ("dry_run=true&force=true&", "IMPORT_ERROR_ATTACHED_DISKS_NOT_FOUND"),
        ("", "VDI_LOCATION_MISSING"),
    ] {
        assert_eq!(import(&client, query, &running).await["error_info"][0], code, "{query}");
        assert_eq!(everything(&pool), before, "{query}");
    }
    // With force nothing is taken back when an import fails.
    assert_eq!(
        import(&client, "force=true&", &running).await["error_info"][0],
        "IMPORT_ERROR_ATTACHED_DISKS_NOT_FOUND"
    );
    assert_eq!(client.ok("VM.get_by_name_label", &[json!("vm")]).await.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn restored_records_keep_their_names_and_count_their_restores() {
    let (pool, client) = pool(1).await;
    let vm = pool.vm("vm").unwrap();
    let reference = client.ok("VM.get_by_uuid", &[json!(vm.uuid)]).await;
    let snapshot = client.ok("VM.snapshot", &[reference.clone(), json!("s")]).await;
    let old = client.ok("VM.get_record", std::slice::from_ref(&reference)).await;
    let records = get(&client, &format!("/export_metadata?uuid={}&export_snapshots=false&", vm.uuid)).await.body;
    let vbd = client.ok("VBD.get_uuid", &[old["VBDs"][0].clone()]).await;
    let mac = client.ok("VIF.get_MAC", &[old["VIFs"][0].clone()]).await;
    // Over the living VM: a new reference, the same names, the same disk, one restore more.
    let task = import(&client, "restore=true&force=true&", &records).await;
    assert_eq!(task["status"], "success", "{task}");
    let new = client.ok("VM.get_by_uuid", &[json!(vm.uuid)]).await;
    assert_ne!(new, reference);
    let record = client.ok("VM.get_record", std::slice::from_ref(&new)).await;
    assert_eq!(record["version"], json!(1));
    assert_eq!(record["other_config"]["mac_seed"], old["other_config"]["mac_seed"]);
    assert_eq!(client.ok("VBD.get_uuid", &[record["VBDs"][0].clone()]).await, vbd);
    assert_eq!(client.ok("VIF.get_MAC", &[record["VIFs"][0].clone()]).await, mac);
    assert_eq!(pool.vm(&vm.uuid).unwrap().disks[0].vdi, vm.disks[0].vdi);
    assert_eq!(client.ok("VM.get_snapshot_of", &[snapshot]).await, reference, "it dangles");
    // Without restore it is another VM on the same disk.
    let task = import(&client, "", &records).await;
    assert_eq!(task["status"], "success", "{task}");
    let named = client.ok("VM.get_by_name_label", &[json!("vm")]).await;
    let copy = named.as_array().unwrap().iter().find(|known| **known != new).unwrap();
    let copied = client.ok("VM.get_record", std::slice::from_ref(copy)).await;
    assert_eq!(copied["version"], json!(0));
    assert_ne!(copied["other_config"]["mac_seed"], old["other_config"]["mac_seed"]);
    assert_ne!(client.ok("VIF.get_MAC", &[copied["VIFs"][0].clone()]).await, mac);
    assert_eq!(
        client.ok("VBD.get_VDI", &[copied["VBDs"][0].clone()]).await,
        client.ok("VBD.get_VDI", &[record["VBDs"][0].clone()]).await
    );
    // Another VM must not have the addresses of one that is restored.
    client.ok("VM.remove_from_other_config", &[copy.clone(), json!("mac_seed")]).await;
    let seed = old["other_config"]["mac_seed"].clone();
    client.ok("VM.add_to_other_config", &[copy.clone(), json!("mac_seed"), seed.clone()]).await;
    let task = import(&client, "restore=true&force=true&", &records).await;
    assert_eq!(task["error_info"], json!(["DUPLICATE_MAC_SEED", seed]));
}
