//! `xenvault-datamover check`: a pool with many faults, and what must not happen to it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends with a panic, and its helpers too")]

mod common;

use common::Bench;
use serde_json::{Value, json};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskSpec, NbdAccess, SimOptions, SrSpec, VmSpec};
use xenvault_tests::programs::Finished;

const MIB: u64 = 1 << 20;

/// Calls the pool as its administrator.
fn call(bench: &Bench, method: &str, params: &[Value]) -> Value {
    bench.runtime.block_on(bench.pool.call(method, params)).unwrap()
}

fn reference(bench: &Bench, class: &str, uuid: &str) -> Value {
    call(bench, &format!("{class}.get_by_uuid"), &[json!(uuid)])
}

fn vm(bench: &Bench, name: &str) -> Value {
    reference(bench, "VM", &bench.pool.vm(name).unwrap().uuid)
}

fn disk(bench: &Bench, name: &str) -> Value {
    reference(bench, "VDI", &bench.pool.vm(name).unwrap().disks[0].vdi)
}

fn check(bench: &Bench, more: &[&str]) -> Finished {
    let mut arguments = bench.pool_arguments();
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    bench.datamover("check", &arguments)
}

/// Everything in the pool that a client could change. Sessions come and go; metrics are written by the pool itself.
fn everything(bench: &Bench) -> Vec<(String, Value)> {
    let classes = ["pool", "host", "network", "PIF", "SR", "PBD", "VM", "VBD", "VDI", "VIF", "task", "session"];
    let records = |class: &str| Value::Object(bench.pool.records(class));
    classes.iter().map(|class| ((*class).to_owned(), records(class))).collect()
}

