//! A simulated pool in another process, and `curl` as its only client: the calls of XenAPI go through it too.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use xenvault_tests::programs::{Finished, finish};
use xenvault_tests::simulator::Simulator;
use xenvault_tests::{clients, images};

/// No answer takes longer on any machine, in seconds.
const PATIENCE: &str = "300";

/// See the module.
pub struct Stage {
    pub simulator: Simulator,
    /// Of the one VM, and of its disk.
    pub vm: String,
    pub vdi: String,
    pub user: String,
    pub password: String,
    pub session: String,
    disk_bytes: u64,
    folder: TempDir,
}

/// What a host answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// `1.0` or `1.1`.
    pub version: String,
    /// The file that holds it; the next answer replaces it.
    pub body: PathBuf,
    headers: Vec<(String, String)>,
}

impl Answer {
    /// A header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The body of an answer that is text.
    pub fn text(&self) -> String {
        String::from_utf8(std::fs::read(&self.body).unwrap()).unwrap()
    }

    /// Keeps the body under another name.
    pub fn keep(self, stage: &Stage, name: &str) -> PathBuf {
        let kept = stage.path(name);
        std::fs::rename(self.body, &kept).unwrap();
        kept
    }
}

/// Runs a program that must succeed, and gives what it printed.
pub fn told(command: &mut Command) -> String {
    let finished = finish(command, "").unwrap();
    assert_eq!(finished.code, Some(0), "{command:?}: {finished:?}");
    finished.stdout
}

/// What `sha256sum` says of a file.
pub fn sha256sum(file: &Path) -> String {
    let line = told(Command::new("sha256sum").arg(file));
    line.split(' ').next().unwrap().to_owned()
}

impl Stage {
    /// Starts a pool with one VM and logs in.
    pub fn new(arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let simulator = Simulator::start(&arguments).unwrap();
        let folder = tempfile::tempdir().unwrap();
        clients::save_certificate(&simulator, &folder.path().join("certificate.pem")).unwrap();
        let vm = &simulator.ready()["vms"][0];
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let mut stage = Self {
            vm: text(&vm["uuid"]),
            vdi: text(&vm["disks"][0]["vdi"]),
            disk_bytes: vm["disks"][0]["size"].as_u64().unwrap(),
            user: simulator.text("user").unwrap().to_owned(),
            password: simulator.text("password").unwrap().to_owned(),
            session: String::new(),
            simulator,
            folder,
        };
        let login = [json!(stage.user), json!(stage.password)];
        stage.session = text(&stage.raw_call("session.login_with_password", &login));
        stage
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn certificate(&self) -> PathBuf {
        self.path("certificate.pem")
    }

    /// A file with this content.
    pub fn save(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A file with the disk as its guest sees it, not as XenAPI gives it out.
    pub fn disk(&self) -> PathBuf {
        let file = self.path("guest.raw");
        self.simulator.save_guest_disk(&self.vm, "0", self.disk_bytes, &file).unwrap();
        file
    }

    pub fn disk_sha256(&self) -> String {
        sha256sum(&self.disk())
    }

    /// curl with nothing of its user's settings, and the coordinator's certificate as the only trusted one.
    fn curl(&self) -> Command {
        let mut command = Command::new("curl");
        command.args(["--disable", "--noproxy", "*", "--silent", "--show-error", "--max-time", PATIENCE, "--cacert"]);
        command.arg(self.certificate());
        command
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.simulator.text("url").unwrap().trim_end_matches('/'))
    }

    /// Runs curl with one path, however that ends. Its last option of a name counts.
    pub fn try_get(&self, path: &str, more: &[&str]) -> Finished {
        let mut command = self.curl();
        command.arg("--dump-header").arg(self.path("head")).arg("--output").arg(self.path("body"));
        // An answer without a body makes no file.
        std::fs::write(self.path("body"), []).unwrap();
        finish(command.args(more).arg(self.url(path)), "").unwrap()
    }

    /// The answer to a request; a GET if `more` does not say otherwise.
    pub fn get(&self, path: &str, more: &[&str]) -> Answer {
        let finished = self.try_get(path, more);
        assert_eq!(finished.code, Some(0), "{path} {more:?}: {finished:?}");
        self.answer()
    }

    /// Sends a file, however that ends.
    pub fn try_put(&self, path: &str, file: &Path, more: &[&str]) -> Finished {
        let mut options = vec!["--upload-file", file.to_str().unwrap()];
        options.extend(more);
        self.try_get(path, &options)
    }

    /// The answer to a PUT of a file.
    pub fn put(&self, path: &str, file: &Path, more: &[&str]) -> Answer {
        let finished = self.try_put(path, file, more);
        assert_eq!(finished.code, Some(0), "{path} {more:?}: {finished:?}");
        self.answer()
    }

    /// The last answer that curl got.
    fn answer(&self) -> Answer {
        let head = std::fs::read_to_string(self.path("head")).unwrap();
        // With redirections there are several; the last one counts.
        let last = head.trim_end().rsplit("\r\n\r\n").next().unwrap();
        let mut lines = last.lines();
        let start = lines.next().unwrap();
        let (version, rest) = start.strip_prefix("HTTP/").unwrap().split_once(' ').unwrap();
        let status = rest.split(' ').next().unwrap().parse().unwrap();
        let pair = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        };
        let headers = lines.filter_map(pair).collect();
        Answer { status, version: version.to_owned(), body: self.path("body"), headers }
    }

