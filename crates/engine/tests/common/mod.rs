//! A simulated pool, a repository and an engine between them.

#![allow(dead_code, reason = "every test file uses another part")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use xenvault_block::ByteRange;
use xenvault_engine::{
    BackupReport, BackupRequest, Engine, EngineError, EngineOptions, JobMonitor, Progress, Stage, VmSelector, Warning,
};
use xenvault_sim::{DiskContent, DiskSpec, SimOptions, SimPool, VmSpec};
use xenvault_store::{Point, PointFilter, Repository, Secret};
use xenvault_xenapi::{ConnectOptions, Session, Trust};

pub const MIB: u64 = 1 << 20;
pub const BLOCK: u64 = 64 * 1024;

/// Everything that a test needs; the folder goes last.
pub struct Lab {
    pub sim: SimPool,
    pub session: Session,
    pub repository: Repository,
    pub engine: Engine,
    pub monitor: Arc<Recorder>,
    pub folder: tempfile::TempDir,
}

/// Keeps what a monitor is told.
#[derive(Default)]
pub struct Recorder {
    pub stages: Mutex<Vec<String>>,
    pub warnings: Mutex<Vec<Warning>>,
    pub last: Mutex<Option<Progress>>,
}

impl JobMonitor for Recorder {
    fn stage(&self, stage: &Stage) {
        self.stages.lock().unwrap().push(stage.to_string());
    }

    fn progress(&self, progress: &Progress) {
        *self.last.lock().unwrap() = Some(progress.clone());
    }

    fn warning(&self, warning: &Warning) {
        self.warnings.lock().unwrap().push(warning.clone());
    }
}

impl Lab {
    pub async fn new(options: SimOptions) -> Self {
        let sim = SimPool::start(options).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let session = login(&sim).await;
        let secret = Secret::new("passphrase");
        let repository = Repository::init(&folder.path().join("repo"), &secret, Default::default()).await.unwrap();
        let monitor = Arc::new(Recorder::default());
        let options = EngineOptions::new(folder.path().join("state")).with_monitor(Arc::clone(&monitor) as _);
        let engine = Engine::open(session.clone(), Some(repository.clone()), options).unwrap();
        Self { sim, session, repository, engine, monitor, folder }
    }

