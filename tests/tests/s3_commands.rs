//! A repository in a bucket from the command line: a VM there and back, and what is told when something is not right.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    missing_docs,
    reason = "a test ends with a panic, and its helpers too"
)]

mod common;

use common::{Bench, one_vm};
use std::path::Path;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use xenvault_tests::ceph::{ACCESS_KEY, Ceph, SECRET_KEY};
use xenvault_tests::programs::{self, Finished};
use xenvault_tests::proxy::{Fault, Kind, Proxy};

fn ceph() -> Ceph {
    let ceph = Ceph::start().unwrap();
    ceph.make_bucket("backups", false).unwrap();
    ceph
}

fn keys(folder: &Path, secret: &str) -> String {
    let file = folder.join("keys");
    std::fs::write(&file, format!("{ACCESS_KEY}\n{secret}\n")).unwrap();
    file.to_str().unwrap().to_owned()
}

fn arguments(bucket: &str, endpoint: &str, keys: &str) -> Vec<String> {
    let bucket = format!("s3://{bucket}/berlin");
    let mut arguments: Vec<String> =
        ["--repository", &bucket, "--s3-endpoint", endpoint, "--s3-keys-file", keys].map(str::to_owned).to_vec();
    if endpoint.starts_with("http://") {
        arguments.push("--s3-accept-clear-text".to_owned());
    }
    arguments
}

#[test]
fn a_vm_goes_into_a_bucket_and_comes_back() {
    let ceph = ceph();
    let mut bench = Bench::without_repository(one_vm());
    let keys = keys(bench.folder.path(), SECRET_KEY);
    bench.elsewhere = Some(arguments("backups", &ceph.endpoint(), &keys));
    let made = bench.datamover("init-repository", &bench.repository_arguments());
    assert_eq!(made.code, Some(0), "{made:?}");
    let made = made.json().unwrap();
    assert_eq!((&made["conditional_put"], &made["versioned"]), (&true.into(), &false.into()));
    assert_eq!(bench.datamover("init-repository", &bench.repository_arguments()).code, Some(8));

    let first = bench.backup("web")["point"].as_str().unwrap().to_owned();
    let before = bench.pool.guest_read("web", "0", 0, 64 << 20).unwrap();
    bench.pool.guest_write("web", "0", 1 << 20, &vec![7; 300_000]).unwrap();
    let second = bench.backup("web")["point"].as_str().unwrap().to_owned();
    let after = bench.pool.guest_read("web", "0", 0, 64 << 20).unwrap();
    assert!(bench.restored_disk(&first, "0") == before && bench.restored_disk(&second, "0") == after);

    // The keys from the environment, and nothing of them in what is said.
    let mut program = bench.program("xenvault-restore");
    program.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
    program.env("AWS_ENDPOINT_URL", ceph.endpoint());
    program.args([
        "--log",
        "debug",
        "verify",
        "--full",
        "--s3-accept-clear-text",
        "--repository",
        "s3://backups/berlin",
    ]);
    let verified = programs::finish(&mut program, "").unwrap();
    assert_eq!(verified.code, Some(0), "{verified:?}");
    assert!(!verified.stderr.contains(SECRET_KEY) && !verified.stdout.contains(SECRET_KEY));
}

#[test]
fn whatever_is_wrong_with_the_object_store_has_its_code_and_its_words() {
    let ceph = ceph();
    let folder = tempfile::tempdir().unwrap();
    let right = keys(folder.path(), SECRET_KEY);
    let run = |arguments: &[String]| -> Finished {
        let mut program = programs::program("xenvault-datamover").unwrap();
        program.env("XENVAULT_PASSPHRASE", "a passphrase").arg("init-repository").args(arguments);
        let finished = programs::finish(&mut program, "").unwrap();
        assert!(!finished.stderr.contains(SECRET_KEY), "{finished:?}");
        finished
    };
    let check = |code: i32, arguments: &[String], words: &[&str]| {
        let finished = run(arguments);
        assert_eq!(finished.code, Some(code), "{arguments:?}: {finished:?}");
        for word in words {
            assert!(finished.stderr.contains(word), "{word:?} is missing: {finished:?}");
        }
    };
    let endpoint = ceph.endpoint();

    check(8, &arguments("no-such-bucket", &endpoint, &right), &["there is no such bucket", "NoSuchBucket"]);
    let mut clear = arguments("backups", &endpoint, &right);
    clear.pop();
    check(2, &clear, &["--s3-accept-clear-text"]);
    check(2, &arguments("", &endpoint, &right), &["s3://BUCKET/FOLDER"]);
    check(2, &arguments("backups", &endpoint, "/no/such/file"), &["/no/such/file"]);
    let mut keyless = arguments("backups", &endpoint, &right);
    keyless.drain(4..6);
    check(2, &keyless, &["--s3-keys-file", "AWS_ACCESS_KEY_ID"]);

    let folder = tempfile::tempdir().unwrap();
    let wrong = keys(folder.path(), "another secret");
    check(3, &arguments("backups", &endpoint, &wrong), &["secret key does not belong", "SignatureDoesNotMatch"]);

    // Nobody listens where somebody did a moment ago.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    check(10, &arguments("backups", &format!("http://{gone}"), &right), &["can not be reached"]);

    let proxy = Proxy::start(ceph.address()).unwrap();
    for (status, word, code, words) in [
        (403, "AccessDenied", 3, "what their policy allows"),
        (403, "InvalidAccessKeyId", 3, "does not know the access key"),
        (403, "RequestTimeTooSkewed", 6, "set this machine's clock"),
        (507, "", 8, "no more room"),
    ] {
        // What is only looked at is answered without words.
        proxy.plan(Kind::Head, Fault::Answer(404, ""), u64::MAX);
        proxy.plan(Kind::Get, Fault::Answer(status, word), u64::MAX);
        check(code, &arguments("backups", &proxy.endpoint(), &right), &[words]);
    }
    proxy.relent();

    // A certificate of nobody that the machine knows, and the same once its authority is given.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let port = runtime.block_on(tls_before(&ceph, &made));
    let secure = format!("https://localhost:{port}");
    check(4, &arguments("backups", &secure, &right), &["no trusted connection"]);
    let authority = folder.path().join("authority.pem");
    std::fs::write(&authority, made.cert.pem()).unwrap();
    let mut trusted = arguments("backups", &secure, &right);
    trusted.extend(["--s3-ca-file".to_owned(), authority.to_str().unwrap().to_owned()]);
    check(0, &trusted, &[]);
}

/// Something that speaks TLS before the gateway; gives its port.
async fn tls_before(ceph: &Ceph, made: &rcgen::CertifiedKey<rcgen::KeyPair>) -> u16 {
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let (acceptor, gateway) = (TlsAcceptor::from(Arc::new(config)), ceph.address());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // A client that does not trust us breaks off.
                let Ok(mut client) = acceptor.accept(client).await else { return };
                let Ok(mut service) = TcpStream::connect(gateway).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut client, &mut service).await;
            });
        }
    });
    port
}
