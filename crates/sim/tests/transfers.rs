//! Disks over HTTP and NBD, TLS, and the control interface.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests, of which each test uses its part"
)]

mod wire;

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wire::{Client, exchange};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskContent, DiskSpec, Fault, FaultEffect, NbdAccess, SimOptions, SimPool, SrSpec, VmSpec};

async fn pool(change: impl FnOnce(&mut SimOptions)) -> (SimPool, Client) {
    let disk = DiskSpec::new(8 << 20).content(DiskContent::Random { seed: 3, bytes: 3 << 20 });
    let mut options = SimOptions { plain_http: true, vms: vec![VmSpec::new("vm").disk(disk)], ..SimOptions::default() };
    change(&mut options);
    let pool = SimPool::start(options).await.expect("starts");
    let client = Client::login(&pool).await;
    (pool, client)
}

fn get(client: &Client, vdi: &str, more: &str) -> Vec<u8> {
    format!("GET /export_raw_vdi?vdi={vdi}&session_id={}{more} HTTP/1.1\r\nHost: x\r\n\r\n", client.session)
        .into_bytes()
}

fn put(client: &Client, vdi: &str, more: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "PUT /import_raw_vdi?vdi={vdi}&session_id={}{more} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
        client.session,
        body.len()
    );
    [head.as_bytes(), body].concat()
}

async fn task(client: &Client) -> String {
    client.reference("task.create", &[json!("t"), json!("")]).await
}

async fn new_disk(client: &Client, pool: &SimPool, size: u64) -> String {
    let sr = client.reference("SR.get_by_uuid", &[json!(pool.srs()[0].uuid)]).await;
    let record = json!({"name_label": "new", "SR": sr, "virtual_size": size, "type": "user", "sharable": false,
        "read_only": false, "other_config": {}});
    client.reference("VDI.create", &[record]).await
}

#[tokio::test]
async fn a_raw_export_has_every_byte_and_its_task_succeeds() {
    let (pool, client) = pool(|_| {}).await;
    let disk = pool.vms()[0].disks[0].clone();
    let task = task(&client).await;
    let answer = exchange(&client.url, &get(&client, &disk.vdi, &format!("&format=raw&task_id={task}"))).await;
    assert_eq!(answer.start, "HTTP/1.1 200 OK");
    assert!(answer.header("content-length").is_none() && answer.header("transfer-encoding").is_none());
    assert_eq!(answer.body, pool.vdi_read(&disk.vdi, 0, disk.size).unwrap());
    assert_eq!(client.wait(&task).await["status"], "success");
    assert_eq!(pool.counters().http_sent_bytes[&disk.vdi], disk.size);
    assert!(pool.records("VBD").len() == 1);
}

#[tokio::test]
async fn a_vhd_goes_out_and_comes_in_again() {
    let (pool, client) = pool(|_| {}).await;
    let disk = pool.vms()[0].disks[0].clone();
    let vhd = exchange(&client.url, &get(&client, &disk.vdi, "&format=vhd")).await;
    assert!(vhd.body.starts_with(b"conectix"));
    let target = new_disk(&client, &pool, disk.size).await;
    let task = task(&client).await;
    let request = put(&client, &target, &format!("&format=vhd&task_id={task}"), &vhd.body);
    let answer = exchange(&client.url, &request).await;
    assert_eq!(answer.start, "HTTP/1.1 200 OK");
    let record = client.wait(&task).await;
    assert_eq!(record["status"], "success", "{record}");
    assert_eq!(record["result"], json!(format!("<value>{target}</value>")));
    let uuid = client.reference("VDI.get_uuid", &[json!(target)]).await;
    assert_eq!(pool.vdi_read(&uuid, 0, disk.size).unwrap(), pool.vdi_read(&disk.vdi, 0, disk.size).unwrap());
}