    /// One host, one VHD SR, one halted VM `vm-1` with one disk of 16 MiB, of which 4 MiB hold data.
    pub async fn small() -> Self {
        Self::new(SimOptions {
            vms: vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 4 * MIB))],
            ..Default::default()
        })
        .await
    }

    /// Another engine of the same installation, as a second process would have it.
    pub fn second_engine(&self) -> Engine {
        let options = EngineOptions::new(self.folder.path().join("state")).with_monitor(Arc::clone(&self.monitor) as _);
        Engine::open(self.session.clone(), Some(self.repository.clone()), options).unwrap()
    }

    /// An engine of another installation with the same repository.
    pub fn stranger(&self) -> Engine {
        let options = EngineOptions::new(self.folder.path().join("other-state"));
        Engine::open(self.session.clone(), Some(self.repository.clone()), options).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub async fn incremental(&self) -> BackupReport {
        self.engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap()
    }

    pub async fn full(&self) -> BackupReport {
        self.engine.backup(BackupRequest::full(name("vm-1"))).await.unwrap()
    }

    pub async fn fails(&self) -> EngineError {
        self.engine.backup(BackupRequest::incremental(name("vm-1"))).await.unwrap_err()
    }

    /// The point of a report.
    pub async fn point(&self, report: &BackupReport) -> Point {
        self.repository.point(&report.point).await.unwrap()
    }

    /// How many points there are, none of which is damaged.
    pub async fn points(&self) -> usize {
        let listing = self.repository.points(&PointFilter::default()).await.unwrap();
        assert!(listing.damaged.is_empty(), "{:?}", listing.damaged);
        listing.points.len()
    }

    /// Asserts that the newest point holds, disk by disk, what the guest sees at this moment.
    pub async fn assert_equals_guest(&self, report: &BackupReport, vm: &str) {
        let point = self.point(report).await;
        assert_eq!(point.disks.len(), self.sim.vm(vm).unwrap().disks.len());
        for disk in &point.disks {
            let reader = self.repository.disk(&disk.map);
            assert_eq!(reader.size(), disk.virtual_size);
            for piece in ByteRange::up_to(disk.virtual_size).pieces(4 * MIB) {
                let stored = reader.read_at(piece).await.unwrap();
                let guest = self.sim.guest_read(vm, &disk.device, piece.start(), piece.len()).unwrap();
                assert_same(&stored, &guest, &format!("disk {} {piece}", disk.device));
            }
        }
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        self.sim.guest_write("vm-1", "0", offset, data).unwrap();
    }

    /// UUID of the first disk of `vm-1`.
    pub fn disk(&self) -> String {
        self.sim.vm("vm-1").unwrap().disks[0].vdi.clone()
    }

    /// Bytes of data that NBD sent since the beginning.
    pub fn nbd_sent(&self) -> u64 {
        self.sim.counters().nbd_sent_bytes()
    }

    pub fn calls(&self, method: &str) -> u64 {
        self.sim.counters().calls.get(method).copied().unwrap_or(0)
    }

    /// New objects of one class.
    pub fn new_of(&self, class: &str) -> Vec<Value> {
        let of_class = |object: (String, String, Value)| (object.0 == class).then_some(object.2);
        self.sim.new_objects().into_iter().filter_map(of_class).collect()
    }

    /// Disks of the pool that are bases: snapshots of ours without data.
    pub fn bases(&self) -> Vec<Value> {
        self.new_of("VDI").into_iter().filter(|record| record["type"] == "cbt_metadata").collect()
    }

    /// Asserts that nothing of ours is in the pool but so many bases.
    pub fn assert_clean(&self, bases: usize) {
        let objects = self.sim.new_objects();
        let mut counted = 0;
        for (class, reference, record) in &objects {
            let is_base = class == "VDI"
                && record["type"] == "cbt_metadata"
                && record["other_config"]["xenvault:role"] == "base"
                && record["other_config"]["xenvault:self"] == record["uuid"];
            counted += usize::from(is_base);
            assert!(is_base || class == "session", "left in the pool: {class} {reference} {record:#}");
        }
        assert_eq!(counted, bases, "bases");
        let journals = std::fs::read_dir(self.path("state/runs")).unwrap().count();
        assert_eq!(journals, 0, "journals of runs that left nothing");
    }

    /// A call as `root`.
    pub async fn call(&self, method: &str, params: &[Value]) -> Value {
        self.sim.call(method, params).await.unwrap()
    }

    /// The reference of an object.
    pub async fn reference(&self, class: &str, uuid: &str) -> Value {
        self.call(&format!("{class}.get_by_uuid"), &[json!(uuid)]).await
    }
}

pub async fn login(sim: &SimPool) -> Session {
    let trust = Trust::Fingerprint(sim.fingerprint().parse().unwrap());
    let options = ConnectOptions::new(&sim.url(), sim.user(), sim.password(), trust);
    Session::login(options).await.unwrap()
}

pub fn name(text: &str) -> VmSelector {
    VmSelector::Name(text.to_owned())
}

pub fn data_disk(size: u64, data: u64) -> DiskSpec {
    DiskSpec::new(size).content(DiskContent::Random { seed: 7, bytes: data })
}

/// Bytes that do not repeat.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Compares without printing megabytes.
pub fn assert_same(left: &[u8], right: &[u8], what: &str) {
    assert_eq!(left.len(), right.len(), "length of {what}");
    if let Some(at) = left.iter().zip(right).position(|(a, b)| a != b) {
        panic!("{what} differ first at {at}: {:02x} and {:02x}", left[at], right[at]);
    }
}

/// `other_config` of a record.
pub fn config(record: &Value) -> BTreeMap<String, String> {
    serde_json::from_value(record["other_config"].clone()).unwrap()
}
