//! The whole line through the programs: full, incremental, restore, and what an operator sees on the way.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    missing_docs,
    reason = "a test ends with a panic, and its helpers too"
)]

mod common;

use common::{Bench, assert_fails, disk, one_vm};
use serde_json::Value;
use xenvault_sim::storage::SrKind;
use xenvault_sim::{SimOptions, SrSpec, VmSpec};
use xenvault_tests::programs;

const MIB: u64 = 1 << 20;

/// Two hosts, two SRs, a VM with two disks of which one is on the second SR, and a copy of its first disk's content.
fn pool() -> SimOptions {
    SimOptions {
        hosts: 2,
        srs: vec![SrSpec::new("first", SrKind::Ext), SrSpec::new("second", SrKind::Ext)],
        vms: vec![
            VmSpec::new("web").disk(disk(48 * MIB, 6 * MIB)).disk(disk(80 * MIB, 10 * MIB).on("second")),
            VmSpec::new("twin of web").disk(disk(48 * MIB, 6 * MIB)),
        ],
        ..SimOptions::default()
    }
}

fn point(report: &Value) -> &str {
    report["point"].as_str().unwrap()
}

#[test]
fn full_then_incremental_then_restore_to_another_sr() {
    let bench = Bench::start(pool());
    let sizes = [48 * MIB, 80 * MIB];
    let state = || [0, 1].map(|disk| bench.guest_disk("web", &disk.to_string(), sizes[disk]));

    let full = bench.backup("web");
    let before = state();
    assert_eq!(full["level"], "FULL");
    assert_eq!(full["disks"][0]["reason"], "first-backup");
    // Only what is allocated was read, not the whole disks.
    assert!(full["totals"]["read_bytes"].as_u64().unwrap() <= 20 * MIB, "{full}");

    bench.pool.guest_write("web", "0", 5 * MIB, &[1; 200_000]).unwrap();
    bench.pool.guest_write("web", "1", 70 * MIB, &[2; 100]).unwrap();
    let incremental = bench.backup("web");
    let after = state();
    assert_eq!(incremental["level"], "INC", "{incremental}");
    assert!(incremental["totals"]["read_bytes"].as_u64().unwrap() <= 6 * 65536, "{incremental}");
    bench.assert_pool_is_clean();
    assert_eq!(bench.bases(), 2, "one base a disk");

    for (report, state) in [(&full, &before), (&incremental, &after)] {
        for (disk, content) in state.iter().enumerate() {
            assert!(bench.restored_disk(point(report), &disk.to_string()) == *content);
        }
    }

    let restored = bench.try_restore_vm(point(&incremental), &["--sr", "second", "--name", "web again"]);
    assert_eq!(restored.code, Some(0), "{restored:?}");
    let restored = restored.json().unwrap();
    let uuid = restored["vm_uuid"].as_str().unwrap();
    let vm = bench.pool.vm(uuid).unwrap();
    assert_eq!(vm.name, "web again");
    let second = bench.pool.srs().into_iter().find(|sr| sr.name == "second").unwrap().uuid;
    for (device, disk) in vm.disks.iter().enumerate() {
        assert_eq!(disk.sr, second);
        assert_eq!(disk.size, sizes[device]);
        assert!(bench.guest_disk(uuid, &disk.userdevice, disk.size) == after[device]);
    }
    assert_eq!(bench.pool.record("VM", uuid).unwrap()["power_state"], "Halted");
    // Beside the new VM with its two disks, two VBDs and its VIF there is nothing.
    let mut classes: Vec<String> =
        bench.left_over().iter().map(|object| object.split(' ').next().unwrap().to_owned()).collect();
    classes.sort();
    assert_eq!(classes, ["VBD", "VBD", "VDI", "VDI", "VIF", "VM"]);
}

#[test]
fn what_another_vm_holds_is_not_stored_again() {
    let bench = Bench::start(pool());
    bench.backup("web");
    let twin = bench.backup("twin of web");
    let stored = twin["totals"]["stored_bytes"].as_u64().unwrap();
    assert!(stored < MIB / 4, "{stored} bytes stored for a twin: {twin}");
    bench.assert_repository_intact();
}

#[test]
fn a_full_backup_can_be_asked_for() {
    let bench = Bench::start(one_vm());
    bench.backup("web");
    let mut arguments = bench.backup_arguments("web");
    arguments.push("--full".to_owned());
    let report = bench.datamover("backup", &arguments).json().unwrap();
    assert_eq!((report["level"].as_str(), report["disks"][0]["reason"].as_str()), (Some("FULL"), Some("requested")));
    assert_eq!(bench.backup("web")["level"], "INC");
}

#[test]
fn an_unmapped_network_leaves_the_vif_out_and_a_map_puts_it_back() {
    let bench = Bench::start(one_vm());
    let report = bench.backup("web");
    let networks = bench.pool.records("network");
    let name = networks.values().next().unwrap()["name_label"].as_str().unwrap().to_owned();
    let other = networks.values().nth(1).map(|network| network["name_label"].as_str().unwrap().to_owned());

    let plain = bench.try_restore_vm(point(&report), &["--name", "plain"]).json().unwrap();
    assert_eq!(plain["vifs"].as_array().unwrap().len(), 1, "{plain}");
    if let Some(other) = other {
        let map = format!("{name}={other}");
        let mapped = bench.try_restore_vm(point(&report), &["--name", "mapped", "--network", &map]).json().unwrap();
        assert_eq!(mapped["vifs"][0]["mapped_to"], other.as_str(), "{mapped}");
    }
    let wrong = format!("{name}=no such network");
    let refused = bench.try_restore_vm(point(&report), &["--name", "refused", "--network", &wrong]);
    assert_fails(&refused, 5, &["no such network"]);
    assert!(bench.pool.vm("refused").is_err(), "nothing of it is left");
}