    /// For `times` requests of one path by one curl, how many connections each opened.
    pub fn connections(&self, path: &str, times: usize, more: &[&str]) -> Vec<u32> {
        let mut command = self.curl();
        command.args(["--write-out", "%{stderr}%{num_connects}\n"]).args(more);
        for _ in 0..times {
            command.args(["--output", "/dev/null"]).arg(self.url(path));
        }
        let finished = finish(&mut command, "").unwrap();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        finished.stderr.lines().map(|line| line.parse().unwrap()).collect()
    }

    fn raw_call(&self, method: &str, params: &[Value]) -> Value {
        let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
        let mut command = self.curl();
        command.args(["--header", "Content-Type: application/json", "--data-binary", "@-", &self.url("/jsonrpc")]);
        let finished = finish(&mut command, &request.to_string()).unwrap();
        assert_eq!(finished.code, Some(0), "{method}: {finished:?}");
        let answer = finished.json().unwrap();
        assert_eq!(answer["error"], Value::Null, "{method}: {answer}");
        answer["result"].clone()
    }

    /// A call of XenAPI that must succeed.
    pub fn call(&self, method: &str, params: &[Value]) -> Value {
        let params: Vec<Value> = [json!(self.session)].into_iter().chain(params.iter().cloned()).collect();
        self.raw_call(method, &params)
    }

    /// A task of the client's own.
    pub fn task(&self) -> String {
        self.call("task.create", &[json!("curl"), json!("")]).as_str().unwrap().to_owned()
    }

    /// How a task ended: its status and its error. Waits for the end, which may come after that of the connection.
    pub fn ended(&self, task: &str) -> (String, Value) {
        loop {
            let record = self.call("task.get_record", &[json!(task)]);
            if record["status"] != "pending" {
                return (record["status"].as_str().unwrap().to_owned(), record["error_info"].clone());
            }
            std::thread::yield_now();
        }
    }

    /// Makes an empty disk on the SR of the VM's disk.
    pub fn new_vdi(&self, bytes: u64) -> String {
        let sr = self.call("VDI.get_SR", &[self.call("VDI.get_by_uuid", &[json!(self.vdi)])]);
        let record = json!({
            "name_label": "of curl", "name_description": "", "SR": sr, "virtual_size": bytes.to_string(), "type": "user",
            "sharable": false, "read_only": false, "other_config": {}, "xenstore_data": {}, "sm_config": {}, "tags": [],
        });
        self.call("VDI.create", &[record]).as_str().unwrap().to_owned()
    }

    /// A file with the raw export of a disk.
    pub fn export(&self, vdi: &str) -> PathBuf {
        let path = format!("/export_raw_vdi?format=raw&vdi={vdi}&session_id={}", self.session);
        let answer = self.get(&path, &[]);
        assert_eq!(answer.status, 200);
        answer.keep(self, "export.raw")
    }

    /// Logs out; then nothing that the client caused is left but its own tasks.
    pub fn assert_clean(&self) {
        self.call("session.logout", &[]);
        let new = self.simulator.new_objects().unwrap();
        let left: Vec<_> = new.iter().filter(|(class, ..)| class != "task").collect();
        assert!(left.is_empty(), "{left:?}");
        // The two ways to hash agree, so that a mistake of neither is hidden.
        let file = self.disk();
        assert_eq!(sha256sum(&file), images::sha256(&mut std::fs::File::open(&file).unwrap()).unwrap());
    }
}
