//! The life of a pool: toolstacks that restart, a coordinator that moves, hosts that stop, and what HA does.
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
use xenvault_sim::{DiskSpec, SimOptions, SimPool, VmSpec};

/// Generous: the machine may be slow.
const LONG: Duration = Duration::from_secs(60);

async fn pool(hosts: usize) -> SimPool {
    let mut disk = DiskSpec::new(8 << 20);
    disk.cbt = true;
    let options =
        SimOptions { hosts, plain_http: true, vms: vec![VmSpec::new("vm-1").disk(disk)], ..SimOptions::default() };
    SimPool::start(options).await.expect("starts")
}

async fn body(url: &str, method: &str, params: Value) -> String {
    let body = json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).to_string();
    wire::exchange(url, &wire::post("/jsonrpc", &body)).await.start
}

fn messages(pool: &SimPool, name: &str) -> Vec<Value> {
    pool.records("message").into_iter().map(|(_, record)| record).filter(|record| record["name"] == name).collect()
}

#[tokio::test]
async fn a_toolstack_that_restarts_ends_sessions_and_tasks() {
    let pool = pool(1).await;
    let client = Client::login(&pool).await;
    let task = client.reference("task.create", &[json!("a transfer"), json!("")]).await;
    let restart = tokio::spawn({
        let pool = pool.clone();
        async move { pool.restart_toolstack(0, Duration::from_secs(2)).await }
    });
    // Until it is up again connections are closed without a byte; the session is gone then.
    let failed = tokio::time::timeout(LONG, async {
        let mut closed = false;
        loop {
            let start = body(&pool.url(), "task.get_status", json!([client.session, task])).await;
            closed |= start.is_empty();
            if closed && !start.is_empty() {
                return client.failure("task.get_status", &[json!(task)]).await;
            }
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(failed.await.expect("comes back").0, "SESSION_INVALID");
    restart.await.unwrap().unwrap();
    let client = Client::login(&pool).await;
    assert_eq!(client.failure("task.get_status", &[json!(task)]).await.0, "HANDLE_INVALID");
}

#[tokio::test]
async fn a_wait_for_events_breaks_when_the_toolstack_restarts() {
    let pool = pool(1).await;
    let client = Client::login(&pool).await;
    let first = client.ok("event.from", &[json!(["vm"]), json!(""), json!(1.0)]).await;
    let (url, session) = (pool.url(), client.session.clone());
    let params = json!([session, ["vm"], first["token"], 600.0]);
    let waiting = tokio::spawn(async move { body(&url, "event.from", params).await });
    // The call has to be there before the restart; its counter says so.
    while pool.counters().calls["event.from"] < 2 {
        tokio::task::yield_now().await;
    }
    pool.restart_toolstack(0, Duration::ZERO).await.unwrap();
    assert_eq!(tokio::time::timeout(LONG, waiting).await.expect("ends").unwrap(), "");
}

#[tokio::test]
async fn a_coordinator_that_moved_names_the_new_one() {
    let pool = pool(3).await;
    let old = Client::login(&pool).await;
    pool.move_coordinator(2).await.unwrap();
    let hosts = pool.hosts();
    assert_eq!(pool.url(), hosts[2].url);
    for member in [0, 1] {
        let params = json!(["root", "whatever", "1.0", "test"]);
        let failed = wire::raw_call(&hosts[member].url, "session.login_with_password", params).await.unwrap_err();
        assert_eq!(failed, ("HOST_IS_SLAVE".to_owned(), vec![hosts[2].address.to_string()]));
    }
    assert_eq!(old.failure("pool.get_all", &[]).await.0, "SESSION_INVALID");
    let client = Client::login(&pool).await;
    let pools = client.ok("pool.get_all", &[]).await;
    let master = client.ok("pool.get_master", &[pools[0].clone()]).await;
    assert_eq!(client.ok("host.get_uuid", &[master]).await, json!(hosts[2].uuid));
}

#[tokio::test]
async fn a_fail_over_that_takes_a_while_has_hosts_that_still_boot() {
    let pool = pool(3).await;
    let old = Client::login(&pool).await;
    let task = old.reference("task.create", &[json!("a transfer"), json!("")]).await;
    let started = |pool: &SimPool, host: usize| {
        pool.record("host", &pool.hosts()[host].uuid).unwrap()["other_config"]["agent_start_time"].clone()
    };
    let before = started(&pool, 1);
    let moving = tokio::spawn({
        let pool = pool.clone();
        async move { pool.fail_over(1, Duration::from_secs(5)).await }
    });
    let hosts = pool.hosts();
    while pool.url() != hosts[1].url {
        tokio::task::yield_now().await;
    }
    let login = |host: usize| {
        let url = hosts[host].url.clone();
        async move {
            let params = json!(["root", "whatever", "1.0", "test"]);
            wire::raw_call(&url, "session.login_with_password", params).await.unwrap_err()
        }
    };
    for booting in [1, 2] {
        assert_eq!(login(booting).await, ("HOST_STILL_BOOTING".to_owned(), vec![]), "host {booting}");
    }
    assert_eq!(login(0).await, ("HOST_IS_SLAVE".to_owned(), vec![hosts[1].address.to_string()]));
    let read = wire::raw_call(&hosts[1].url, "VM.get_all", json!([old.session])).await;
    assert_eq!(read.unwrap_err().0, "HOST_STILL_BOOTING");
    let other = pool.move_coordinator(0).await.unwrap_err().to_string();
    assert!(other.contains("HOST_STILL_BOOTING"), "{other}");
    // The old one has no answer of its own until the new one serves.
    let mute = tokio::spawn({
        let (url, session) = (hosts[0].url.clone(), old.session.clone());
        async move { wire::raw_call(&url, "VM.get_all", json!([session])).await }
    });
    assert!(!moving.is_finished(), "this machine is too slow for the window");
    moving.await.unwrap().unwrap();
    let ended = tokio::time::timeout(LONG, mute).await.expect("ends").unwrap();
    assert_eq!(ended.unwrap_err().0, "SESSION_INVALID");
    let client = Client::login(&pool).await;
    assert_eq!(client.failure("task.get_status", &[json!(task)]).await.0, "HANDLE_INVALID");
    assert_ne!(started(&pool, 1), before);
    for member in [0, 2] {
        assert_eq!(login(member).await.1, [hosts[1].address.to_string()]);
    }
    // Also when the old coordinator is down; and nothing happens to one that is the coordinator.
    pool.stop_host(1).await.unwrap();
    pool.fail_over(2, Duration::from_millis(1)).await.unwrap();
    pool.fail_over(2, LONG * 60).await.unwrap();
    Client::login(&pool).await;
    assert!(pool.fail_over(1, Duration::ZERO).await.unwrap_err().to_string().contains("HOST_OFFLINE"));
}

#[tokio::test]
async fn members_are_mute_without_a_coordinator_until_there_is_another() {
    let pool = pool(2).await;
    let client = Client::login(&pool).await;
    let token = client.ok("event.from", &[json!(["vm"]), json!(""), json!(1.0)]).await["token"].clone();
    pool.stop_host(0).await.unwrap();
    let hosts = pool.hosts();
    assert_eq!(body(&hosts[0].url, "VM.get_all", json!([client.session])).await, "");
    let metrics = pool.records("host_metrics");
    assert_eq!(metrics.values().filter(|record| record["live"] == false).count(), 1);
    // Logins are still sent away, to where nobody answers.
    let params = json!(["root", "whatever", "1.0", "test"]);
    let failed = wire::raw_call(&hosts[1].url, "session.login_with_password", params).await.unwrap_err();
    assert_eq!(failed.1, [hosts[0].address.to_string()]);
    let url = hosts[1].url.clone();
    let session = client.session.clone();
    let mute = tokio::spawn(async move {
        wire::exchange(
            &url,
            &wire::post(
                "/jsonrpc",
                &json!({"jsonrpc": "2.0", "method": "VM.get_all", "params": [session], "id": 1}).to_string(),
            ),
        )
        .await
        .start
    });
    while pool.counters().calls.get("VM.get_all").copied().unwrap_or_default() < 1 {
        tokio::task::yield_now().await;
    }
    assert!(!mute.is_finished());
    pool.move_coordinator(1).await.unwrap();
    // Its toolstack restarted for it.
    assert_eq!(tokio::time::timeout(LONG, mute).await.expect("ends").unwrap(), "");
    let client = Client::login(&pool).await;
    // A token that is ahead of the new database hears nothing and is given back.
    let quiet = client.ok("event.from", &[json!(["vm"]), token.clone(), json!(0.01)]).await;
    assert_eq!((&quiet["events"], &quiet["token"]), (&json!([]), &token));
    pool.start_host(0).await.unwrap();
    let params = json!(["root", "whatever", "1.0", "test"]);
    let failed = wire::raw_call(&hosts[0].url, "session.login_with_password", params).await.unwrap_err();
    assert_eq!(failed.1, [hosts[1].address.to_string()]);
}

#[tokio::test]
async fn a_stopped_host_keeps_its_vms_by_the_records_until_it_boots() {
    let pool = pool(2).await;
    let vm = pool.vms()[0].uuid.clone();
    pool.start_vm(&vm, 1).await.unwrap();
    let boot =
        |pool: &SimPool| pool.record("host", &pool.hosts()[1].uuid).unwrap()["other_config"]["boot_time"].clone();
    let before = boot(&pool);
    pool.stop_host(1).await.unwrap();
    assert_eq!(pool.record("VM", &vm).unwrap()["power_state"], "Running");
    let client = Client::login(&pool).await;
    let reference = client.reference("VM.get_by_uuid", &[json!(vm)]).await;
    assert_eq!(client.failure("VM.snapshot", &[json!(reference), json!("x")]).await.0, "HOST_OFFLINE");
    pool.start_host(1).await.unwrap();
    assert_eq!(pool.record("VM", &vm).unwrap()["power_state"], "Halted");
    assert_ne!(boot(&pool), before);
    // The log of the crash is thrown away at the next start.
    pool.start_vm(&vm, 0).await.unwrap();
    assert_eq!(messages(&pool, "VDI_CBT_METADATA_INCONSISTENT").len(), 1);
}

#[tokio::test]
async fn ha_starts_a_vm_elsewhere_and_the_storage_drops_its_change_log() {
    let pool = pool(2).await;
    let vm = pool.vms()[0].uuid.clone();
    pool.start_vm(&vm, 1).await.unwrap();
    assert!(pool.ha_restart_vm(&vm, 0).await.is_err());
    pool.stop_host(1).await.unwrap();
    pool.ha_restart_vm(&vm, 0).await.unwrap();
    let record = pool.record("VM", &vm).unwrap();
    assert_eq!(record["power_state"], "Running");
    let failed = messages(&pool, "HA_HOST_FAILED");
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0]["obj_uuid"], json!(pool.hosts()[1].uuid));
    assert_eq!(failed[0]["body"], "Server 'host-2' has failed");
    assert_eq!(messages(&pool, "VDI_CBT_METADATA_INCONSISTENT").len(), 1);
    let vdi = &pool.vms()[0].disks[0].vdi;
    assert_eq!(pool.record("VDI", vdi).unwrap()["cbt_enabled"], false);
    // The host that comes back does not touch the VM that runs elsewhere.
    pool.start_host(1).await.unwrap();
    assert_eq!(pool.record("VM", &vm).unwrap()["power_state"], "Running");
}

#[tokio::test]
async fn ha_also_starts_a_vm_whose_host_is_back_already() {
    let pool = pool(2).await;
    let vm = pool.vms()[0].uuid.clone();
    pool.start_vm(&vm, 0).await.unwrap();
    pool.crash_host(0).await.unwrap();
    pool.ha_restart_vm(&vm, 1).await.unwrap();
    assert_eq!(messages(&pool, "HA_HOST_FAILED").len(), 1);
    assert_eq!(messages(&pool, "VDI_CBT_METADATA_INCONSISTENT").len(), 1);
}

#[tokio::test]
async fn an_open_export_outlives_a_restart_and_a_coordinator_that_moves() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let pool = pool(2).await;
    pool.set_nbd(xenvault_sim::NbdAccess::Insecure);
    let vm = pool.vms()[0].clone();
    pool.guest_write(&vm.uuid, "0", 0, &[7; 4096]).unwrap();
    let client = Client::login(&pool).await;
    let vdi = client.reference("VDI.get_by_uuid", &[json!(vm.disks[0].vdi)]).await;
    let info = client.ok("VDI.get_nbd_info", &[json!(vdi)]).await;
    let info = info.as_array().unwrap().iter().find(|info| info["address"] == "127.0.0.2").unwrap().clone();
    let port = u16::try_from(info["port"].as_u64().unwrap()).unwrap();
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.2", port)).await.unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.unwrap();
    stream.write_all(&1_u32.to_be_bytes()).await.unwrap();
    let name = info["exportname"].as_str().unwrap();
    let mut option = b"IHAVEOPT".to_vec();
    option.extend(1_u32.to_be_bytes());
    option.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    option.extend(name.as_bytes());
    stream.write_all(&option).await.unwrap();
    let mut answer = [0; 134];
    stream.read_exact(&mut answer).await.unwrap();
    pool.restart_toolstack(0, Duration::ZERO).await.unwrap();
    pool.move_coordinator(1).await.unwrap();
    let mut read = 0x2560_9513_u32.to_be_bytes().to_vec();
    read.extend([0, 0, 0, 0]);
    read.extend(9_u64.to_be_bytes());
    read.extend(0_u64.to_be_bytes());
    read.extend(4096_u32.to_be_bytes());
    stream.write_all(&read).await.unwrap();
    let mut data = vec![0; 16 + 4096];
    stream.read_exact(&mut data).await.unwrap();
    assert!(data[16..].iter().all(|byte| *byte == 7));
    // The death of its host ends it.
    pool.stop_host(1).await.unwrap();
    assert!(matches!(tokio::time::timeout(LONG, stream.read(&mut data)).await.expect("ends"), Ok(0) | Err(_)));
}

