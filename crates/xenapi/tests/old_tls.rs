//! Hosts from before the TLS that this client speaks, played by OpenSSL: the error says what is needed, and nothing is
//! sent.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use xenvault_xenapi::{ConnectOptions, Retry, Session, Sha256Fingerprint, Trust, XenApiError, fetch_certificates};

/// `openssl s_server` with an RSA certificate.
struct Server {
    child: Child,
    url: String,
    fingerprint: Sha256Fingerprint,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(manner: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
        let (key, certificate, der) = (path("key.pem"), path("cert.pem"), path("cert.der"));
        let run = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).stdin(Stdio::null()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=host", "-days", "30"];
        run(&[&request[..], &["-keyout", &key, "-out", &certificate]].concat());
        run(&["x509", "-in", &certificate, "-outform", "DER", "-out", &der]);
        let fingerprint = Sha256Fingerprint::of(&std::fs::read(&der).unwrap());
        let common = ["s_server", "-accept", "127.0.0.1:0", "-www", "-key", &key, "-cert", &certificate];
        let mut child = Command::new("openssl")
            .args(common)
            .args(manner)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It says "ACCEPT 127.0.0.1:PORT" once it listens.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines.find_map(|line| {
            let line = line.unwrap();
            line.strip_prefix("ACCEPT ").and_then(|place| place.rsplit_once(':')).map(|(_, port)| port.to_owned())
        });
        // What else it says is not read, and little.
        Self { child, url: format!("https://127.0.0.1:{}", port.unwrap()), fingerprint, _folder: folder }
    }

    async fn login(&self) -> XenApiError {
        let trust = Trust::Fingerprint(self.fingerprint);
        Session::login(ConnectOptions::new(&self.url, "root", "secret", trust)).await.unwrap_err()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn hosts_with_an_older_tls_are_named_with_what_is_needed() {
    for (manner, what) in [
        (&["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"][..], "TLS 1.1"),
        (&["-tls1", "-cipher", "ALL:@SECLEVEL=0"][..], "TLS 1.0"),
        (&["-tls1_2", "-cipher", "AES128-SHA256:AES128-GCM-SHA256"][..], "RSA key exchange"),
    ] {
        let server = Server::start(manner);
        for error in [server.login().await, fetch_certificates(&server.url).await.unwrap_err()] {
            assert!(matches!(error, XenApiError::TlsTooOld { .. }), "{what}: {error:?}");
            assert_eq!(error.retry(), Retry::Never, "{what}");
            let text = error.to_string();
            for part in ["TLS 1.2", "ECDHE", "Citrix Hypervisor 8.1", "XCP-ng 8.1", "127.0.0.1"] {
                assert!(text.contains(part), "{what}: {text}");
            }
        }
    }
}

#[tokio::test]
async fn what_current_hosts_offer_is_enough() {
    // The cipher list and the curve of current hosts.
    let list = "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-AES128-GCM-SHA256";
    let server = Server::start(&["-tls1_2", "-cipher", list, "-curves", "secp384r1"]);
    let shown = fetch_certificates(&server.url).await.unwrap();
    assert_eq!(shown.chain.first().unwrap().fingerprint, server.fingerprint);
}
