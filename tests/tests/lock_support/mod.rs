//! What the tests of locks share: one Ceph, users with the documented policy, repositories, and requests that are not the
//! product's.
#![allow(dead_code, reason = "every test file uses a part of it")]

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use xenvault_block::ByteRange;
use xenvault_store::backend::{Backend, BucketOptions, Patience, open_bucket};
use xenvault_store::{
    BlobRef, DiskMapRef, DiskOptions, InitOptions, Level, PointDisk, PointId, PointManifest, Repository, Secret,
    StoreError, WriterOptions,
};
use xenvault_tests::ceph::{ACCESS_KEY, Ceph, SECRET_KEY};
use xenvault_tests::programs::{self, Finished};
use xenvault_tests::s3::{Client, Request};

/// Who asks: access key and secret key.
pub type User = (&'static str, &'static str);
pub const OWNER: User = (ACCESS_KEY, SECRET_KEY);
pub const WRITER: User = ("writer-key", "writer-secret");
pub const KEEPER: User = ("keeper-key", "keeper-secret");
pub const SWEEPER: User = ("sweeper-key", "sweeper-secret");

/// The one Ceph of all tests that run now. It ends with the last of them: whoever needs it holds it.
pub fn ceph() -> Arc<Ceph> {
    static CEPH: Mutex<Weak<Ceph>> = Mutex::new(Weak::new());
    let mut running = CEPH.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(ceph) = running.upgrade() {
        return ceph;
    }
    let ceph = Arc::new(Ceph::start().unwrap());
    for (name, (access_key, secret_key)) in [("writer", WRITER), ("keeper", KEEPER), ("sweeper", SWEEPER)] {
        ceph.add_user(name, access_key, secret_key).unwrap();
    }
    *running = Arc::downgrade(&ceph);
    ceph
}

/// A bucket with object lock under the documented policy.
#[must_use = "Ceph ends when nobody holds it"]
pub fn locked_bucket(name: &str) -> Arc<Ceph> {
    let ceph = ceph();
    ceph.make_bucket(name, true).unwrap();
    set_policy(name);
    ceph
}

/// The bucket's owner says who may do what.
pub fn set_policy(name: &str) {
    let policy = include_str!("../../../docs/s3-bucket-policy.json");
    let policy = policy.replace("BUCKET", name).replace("user/OWNER", "user/adm");
    let policy = policy.replace("user/WRITER", "user/writer").replace("user/KEEPER", "user/keeper");
    let policy = policy.replace("user/SWEEPER", "user/sweeper");
    let (status, said) = ask(OWNER, "PUT", &format!("{name}?policy="), &[], policy.as_bytes());
    assert!(status < 300, "{status}: {said}");
}

pub fn options(user: User, bucket: &str) -> BucketOptions {
    BucketOptions {
        bucket: bucket.to_owned(),
        folder: "site a".to_owned(),
        endpoint: Some(ceph().endpoint()),
        region: "us-east-1".to_owned(),
        access_key: user.0.to_owned(),
        secret_key: user.1.to_owned().into(),
        session_token: None,
        authority: None,
        clear_text: true,
        patience: Patience::default(),
    }
}

pub async fn place(user: User, bucket: &str) -> Arc<dyn Backend> {
    open_bucket(&options(user, bucket)).await.unwrap()
}

pub fn passphrase() -> Secret {
    Secret::new("correct horse battery staple")
}

/// Small packs, so that little data makes many objects.
pub async fn init(place: Arc<dyn Backend>, immutability: &str) -> Result<Repository, StoreError> {
    let mut options = InitOptions::default();
    options.pack_target_bytes = 256 * 1024;
    options.immutability = immutability.parse().unwrap();
    Repository::init_on(place, &passphrase(), options).await
}

pub async fn open(user: User, bucket: &str) -> Repository {
    Repository::open_on(place(user, bucket).await, &passphrase()).await.unwrap()
}

/// A request of our own: the status, and what was answered. `target` is `bucket/object?query` with everything escaped and
/// the query in order, each name with its `=`.
pub fn ask(user: User, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, String) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let client = Client {
        host: ceph().endpoint().trim_start_matches("http://").to_owned(),
        access_key: user.0.to_owned(),
        secret_key: user.1.to_owned(),
    };
    let path = format!("/{path}");
    let answer = client.send(Request { method, path: &path, query, headers, body }).unwrap();
    (answer.status, answer.text())
}