#[tokio::test]
async fn sixty_four_hosts_answer_each_at_its_own_address() {
    let pool = pool(64).await;
    let hosts = pool.hosts();
    let client = Client::login(&pool).await;
    for host in &hosts {
        let found = wire::raw_call(&host.url, "host.get_by_uuid", json!([client.session, host.uuid])).await;
        assert!(found.is_ok(), "{found:?}");
    }
    let addresses: std::collections::HashSet<_> = hosts.iter().map(|host| host.address).collect();
    assert_eq!(addresses.len(), 64);
}

#[tokio::test]
async fn the_control_interface_orders_the_life_of_hosts() {
    let pool = pool(2).await;
    let vm = pool.vms()[0].uuid.clone();
    let order = async |path: String| {
        let request = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n");
        wire::exchange(&pool.control_url(), request.as_bytes()).await.start
    };
    for path in [
        format!("/vms/{vm}/start?host=0"),
        "/hosts/0/restart-toolstack?milliseconds=1".to_owned(),
        "/hosts/0/stop".to_owned(),
        "/hosts/1/coordinator".to_owned(),
        format!("/vms/{vm}/ha-restart?host=1"),
        "/hosts/0/start".to_owned(),
        "/hosts/0/fail-over?milliseconds=1".to_owned(),
        "/hosts/1/fail-over?milliseconds=1".to_owned(),
    ] {
        assert_eq!(order(path.clone()).await, "HTTP/1.1 200 OK", "{path}");
    }
    assert_eq!(order("/hosts/9/stop".to_owned()).await, "HTTP/1.1 409 Conflict");
    assert_eq!(pool.url(), pool.hosts()[1].url);
    assert_eq!(pool.record("VM", &vm).unwrap()["power_state"], "Running");
}

