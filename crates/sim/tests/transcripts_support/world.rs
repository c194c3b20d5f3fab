//! A pool like the recorded one, and the objects that recordings name by their part in the story.

use std::collections::HashMap;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskSpec, Fault, FaultEffect, NbdAccess, SimOptions, SimPool, SrSpec, VmSpec};

use super::super::wire::Client;

/// Size of the recorded disks.
pub const DISK: u64 = 8 << 20;

pub struct World {
    pub pool: SimPool,
    pub client: Client,
    known: HashMap<String, String>,
}

impl World {
    /// Makes the pool; `steps` are what has to be the case before the request.
    pub async fn new(steps: &[&str]) -> Self {
        let kind = if steps.contains(&"no-vhd") { SrKind::Large } else { SrKind::Ext };
        let options = SimOptions {
            hosts: if steps.contains(&"member") || steps.contains(&"mute-member") { 2 } else { 1 },
            hardware_virtualisation: !steps.contains(&"no-hvm"),
            srs: vec![SrSpec::new("lab-file-sr", kind)],
            vms: vec![VmSpec { vifs: 0, ..VmSpec::new("lab-vm").disk(DiskSpec::new(DISK)) }],
            plain_http: true,
            password: "************".to_owned(),
            nbd: if steps.contains(&"nbd-off") { NbdAccess::Off } else { NbdAccess::Tls },
            task_delay: if steps.contains(&"slow") { Duration::from_secs(3600) } else { Duration::ZERO },
            ..SimOptions::default()
        };
        let pool = SimPool::start(options).await.expect("starts");
        let client = Client::login(&pool).await;
        let mut world = Self { pool, client, known: HashMap::new() };
        world.known.insert("session".to_owned(), world.client.session.clone());
        // Three of the four blocks of the VHD are in use, as in the recordings.
        let vm = world.pool.vms()[0].uuid.clone();
        for offset in [0, 2 << 20, DISK - 4096] {
            world.pool.guest_write(&vm, "0", offset, &[0x62; 4096]).unwrap();
        }
        for step in steps {
            world.step(step).await;
        }
        world
    }

    async fn ok(&self, method: &str, params: &[Value]) -> Value {
        self.client.ok(method, params).await
    }

    async fn make(&self, method: &str, params: &[Value]) -> String {
        self.client.reference(method, params).await
    }

    /// What has to be done before a request.
    async fn step(&mut self, step: &str) {
        if let Some(role) = step.strip_prefix("make:") {
            self.role(role).await;
            return;
        }
        if let Some(code) = step.strip_prefix("fault:") {
            let (call, code) = code.split_once('=').expect("call=code");
            self.fault(call, code).await;
            return;
        }
        match step {
            "member" | "mute-member" | "starting" | "no-hvm" | "slow" | "no-vhd" | "nbd-off" => {}
            "marked" => {
                let vm = self.role("vm").await;
                self.ok("VM.add_to_other_config", &[json!(vm), json!("lab"), json!("yes")]).await;
            }
            "cbt" => {
                let vdi = self.role("vdi").await;
                self.ok("VDI.enable_cbt", &[json!(vdi)]).await;
            }
            "no-cbt" => {
                let vdi = self.role("vdi").await;
                self.ok("VDI.disable_cbt", &[json!(vdi)]).await;
            }
            "grown" => {
                let vdi = self.role("vdi").await;
                self.ok("VDI.resize", &[json!(vdi), json!((16_u64 << 20).to_string())]).await;
            }
            "changes" => {
                let vm = self.pool.vms()[0].uuid.clone();
                for block in [3_u64, 4, 100] {
                    self.pool.guest_write(&vm, "0", block << 16, &[7; 65536]).unwrap();
                }
            }
            "blocked" => {
                let vm = self.role("vm").await;
                self.ok("VM.set_blocked_operations", &[json!(vm), json!({"snapshot": ""})]).await;
            }
            "diskless" => {
                let vbds = self.role("vbds").await;
                self.ok("VBD.destroy", &[json!(vbds)]).await;
            }
            "unplugged" => {
                let vbd = self.role("plugged-vbd").await;
                self.ok("VBD.unplug", &[json!(vbd)]).await;
            }
            "no-host" => {
                for (pbd, _) in self.pool.records("PBD") {
                    self.ok("PBD.unplug", &[json!(pbd)]).await;
                }
            }
            "no-purpose" => self.pool.set_nbd(NbdAccess::Off),
            "registered" => {
                self.ok("event.register", &[json!(["vm"])]).await;
                let vm = self.role("vm").await;
                self.ok("VM.set_name_description", &[json!(vm), json!("changed")]).await;
            }
            "reverted" => {
                let snapshot = self.role("snap").await;
                self.ok("VM.revert", &[json!(snapshot)]).await;
            }
            other => panic!("no step {other}"),
        }
    }

    async fn fault(&mut self, call: &str, code: &str) {
        let vdi = match self.known.get("plugged") {
            Some(vdi) => self.make("VDI.get_uuid", &[json!(vdi)]).await,
            None => String::new(),
        };
        let text = match code {
            "SR_BACKEND_FAILURE_457" => {
                format!("Unable to activate changed block tracking. [opterr=Failed to pause VDI {vdi}]")
            }
            "SR_BACKEND_FAILURE_82" => format!("Failed to snapshot VDI [opterr=failed to pause VDI {vdi}]"),
            device => {
                let number = device.strip_prefix("SR_BACKEND_FAILURE_1200/").unwrap_or("0");
                let path = "/run/blktap-control/tapdisk/tapdisk-";
                format!("malformed tap device: '{path}{number}' ({path}(\\d+)$) ")
            }
        };
        let code = code.split('/').next().unwrap().to_owned();
        let effect = FaultEffect::Error { code, params: vec![String::new(), text, String::new()] };
        self.pool.fault(Fault::once(call, effect));
    }

