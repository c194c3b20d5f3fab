//! VMs that sleep, checkpoints, TPMs, and what each state lets a client do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail loudly"
)]

mod wire;

use serde_json::{Value, json};
use wire::Client;
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskSpec, SimOptions, SimPool, SrSpec, VmSpec};

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
            vms: vec![VmSpec { cd: true, ..VmSpec::new("vm-1").disk(DiskSpec::new(8 << 20)) }],
            ..SimOptions::default()
        };
        change(&mut options);
        let pool = SimPool::start(options).await.expect("starts");
        let client = Client::login(&pool).await;
        let uuid = pool.vms()[0].uuid.clone();
        let vm = client.reference("VM.get_by_uuid", &[json!(uuid)]).await;
        Self { pool, client, vm, uuid }
    }

    async fn running(change: impl FnOnce(&mut SimOptions)) -> Self {
        let lab = Self::new(change).await;
        lab.pool.start_vm(&lab.uuid, 0).await.unwrap();
        lab
    }

    async fn of_vm(&self, method: &str) -> Value {
        self.client.ok(&format!("VM.{method}"), &[json!(self.vm)]).await
    }

    async fn record(&self, class: &str, reference: &Value) -> Value {
        self.client.ok(&format!("{class}.get_record"), std::slice::from_ref(reference)).await
    }

    async fn vm(&self) -> Value {
        self.record("VM", &json!(self.vm)).await
    }

    async fn disk(&self) -> Value {
        self.client.ok("VDI.get_by_uuid", &[json!(self.pool.vms()[0].disks[0].vdi)]).await
    }

    async fn resume(&self) {
        self.client.ok("VM.resume", &[json!(self.vm), json!(false), json!(false)]).await;
    }

    fn allowed(record: &Value) -> Vec<String> {
        let mut names: Vec<String> = record["allowed_operations"]
            .as_array()
            .unwrap()
            .iter()
            .map(|name| name.as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    }
}

#[tokio::test]
async fn a_suspended_vm_has_its_memory_on_a_disk_and_its_disks_locked() {
    let lab = Lab::running(|_| {}).await;
    lab.pool.guest_write(&lab.uuid, "0", 0, &[5; 4096]).unwrap();
    let disk = lab.disk().await;
    let sr = lab.record("VDI", &disk).await["SR"].clone();
    lab.of_vm("suspend").await;
    let vm = lab.vm().await;
    assert_eq!((&vm["power_state"], &vm["resident_on"]), (&json!("Suspended"), &json!("OpaqueRef:NULL")));
    let image = lab.record("VDI", &vm["suspend_VDI"]).await;
    assert_eq!((&image["type"], &image["SR"], &image["name_label"]), (&json!("suspend"), &sr, &json!("Suspend image")));
    assert!(image["virtual_size"].as_u64().unwrap() >= (512 << 20) * 126 / 100 + (100 << 20));
    let messages = lab.pool.records("message");
    assert!(messages.values().any(|message| message["name"] == "VM_SUSPENDED"));
    // Its devices keep others away: no copy, no destruction; a snapshot is possible.
    assert_eq!(lab.client.failure("VDI.destroy", std::slice::from_ref(&disk)).await.0, "VDI_IN_USE");
    let copy = [disk.clone(), sr, json!("OpaqueRef:NULL"), json!("OpaqueRef:NULL")];
    assert_eq!(lab.client.failure("VDI.copy", &copy).await.0, "VDI_IN_USE");
    let snapshot = lab.client.ok("VM.snapshot", &[json!(lab.vm), json!("asleep")]).await;
    let taken = lab.record("VM", &snapshot).await;
    assert_eq!((&taken["power_state"], &taken["suspend_VDI"]), (&json!("Halted"), &json!("OpaqueRef:NULL")));
    assert_eq!(taken["snapshot_info"]["power-state-at-snapshot"], "Suspended");
    lab.resume().await;
    let awake = lab.vm().await;
    assert_eq!((&awake["power_state"], &awake["suspend_VDI"]), (&json!("Running"), &json!("OpaqueRef:NULL")));
    assert_eq!(lab.client.failure("VDI.get_uuid", &[vm["suspend_VDI"].clone()]).await.0, "HANDLE_INVALID");
    assert_eq!(lab.pool.guest_read(&lab.uuid, "0", 0, 4096).unwrap(), [5; 4096]);
    lab.pool.shutdown_vm(&lab.uuid).await.unwrap();
    lab.client.ok("VDI.destroy", &[disk]).await;
}