#[tokio::test]
async fn a_disk_is_offered_where_its_sr_is_plugged_also_at_addresses_that_nobody_serves() {
    let options = SimOptions { hosts: 2, plain_http: true, ipv6: true, ..SimOptions::default() };
    let pool = SimPool::start(options).await.unwrap();
    let client = Client::login(&pool).await;
    let vdi = client.reference("VDI.get_by_uuid", &[json!(pool.vms()[0].disks[0].vdi)]).await;
    let addresses = async || -> Vec<String> {
        let info = client.ok("VDI.get_nbd_info", &[json!(vdi)]).await;
        info.as_array().unwrap().iter().map(|info| info["address"].as_str().unwrap().to_owned()).collect()
    };
    let all = addresses().await;
    assert!(all.contains(&"2001:db8::1".to_owned()) && all.contains(&"127.0.0.2".to_owned()), "{all:?}");
    let second = client.reference("host.get_by_uuid", &[json!(pool.hosts()[1].uuid)]).await;
    let pbds = client.ok("host.get_PBDs", &[json!(second)]).await;
    client.ok("PBD.unplug", &[pbds[0].clone()]).await;
    let left = addresses().await;
    assert_eq!(left.len(), 2);
    assert!(left.contains(&"127.0.0.1".to_owned()) && left.contains(&"2001:db8::1".to_owned()), "{left:?}");
    // A transfer that asks there is sent to the host that has it.
    let path = format!("/export_raw_vdi?session_id={}&vdi={vdi}&format=raw", client.session);
    let answer =
        wire::exchange(&pool.hosts()[1].url, format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await;
    assert_eq!(answer.start, "HTTP/1.1 302 Found");
    assert!(answer.header("Location").unwrap().starts_with(&pool.hosts()[0].url));
    client.ok("PBD.plug", &[pbds[0].clone()]).await;
    assert_eq!(addresses().await.len(), 4);
}

#[tokio::test]
async fn a_large_pool_is_told_in_one_answer_and_a_change_in_the_next() {
    let vm = |index: usize| (0..3).fold(VmSpec::new(&format!("vm-{index}")), |vm, _| vm.disk(DiskSpec::new(64 << 20)));
    let options = SimOptions { plain_http: true, vms: (0..1000).map(vm).collect(), ..SimOptions::default() };
    let pool = SimPool::start(options).await.unwrap();
    let client = Client::login(&pool).await;
    let first = client.ok("event.from", &[json!(["vm", "vdi"]), json!(""), json!(1.0)]).await;
    let told = |class: &str| first["events"].as_array().unwrap().iter().filter(|event| event["class"] == class).count();
    // One control domain.
    assert_eq!((told("vm"), told("vdi")), (1001, 3000));
    let reference = client.reference("VM.get_by_uuid", &[json!(pool.vms()[500].uuid)]).await;
    client.ok("VM.set_name_label", &[json!(reference), json!("renamed")]).await;
    let next = client.ok("event.from", &[json!(["vm", "vdi"]), first["token"].clone(), json!(30.0)]).await;
    assert_eq!(next["events"].as_array().unwrap().len(), 1);
    assert_eq!(next["events"][0]["snapshot"]["name_label"], "renamed");
}
