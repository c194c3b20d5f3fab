//! NBD servers of others, started for a test on a port that is theirs from the first moment.
//!
//! The test binds the socket and hands it over (socket activation), so no port is guessed and nothing is waited for.

#![allow(dead_code, reason = "each test uses another part of it")]

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use xenvault_nbd::{Endpoint, ExportName, Tls};

pub struct Server {
    pub address: SocketAddr,
    child: Child,
}

impl Server {
    /// nbdkit with these arguments (filters, plugin and its parameters).
    pub fn nbdkit(arguments: &[&str]) -> Self {
        Self::start("nbdkit", "nbdkit", &[&["--foreground", "--exit-with-parent"], arguments].concat())
    }

    /// qemu-nbd with these arguments; read-only, for many clients, until it is dropped.
    pub fn qemu_nbd(arguments: &[&str]) -> Self {
        Self::start("qemu-nbd", "qemu-utils", &[&["--persistent", "--shared=16", "--read-only"], arguments].concat())
    }

    fn start(program: &str, package: &str, arguments: &[&str]) -> Self {
        let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(found.is_ok(), "{program} is needed: install the package {package}");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("the port of a bound socket");
        // The shell moves the socket to where socket activation looks for it, and becomes the server.
        let child = Command::new("sh")
            .args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh", program])
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .spawn()
            .expect("a shell");
        Self { address, child }
    }

    pub fn endpoint(&self, tls: Option<Tls>) -> Endpoint {
        Endpoint { address: self.address, tls, export_name: ExportName::new("") }
    }

    /// As [`Server::endpoint`], for an export with a name.
    pub fn named(&self, name: &str) -> Endpoint {
        Endpoint { export_name: ExportName::new(name), ..self.endpoint(None) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The option that makes nbdkit use the certificates of a folder.
pub fn nbdkit_certificates(folder: &Path) -> String {
    format!("--tls-certificates={}", folder.display())
}

/// The object that makes qemu-nbd use the certificates of a folder.
pub fn qemu_certificates(folder: &Path) -> String {
    format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=no,dir={}", folder.display())
}