#[tokio::test]
async fn change_tracking_survives_a_sleep() {
    let lab = Lab::new(|options| options.vms[0].disks[0].cbt = true).await;
    lab.pool.start_vm(&lab.uuid, 0).await.unwrap();
    let snapshot = lab.client.ok("VM.snapshot", &[json!(lab.vm), json!("s")]).await;
    let of_snapshot = async |vm: &Value| {
        for vbd in lab.client.ok("VM.get_VBDs", std::slice::from_ref(vm)).await.as_array().unwrap() {
            let record = lab.record("VBD", vbd).await;
            if record["type"] == "Disk" {
                return record["VDI"].clone();
            }
        }
        panic!("no disk");
    };
    let from = of_snapshot(&snapshot).await;
    lab.of_vm("suspend").await;
    // The live disk of a sleeping VM counts as attached.
    let live = [from.clone(), lab.disk().await];
    assert_eq!(lab.client.failure("VDI.list_changed_blocks", &live).await.0, "VDI_IN_USE");
    lab.resume().await;
    lab.pool.guest_write(&lab.uuid, "0", 1 << 20, &[1; 65536]).unwrap();
    let second = lab.client.ok("VM.snapshot", &[json!(lab.vm), json!("s2")]).await;
    let to = of_snapshot(&second).await;
    lab.client.ok("VDI.list_changed_blocks", &[from, to]).await;
    assert_eq!(lab.record("VDI", &lab.disk().await).await["cbt_enabled"], true);
}

#[tokio::test]
async fn a_forced_shutdown_of_a_sleeping_vm_forgets_its_memory() {
    let lab = Lab::running(|_| {}).await;
    lab.of_vm("suspend").await;
    let image = lab.vm().await["suspend_VDI"].clone();
    lab.of_vm("hard_shutdown").await;
    assert_eq!(lab.vm().await["power_state"], "Halted");
    assert_eq!(lab.client.failure("VDI.get_uuid", &[image]).await.0, "HANDLE_INVALID");
    lab.client.ok("VDI.destroy", &[lab.disk().await]).await;
}

#[tokio::test]
async fn a_vm_without_room_for_its_memory_stays_awake() {
    let lab = Lab::running(|options| {
        options.srs =
            vec![SrSpec::new("disks", SrKind::Ext), SrSpec { size: 64 << 20, ..SrSpec::new("small", SrKind::Lvm) }];
    })
    .await;
    let small = lab.client.ok("SR.get_by_uuid", &[json!(lab.pool.srs()[1].uuid)]).await;
    lab.client.ok("VM.set_suspend_SR", &[json!(lab.vm), small.clone()]).await;
    let failed = lab.client.failure("VM.suspend", &[json!(lab.vm)]).await;
    assert_eq!(failed, ("SR_SUSPEND_SPACE_INSUFFICIENT".to_owned(), vec![small.as_str().unwrap().to_owned()]));
    let vm = lab.vm().await;
    assert_eq!((&vm["power_state"], &vm["current_operations"]), (&json!("Running"), &json!({})));
}

#[tokio::test]
async fn a_checkpoint_keeps_the_memory_and_a_revert_brings_it_back() {
    let lab = Lab::running(|_| {}).await;
    lab.pool.guest_write(&lab.uuid, "0", 0, &[1; 4096]).unwrap();
    let host = lab.vm().await["resident_on"].clone();
    let checkpoint = lab.client.ok("VM.checkpoint", &[json!(lab.vm), json!("c")]).await;
    let vm = lab.vm().await;
    assert_eq!((&vm["power_state"], &vm["resident_on"]), (&json!("Running"), &host));
    let taken = lab.record("VM", &checkpoint).await;
    assert_eq!((&taken["power_state"], &taken["is_a_snapshot"]), (&json!("Suspended"), &json!(true)));
    assert_eq!(taken["snapshot_info"]["power-state-at-snapshot"], "Running");
    let image = lab.record("VDI", &taken["suspend_VDI"]).await;
    assert_eq!((&image["type"], &image["is_a_snapshot"]), (&json!("suspend"), &json!(true)));
    assert_eq!(
        Lab::allowed(&taken),
        ["clone", "copy", "destroy", "export", "hard_shutdown", "metadata_export", "revert"]
    );
    let attached: Vec<Value> = lab.pool.records("VBD").into_values().filter(|vbd| vbd["VM"] == checkpoint).collect();
    assert!(attached.iter().any(|vbd| vbd["type"] == "Disk" && vbd["currently_attached"] == true));
    lab.pool.guest_write(&lab.uuid, "0", 0, &[2; 4096]).unwrap();
    lab.client.ok("VM.revert", std::slice::from_ref(&checkpoint)).await;
    let vm = lab.vm().await;
    assert_eq!(vm["power_state"], "Suspended");
    assert_ne!(vm["suspend_VDI"], taken["suspend_VDI"]);
    lab.resume().await;
    assert_eq!(lab.pool.guest_read(&lab.uuid, "0", 0, 4096).unwrap(), [1; 4096]);
    // A clone of it begins without the memory.
    let clone = lab.client.ok("VM.clone", &[checkpoint, json!("clone")]).await;
    let clone = lab.record("VM", &clone).await;
    assert_eq!((&clone["power_state"], &clone["suspend_VDI"]), (&json!("Halted"), &json!("OpaqueRef:NULL")));
}