/// Keys and versions of everything in a bucket, cut out of the listing by hand.
pub fn versions(user: User, bucket: &str) -> Vec<(String, String)> {
    let (status, said) = ask(user, "GET", &format!("{bucket}?encoding-type=url&max-keys=1000&versions="), &[], b"");
    assert_eq!(status, 200, "{said}");
    assert!(said.contains("<IsTruncated>false</IsTruncated>"));
    let between = |text: &str, tag: &str| -> String {
        let rest = text.split_once(&format!("<{tag}>")).unwrap().1;
        rest.split_once("</").unwrap().0.to_owned()
    };
    said.split("<Version>").skip(1).map(|piece| (between(piece, "Key"), between(piece, "VersionId"))).collect()
}

/// Bytes that do not compress.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn manifest(map: DiskMapRef, vm_config: BlobRef) -> PointManifest {
    PointManifest {
        id: PointId::random(),
        run_id: uuid::Uuid::new_v4(),
        fencing: 1,
        instance: "test".to_owned(),
        pool_uuid: uuid::Uuid::from_u128(1).to_string(),
        vm_uuid: uuid::Uuid::from_u128(2).to_string(),
        vm_name: "vm".to_owned(),
        level: Level::Full,
        reason: "first-backup".to_owned(),
        created_unix_ms: 1_700_000_000_000,
        parent: None,
        newest_sweep_seen: 0,
        disks: vec![PointDisk {
            vdi_uuid: uuid::Uuid::from_u128(3).to_string(),
            snapshot_vdi_uuid: uuid::Uuid::from_u128(4).to_string(),
            name: "disk".to_owned(),
            device: "0".to_owned(),
            virtual_size: map.virtual_size,
            map,
            level: Level::Full,
            reason: "first-backup".to_owned(),
            changed_bytes: map.virtual_size,
            bitmap: None,
            chain_nonce: None,
            attributes: BTreeMap::new(),
        }],
        vm_config,
        attributes: BTreeMap::new(),
    }
}

pub async fn back_up(repository: &Repository, content: &[u8]) -> Result<PointId, StoreError> {
    let writer = repository.writer(WriterOptions::default()).await?;
    let mut disk = writer.disk(DiskOptions { virtual_size: content.len() as u64, base: None }).await?;
    for (at, piece) in content.chunks(1 << 20).enumerate() {
        disk.write((at as u64) << 20, Bytes::copy_from_slice(piece)).await?;
    }
    let map = disk.finish().await?.map;
    let config = writer.put_blob(b"{}").await?;
    writer.publish(manifest(map, config)).await
}

/// The disk of a point.
pub async fn read(repository: &Repository, point: &PointId) -> Vec<u8> {
    let point = repository.point(point).await.unwrap();
    let map = point.disks[0].map;
    repository.disk(&map).read_at(ByteRange::up_to(map.virtual_size)).await.unwrap().to_vec()
}

/// `xenvault-restore` on the repository in a bucket.
pub fn restore(user: User, bucket: &str, arguments: &[&str]) -> Finished {
    let mut program = programs::program("xenvault-restore").unwrap();
    program.args(arguments).args(["--repository", &format!("s3://{bucket}/site a"), "--s3-accept-clear-text"]);
    program.args(["--s3-endpoint", &ceph().endpoint(), "--cache-limit", "0"]);
    program.env("AWS_ACCESS_KEY_ID", user.0).env("AWS_SECRET_ACCESS_KEY", user.1);
    program.env("XENVAULT_PASSPHRASE", "correct horse battery staple");
    programs::finish(&mut program, "").unwrap()
}

/// The bytes of an object.
pub fn fetch(user: User, target: &str) -> Vec<u8> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let client = Client {
        host: ceph().endpoint().trim_start_matches("http://").to_owned(),
        access_key: user.0.to_owned(),
        secret_key: user.1.to_owned(),
    };
    let path = format!("/{path}");
    client.expect(Request { method: "GET", path: &path, query, ..Request::default() }).unwrap().body
}

/// As `content-md5` has it.
pub fn md5_base64(bytes: &[u8]) -> String {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let mut openssl =
        Command::new("openssl").args(["md5", "-binary"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    openssl.stdin.take().unwrap().write_all(bytes).unwrap();
    let digest = openssl.wait_with_output().unwrap().stdout;
    let mut base64 = Command::new("base64").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    base64.stdin.take().unwrap().write_all(&digest).unwrap();
    String::from_utf8(base64.wait_with_output().unwrap().stdout).unwrap().trim().to_owned()
}
