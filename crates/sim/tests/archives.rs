//! Archives of whole VMs over HTTP: what goes out comes in again, and what is broken is told as a real server tells it.
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
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use wire::{Answer, Client, exchange, read_answer};
use xenvault_sim::{DiskContent, DiskSpec, SimOptions, SimPool, VmSpec};

const SIZE: u64 = 8 << 20;

async fn pool() -> (SimPool, Client) {
    let disk = DiskSpec::new(SIZE).content(DiskContent::Random { seed: 3, bytes: (3 << 20) + 100 });
    let options = SimOptions { plain_http: true, vms: vec![VmSpec::new("vm").disk(disk)], ..SimOptions::default() };
    let pool = SimPool::start(options).await.expect("starts");
    let client = Client::login(&pool).await;
    (pool, client)
}

async fn get(client: &Client, path: &str) -> Answer {
    let request = format!("GET {path}&session_id={} HTTP/1.1\r\nHost: x\r\n\r\n", client.session);
    exchange(&client.url, request.as_bytes()).await
}

fn head(client: &Client, path: &str, task: &str, length: usize) -> Vec<u8> {
    let session = &client.session;
    format!("PUT {path}&session_id={session}&task_id={task} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n")
        .into_bytes()
}

/// Imports; gives the task's record.
async fn put(client: &Client, path: &str, body: &[u8]) -> (Answer, Value) {
    let task = client.reference("task.create", &[json!("t"), json!("")]).await;
    let request = [head(client, path, &task, body.len()), body.to_vec()].concat();
    let mut stream = TcpStream::connect(client.url.strip_prefix("http://").unwrap()).await.unwrap();
    // A server that refuses closes while we still send: the answer and the task tell why.
    let _ = stream.write_all(&request).await;
    let answer = read_answer(&mut stream).await;
    (answer, client.wait(&task).await)
}