#[tokio::test]
async fn each_state_lists_its_own_operations() {
    let lab = Lab::running(|_| {}).await;
    let running = Lab::allowed(&lab.vm().await);
    let expected = [
        "changing_VCPUs_live",
        "changing_dynamic_range",
        "checkpoint",
        "clean_reboot",
        "clean_shutdown",
        "hard_reboot",
        "hard_shutdown",
        "metadata_export",
        "migrate_send",
        "pause",
        "pool_migrate",
        "snapshot",
        "suspend",
        "sysprep",
    ];
    assert_eq!(running, expected);
    lab.of_vm("pause").await;
    let paused = ["checkpoint", "hard_reboot", "hard_shutdown", "metadata_export", "snapshot", "unpause"];
    assert_eq!(Lab::allowed(&lab.vm().await), paused);
    lab.of_vm("unpause").await;
    lab.of_vm("suspend").await;
    let suspended = [
        "checkpoint",
        "destroy",
        "export",
        "hard_shutdown",
        "metadata_export",
        "migrate_send",
        "resume",
        "resume_on",
        "snapshot",
    ];
    assert_eq!(Lab::allowed(&lab.vm().await), suspended);
    lab.resume().await;
    let task = lab.client.reference("task.create", &[json!("x"), json!("")]).await;
    assert!(task.starts_with("OpaqueRef:"));
    // A platform that may not move does not list it, and the call is tried all the same.
    lab.client.ok("VM.add_to_platform", &[json!(lab.vm), json!("nomigrate"), json!("true")]).await;
    assert!(!Lab::allowed(&lab.vm().await).contains(&"suspend".to_owned()));
    lab.of_vm("suspend").await;
    let failed = lab.client.failure("VM.suspend", &[json!(lab.vm)]).await;
    assert_eq!(failed.1[1..], ["running", "suspended"]);
}

#[tokio::test]
async fn devices_of_a_running_and_of_a_sleeping_vm_are_locked_as_in_a_real_pool() {
    let lab = Lab::running(|_| {}).await;
    let vbds = lab.pool.records("VBD");
    let (drive, _) = vbds.iter().find(|(_, vbd)| vbd["VM"] == lab.vm && vbd["type"] == "CD").unwrap();
    let failed = lab.client.failure("VBD.unplug", &[json!(drive)]).await;
    let text = "HVM CDROMs cannot be hotplugged/unplugged, only inserted or ejected";
    assert_eq!(failed, ("OPERATION_NOT_ALLOWED".to_owned(), vec![text.to_owned()]));
    lab.client.ok("VBD.eject", &[json!(drive)]).await;
    lab.of_vm("suspend").await;
    let disc = lab.pool.records("VDI").into_iter().find(|(_, vdi)| vdi["name_label"] == "install.iso").unwrap().0;
    let failed = lab.client.failure("VBD.insert", &[json!(drive), json!(disc)]).await;
    assert_eq!(
        (failed.0.as_str(), &failed.1[1..]),
        ("VM_BAD_POWER_STATE", &["halted, running".to_owned(), "suspended".to_owned()][..])
    );
    // Another VM may have a sleeping VM's disk.
    let disk = lab.disk().await;
    let allowed = lab.record("VDI", &disk).await["allowed_operations"].clone();
    let allowed = allowed.as_array().unwrap();
    assert!(allowed.contains(&json!("snapshot")) && allowed.contains(&json!("clone")), "{allowed:?}");
    assert!(!allowed.contains(&json!("destroy")) && !allowed.contains(&json!("resize")), "{allowed:?}");
}