#[tokio::test]
async fn chunks_jump_and_leave_gaps() {
    let (pool, client) = pool(|_| {}).await;
    let disk = pool.vms()[0].disks[0].clone();
    let before = pool.vdi_read(&disk.vdi, 0, disk.size).unwrap();
    let mut body = Vec::new();
    for (offset, data) in [(4096_u64, vec![1_u8; 512]), ((8 << 20) - 512, vec![2_u8; 512])] {
        body.extend_from_slice(&offset.to_le_bytes());
        body.extend_from_slice(&u32::try_from(data.len()).unwrap().to_le_bytes());
        body.extend_from_slice(&data);
    }
    let cut = body.clone();
    body.extend_from_slice(&[0; 12]);
    let first = task(&client).await;
    let more = |task: &str| format!("&format=raw&chunked=true&task_id={task}");
    exchange(&client.url, &put(&client, &disk.vdi, &more(&first), &body)).await;
    assert_eq!(client.wait(&first).await["status"], "success");
    let mut expected = before;
    expected[4096..4608].fill(1);
    expected[(8 << 20) - 512..].fill(2);
    assert_eq!(pool.vdi_read(&disk.vdi, 0, disk.size).unwrap(), expected);
    // Without the end marker it is a failure, told after the 200.
    let second = task(&client).await;
    let mut stream = TcpStream::connect(client.url.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(&put(&client, &disk.vdi, &more(&second), &cut)).await.unwrap();
    stream.shutdown().await.unwrap();
    let answer = wire::read_answer(&mut stream).await;
    assert_eq!(answer.start, "HTTP/1.1 200 OK");
    assert!(answer.text().contains("HTTP/1.1 500 Internal Error"), "{}", answer.text());
    assert_eq!(client.wait(&second).await["error_info"], json!(["VDI_IO_ERROR", "Device I/O errors"]));
}

#[tokio::test]
async fn a_host_without_the_sr_sends_the_client_to_one_that_has_it() {
    let (pool, client) = pool(|options| {
        options.hosts = 2;
        let mut sr = SrSpec::new("local", SrKind::Ext);
        sr.local_to = Some(1);
        options.srs = vec![sr];
    })
    .await;
    let disk = pool.vms()[0].disks[0].clone();
    let answer = exchange(&client.url, &get(&client, &disk.vdi, "&format=raw")).await;
    assert_eq!(answer.start, "HTTP/1.1 302 Found");
    let location = answer.header("Location").unwrap();
    assert!(location.starts_with(&format!("{}/export_raw_vdi?", pool.hosts()[1].url)), "{location}");
    let path = location.strip_prefix(&pool.hosts()[1].url).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let answer = exchange(&pool.hosts()[1].url, request.as_bytes()).await;
    assert_eq!(answer.body.len() as u64, disk.size);
}

#[tokio::test]
async fn a_late_failure_is_a_second_response_in_the_body() {
    let (pool, client) = pool(|_| {}).await;
    let disk = pool.vms()[0].disks[0].clone();
    let error = FaultEffect::Error {
        code: "SR_BACKEND_FAILURE_1200".into(),
        params: vec![String::new(), "no".into(), String::new()],
    };
    pool.fault(Fault::once("http/export_raw_vdi", error));
    let task = task(&client).await;
    let answer = exchange(&client.url, &get(&client, &disk.vdi, &format!("&task_id={task}"))).await;
    assert_eq!(answer.start, "HTTP/1.1 200 OK");
    assert!(answer.text().starts_with("HTTP/1.1 500 Internal Error\r\n"));
    assert!(answer.text().contains("SR_BACKEND_FAILURE_1200: [ ; no;  ]"), "{}", answer.text());
    assert_eq!(client.wait(&task).await["status"], "failure");
    pool.fault(Fault::once("http/export_raw_vdi", FaultEffect::Truncate(1000)));
    assert_eq!(exchange(&client.url, &get(&client, &disk.vdi, "")).await.body.len(), 1000);
}

#[tokio::test]
async fn basic_authentication_is_enough_and_leaves_no_session() {
    let (pool, client) = pool(|options| options.password = "x".into()).await;
    let disk = pool.vms()[0].disks[0].clone();
    let request =
        |header: &str| format!("GET /export_raw_vdi?vdi={} HTTP/1.1\r\n{header}\r\n\r\n", disk.vdi).into_bytes();
    let answer = exchange(&client.url, &request("Authorization: Basic cm9vdDp4")).await;
    assert_eq!(answer.start, "HTTP/1.1 200 OK");
    assert_eq!(pool.records("session").len(), 1);
    let answer = exchange(&client.url, &request("Authorization: Basic cm9vdDp5")).await;
    assert_eq!(answer.start, "HTTP/1.1 401 Unauthorised");
    assert_eq!(answer.header("WWW-Authenticate"), Some("Basic realm=\"get_export_raw_vdi\""));
}

#[tokio::test]
async fn nbd_info_leads_to_an_export_whose_device_goes_with_it() {
    let (pool, client) = pool(|options| options.nbd = NbdAccess::Insecure).await;
    let disk = pool.vms()[0].disks[0].clone();
    let vdi = client.reference("VDI.get_by_uuid", &[json!(disk.vdi)]).await;
    let info = client.ok("VDI.get_nbd_info", &[json!(vdi)]).await;
    let info = &info[0];
    assert!(info["cert"].as_str().unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
    let address = format!("{}:{}", info["address"].as_str().unwrap(), info["port"]);
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.unwrap();
    let name = info["exportname"].as_str().unwrap().as_bytes();
    let mut open = 1_u32.to_be_bytes().to_vec();
    open.extend_from_slice(b"IHAVEOPT");
    open.extend_from_slice(&1_u32.to_be_bytes());
    open.extend_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    open.extend_from_slice(name);
    stream.write_all(&open).await.unwrap();
    let mut answer = [0; 134];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(u64::from_be_bytes(answer[..8].try_into().unwrap()), disk.size);
    assert_eq!(pool.records("VBD").len(), 2);
    let failed = client.failure("VDI.destroy", &[json!(vdi)]).await;
    assert_eq!(failed.0, "VDI_IN_USE");
    let mut read = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
    read.extend_from_slice(&0_u64.to_be_bytes());
    read.extend_from_slice(&4096_u32.to_be_bytes());
    stream.write_all(&read).await.unwrap();
    let mut reply = vec![0; 16 + 4096];
    stream.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply[16..], pool.vdi_read(&disk.vdi, 0, 4096).unwrap());
    let mut end = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2];
    end.extend_from_slice(&[0; 20]);
    stream.write_all(&end).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(pool.records("VBD").len(), 1);
    assert_eq!(pool.counters().nbd_sent_bytes(), 4096);
    pool.set_nbd(NbdAccess::Off);
    assert_eq!(client.ok("VDI.get_nbd_info", &[json!(vdi)]).await, json!([]));
}

