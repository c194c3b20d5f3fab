//! Storage migration: what becomes of disks, devices, snapshots, change logs and a guest's writes, and what is refused.
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
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskSpec, SimOptions, SimPool, SrSpec, VmSpec};

const DISK: u64 = 8 << 20;

struct Lab {
    pool: SimPool,
    client: Client,
    vm: String,
    uuid: String,
}

impl Lab {
    async fn new(change: impl FnOnce(&mut SimOptions)) -> Self {
        let mut options = SimOptions {
            plain_http: true,
            srs: vec![SrSpec::new("here", SrKind::Ext), SrSpec::new("there", SrKind::Ext)],
            vms: vec![VmSpec::new("vm-1").disk(DiskSpec::new(DISK)).disk(DiskSpec::new(DISK))],
            ..SimOptions::default()
        };
        change(&mut options);
        let pool = SimPool::start(options).await.expect("starts");
        let client = Client::login(&pool).await;
        let uuid = pool.vms()[0].uuid.clone();
        let vm = client.reference("VM.get_by_uuid", &[json!(uuid)]).await;
        Self { pool, client, vm, uuid }
    }

    async fn disk(&self, device: usize) -> String {
        let uuid = self.pool.vms()[0].disks[device].vdi.clone();
        self.client.reference("VDI.get_by_uuid", &[json!(uuid)]).await
    }

    async fn sr(&self, index: usize) -> String {
        self.client.reference("SR.get_by_uuid", &[json!(self.pool.srs()[index].uuid)]).await
    }

    async fn record(&self, class: &str, reference: &str) -> Value {
        self.client.ok(&format!("{class}.get_record"), &[json!(reference)]).await
    }

    /// A destination for `VM.migrate_send`.
    async fn destination(&self, host: usize) -> Value {
        let host = self.client.reference("host.get_by_uuid", &[json!(self.pool.hosts()[host].uuid)]).await;
        let networks = self.pool.records("network");
        let (network, _) = networks.into_iter().find(|(_, record)| record["bridge"] == "xenbr0").unwrap();
        self.client.ok("host.migrate_receive", &[json!(host), json!(network), json!({})]).await
    }

    async fn send(&self, host: usize, disks: Value) -> Result<Value, wire::Failed> {
        let destination = self.destination(host).await;
        let params = [json!(self.vm), destination, json!(true), disks, json!({}), json!({})];
        self.client.call("VM.migrate_send", &params).await
    }

    /// Waits until a VM has an operation.
    async fn operation(&self, operation: &str) {
        let mut token = json!("");
        loop {
            let record = self.record("VM", &self.vm).await;
            let current = record["current_operations"].as_object().unwrap().clone();
            if current.values().any(|name| name == operation) {
                return;
            }
            let class = format!("vm/{}", self.vm);
            token = self.client.ok("event.from", &[json!([class]), token, json!(5.0)]).await["token"].clone();
        }
    }
}

