//! XenAPI libraries that others wrote take the simulated pool for a server.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends with a panic, and its helpers too")]

use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;
use xenvault_tests::simulator::Simulator;
use xenvault_tests::{clients, images};

const DISK_BYTES: u64 = 64 << 20;

/// A pool of two VMs, the certificate of its coordinator, and what the first VM's disk holds.
struct Stage {
    simulator: Simulator,
    folder: TempDir,
    vm: String,
    before: String,
}

impl Stage {
    fn new() -> Self {
        let simulator = Simulator::start(&["--vms".to_owned(), "2".to_owned()]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        clients::save_certificate(&simulator, &folder.path().join("certificate.pem")).unwrap();
        let vm = simulator.ready()["vms"][0]["uuid"].as_str().unwrap().to_owned();
        let mut stage = Self { simulator, folder, vm, before: String::new() };
        stage.before = stage.disk_sha256();
        stage
    }

    fn certificate(&self) -> String {
        self.folder.path().join("certificate.pem").to_str().unwrap().to_owned()
    }

    /// What the guest sees, not what XenAPI says.
    fn disk_sha256(&self) -> String {
        let file = self.folder.path().join("disk.raw");
        self.simulator.save_guest_disk(&self.vm, "0", DISK_BYTES, &file).unwrap();
        images::sha256(&mut std::fs::File::open(file).unwrap()).unwrap()
    }

    /// The client saw the pool's VMs and the right bytes, and left nothing.
    fn assert_seen(&self, seen: &Value) {
        let mut vms: Vec<&str> = self.simulator.ready()["vms"].as_array().unwrap().iter().map(uuid).collect();
        vms.sort_unstable();
        assert_eq!(seen["vms"], serde_json::json!(vms));
        assert_eq!(seen["older_sha256"], self.before);
        assert_eq!(seen["newer_sha256"], self.disk_sha256());
        assert_ne!(seen["newer_sha256"], seen["older_sha256"]);
        assert_eq!(self.simulator.new_objects().unwrap(), []);
    }
}

fn uuid(record: &Value) -> &str {
    record["uuid"].as_str().unwrap()
}

#[test]
fn the_python_library_works_on_the_simulated_pool() {
    let stage = Stage::new();
    let python = clients::folder().unwrap().join("python/venv/bin/python");
    let mut command = Command::new(python);
    command.arg(clients::script("xenapi_library.py"));
    let seen = clients::run_script(&stage.simulator, &mut command, &[("certificate", &stage.certificate())]).unwrap();
    assert_eq!(seen["api_version"], "2.21");
    stage.assert_seen(&seen);
}

/// `transport` is one of the package's.
fn npm_package(transport: &str) {
    let stage = Stage::new();
    let modules = clients::folder().unwrap().join("node/node_modules");
    let mut command = Command::new("node");
    command.arg(clients::script("xen_api_package.mjs")).env("NODE_EXTRA_CA_CERTS", Path::new(&stage.certificate()));
    let more = [("modules", modules.to_str().unwrap()), ("transport", transport)];
    let seen = clients::run_script(&stage.simulator, &mut command, &more).unwrap();
    stage.assert_seen(&seen);
}

#[test]
fn the_npm_package_works_on_the_simulated_pool_over_json() {
    npm_package("json-rpc");
}

#[test]
fn the_npm_package_works_on_the_simulated_pool_over_xml() {
    npm_package("xml-rpc");
}