#[tokio::test]
async fn tls_shows_the_certificate_that_the_api_gives() {
    let (pool, _) = tls_pool().await;
    let hosts = pool.hosts();
    for (index, host) in hosts.iter().enumerate() {
        let certificate = certificate_of(&host.url).await;
        let digest = ring::digest::digest(&ring::digest::SHA256, &certificate);
        let shown: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(shown, host.fingerprint);
        let has_names = certificate.windows(5).any(|window| window == [0x06, 0x03, 0x55, 0x1d, 0x11]);
        assert_eq!(has_names, index == 0, "only the first has a subjectAltName");
    }
    assert_ne!(hosts[0].fingerprint, hosts[1].fingerprint);
    let reference = pool.records("host").into_iter().find(|(_, record)| record["uuid"] == hosts[1].uuid).unwrap().0;
    let pem = pool.call("host.get_server_certificate", &[json!(reference)]).await.unwrap();
    assert!(pem.as_str().unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
}

async fn tls_pool() -> (SimPool, ()) {
    let options = SimOptions { hosts: 2, ..SimOptions::default() };
    (SimPool::start(options).await.expect("starts"), ())
}

#[derive(Debug)]
struct TakeAny(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for TakeAny {
    fn verify_server_cert(
        &self,
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &[rustls_pki_types::CertificateDer<'_>],
        _: &rustls_pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls_pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls_pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

async fn certificate_of(url: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TakeAny(provider)))
        .with_no_client_auth();
    let stream = TcpStream::connect(url.strip_prefix("https://").unwrap()).await.unwrap();
    let name = "host".try_into().unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test]
async fn the_control_interface_reads_writes_and_counts() {
    let (pool, client) = pool(|_| {}).await;
    let url = pool.control_url();
    let vm = pool.vms()[0].uuid.clone();
    let request = format!("PUT /vms/{vm}/disks/0?offset=65536 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello");
    assert_eq!(exchange(&url, request.as_bytes()).await.start, "HTTP/1.1 200 OK");
    let read = format!("GET /vms/{vm}/disks/0?offset=65536&length=5 HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(exchange(&url, read.as_bytes()).await.body, b"hello");
    let order = json!({"call": "VM.get_all", "effect": "error", "code": "X", "params": ["y"]}).to_string();
    assert_eq!(exchange(&url, &wire::post("/faults", &order)).await.start, "HTTP/1.1 200 OK");
    assert_eq!(client.failure("VM.get_all", &[]).await, ("X".into(), vec!["y".into()]));
    let counters = exchange(&url, b"GET /counters HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let counters: Value = serde_json::from_slice(&counters.body).unwrap();
    assert_eq!(counters["calls"]["VM.get_all"], 1);
    let missing = exchange(&url, b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(missing.start, "HTTP/1.1 404 Not Found");
}