#[tokio::test]
async fn a_tpm_goes_with_its_vm_and_into_its_snapshots() {
    let lab = Lab::new(|_| {}).await;
    let vtpm = lab.client.ok("VTPM.create", &[json!(lab.vm), json!(false)]).await;
    lab.pool.set_vtpm_contents(&lab.uuid, "c2VjcmV0").unwrap();
    let failed = lab.client.failure("VTPM.create", &[json!(lab.vm), json!(false)]).await;
    assert_eq!(failed, ("VTPM_MAX_AMOUNT_REACHED".to_owned(), vec!["1".to_owned()]));
    let snapshot = lab.client.ok("VM.snapshot", &[json!(lab.vm), json!("s")]).await;
    let uuid = lab.record("VM", &snapshot).await["uuid"].as_str().unwrap().to_owned();
    assert_eq!(lab.pool.vtpm_contents(&uuid).unwrap().as_deref(), Some("c2VjcmV0"));
    lab.pool.set_vtpm_contents(&lab.uuid, "bmV3ZXI=").unwrap();
    lab.client.ok("VM.revert", &[snapshot]).await;
    assert_eq!(lab.pool.vtpm_contents(&lab.uuid).unwrap().as_deref(), Some("c2VjcmV0"));
    assert_eq!(lab.client.failure("VTPM.get_record", &[vtpm]).await.0, "HANDLE_INVALID");
    lab.pool.start_vm(&lab.uuid, 0).await.unwrap();
    let present = lab.vm().await["VTPMs"][0].clone();
    assert_eq!(lab.client.failure("VTPM.destroy", std::slice::from_ref(&present)).await.0, "VM_BAD_POWER_STATE");
    lab.pool.shutdown_vm(&lab.uuid).await.unwrap();
    lab.client.ok("VTPM.destroy", &[present]).await;
    assert_eq!(lab.pool.vtpm_contents(&lab.uuid).unwrap(), None);
    let restricted = Lab::new(|options| options.restrictions = vec!["restrict_vtpm".into()]).await;
    let failed = restricted.client.failure("VTPM.create", &[json!(restricted.vm), json!(false)]).await;
    assert_eq!(failed, ("FEATURE_RESTRICTED".to_owned(), vec!["restrict_vtpm".to_owned()]));
}

#[tokio::test]
async fn hosts_without_hardware_virtualisation_start_nothing() {
    let lab = Lab::new(|options| options.hardware_virtualisation = false).await;
    let start = [json!(lab.vm), json!(false), json!(false)];
    assert_eq!(lab.client.failure("VM.start", &start).await.0, "NO_HOSTS_AVAILABLE");
    let host = lab.client.ok("host.get_all", &[]).await[0].clone();
    let on = [json!(lab.vm), host, json!(false), json!(false)];
    assert_eq!(lab.client.failure("VM.start_on", &on).await, ("VM_HVM_REQUIRED".to_owned(), vec![lab.vm.clone()]));
}

#[tokio::test]
async fn disks_of_checkpoints_count_as_attached_but_their_changes_can_be_asked_for() {
    let lab = Lab::new(|options| {
        options.vms[0].disks[0].cbt = true;
        options.vms[0].cd = false;
    })
    .await;
    lab.pool.start_vm(&lab.uuid, 0).await.unwrap();
    let mut disks = Vec::new();
    let mut checkpoints = Vec::new();
    for name in ["c1", "c2"] {
        let checkpoint = lab.client.ok("VM.checkpoint", &[json!(lab.vm), json!(name)]).await;
        let vbds = lab.client.ok("VM.get_VBDs", std::slice::from_ref(&checkpoint)).await;
        let vbd = lab.record("VBD", &vbds[0]).await;
        assert_eq!(vbd["currently_attached"], true);
        disks.push(vbd["VDI"].clone());
        checkpoints.push(checkpoint);
    }
    lab.client.ok("VDI.list_changed_blocks", &disks).await;
    let first = &disks[..1];
    assert_eq!(lab.client.failure("VDI.destroy", first).await.0, "VDI_IN_USE");
    // It waits a little for the devices to go, then says so; nothing has changed.
    let failed = lab.client.failure("VDI.data_destroy", first).await;
    assert_eq!(
        failed,
        ("VDI_IN_USE".to_owned(), vec![first[0].as_str().unwrap().to_owned(), "data_destroy".to_owned()])
    );
    assert_eq!(lab.record("VDI", &first[0]).await["type"], "user");
    lab.client.ok("VM.destroy", &checkpoints[..1]).await;
    lab.client.ok("VDI.data_destroy", first).await;
    assert_eq!(lab.record("VDI", &first[0]).await["type"], "cbt_metadata");
    lab.client.ok("VDI.list_changed_blocks", &disks).await;
}
