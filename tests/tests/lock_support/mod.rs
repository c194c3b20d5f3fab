//! What the tests of locks share: one Ceph, users with the documented policy, repositories, and an attacker who has the
//! datamover's credential and `curl`.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use xenvault_block::ByteRange;
use xenvault_store::backend::{Backend, BucketOptions, open_bucket};
use xenvault_store::{
    BlobRef, DiskMapRef, DiskOptions, InitOptions, Level, PointDisk, PointId, PointManifest, Repository, Secret,
    StoreError, WriterOptions,
};
use xenvault_tests::ceph::{ACCESS_KEY, Ceph, SECRET_KEY};

/// Who asks: access key and secret key.
pub type User = (&'static str, &'static str);
pub const OWNER: User = (ACCESS_KEY, SECRET_KEY);
pub const WRITER: User = ("writer-key", "writer-secret");
pub const KEEPER: User = ("keeper-key", "keeper-secret");
pub const SWEEPER: User = ("sweeper-key", "sweeper-secret");

/// The one Ceph of this test program. It ends with the process.
pub fn ceph() -> &'static Ceph {
    static CEPH: OnceLock<Ceph> = OnceLock::new();
    CEPH.get_or_init(|| {
        let ceph = Ceph::start().unwrap();
        for (name, (access_key, secret_key)) in [("writer", WRITER), ("keeper", KEEPER), ("sweeper", SWEEPER)] {
            ceph.add_user(name, access_key, secret_key).unwrap();
        }
        ceph
    })
}

/// A bucket with object lock under the documented policy.
pub fn locked_bucket(name: &str) -> &'static Ceph {
    let ceph = ceph();
    ceph.make_bucket(name, true).unwrap();
    let policy = include_str!("../../../docs/s3-bucket-policy.json");
    let policy = policy.replace("BUCKET", name).replace("user/OWNER", "user/adm");
    let policy = policy.replace("user/WRITER", "user/writer").replace("user/KEEPER", "user/keeper");
    let policy = policy.replace("user/SWEEPER", "user/sweeper");
    let (status, said) = curl(OWNER, "PUT", &format!("{name}?policy="), &[], policy.as_bytes());
    assert!(status < 300, "{status}: {said}");
    ceph
}

pub fn options(user: User, bucket: &str) -> BucketOptions {
    BucketOptions {
        bucket: bucket.to_owned(),
        folder: "site a".to_owned(),
        endpoint: Some(ceph().endpoint()),
        region: "us-east-1".to_owned(),
        access_key: user.0.to_owned(),
        secret_key: user.1.to_owned().into(),
        authority: None,
        clear_text: true,
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

/// A request with `curl`: the status, and what was answered. `target` is what follows the endpoint, with everything
/// encoded and the query in order, each name with its `=`.
pub fn curl(user: User, method: &str, target: &str, headers: &[&str], body: &[u8]) -> (u16, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), body).unwrap();
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--request", method, "--write-out", "\n%{http_code}"]);
    curl.args(["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", &format!("{}:{}", user.0, user.1)]);
    curl.args(["--header", "content-type: application/octet-stream"]);
    for header in headers {
        curl.args(["--header", header]);
    }
    if !body.is_empty() {
        curl.args(["--data-binary", &format!("@{}", file.path().display())]);
    }
    let output = curl.arg(format!("{}/{target}", ceph().endpoint())).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (said, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), said.to_owned())
}

/// Keys and versions of everything in a bucket, cut out of the listing by hand.
pub fn versions(user: User, bucket: &str) -> Vec<(String, String)> {
    let (status, said) = curl(user, "GET", &format!("{bucket}?encoding-type=url&max-keys=1000&versions="), &[], b"");
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