fn sha256(pool: &SimPool, vdi: &str) -> String {
    let data = pool.vdi_read(vdi, 0, pool.vdi_size(vdi).unwrap()).unwrap();
    ring::digest::digest(&ring::digest::SHA256, &data).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The only reference in a task's result.
fn vm_of(task: &Value) -> String {
    let result = task["result"].as_str().unwrap();
    let at = result.find("OpaqueRef:").unwrap_or_else(|| panic!("{task}"));
    result[at..].split('<').next().unwrap().to_owned()
}

/// Names and sizes of a tar's files, walked by the rules of the format.
fn files(tar: &[u8]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    while tar[at] != 0 {
        let text =
            |range: std::ops::Range<usize>| String::from_utf8_lossy(&tar[range]).trim_end_matches('\0').to_owned();
        let size = usize::from_str_radix(&text(at + 124..at + 136), 8).unwrap();
        found.push((text(at..at + 100), size));
        at += 512 + size.next_multiple_of(512);
    }
    assert_eq!(tar.len() - at, 1024, "two empty blocks end it");
    found
}

#[tokio::test]
async fn an_archive_has_the_records_then_chunks_with_a_check_sum_each() {
    let (pool, client) = pool().await;
    let answer = get(&client, &format!("/export?uuid={}", pool.vms()[0].uuid)).await;
    assert_eq!(answer.start, "HTTP/1.0 200 OK");
    assert!(answer.header("content-length").is_none());
    let files = files(&answer.body);
    assert_eq!(files[0].0, "ova.xml");
    let numbers: Vec<&str> = files[1..].iter().map(|(name, _)| name.split_once('/').unwrap().1).collect();
    let expected = ["00000000", "00000001", "00000002", "00000003", "00000007"];
    let expected: Vec<String> =
        expected.iter().flat_map(|number| [(*number).to_owned(), format!("{number}.xxhash")]).collect();
    assert_eq!(numbers, expected, "chunks of zeros are left out, the last one is there");
    assert!(files[1..].iter().all(|(name, size)| name.starts_with("Ref:") && [1 << 20, 16].contains(size)));
    assert!(pool.records("VBD").len() == 1, "the device in the control domain is gone");
}

#[tokio::test]
async fn what_was_exported_comes_in_with_the_same_bytes_whatever_the_compression() {
    let (pool, client) = pool().await;
    let vm = pool.vms()[0].clone();
    pool.set_vtpm_contents("vm", "dGhlIGtleXM=").unwrap();
    let wanted = sha256(&pool, &vm.disks[0].vdi);
    for compression in ["", "&use_compression=true", "&use_compression=gzip", "&use_compression=zstd"] {
        let xva = get(&client, &format!("/export?uuid={}{compression}", vm.uuid)).await.body;
        let (answer, task) = put(&client, "/import?x=y", &xva).await;
        assert_eq!(answer.start, "HTTP/1.1 200 OK");
        assert_eq!(task["status"], "success", "{compression}: {task}");
        let copy = client.reference("VM.get_uuid", &[json!(vm_of(&task))]).await;
        assert_ne!(copy, vm.uuid);
        let info = pool.vm(&copy).unwrap();
        assert_ne!(info.disks[0].vdi, vm.disks[0].vdi);
        assert_eq!(sha256(&pool, &info.disks[0].vdi), wanted, "{compression}");
        assert_eq!(pool.vtpm_contents(&copy).unwrap().as_deref(), Some("dGhlIGtleXM="));
        let (old, new) = (pool.record("VM", &vm.uuid).unwrap(), pool.record("VM", &copy).unwrap());
        for field in ["name_label", "memory_static_max", "VCPUs_max", "platform", "HVM_boot_params"] {
            assert_eq!(old[field], new[field], "{field}");
        }
        assert_eq!(new["VIFs"].as_array().unwrap().len(), 1);
    }
    assert_eq!(pool.records("VBD").len(), 5, "no device is left in the control domain");
}

#[tokio::test]
async fn a_restore_over_the_living_vm_leaves_its_disk_and_its_snapshot_without_it() {
    let (pool, client) = pool().await;
    let vm = pool.vms()[0].clone();
    let old = client.reference("VM.get_by_uuid", &[json!(vm.uuid)]).await;
    let snapshot = client.reference("VM.snapshot", &[json!(old), json!("s")]).await;
    let xva = get(&client, &format!("/export?ref={old}")).await.body;
    let (_, refused) = put(&client, "/import?restore=true", &xva).await;
    assert_eq!(refused["error_info"], json!(["VM_TO_IMPORT_IS_NOT_NEWER_VERSION", old, "0", "0"]));
    let (_, task) = put(&client, "/import?restore=true&force=true", &xva).await;
    assert_eq!(task["status"], "success", "{task}");
    let new = client.reference("VM.get_by_uuid", &[json!(vm.uuid)]).await;
    assert_eq!(new, vm_of(&task));
    assert_ne!(new, old);
    let gone = client.failure("VM.get_record", &[json!(old)]).await;
    assert_eq!(gone, ("HANDLE_INVALID".to_owned(), vec!["VM".to_owned(), old.clone()]));
    assert_eq!(client.ok("VM.get_snapshot_of", &[json!(snapshot)]).await, json!(old), "it dangles");
    let orphan = client.reference("VDI.get_by_uuid", &[json!(vm.disks[0].vdi)]).await;
    assert_eq!(client.ok("VDI.get_VBDs", &[json!(orphan)]).await, json!([]));
    assert_eq!(sha256(&pool, &pool.vm(&vm.uuid).unwrap().disks[0].vdi), sha256(&pool, &vm.disks[0].vdi));
}

#[tokio::test]
async fn records_travel_alone_and_find_their_disks_again() {
    let (pool, client) = pool().await;
    let vm = pool.vms()[0].clone();
    let reference = client.reference("VM.get_by_uuid", &[json!(vm.uuid)]).await;
    let answer = get(&client, &format!("/export_metadata?uuid={}", vm.uuid)).await;
    let length: usize = answer.header("Content-Length").unwrap().parse().unwrap();
    assert_eq!((answer.body.len(), files(&answer.body).len()), (length, 1));
    client.ok("VM.destroy", &[json!(reference)]).await;
    let (_, task) = put(&client, "/import_metadata?restore=true", &answer.body).await;
    assert_eq!(task["status"], "success", "{task}");
    assert_eq!(pool.vm(&vm.uuid).unwrap().disks[0].vdi, vm.disks[0].vdi);
    // Without the disk there is nothing to find.
    let disk = client.reference("VDI.get_by_uuid", &[json!(vm.disks[0].vdi)]).await;
    client.ok("VM.destroy", &[json!(vm_of(&task))]).await;
    client.ok("VDI.destroy", &[json!(disk)]).await;
    let (_, task) = put(&client, "/import_metadata?restore=true", &answer.body).await;
    assert_eq!(task["error_info"][0], "VDI_LOCATION_MISSING", "{task}");
    assert!(pool.vm(&vm.uuid).is_err(), "nothing is left of it");
    let (_, task) = put(&client, "/import_metadata?restore=true&force=true", &answer.body).await;
    assert_eq!(task["status"], "success", "{task}");
    assert!(pool.vm(&vm.uuid).unwrap().disks.is_empty());
}

#[tokio::test]
async fn a_cut_off_archive_waits_for_its_rest_until_the_client_half_closes() {
    let (pool, client) = pool().await;
    let xva = get(&client, &format!("/export?uuid={}", pool.vms()[0].uuid)).await.body;
    let before = pool.new_objects().len();
    let task = client.reference("task.create", &[json!("t"), json!("")]).await;
    let part = xva.len() / 2;
    let mut stream = TcpStream::connect(client.url.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(&[head(&client, "/import?x=y", &task, part), xva[..part].to_vec()].concat()).await.unwrap();
    // All that came was read: the objects are there, the task goes on.
    loop {
        let record = client.ok("task.get_record", &[json!(task)]).await;
        assert_eq!(record["status"], "pending");
        if record["other_config"]["object_creation"] == "complete" {
            break;
        }
        tokio::task::yield_now().await;
    }
    stream.shutdown().await.unwrap();
    let answer = read_answer(&mut stream).await;
    assert_eq!(answer.start, "HTTP/1.1 200 OK");
    assert_eq!(client.wait(&task).await["error_info"], json!(["IMPORT_ERROR_PREMATURE_EOF"]));
    client.ok("task.destroy", &[json!(task)]).await;
    assert_eq!(pool.new_objects().len(), before, "nothing is left of it");
}

#[tokio::test]
async fn garbage_a_wrong_check_sum_and_a_missing_sr_are_told() {
    let (pool, client) = pool().await;
    let (answer, task) = put(&client, "/import?x=y", &[b'x'; 2048]).await;
    assert!(answer.text().contains("IMPORT_ERROR_PREMATURE_EOF: [  ]"), "{}", answer.text());
    assert_eq!(task["error_info"], json!(["IMPORT_ERROR_PREMATURE_EOF"]));
    let mut xva = get(&client, &format!("/export?uuid={}", pool.vms()[0].uuid)).await.body;
    let records = files(&xva)[0].1.next_multiple_of(512) + 512;
    xva[records + 512 + 5] ^= 1;
    let (_, task) = put(&client, "/import?x=y", &xva).await;
    assert_eq!(task["error_info"], json!(["IMPORT_ERROR_SOME_CHECKSUMS_FAILED"]));
    assert_eq!(pool.records("VM").len(), 2, "one VM and the control domain");
    let options = SimOptions { plain_http: true, srs: Vec::new(), vms: Vec::new(), ..SimOptions::default() };
    let other = SimPool::start(options).await.expect("starts");
    let client = Client::login(&other).await;
    let (answer, task) = put(&client, "/import?x=y", &[]).await;
    assert_eq!(answer.start, "HTTP/1.1 500 Internal Error");
    assert_eq!(task["error_info"][0], "DEFAULT_SR_NOT_FOUND");
}
