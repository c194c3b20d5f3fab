//! Runs the example against the simulated pool, which is a process of its own here: this package does not know it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use xenvault_embed_example::example::{Place, backup_read_restore, give_up_after, open};
use xenvault_xenapi::{Session, task, vbd, vdi, vm};

struct Simulator {
    child: Child,
    ready: serde_json::Value,
}

impl Simulator {
    fn start(arguments: &[&str]) -> Self {
        let programs = std::env::var_os("XENVAULT_PROGRAMS")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/debug"), PathBuf::from);
        let program = programs.join("xenvault-sim");
        let mut child = Command::new(&program)
            .arg("serve")
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start ({error}): run `cargo xtask test`", program.display()));
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, ready: serde_json::from_str(&line).unwrap() }
    }

    fn text(&self, name: &str) -> &str {
        self.ready[name].as_str().unwrap()
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Snapshots, disks with data, VBDs and tasks: how many there are of each.
async fn inventory(session: &Session) -> [usize; 4] {
    let snapshots = vm::get_all_records(session).await.unwrap();
    let snapshots = snapshots.values().filter(|record| record.is_a_snapshot).count();
    let disks = vdi::get_all_records(session).await.unwrap();
    let disks = disks.values().filter(|record| !matches!(record.type_, vdi::Type::CbtMetadata)).count();
    let vbds = vbd::get_all_records(session).await.unwrap().len();
    let tasks = task::get_all_records(session).await.unwrap().len();
    [snapshots, disks, vbds, tasks]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_backs_up_reads_restores_and_cancels() {
    let folder = tempfile::tempdir().unwrap();
    // A disk with content that can be told apart.
    let content: Vec<u8> = (0..(8u32 << 20)).map(|at| (at / 4096 % 251) as u8 ^ (at % 7) as u8).collect();
    let image = folder.path().join("disk.raw");
    std::fs::write(&image, &content).unwrap();
    let simulator = Simulator::start(&["--hosts", "1", "--vms", "1", "--disk", image.to_str().unwrap()]);

    let place = Place {
        url: simulator.text("url"),
        fingerprint: simulator.text("fingerprint"),
        password: simulator.text("password"),
        folder: folder.path(),
    };
    let name = simulator.ready["vms"][0]["name"].as_str().unwrap().to_owned();
    let (session, repository, engine) = open(&place).await.unwrap();
    let before = inventory(&session).await;

    assert!(!give_up_after(&engine, &name, Duration::from_millis(1)).await, "a backup takes longer than a millisecond");
    assert_eq!(inventory(&session).await, before, "a cancelled backup leaves nothing");

    let (start, restored) = backup_read_restore(&engine, &repository, &name).await.unwrap();
    assert!(start[..] == content[..1 << 20], "the point holds other bytes than the disk");

    let restored = vm::get_by_uuid(&session, &restored).await.unwrap();
    let record = vm::get_record(&session, &restored).await.unwrap();
    assert_eq!(record.name_label, format!("{name} restored"));
    let [snapshots, disks, vbds, tasks] = inventory(&session).await;
    assert_eq!([snapshots, disks, vbds, tasks], [before[0], before[1] + 1, before[2] + 1, before[3]]);
    session.logout().await.unwrap();
}