    /// The reference of the object with a part in the story; made if it is not there yet.
    pub fn role<'a>(&'a mut self, role: &'a str) -> BoxFuture<'a, String> {
        async move {
            if let Some(known) = self.known.get(role) {
                return known.clone();
            }
            let made = self.make_role(role).await;
            self.known.insert(role.to_owned(), made.clone());
            made
        }
        .boxed()
    }

    async fn first(&self, class: &str) -> String {
        self.pool.records(class).into_iter().next().expect("one").0
    }

    async fn disk_of(&self, vm: &str) -> String {
        let vbds = self.ok("VM.get_VBDs", &[json!(vm)]).await;
        self.make("VBD.get_VDI", &[vbds[0].clone()]).await
    }

    async fn new_disk(&mut self) -> String {
        let sr = self.role("sr").await;
        let record = json!({"name_label": "lab", "name_description": "", "SR": sr, "virtual_size": DISK, "type": "user",
            "sharable": false, "read_only": false, "other_config": {}, "xenstore_data": {}, "sm_config": {}, "tags": []});
        self.make("VDI.create", &[record]).await
    }

    async fn snapshot(&mut self, name: &str) -> String {
        let vm = self.role("vm").await;
        self.make("VM.snapshot", &[json!(vm), json!(name)]).await
    }

    async fn make_role(&mut self, role: &str) -> String {
        match role {
            "vm" => self.make("VM.get_by_uuid", &[json!(self.pool.vms()[0].uuid)]).await,
            "vdi" => {
                let vm = self.role("vm").await;
                self.disk_of(&vm).await
            }
            "vbds" => {
                let vm = self.role("vm").await;
                self.ok("VM.get_VBDs", &[json!(vm)]).await[0].as_str().unwrap().to_owned()
            }
            "sr" => self.first("SR").await,
            "host" => self.first("host").await,
            "network" => {
                let networks = self.pool.records("network");
                networks.into_iter().find(|(_, record)| record["bridge"] == "xenbr0").expect("one").0
            }
            "dom0" => {
                let host = self.role("host").await;
                self.make("host.get_control_domain", &[json!(host)]).await
            }
            "snap" => self.snapshot("lab-snap").await,
            "snap2" => self.snapshot("lab-snap2").await,
            "s1" => {
                let snapshot = self.role("snap").await;
                self.disk_of(&snapshot).await
            }
            "s2" => {
                self.role("s1").await;
                let snapshot = self.role("snap2").await;
                self.disk_of(&snapshot).await
            }
            // The first snapshot's disk without its VM.
            "free-s1" => {
                let vdi = self.role("s1").await;
                let snapshot = self.role("snap").await;
                self.ok("VM.destroy", &[json!(snapshot)]).await;
                vdi
            }
            "meta" => {
                let vdi = self.role("free-s1").await;
                self.ok("VDI.data_destroy", &[json!(vdi)]).await;
                vdi
            }
            "plain" => self.new_disk().await,
            "plain-snapshot" => {
                let plain = self.role("plain").await;
                self.make("VDI.snapshot", &[json!(plain), json!({})]).await
            }
            "unrelated" => {
                let disk = self.new_disk().await;
                self.ok("VDI.enable_cbt", &[json!(disk)]).await;
                self.make("VDI.snapshot", &[json!(disk), json!({})]).await
            }
            "gone" => {
                let disk = self.new_disk().await;
                self.ok("VDI.destroy", &[json!(disk)]).await;
                disk
            }
            "plugged" => {
                let disk = self.new_disk().await;
                self.known.insert("plugged".to_owned(), disk.clone());
                self.role("plugged-vbd").await;
                disk
            }
            "plugged-cbt-snapshot" => {
                let disk = self.role("plugged").await;
                self.ok("VDI.enable_cbt", &[json!(disk)]).await;
                self.make("VDI.snapshot", &[json!(disk), json!({})]).await
            }
            "plugged-vbd" => {
                let (disk, domain) = (self.role("plugged").await, self.role("dom0").await);
                if let Some(known) = self.known.get("plugged-vbd") {
                    return known.clone();
                }
                let record = json!({"VM": domain, "VDI": disk, "userdevice": "autodetect", "bootable": false,
                    "mode": "RW", "type": "Disk", "unpluggable": true, "empty": false, "other_config": {},
                    "qos_algorithm_type": "", "qos_algorithm_params": {}});
                let vbd = self.make("VBD.create", &[record]).await;
                self.ok("VBD.plug", &[json!(vbd)]).await;
                self.known.insert("plugged-vbd".to_owned(), vbd.clone());
                vbd
            }
            "task" => self.make("task.create", &[json!("lab export"), json!("made by client")]).await,
            "background" => {
                let vm = self.role("vm").await;
                self.make("Async.VM.snapshot", &[json!(vm), json!("x")]).await
            }
            "done" => {
                let task = self.role("background").await;
                self.client.wait(&task).await;
                task
            }
            "failed" => {
                let vm = self.role("vm").await;
                let nobody = "OpaqueRef:00000000-0000-0000-0000-000000000000";
                let params = [json!(vm), json!(nobody), json!(false), json!(false)];
                let task = self.make("Async.VM.start_on", &params).await;
                self.client.wait(&task).await;
                task
            }
            "destroyed-task" => {
                let task = self.role("done").await;
                self.ok("task.destroy", &[json!(task)]).await;
                task
            }
            "ended-session" => {
                let other = Client::login(&self.pool).await;
                other.ok("session.logout", &[]).await;
                other.session
            }
            other => panic!("no part {other}"),
        }
    }
}