#[tokio::test]
async fn a_disk_that_moves_is_another_vdi_with_the_same_content() {
    let lab = Lab::new(|_| {}).await;
    lab.pool.guest_write(&lab.uuid, "0", 4096, &[7; 100_000]).unwrap();
    let (disk, other) = (lab.disk(0).await, lab.disk(1).await);
    lab.client.ok("VDI.add_to_other_config", &[json!(disk), json!("mine"), json!("1")]).await;
    lab.client.ok("VDI.set_name_label", &[json!(disk), json!("system")]).await;
    let before = lab.pool.guest_read(&lab.uuid, "0", 0, DISK).unwrap();
    let old = lab.record("VDI", &disk).await;
    let there = lab.sr(1).await;
    let new = lab.client.reference("VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    assert_eq!(lab.disk(0).await, new);
    let record = lab.record("VDI", &new).await;
    assert_eq!((&record["SR"], &record["name_label"]), (&json!(there), &json!("system")));
    assert_ne!(record["uuid"], old["uuid"]);
    // Keys of the client stay behind with the old record.
    assert!(record["other_config"].get("mine").is_none(), "{record}");
    assert_eq!(record["cbt_enabled"], false);
    assert_eq!(lab.pool.guest_read(&lab.uuid, "0", 0, DISK).unwrap(), before);
    assert_eq!(lab.client.failure("VDI.get_uuid", &[json!(disk)]).await.0, "HANDLE_INVALID");
    assert_eq!(lab.disk(1).await, other);
    assert_eq!(lab.record("VM", &lab.vm).await["current_operations"], json!({}));
}

#[tokio::test]
async fn a_tracked_disk_does_not_move_and_neither_does_one_with_tracked_snapshots() {
    let lab = Lab::new(|_| {}).await;
    let (disk, there) = (lab.disk(0).await, lab.sr(1).await);
    lab.client.ok("VDI.enable_cbt", &[json!(disk)]).await;
    let failed = lab.client.failure("VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    assert_eq!(failed, ("VDI_CBT_ENABLED".to_owned(), vec![disk.clone()]));
    let stays = lab.sr(0).await;
    let other = lab.disk(1).await;
    let failed = lab.send(0, json!({disk.clone(): there, other.clone(): stays})).await.unwrap_err();
    assert_eq!(failed, ("VDI_CBT_ENABLED".to_owned(), vec![disk.clone()]));
    // A disk that stays may be tracked.
    let moved = lab.client.reference("VDI.pool_migrate", &[json!(other), json!(there), json!({})]).await;
    let snapshot = lab.client.reference("VM.snapshot", &[json!(lab.vm), json!("s")]).await;
    let tracked = snapshot_disk(&lab, &snapshot, "0").await;
    lab.client.ok("VDI.disable_cbt", &[json!(disk)]).await;
    let failed = lab.client.failure("VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    assert_eq!(failed, ("VDI_CBT_ENABLED".to_owned(), vec![tracked]));
    assert_eq!(lab.disk(1).await, moved);
    assert_eq!(lab.disk(0).await, disk);
}

async fn snapshot_disk(lab: &Lab, snapshot: &str, device: &str) -> String {
    for vbd in lab.client.ok("VM.get_VBDs", &[json!(snapshot)]).await.as_array().unwrap() {
        let record = lab.record("VBD", vbd.as_str().unwrap()).await;
        if record["userdevice"] == device {
            return record["VDI"].as_str().unwrap().to_owned();
        }
    }
    panic!("no device {device}");
}

#[tokio::test]
async fn snapshots_follow_their_disk_and_change_information_stays_behind() {
    let lab = Lab::new(|_| {}).await;
    let disk = lab.disk(0).await;
    lab.pool.guest_write(&lab.uuid, "0", 0, &[1; 65536]).unwrap();
    lab.client.ok("VDI.enable_cbt", &[json!(disk)]).await;
    let lone = lab.client.reference("VM.snapshot", &[json!(lab.vm), json!("gone")]).await;
    let metadata = snapshot_disk(&lab, &lone, "0").await;
    lab.client.ok("VM.destroy", &[json!(lone)]).await;
    lab.client.ok("VDI.data_destroy", &[json!(metadata)]).await;
    lab.client.ok("VDI.disable_cbt", &[json!(disk)]).await;
    let snapshot = lab.client.reference("VM.snapshot", &[json!(lab.vm), json!("kept")]).await;
    let old = lab.record("VDI", &snapshot_disk(&lab, &snapshot, "0").await).await;
    lab.pool.guest_write(&lab.uuid, "0", 0, &[2; 65536]).unwrap();
    let there = lab.sr(1).await;
    let new = lab.client.reference("VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    let moved = lab.record("VDI", &snapshot_disk(&lab, &snapshot, "0").await).await;
    assert_eq!((&moved["SR"], &moved["snapshot_of"]), (&json!(there), &json!(new)));
    assert_eq!((&moved["is_a_snapshot"], &moved["snapshot_time"]), (&json!(true), &old["snapshot_time"]));
    assert_ne!(moved["uuid"], old["uuid"]);
    assert_eq!(lab.record("VDI", &new).await["snapshots"].as_array().unwrap().len(), 1);
    assert_eq!(lab.pool.vdi_read(moved["uuid"].as_str().unwrap(), 0, 65536).unwrap(), [1; 65536]);
    assert_eq!(lab.pool.guest_read(&lab.uuid, "0", 0, 65536).unwrap(), [2; 65536]);
    // It names a disk that is gone.
    let left = lab.record("VDI", &metadata).await;
    assert_eq!((&left["snapshot_of"], &left["SR"]), (&json!(disk), &json!(lab.sr(0).await)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_vm_moves_with_every_write_and_is_locked_meanwhile() {
    let lab = Lab::new(|options| options.hosts = 2).await;
    lab.pool.start_vm(&lab.uuid, 0).await.unwrap();
    lab.pool.hold_storage_migrations(true);
    let (disk, other) = (lab.disk(0).await, lab.disk(1).await);
    let there = lab.sr(1).await;
    let destination = lab.destination(1).await;
    let map = json!({disk.clone(): there, other.clone(): lab.sr(0).await});
    let params = [json!(lab.vm), destination, json!(true), map, json!({}), json!({})];
    let task = lab.client.reference("Async.VM.migrate_send", &params).await;
    lab.operation("migrate_send").await;
    let mut expected = vec![0_u8; usize::try_from(DISK).unwrap()];
    for round in 0..200_usize {
        let at = round * 37_123 % 8_000_000;
        let byte = u8::try_from(round % 251).unwrap();
        lab.pool.guest_write(&lab.uuid, "0", at as u64, &[byte; 5000]).unwrap();
        expected[at..at + 5000].fill(byte);
    }
    let allowed = lab.client.ok("VM.get_allowed_operations", &[json!(lab.vm)]).await;
    let allowed: Vec<&str> = allowed.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(!allowed.contains(&"snapshot") && !allowed.contains(&"migrate_send"), "{allowed:?}");
    assert!(allowed.contains(&"clean_shutdown") && allowed.contains(&"metadata_export"), "{allowed:?}");
    let valid = lab.client.failure("VM.assert_operation_valid", &[json!(lab.vm), json!("snapshot")]).await;
    assert_eq!(valid.0, "OTHER_OPERATION_IN_PROGRESS");
    assert_eq!(valid.1[2], "migrate_send");
    // A snapshot waits for the end.
    let snapshot = lab.client.reference("Async.VM.snapshot", &[json!(lab.vm), json!("after")]).await;
    assert_eq!(lab.record("task", &snapshot).await["status"], "pending");
    lab.pool.hold_storage_migrations(false);
    assert_eq!(lab.client.wait(&task).await["status"], "success");
    assert_eq!(lab.client.wait(&snapshot).await["status"], "success");
    assert_ne!(lab.disk(0).await, disk);
    assert_eq!(lab.disk(1).await, other);
    assert!(lab.pool.guest_read(&lab.uuid, "0", 0, DISK).unwrap() == expected);
    let host = lab.client.reference("host.get_by_uuid", &[json!(lab.pool.hosts()[1].uuid)]).await;
    let record = lab.record("VM", &lab.vm).await;
    assert_eq!((&record["resident_on"], &record["power_state"]), (&json!(host), &json!("Running")));
    let messages = lab.pool.records("message");
    assert!(messages.values().any(|message| message["name"] == "VM_MIGRATED"));
    lab.pool.shutdown_vm(&lab.uuid).await.unwrap();
}

#[tokio::test]
async fn what_can_not_move_is_refused_with_its_reason() {
    let lab = Lab::new(|options| {
        options.srs.push(SrSpec { local_to: Some(0), ..SrSpec::new("raw", SrKind::LvmRaw) });
    })
    .await;
    let (disk, there) = (lab.disk(0).await, lab.sr(1).await);
    let failed = lab.send(0, json!({disk.clone(): there})).await.unwrap_err();
    assert_eq!(failed, ("VDI_NOT_IN_MAP".to_owned(), vec![lab.disk(1).await]));
    let free = lab.client.reference("VDI.clone", &[json!(disk), json!({})]).await;
    let failed = lab.client.failure("VDI.pool_migrate", &[json!(free), json!(there), json!({})]).await;
    assert_eq!(failed, ("VDI_NEEDS_VM_FOR_MIGRATE".to_owned(), vec![free]));
    let snapshot = lab.client.reference("VM.snapshot", &[json!(lab.vm), json!("s")]).await;
    let of_snapshot = snapshot_disk(&lab, &snapshot, "0").await;
    let failed = lab.client.failure("VDI.pool_migrate", &[json!(of_snapshot), json!(there), json!({})]).await;
    assert_eq!(failed.0, "VM_IS_SNAPSHOT");
    let small = lab.pool.srs()[1].uuid.parse().unwrap();
    lab.pool.storage().set_foreign_use(small, 16 << 40).unwrap();
    let failed = lab.client.failure("VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    assert_eq!(failed.0, "SR_BACKEND_FAILURE_44");
    // Nothing is left of it.
    let on_target = lab.client.ok("SR.get_VDIs", &[json!(there)]).await;
    assert_eq!(on_target, json!([]));
    assert_eq!(lab.disk(0).await, disk);
    assert_eq!(lab.record("VM", &lab.vm).await["current_operations"], json!({}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_breaks_off_leaves_the_old_disk() {
    let lab = Lab::new(|_| {}).await;
    lab.pool.guest_write(&lab.uuid, "0", 0, &[3; 4096]).unwrap();
    lab.pool.hold_storage_migrations(true);
    let (disk, there) = (lab.disk(0).await, lab.sr(1).await);
    lab.client.reference("Async.VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    lab.operation("migrate_send").await;
    let current = lab.record("VDI", &disk).await["current_operations"].clone();
    assert_eq!(current.as_object().unwrap().values().collect::<Vec<_>>(), ["mirror"]);
    lab.pool.restart_toolstack(0, Duration::ZERO).await.unwrap();
    let client = Client::login(&lab.pool).await;
    // The call that had been broken off is cleared away in its own time.
    loop {
        if client.ok("SR.get_VDIs", &[json!(there)]).await == json!([]) {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(lab.pool.guest_read(&lab.uuid, "0", 0, 4096).unwrap(), [3; 4096]);
    lab.pool.hold_storage_migrations(false);
    client.ok("VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    assert_eq!(lab.pool.guest_read(&lab.uuid, "0", 0, 4096).unwrap(), [3; 4096]);
}

#[tokio::test]
async fn a_snapshot_that_somebody_reads_stays_behind_when_its_disk_moves() {
    let lab = Lab::new(|_| {}).await;
    lab.pool.guest_write(&lab.uuid, "0", 0, &[9; 4096]).unwrap();
    let snapshot = lab.client.reference("VM.snapshot", &[json!(lab.vm), json!("s")]).await;
    let read = snapshot_disk(&lab, &snapshot, "0").await;
    let uuid = lab.record("VDI", &read).await["uuid"].as_str().unwrap().to_owned();
    let host = lab.client.reference("host.get_by_uuid", &[json!(lab.pool.hosts()[0].uuid)]).await;
    let domain = lab.client.reference("host.get_control_domain", &[json!(host)]).await;
    let device = json!({"VM": domain, "VDI": read, "userdevice": "autodetect", "bootable": false, "mode": "RO",
        "type": "Disk", "unpluggable": true, "empty": false, "other_config": {}, "qos_algorithm_type": "",
        "qos_algorithm_params": {}});
    let vbd = lab.client.reference("VBD.create", &[device]).await;
    lab.client.ok("VBD.plug", &[json!(vbd)]).await;
    let (disk, there) = (lab.disk(0).await, lab.sr(1).await);
    let failed = lab.client.failure("VDI.pool_migrate", &[json!(disk), json!(there), json!({})]).await;
    assert_eq!(failed, ("VDI_IN_USE".to_owned(), vec![read.clone(), "destroy".to_owned()]));
    // The VM has moved, and the reader goes on with the old one.
    assert_eq!(lab.record("VDI", &lab.disk(0).await).await["SR"], json!(there));
    assert_eq!(lab.pool.vdi_read(&uuid, 0, 4096).unwrap(), [9; 4096]);
    lab.client.ok("VBD.unplug", &[json!(vbd)]).await;
    lab.client.ok("VBD.destroy", &[json!(vbd)]).await;
    lab.client.ok("VDI.destroy", &[json!(read)]).await;
    assert_eq!(lab.client.failure("VDI.get_uuid", &[json!(disk)]).await.0, "HANDLE_INVALID");
}
