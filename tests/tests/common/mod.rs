//! A pool in this process, a repository and the state of one installation in a temporary folder, and the programs run
//! against them as a user would.
#![allow(dead_code, reason = "every test program uses its own part")]

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use xenvault_sim::{DiskContent, DiskSpec, SimOptions, SimPool, VmSpec};
use xenvault_tests::programs::{self, Finished};

/// Passphrase of every repository in the tests.
pub const PASSPHRASE: &str = "a passphrase of the tests";

/// See the module.
pub struct Bench {
    pub pool: SimPool,
    pub folder: TempDir,
    /// Name of the installation whose state folder is used.
    pub installation: String,
    /// The arguments that name the repository, where it is not in the folder.
    pub elsewhere: Option<Vec<String>>,
    // Last: the pool's tasks run here until everything else is gone.
    pub runtime: Runtime,
}

/// A disk of `size` bytes whose first `data` bytes are random.
pub fn disk(size: u64, data: u64) -> DiskSpec {
    DiskSpec::new(size).content(DiskContent::Random { seed: 7, bytes: data })
}

/// A pool of one host and one VM `web` with one disk of 64 MiB, 8 MiB of which are data.
pub fn one_vm() -> SimOptions {
    SimOptions { vms: vec![VmSpec::new("web").disk(disk(64 << 20, 8 << 20))], ..SimOptions::default() }
}

impl Bench {
    /// Starts the pool and makes the repository.
    pub fn start(options: SimOptions) -> Self {
        let bench = Self::without_repository(options);
        let made = bench.datamover("init-repository", &bench.repository_arguments());
        assert_eq!(made.code, Some(0), "{made:?}");
        bench
    }