/// The finding with this code about this object; its remedy must contain `remedy`.
fn assert_found(report: &Value, severity: &str, code: &str, uuid: &str, remedy: &str) {
    let findings = report["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["code"] == code && finding["object"]["uuid"] == uuid);
    assert!(found.is_some(), "{code} about {uuid} is missing: {report:#}");
    let found = found.unwrap();
    assert_eq!(found["severity"], severity, "{found:#}");
    assert!(found["remedy"].as_str().unwrap().contains(remedy), "{remedy:?}: {found:#}");
    for field in ["reason", "consequence"] {
        assert!(!found[field].as_str().unwrap().is_empty(), "{found:#}");
    }
}

#[test]
fn a_pool_with_more_than_ten_faults_has_each_named_with_its_remedy() {
    let small = |name: &str, sr: &str| VmSpec::new(name).disk(DiskSpec::new(8 * MIB).on(sr));
    let mut with_cd = small("cd", "ext");
    with_cd.cd = true;
    let bench = Bench::without_repository(SimOptions {
        hosts: 2,
        srs: vec![
            SrSpec::new("ext", SrKind::Ext),
            SrSpec { size: 96 * MIB, ..SrSpec::new("thick", SrKind::Lvm) },
            SrSpec::new("raw", SrKind::LvmRaw),
            SrSpec::new("detached", SrKind::Ext),
            SrSpec::new("partly", SrKind::Ext),
        ],
        vms: vec![
            VmSpec::new("thick").disk(DiskSpec::new(64 * MIB).on("thick")),
            small("raw", "raw"),
            small("detached", "detached"),
            with_cd,
            small("blocked", "ext"),
            small("reset", "ext"),
            small("shared", "ext"),
            small("deep", "ext"),
            small("orphan", "ext"),
            VmSpec::new("diskless"),
        ],
        nbd: NbdAccess::Off,
        ..SimOptions::default()
    });
    // The first check also makes the identity of this installation, for the orphan below.
    let first = check(&bench, &["--vm", "deep"]);
    assert_eq!(first.code, Some(6), "{first:?}");

    call(&bench, "VM.set_blocked_operations", &[vm(&bench, "blocked"), json!({"snapshot": "a test forbids it"})]);
    call(&bench, "VDI.set_on_boot", &[disk(&bench, "reset"), json!("reset")]);
    for _ in 0..21 {
        // A disk without a write since its last snapshot gets no deeper.
        bench.pool.guest_write("deep", "0", 0, &[1; 512]).unwrap();
        call(&bench, "VM.snapshot", &[vm(&bench, "deep"), json!("another"), json!([])]);
    }
    let instance = std::fs::read_to_string(bench.path(&bench.installation).join("instance")).unwrap();
    let left = format!("orphan [xenvault {} {}]", instance.trim(), uuid::Uuid::new_v4());
    let left = call(&bench, "VM.snapshot", &[vm(&bench, "orphan"), json!(left), json!([])]);
    let left = call(&bench, "VM.get_uuid", &[left]);
    foreign_base(&bench);
    let mut plugs = Vec::new();
    for (uuid, record) in bench.pool.records("PBD") {
        let sr = call(&bench, "SR.get_name_label", &[record["SR"].clone()]);
        let partly = sr == "partly" && !plugs.iter().any(|(name, _)| *name == sr);
        if sr == "detached" || partly {
            call(&bench, "PBD.unplug", &[json!(uuid)]);
            plugs.push((sr, record["uuid"].as_str().unwrap().to_owned()));
        }
    }
    let before = everything(&bench);
    let finished = check(&bench, &[]);
    assert_eq!(finished.code, Some(6), "{finished:?}");
    assert_eq!(everything(&bench), before, "the check changed the pool");

    let report = finished.json().unwrap();
    let sr = |name: &str| bench.pool.srs().into_iter().find(|sr| sr.name == name).unwrap().uuid;
    let vm = |name: &str| bench.pool.vm(name).unwrap().uuid;
    let vdi = |name: &str| bench.pool.vm(name).unwrap().disks[0].vdi.clone();
    let networks = bench.pool.records("network");
    let network = networks.values().find(|record| record["bridge"] == "xenbr0").unwrap()["uuid"].as_str().unwrap();
    let unplugged = |name: &str| format!("xe pbd-plug uuid={}", plugs.iter().find(|(sr, _)| sr == name).unwrap().1);
    let command = format!("xe network-param-add param-name=purpose param-key=nbd uuid={network}");
    assert_found(&report, "error", "nbd-not-enabled", network, &command);
    assert_found(&report, "error", "sr-space", &sr("thick"), &format!("xe vdi-list sr-uuid={}", sr("thick")));
    assert_found(&report, "error", "snapshot-unsupported", &vdi("raw"), "xe vdi-copy");
    assert_found(&report, "error", "sr-unplugged", &sr("detached"), &unplugged("detached"));
    assert_found(&report, "warning", "sr-partly-unplugged", &sr("partly"), &unplugged("partly"));
    let command = format!("param-key=snapshot uuid={}", vm("blocked"));
    assert_found(&report, "error", "snapshot-not-allowed", &vm("blocked"), &command);
    let command = format!("xe vdi-param-set uuid={} on-boot=persist", vdi("reset"));
    assert_found(&report, "warning", "cbt-unsupported", &vdi("reset"), &command);
    assert_found(&report, "warning", "foreign-cbt", &vdi("shared"), "xe vdi-destroy uuid=");
    assert_found(&report, "warning", "chain-depth", &vdi("deep"), &format!("xe sr-scan uuid={}", sr("ext")));
    assert_found(&report, "warning", "orphan", left.as_str().unwrap(), "xenvault-datamover sweep");
    assert_found(&report, "note", "device-skipped", &vm("cd"), &format!("xe vbd-list vm-uuid={}", vm("cd")));
    assert_found(&report, "warning", "no-disks", &vm("diskless"), &format!("xe vm-disk-list uuid={}", vm("diskless")));

    // The same for people.
    let mut program = bench.program("xenvault-datamover");
    let told = xenvault_tests::programs::finish(program.arg("check").args(bench.pool_arguments()), "").unwrap();
    assert_eq!(told.code, Some(6), "{told:?}");
    let errors = told.stdout.find("\nERRORS\n").unwrap();
    assert!(errors < told.stdout.find("\nWARNINGS\n").unwrap(), "{told:?}");
    assert!(told.stdout.contains(&format!("remedy:  repair it with `{}", unplugged("detached"))), "{told:?}");
}

/// Change information on the disk of VM `shared` that another product left.
fn foreign_base(bench: &Bench) {
    let disk = disk(bench, "shared");
    call(bench, "VDI.enable_cbt", std::slice::from_ref(&disk));
    let snapshot = call(bench, "VDI.snapshot", &[disk, json!({})]);
    call(bench, "VDI.data_destroy", &[snapshot]);
}

#[test]
fn x21_change_information_of_another_product_is_found_and_stays() {
    let bench = Bench::without_repository(SimOptions {
        vms: vec![VmSpec::new("shared").disk(DiskSpec::new(8 * MIB))],
        ..SimOptions::default()
    });
    foreign_base(&bench);
    let before = everything(&bench);
    let finished = check(&bench, &["--vm", "shared"]);
    assert_eq!(finished.code, Some(0), "a warning is no failure: {finished:?}");
    let disk = bench.pool.vm("shared").unwrap().disks[0].vdi.clone();
    assert_found(&finished.json().unwrap(), "warning", "foreign-cbt", &disk, "only one product");
    assert_eq!(everything(&bench), before);
}

#[test]
fn x32_a_snapshot_that_the_vm_forbids_is_found_with_the_command_that_lifts_it() {
    let bench = Bench::without_repository(common::one_vm());
    let blocked = json!({"snapshot": "maintenance"});
    call(&bench, "VM.set_blocked_operations", &[vm(&bench, "web"), blocked]);
    let finished = check(&bench, &["--vm", "web"]);
    assert_eq!(finished.code, Some(6), "{finished:?}");
    let uuid = bench.pool.vm("web").unwrap().uuid;
    let command = format!("xe vm-param-remove param-name=blocked-operations param-key=snapshot uuid={uuid}");
    assert_found(&finished.json().unwrap(), "error", "snapshot-not-allowed", &uuid, &command);
}

#[test]
fn x32_a_usb_device_that_is_passed_through_is_found_with_the_commands_that_take_it_away() {
    let bench = Bench::without_repository(common::one_vm());
    let device = call(&bench, "VUSB.create", &[vm(&bench, "web"), json!("OpaqueRef:of-a-usb-group"), json!({})]);
    let finished = check(&bench, &["--vm", "web"]);
    assert_eq!(finished.code, Some(6), "{finished:?}");
    let uuid = bench.pool.vm("web").unwrap().uuid;
    let command = format!("`xe vusb-list vm-uuid={uuid}`, then `xe vusb-unplug` and `xe vusb-destroy`");
    assert_found(&finished.json().unwrap(), "error", "snapshot-not-allowed", &uuid, &command);
    call(&bench, "VUSB.destroy", &[device]);
    assert_eq!(check(&bench, &["--vm", "web"]).code, Some(0));
}

#[test]
fn a_server_without_nbd_is_a_warning_and_its_backup_works() {
    let bench = Bench::start(SimOptions { older_server: true, nbd: NbdAccess::Off, ..common::one_vm() });
    let finished = check(&bench, &[]);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let report = finished.json().unwrap();
    let pool = bench.pool.records("pool").values().next().unwrap()["uuid"].as_str().unwrap().to_owned();
    assert_found(&report, "warning", "nbd-unsupported", &pool, "upgrade all hosts");
    let warned = bench.backup("web");
    assert!(warned["disks"][0]["sample_bytes"].as_u64().unwrap() > 0, "{warned:#}");
}

#[test]
fn a_good_pool_has_no_findings_and_its_hosts_were_really_connected_to() {
    let bench = Bench::without_repository(SimOptions { hosts: 2, ..common::one_vm() });
    let finished = check(&bench, &[]);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let report = finished.json().unwrap();
    assert_eq!(report["findings"], json!([]), "{report:#}");
    assert_eq!(report["hosts"], 2);
    // No export was opened: nothing was plugged anywhere.
    assert!(bench.pool.counters().nbd.is_empty());
    assert_eq!(bench.pool.new_objects(), []);
}

#[test]
fn hosts_that_serve_no_nbd_to_us_are_named() {
    let bench = Bench::without_repository(common::one_vm());
    let faults = bench.pool.nbd_faults();
    let fault = xenvault_sim::nbd::Fault::Refuse;
    faults.order(xenvault_sim::nbd::FaultOrder { fault, host: None, vdi: None, skip: 0, times: None });
    let finished = check(&bench, &[]);
    assert_eq!(finished.code, Some(6), "{finished:?}");
    let host = bench.pool.hosts()[0].uuid.clone();
    assert_found(&finished.json().unwrap(), "error", "nbd-unreachable", &host, "systemctl status xapi-nbd");
}

#[test]
fn a_vm_that_is_not_there_is_code_5() {
    let bench = Bench::without_repository(common::one_vm());
    let finished = check(&bench, &["--vm", "nowhere"]);
    common::assert_fails(&finished, 5, &["nowhere"]);
}
