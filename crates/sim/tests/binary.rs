//! The binary, used by a stranger: Python's own XML-RPC client.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests, of which each test uses its part"
)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const SCRIPT: &str = r#"
import json, sys, xmlrpc.client, ssl
info = json.loads(sys.argv[1])
context = ssl._create_unverified_context() if info["url"].startswith("https") else None
proxy = xmlrpc.client.ServerProxy(info["url"], context=context) if context else xmlrpc.client.ServerProxy(info["url"])
def ok(answer):
    assert answer["Status"] == "Success", answer
    return answer["Value"]
session = ok(proxy.session.login_with_password(info["user"], info["password"], "1.0", "python"))
wrong = proxy.session.login_with_password(info["user"], "no", "1.0", "python")
assert wrong["ErrorDescription"][0] == "SESSION_AUTHENTICATION_FAILED", wrong
vm = ok(proxy.VM.get_by_uuid(session, info["vms"][0]["uuid"]))
record = ok(proxy.VM.get_record(session, vm))
assert record["memory_static_max"] == str(512 << 20), record["memory_static_max"]
assert record["is_a_template"] is False
snapshot = ok(proxy.VM.snapshot(session, vm, "by python"))
assert ok(proxy.VM.get_is_a_snapshot(session, snapshot)) is True
batch = ok(getattr(proxy.event, "from")(session, ["vm"], "", 1.0))
assert batch["valid_ref_counts"]["vm"] >= 2, batch
task = ok(getattr(proxy, "Async").VM.destroy(session, snapshot))
while ok(proxy.task.get_status(session, task)) == "pending":
    pass
assert ok(proxy.task.get_status(session, task)) == "success"
assert ok(proxy.task.get_result(session, task)) == "<value></value>"
now = ok(proxy.host.get_servertime(session, ok(proxy.host.get_all(session))[0]))
assert isinstance(now, xmlrpc.client.DateTime), now
ok(proxy.session.logout(session))
print("done")
"#;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(arguments: &[&str]) -> (Server, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_xenvault-sim"))
        .arg("serve")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
    (Server(child), line)
}

#[test]
fn a_client_that_is_not_ours_gets_along() {
    for arguments in [&["--plain-http", "--vms", "2"][..], &["--hosts", "2"]] {
        let (_server, line) = serve(arguments);
        let output = Command::new("python3").args(["-c", SCRIPT, line.trim()]).output().expect("python3 is installed");
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(text.trim(), "done", "{errors}");
    }
}

#[test]
fn a_file_becomes_a_disk_and_the_end_of_input_ends_the_pool() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![0xab; 3 << 20]).unwrap();
    let (mut server, line) = serve(&["--plain-http", "--disk", path.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(info["vms"][0]["disks"][0]["size"], 4 << 20, "rounded up to what a VHD can have");
    for key in ["url", "fingerprint", "user", "password", "control_url", "hosts", "srs"] {
        assert!(!info[key].is_null(), "{key}");
    }
    drop(server.0.stdin.take());
    assert!(server.0.wait().unwrap().success());
}