    /// Starts the pool.
    pub fn without_repository(options: SimOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let pool = runtime.block_on(SimPool::start(options)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        Self { pool, folder, installation: "installation".to_owned(), elsewhere: None, runtime }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn repository(&self) -> PathBuf {
        self.path("repository")
    }

    pub fn repository_arguments(&self) -> Vec<String> {
        self.elsewhere.clone().unwrap_or_else(|| vec!["--repository".to_owned(), text(&self.repository())])
    }

    /// The options that name this pool, as an operator who confirmed the fingerprint gives them.
    pub fn pool_arguments(&self) -> Vec<String> {
        let state = text(&self.path(&self.installation));
        [
            "--pool",
            &self.pool.url(),
            "--fingerprint",
            &self.pool.fingerprint(),
            "--user",
            self.pool.user(),
            "--state",
            &state,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// A program with the secrets in its environment.
    pub fn program(&self, name: &str) -> Command {
        let mut command = programs::program(name).unwrap();
        command.env("XENVAULT_PASSWORD", self.pool.password()).env("XENVAULT_PASSPHRASE", PASSPHRASE);
        command
    }

    /// Runs `xenvault-datamover --json <command> <arguments>` to its end.
    pub fn datamover(&self, command: &str, arguments: &[String]) -> Finished {
        let mut program = self.program("xenvault-datamover");
        programs::finish(program.args(["--json", command]).args(arguments), "").unwrap()
    }

    /// Runs `xenvault-restore --json <command> <arguments>` to its end.
    pub fn restore(&self, command: &str, arguments: &[String]) -> Finished {
        let mut program = self.program("xenvault-restore");
        programs::finish(program.args(["--json", command]).args(arguments), "").unwrap()
    }

    /// The arguments of a backup of `vm`.
    pub fn backup_arguments(&self, vm: &str) -> Vec<String> {
        let mut arguments = self.pool_arguments();
        arguments.extend(self.repository_arguments());
        arguments.extend(["--vm".to_owned(), vm.to_owned()]);
        arguments
    }

    /// Backs `vm` up, however that ends.
    pub fn try_backup(&self, vm: &str) -> Finished {
        self.datamover("backup", &self.backup_arguments(vm))
    }

    /// Backs `vm` up and gives the report.
    pub fn backup(&self, vm: &str) -> Value {
        let finished = self.try_backup(vm);
        assert_eq!(finished.code, Some(0), "{finished:?}");
        finished.json().unwrap()
    }

    /// Sweeps and gives the report.
    pub fn sweep(&self, more: &[&str]) -> Value {
        let mut arguments = self.pool_arguments();
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let finished = self.datamover("sweep", &arguments);
        assert_eq!(finished.code, Some(0), "{finished:?}");
        finished.json().unwrap()
    }

    /// Restores a point as a new VM, however that ends.
    pub fn try_restore_vm(&self, point: &str, more: &[&str]) -> Finished {
        let mut arguments = vec![point.to_owned()];
        arguments.extend(self.repository_arguments());
        arguments.extend(self.pool_arguments());
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        self.restore("vm", &arguments)
    }

    /// Writes a disk of a point to a file, however that ends.
    pub fn try_restore_disk(&self, point: &str, device: &str, to: &Path) -> Finished {
        let mut arguments = vec![point.to_owned(), device.to_owned(), "--to".to_owned(), text(to)];
        arguments.extend(self.repository_arguments());
        self.restore("disk", &arguments)
    }

    /// The content of a disk of a point.
    pub fn restored_disk(&self, point: &str, device: &str) -> Vec<u8> {
        let file = self.path(&format!("{point}-{device}.raw"));
        let finished = self.try_restore_disk(point, device, &file);
        assert_eq!(finished.code, Some(0), "{finished:?}");
        let content = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        content
    }

    /// The points of the repository, oldest first.
    pub fn points(&self) -> Vec<Value> {
        let finished = self.restore("points", &self.repository_arguments());
        assert_eq!(finished.code, Some(0), "{finished:?}");
        finished.json().unwrap()["points"].as_array().unwrap().clone()
    }

    /// The repository opens and every disk of every point can be read to its end.
    pub fn assert_repository_intact(&self) {
        for point in self.points() {
            let id = point["point"].as_str().unwrap();
            let mut arguments = vec![id.to_owned()];
            arguments.extend(self.repository_arguments());
            let shown = self.restore("show", &arguments);
            assert_eq!(shown.code, Some(0), "{shown:?}");
            for disk in shown.json().unwrap()["disks"].as_array().unwrap() {
                let file = self.path("intact.raw");
                let read = self.try_restore_disk(id, disk["device"].as_str().unwrap(), &file);
                assert_eq!(read.code, Some(0), "{read:?}");
                std::fs::remove_file(&file).unwrap();
            }
        }
    }

    /// Objects of the pool that were not there at the start, without the bases of changed block tracking: what is left
    /// of our work. Each is told as `class name (uuid)`.
    pub fn left_over(&self) -> Vec<String> {
        self.pool
            .new_objects()
            .into_iter()
            .filter(|(class, _, record)| !(class == "VDI" && record["type"] == "cbt_metadata"))
            .map(|(class, reference, record)| format!("{class} {} ({reference})", record["name_label"]))
            .collect()
    }

    /// Bases of changed block tracking in the pool.
    pub fn bases(&self) -> usize {
        let new = self.pool.new_objects();
        new.iter().filter(|(class, _, record)| class == "VDI" && record["type"] == "cbt_metadata").count()
    }

    /// Nothing of ours is left in the pool but bases.
    pub fn assert_pool_is_clean(&self) {
        assert_eq!(self.left_over(), Vec::<String>::new());
    }

    /// What a guest sees of its disk.
    pub fn guest_disk(&self, vm: &str, device: &str, size: u64) -> Vec<u8> {
        self.pool.guest_read(vm, device, 0, size).unwrap()
    }
}

/// A failure has this exit code and says these things on standard error, and the same in its JSON.
pub fn assert_fails(finished: &Finished, code: i32, says: &[&str]) {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    for part in says {
        assert!(finished.stderr.contains(part), "{part:?} is not said: {finished:?}");
    }
    let record = finished.json().unwrap();
    assert_eq!(record["ok"], false);
    assert_eq!(record["error"]["exit_code"], code);
}

/// A path as an argument.
pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
