//! Reads 8 GiB from `nbdkit` (TLS) and from `qemu-nbd` with our client and with `nbdcopy`: the same bytes, and at no
//! less than 0.8 of its speed.

use crate::run::{Outcome, cargo, output, show, target_folder};
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const EXPORT_BYTES: u64 = 8 << 30;

/// The least share of nbdcopy's speed.
const LEAST_SHARE: f64 = 0.8;

/// Connections of both programs.
const CONNECTIONS: &str = "4";

/// No server takes longer to listen.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Measures both servers.
///
/// # Errors
/// If the bytes differ or our client is too slow.
pub fn run() -> Outcome {
    show(cargo().args(["build", "--quiet", "--release", "--package", "xenvault-nbd", "--example", "nbd-sha256"]))?;
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;

    let port = free_port()?;
    let size = format!("size={EXPORT_BYTES}");
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["--foreground", "--tls", "require", "--ipaddr", "127.0.0.1", "--port", &port, "--tls-certificates"]);
    let nbdkit = Server::start(nbdkit.arg(folder.path()).args(["pattern", &size]), &port)?;
    let secure = format!("nbds://localhost:{port}?tls-certificates={}", folder.path().display());
    let certificate = folder.path().join("server-cert.pem");
    compare("nbdkit, TLS", &secure, &port, Some(&certificate))?;

    let image = folder.path().join("pattern.raw");
    std::fs::File::create(&image)?.set_len(EXPORT_BYTES)?;
    show(Command::new("nbdcopy").arg(&secure).arg(&image))?;
    drop(nbdkit);
    let port = free_port()?;
    let mut qemu = Command::new("qemu-nbd");
    qemu.args(["--read-only", "--persistent", "--shared", "8", "--format", "raw", "--export-name", ""]);
    let _qemu = Server::start(qemu.args(["--bind", "127.0.0.1", "--port", &port]).arg(&image), &port)?;
    compare("qemu-nbd", &format!("nbd://localhost:{port}"), &port, None)
}

/// Both programs twice, alternating; the better time of each counts, so that a neighbour's load matters less.
fn compare(name: &str, url: &str, port: &str, certificate: Option<&Path>) -> Outcome {
    let (mut theirs, mut ours) = (f64::MAX, f64::MAX);
    for _ in 0..2 {
        let started = Instant::now();
        let expected = nbdcopy_sha256(url)?;
        theirs = theirs.min(started.elapsed().as_secs_f64());

        let mut client = Command::new(target_folder().join("release/examples/nbd-sha256"));
        client.arg(format!("127.0.0.1:{port}")).args(["--connections", CONNECTIONS]);
        if let Some(certificate) = certificate {
            client.arg("--certificate").arg(certificate);
        }
        let started = Instant::now();
        let said = String::from_utf8(output(&mut client)?)?;
        ours = ours.min(started.elapsed().as_secs_f64());
        let found = said.split(' ').next().unwrap_or_default();
        if found != expected {
            return Err(format!("{name}: nbdcopy reads {expected}, our client {found}").into());
        }
    }
    let share = theirs / ours;
    println!("{name}: 8 GiB equal; nbdcopy {theirs:.2} s, our client {ours:.2} s: {share:.2} of its speed");
    if share < LEAST_SHARE {
        return Err(format!("{name}: our client has {share:.2} of nbdcopy's speed, it must have {LEAST_SHARE}").into());
    }
    Ok(())
}

fn nbdcopy_sha256(url: &str) -> Outcome<String> {
    let mut command = Command::new("nbdcopy");
    command.args(["--connections", CONNECTIONS, url, "-"]).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut stdout = child.stdout.take().ok_or("nbdcopy has no output")?;
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = stdout.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        context.update(bytes);
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(format!("nbdcopy ended with {status}").into());
    }
    Ok(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// One certificate that is its own authority, as XenServer's hosts have, in the names that nbdkit and libnbd look for.
fn certificates(folder: &Path) -> Outcome {
    let certificate = folder.join("server-cert.pem");
    output(
        Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
            .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout"])
            .arg(folder.join("server-key.pem"))
            .arg("-out")
            .arg(&certificate),
    )?;
    std::fs::copy(&certificate, folder.join("ca-cert.pem"))?;
    Ok(())
}

fn free_port() -> Outcome<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string())
}

/// A server that ends when it is dropped.
struct Server(Child);

impl Server {
    fn start(command: &mut Command, port: &str) -> Outcome<Self> {
        let mut server = Self(command.spawn()?);
        let started = Instant::now();
        while TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
            if let Some(status) = server.0.try_wait()? {
                return Err(format!("{:?} ended with {status}", command.get_program()).into());
            }
            if started.elapsed() > START_LIMIT {
                return Err(format!("{:?} does not listen", command.get_program()).into());
            }
            std::thread::yield_now();
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