#[test]
fn restoring_what_is_not_there() {
    let bench = Bench::start(one_vm());
    let report = bench.backup("web");
    let before = bench.left_over();
    assert_fails(&bench.try_restore_vm("ffffffff", &[]), 5, &["no restore point"]);
    assert_fails(&bench.try_restore_vm(point(&report), &["--sr", "no such SR"]), 5, &["no such SR"]);
    assert_fails(&bench.try_restore_disk(point(&report), "7", &bench.path("x.raw")), 5, &["has no disk"]);
    let taken = bench.path("taken");
    std::fs::write(&taken, "keep").unwrap();
    assert_fails(&bench.try_restore_disk(point(&report), "0", &taken), 1, &["taken"]);
    assert_eq!(std::fs::read_to_string(taken).unwrap(), "keep");
    assert_eq!(bench.left_over(), before);
}

#[test]
fn pin_shows_what_the_coordinator_shows() {
    let bench = Bench::without_repository(one_vm());
    let shown = bench.datamover("pin", &[bench.pool.url()]);
    assert_eq!(shown.code, Some(0), "{shown:?}");
    let shown = shown.json().unwrap()["fingerprint"].as_str().unwrap().to_lowercase().replace(':', "");
    assert_eq!(shown, bench.pool.fingerprint());
    assert_eq!(bench.pool.counters().calls.get("session.login_with_password"), None);
}

#[test]
fn pin_with_the_confirmed_fingerprint_shows_and_remembers_all_members() {
    let bench = Bench::without_repository(pool());
    let state = bench.path("state-of-pin");
    let mut arguments = vec![bench.pool.url(), "--fingerprint".to_owned(), bench.pool.fingerprint()];
    arguments.extend(["--state".to_owned(), state.to_str().unwrap().to_owned()]);
    let hosts = bench.pool.hosts();
    assert!(hosts.len() > 1);
    let shown = bench.datamover("pin", &arguments).json().unwrap();
    let members = shown["members"].as_array().unwrap();
    assert_eq!(members.len(), hosts.len());
    for host in &hosts {
        let member = members.iter().find(|member| host.url.contains(member["address"].as_str().unwrap())).unwrap();
        assert_eq!(
            (&member["fingerprint"], &member["shown"]),
            (&host.fingerprint.clone().into(), &host.fingerprint.clone().into())
        );
        assert_eq!((&member["verdict"], &member["remembered"]), (&"confirmed".into(), &Value::Null));
    }
    // A member whose certificate was changed since: the old one is shown beside the new one, and replaced.
    let file = std::fs::read_dir(state.join("pins")).unwrap().next().unwrap().unwrap().path();
    let good = std::fs::read_to_string(&file).unwrap();
    let old = "ab".repeat(32);
    std::fs::write(&file, good.replace(&hosts[1].fingerprint, &old)).unwrap();
    let shown = bench.datamover("pin", &arguments).json().unwrap();
    let members = shown["members"].as_array().unwrap();
    let changed = members.iter().find(|member| member["remembered"] == old.as_str()).unwrap();
    assert_eq!(changed["fingerprint"], hosts[1].fingerprint.as_str());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), good);
    // For people.
    let mut program = bench.program("xenvault-datamover");
    let text = programs::finish(program.arg("pin").args(&arguments), "").unwrap().stdout;
    assert!(text.contains("the host shows the same") && text.contains(&hosts[1].fingerprint), "{text}");
    // Another fingerprint than the coordinator's gets no password.
    let wrong = [bench.pool.url(), "--fingerprint".to_owned(), old];
    assert_fails(&bench.datamover("pin", &wrong), 4, &["shows a certificate with fingerprint"]);
}

#[test]
fn a_member_is_no_coordinator() {
    let bench = Bench::start(pool());
    let member = bench.pool.hosts().remove(1);
    let mut arguments = bench.backup_arguments("web");
    for (option, value) in [("--pool", member.url), ("--fingerprint", member.fingerprint)] {
        let at = arguments.iter().position(|argument| argument == option).unwrap();
        arguments[at + 1] = value;
    }
    assert_fails(&bench.datamover("backup", &arguments), 4, &["xenvault-datamover pin", "is a member of a pool"]);
    bench.assert_pool_is_clean();
}

#[test]
fn progress_is_json_for_machines_and_lines_elsewhere() {
    let bench = Bench::start(one_vm());
    let finished = bench.try_backup("web");
    let events: Vec<Value> = finished.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().any(|event| event["event"] == "stage"), "{events:?}");
    assert!(events.iter().any(|event| event["event"] == "progress"), "{events:?}");

    let mut program = bench.program("xenvault-datamover");
    let finished = programs::finish(program.arg("backup").args(bench.backup_arguments("web")), "").unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stderr.contains("taking the snapshot"), "{finished:?}");
    assert!(finished.stdout.contains("point ") && finished.stdout.contains("INC"), "{finished:?}");
    for secret in [bench.pool.password().as_str(), common::PASSPHRASE, "OpaqueRef"] {
        assert!(!format!("{finished:?}").contains(secret), "{secret} is shown");
    }
}

#[test]
fn secrets_are_not_in_the_log() {
    let bench = Bench::start(one_vm());
    let mut arguments = bench.backup_arguments("web");
    arguments.extend(["--log".to_owned(), "trace".to_owned()]);
    let finished = bench.datamover("backup", &arguments);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    for secret in [bench.pool.password().as_str(), common::PASSPHRASE, "session_id=OpaqueRef"] {
        assert!(!finished.stderr.contains(secret), "{secret} is in the log");
    }
}
