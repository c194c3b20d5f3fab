//! The simulated pool as a process of its own, and its control interface.

use crate::{Outcome, programs};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::time::Duration;

/// No answer takes longer on any machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Disks are copied in pieces of this size.
const PIECE_BYTES: u64 = 4 << 20;

/// A running `xenvault-sim serve`; dropping it ends it.
#[derive(Debug)]
pub struct Simulator {
    child: Child,
    // Kept open: the pool ends when its standard input does.
    _stdin: Option<ChildStdin>,
    ready: Value,
}

impl Simulator {
    /// Starts it with these arguments after `serve` and waits until it is ready.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(arguments: &[String]) -> Outcome<Self> {
        let mut command = programs::program("xenvault-sim")?;
        command.arg("serve").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or("the simulator has no output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let stdin = child.stdin.take();
        match serde_json::from_str(&line) {
            Ok(ready) => Ok(Self { child, _stdin: stdin, ready }),
            Err(error) => {
                let _ = child.kill();
                Err(format!("the simulator did not start ({error}): {line}").into())
            }
        }
    }

    /// What it told when it was ready.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// A text out of what it told.
    ///
    /// # Errors
    /// If there is no such text.
    pub fn text(&self, name: &str) -> Outcome<&str> {
        self.ready.get(name).and_then(Value::as_str).ok_or_else(|| format!("the simulator did not tell {name}").into())
    }

    /// Asks the control interface; `path` begins with `/`.
    ///
    /// # Errors
    /// If the answer is not a success, with its text.
    pub fn control(&self, method: &str, path: &str, body: &[u8]) -> Outcome<Vec<u8>> {
        let url = self.text("control_url")?;
        let authority = url.trim_start_matches("http://").trim_end_matches('/');
        let mut stream = TcpStream::connect(authority)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader.read_line(&mut status)?;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            if line.trim().is_empty() {
                break;
            }
        }
        let mut answer = Vec::new();
        reader.read_to_end(&mut answer)?;
        match status.split(' ').nth(1) {
            Some(code) if code.starts_with('2') => Ok(answer),
            _ => Err(format!("{method} {path}: {} {}", status.trim(), String::from_utf8_lossy(&answer)).into()),
        }
    }

    /// Asks the control interface for JSON.
    ///
    /// # Errors
    /// As [`Simulator::control`].
    pub fn get_json(&self, path: &str) -> Outcome<Value> {
        Ok(serde_json::from_slice(&self.control("GET", path, &[])?)?)
    }

    /// Writes to a VM's disk as its guest would.
    ///
    /// # Errors
    /// As [`Simulator::control`].
    pub fn guest_write(&self, vm: &str, device: &str, offset: u64, data: &[u8]) -> Outcome {
        self.control("PUT", &format!("/vms/{vm}/disks/{device}?offset={offset}"), data).map(|_| ())
    }

    /// Copies a VM's disk into a file, zeros as holes.
    ///
    /// # Errors
    /// As [`Simulator::control`], and if the file can not be written.
    pub fn save_guest_disk(&self, vm: &str, device: &str, size: u64, to: &Path) -> Outcome {
        let file = std::fs::File::create(to)?;
        file.set_len(size)?;
        let mut offset = 0;
        while offset < size {
            let length = PIECE_BYTES.min(size - offset);
            let path = format!("/vms/{vm}/disks/{device}?offset={offset}&length={length}");
            let piece = self.control("GET", &path, &[])?;
            if piece.len() as u64 != length {
                return Err(format!("{} bytes instead of {length} from {path}", piece.len()).into());
            }
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(&piece, offset)?;
            }
            offset += length;
        }
        Ok(())
    }

    /// What stands in the pool that did not at its start: class, reference and record.
    ///
    /// # Errors
    /// As [`Simulator::control`].
    pub fn new_objects(&self) -> Outcome<Vec<(String, String, Value)>> {
        let list = self.get_json("/new-objects")?;
        Ok(serde_json::from_value(list)?)
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
