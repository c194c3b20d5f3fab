//! The attacker: who has the datamover's key and credential, and code of its own. Every point that is under lock restores
//! afterwards.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test ends with a panic, and its helpers too"
)]

mod lock_support;

use lock_support::{
    KEEPER, OWNER, SWEEPER, User, WRITER, ask, back_up, init, locked_bucket, noise, open, passphrase, place, read,
    restore, set_policy, versions,
};
use std::collections::HashMap;
use std::time::Duration;
use xenvault_store::{
    KeepOptions, PointFilter, PointId, Repository, StoreError, SweepOptions, VerifyMode, VerifyOptions,
};
use xenvault_store_format::{
    DamageMark, DamagedCopy, ForgottenPoint, IndexEntry, KeySlot, Keys, PackId, Placement, Record, RecordId, RunPart,
    SegmentContent, SlotSecret, SweepEnd, SweepIntent, Tombstone, encode_index, encode_record,
};

/// The folder of the repository, as an address has it.
const FOLDER: &str = "site%20a";

/// Somebody with the keys of a user of the service.
struct Attacker {
    user: User,
    bucket: &'static str,
}

impl Attacker {
    fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> u16 {
        ask(self.user, method, target, headers, body).0
    }

    fn put(&self, name: &str, body: &[u8]) {
        let status = self.ask("PUT", &format!("{}/{FOLDER}/{name}", self.bucket), &[], body);
        assert_eq!(status, 200, "what may be written can be overwritten: {name}");
    }

    /// Everything that can be tried with each version of each object. Says how many versions it removed.
    fn harm_objects(&self) -> usize {
        let all = versions(OWNER, self.bucket);
        let count = all.len();
        let mut list = String::new();
        for (key, version) in &all {
            let key = key.replace("%2F", "/");
            list.push_str(&format!(
                "<Object><Key>{}</Key><VersionId>{version}</VersionId></Object>",
                key.replace("%20", " ")
            ));
            let object = format!("{}/{key}", self.bucket);
            self.ask("DELETE", &format!("{object}?versionId={version}"), &[], b"");
            for mode in ["GOVERNANCE", "COMPLIANCE"] {
                let earlier = format!(
                    "<Retention><Mode>{mode}</Mode><RetainUntilDate>2026-01-01T00:00:00Z</RetainUntilDate></Retention>"
                );
                let target = format!("{object}?retention=&versionId={version}");
                self.ask("PUT", &target, &[], earlier.as_bytes());
            }
            self.ask(
                "PUT",
                &format!("{object}?legal-hold=&versionId={version}"),
                &[],
                b"<LegalHold><Status>OFF</Status></LegalHold>",
            );
            self.ask("PUT", &format!("{object}?acl="), &[("x-amz-acl", "public-read-write")], b"");
            // Overwritten, cut to nothing, then deleted.
            self.ask("PUT", &object, &[], b"junk");
            self.ask("PUT", &object, &[], b"");
            self.ask("DELETE", &object, &[], b"");
        }
        let body = format!("<Delete>{list}</Delete>");
        let md5 = md5_of(body.as_bytes());
        self.ask("POST", &format!("{}?delete=", self.bucket), &[("content-md5", &md5)], body.as_bytes());
        let left = versions(OWNER, self.bucket);
        all.into_iter().filter(|version| !left.contains(version)).count().min(count)
    }

    fn harm_bucket(&self) -> Vec<u16> {
        let bucket = self.bucket;
        let rule = "<LifecycleConfiguration><Rule><ID>x</ID><Prefix></Prefix><Status>Enabled</Status>\
             <Expiration><Days>1</Days></Expiration>\
             <NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays></NoncurrentVersionExpiration>\
             </Rule></LifecycleConfiguration>";
        let md5 = md5_of(rule.as_bytes());
        let suspended = "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>";
        let policy = format!(
            "{{\"Version\":\"2012-10-17\",\"Statement\":[{{\"Effect\":\"Allow\",\"Principal\":\"*\",\
             \"Action\":\"s3:*\",\"Resource\":[\"arn:aws:s3:::{bucket}\",\"arn:aws:s3:::{bucket}/*\"]}}]}}"
        );
        vec![
            self.ask("PUT", &format!("{bucket}?lifecycle="), &[("content-md5", &md5)], rule.as_bytes()),
            self.ask("PUT", &format!("{bucket}?versioning="), &[], suspended.as_bytes()),
            self.ask("PUT", &format!("{bucket}?policy="), &[], policy.as_bytes()),
            self.ask("DELETE", &format!("{bucket}?policy="), &[], b""),
            self.ask("PUT", &format!("{bucket}?acl="), &[("x-amz-acl", "public-read-write")], b""),
            self.ask("DELETE", bucket, &[], b""),
        ]
    }

    /// What does not open, under every name that a repository has or may have.
    fn put_junk(&self) {
        for name in [
            "config",
            "keys/1",
            "keys/2",
            "index/junk",
            "points/junk",
            "packs/junk",
            "records/junk",
            "sweeps/junk",
            "sweeps/1/intent",
            "sweeps/1/end",
            "sweeps/2/intent",
            "sweeps/77/intent",
            "sweeps/77/end",
            "records/tombstones/junk",
            "records/receipts/junk",
            "records/undone/junk",
            "records/damage/junk",
            "index/00000000000000000000000000000000",
            "packs/00/00000000000000000000000000000000",
        ] {
            self.put(name, b"junk");
        }
    }

    fn put_record<R: Record>(&self, keys: &Keys, name: &str, record: &R) {
        self.put(name, &encode_record(keys, record).unwrap());
    }

    /// What opens, since the datamover's key has sealed it: everything is forgotten, condemned, damaged and swept.
    fn forge(&self, keys: &Keys, points: &[PointId]) {
        let (pool_uuid, vm_uuid) = (uuid::Uuid::from_u128(1).to_string(), uuid::Uuid::from_u128(2).to_string());
        let mut forgotten = Vec::new();
        for point in points {
            let id = RecordId::random();
            let (pool_uuid, vm_uuid) = (pool_uuid.clone(), vm_uuid.clone());
            let tombstone = Tombstone {
                id,
                point: *point,
                pool_uuid: pool_uuid.clone(),
                vm_uuid: vm_uuid.clone(),
                created_unix_ms: 0,
                reason: String::new(),
            };
            self.put_record(keys, &format!("records/tombstones/{point}.{id}"), &tombstone);
            forgotten.push(ForgottenPoint { point: *point, pool_uuid, vm_uuid, tombstone: id });
        }
        let names: Vec<String> =
            versions(OWNER, self.bucket).into_iter().map(|(key, _)| key.replace("%2F", "/")).collect();
        let of = |folder: &str| -> Vec<String> {
            let marker = format!("{FOLDER}/{folder}/");
            names.iter().filter_map(|name| name.strip_prefix(&marker)).map(str::to_owned).collect()
        };
        let mut condemned: Vec<PackId> =
            of("packs").iter().filter_map(|name| name.rsplit('/').next()?.parse().ok()).collect();
        condemned.sort_unstable();
        condemned.dedup();
        let mut stale_records = of("records");
        stale_records.dedup();
        // Damage everywhere, and an index that leads every chunk astray.
        let mark = DamageMark {
            id: RecordId::random(),
            created_unix_ms: 0,
            copies: Vec::<DamagedCopy>::new(),
            packs: condemned.clone(),
        };
        self.put_record(keys, &format!("records/damage/{}", mark.id), &mark);
        let chunks = chunks_of(keys, self, &of("index"));
        let astray: Vec<IndexEntry> = chunks
            .into_iter()
            .map(|entry| IndexEntry {
                pack: PackId::from_bytes([7; 16]),
                placement: Placement { offset: entry.placement.offset, ..entry.placement },
                ..entry
            })
            .collect();
        assert!(astray.len() > 4);
        // And one that says that it knows everything in every pack, or that all of them are gone.
        let lies = [
            SegmentContent { entries: astray, ..SegmentContent::default() },
            SegmentContent { packs: condemned.clone(), ..SegmentContent::default() },
            SegmentContent { gone: condemned.clone(), ..SegmentContent::default() },
        ];
        for (number, lie) in (10_u8..).zip(lies) {
            let segment = encode_index(keys, RunPart::alone([number; 16]), lie).unwrap();
            self.put(&format!("index/ffffffffffffffffffffffffffffff{number}"), &segment);
        }
        for number in 1..=3_u64 {
            let intent = SweepIntent {
                number,
                created_unix_ms: 0,
                grace_seconds: 0,
                forgotten: forgotten.clone(),
                condemned: condemned.clone(),
                stale_records: stale_records.clone(),
            };
            self.put_record(keys, &format!("sweeps/{number}/intent"), &intent);
            if number < 3 {
                let end = SweepEnd {
                    number,
                    ended_unix_ms: 0,
                    removed_points: 0,
                    removed_packs: 0,
                    removed_bytes: 0,
                    carried_bytes: 0,
                    kept: Vec::new(),
                };
                self.put_record(keys, &format!("sweeps/{number}/end"), &end);
            }
        }
    }
}

/// The chunks that the repository's own segments name.
fn chunks_of(keys: &Keys, attacker: &Attacker, segments: &[String]) -> Vec<IndexEntry> {
    let mut entries = Vec::new();
    for name in segments {
        for (key, version) in versions(OWNER, attacker.bucket) {
            if key.replace("%2F", "/") != format!("{FOLDER}/index/{name}") {
                continue;
            }
            let bytes =
                get(attacker.user, &format!("{}/{key}?versionId={version}", attacker.bucket).replace("%2F", "/"));
            if let Ok(layout) = xenvault_store_format::IndexLayout::check(&bytes, keys) {
                entries.extend((0..layout.len()).filter_map(|number| layout.entry(&bytes, number)));
            }
        }
    }
    let mut by_id: HashMap<_, _> = entries.into_iter().map(|entry| (entry.id, entry)).collect();
    by_id.drain().map(|(_, entry)| entry).collect()
}

fn get(user: User, target: &str) -> Vec<u8> {
    lock_support::fetch(user, target)
}

fn md5_of(bytes: &[u8]) -> String {
    lock_support::md5_base64(bytes)
}

/// The keys, by the passphrase that the datamover has.
fn keys(bucket: &str) -> Keys {
    let first = versions(OWNER, bucket).into_iter().rfind(|(key, _)| key.ends_with("keys%2F1")).unwrap();
    let slot = get(WRITER, &format!("{bucket}/{FOLDER}/keys/1?versionId={}", first.1));
    let slot = KeySlot::decode(&slot).unwrap();
    let material = slot.unwrap(&SlotSecret::new(&passphrase()).unwrap()).unwrap().unwrap();
    Keys::of_material(material, slot.repository()).unwrap()
}

async fn restores(repository: &Repository, contents: &[(PointId, Vec<u8>)]) {
    let listing = repository.points(&PointFilter::default()).await.unwrap();
    for (point, content) in contents {
        assert!(listing.points.iter().any(|found| found.id == *point), "{point} is not listed: {listing:?}");
        assert!(read(repository, point).await == *content, "{point}");
    }
}

async fn sweep(bucket: &str) -> Result<(), StoreError> {
    let mut options = SweepOptions::default();
    options.grace = Duration::ZERO;
    options.confirm_many = true;
    options.accept_lost_points = true;
    open(SWEEPER, bucket).await.sweep(options).await.map(drop)
}

async fn attack(bucket: &'static str, mode: &str) {
    let ceph = locked_bucket(bucket);
    init(place(SWEEPER, bucket).await, &format!("object-lock:{mode}:1d")).await.unwrap();
    let mut contents = Vec::new();
    for seed in 0..2 {
        let mut content = noise(seed, 1 << 20);
        // Of the second one a half is of the first.
        content[..1 << 19].copy_from_slice(&noise(0, 1 << 19));
        contents.push((back_up(&open(WRITER, bucket).await, &content).await.unwrap(), content));
    }
    let points: Vec<PointId> = contents.iter().map(|(point, _)| *point).collect();
    restores(&open(WRITER, bucket).await, &contents).await;
    let before = versions(OWNER, bucket);

    // With the datamover's credential, which the policy binds to writing.
    let datamover = Attacker { user: WRITER, bucket };
    assert!(datamover.harm_bucket().iter().all(|status| (400..500).contains(status)), "{:?}", datamover.harm_bucket());
    assert_eq!(datamover.harm_objects(), 0, "the datamover's credential removes nothing, not even its own junk");
    datamover.put_junk();
    restores(&open(WRITER, bucket).await, &contents).await;
    // Junk stops nobody: writers write, the keeper keeps, the sweeper sweeps.
    let content = noise(9, 1 << 20);
    contents.push((back_up(&open(WRITER, bucket).await, &content).await.unwrap(), content));
    let kept = open(KEEPER, bucket).await.keep(KeepOptions::default()).await.unwrap();
    assert_eq!((kept.points, kept.missing.len(), kept.hurt.len()), (3, 0, 0), "{kept:?}");
    sweep(bucket).await.unwrap();
    restores(&open(WRITER, bucket).await, &contents).await;

    // With its key too.
    datamover.forge(&keys(bucket), &points);
    for _ in 0..3 {
        // Whether it sweeps or refuses: nothing that is under lock goes.
        let _ = sweep(bucket).await;
    }
    let listing = open(WRITER, bucket).await.points(&PointFilter::default()).await.unwrap();
    assert_eq!(listing.promised.len(), points.len(), "the forged tombstones were seen, and wait");
    restores(&open(WRITER, bucket).await, &contents).await;
    restores(&open(WRITER, bucket).await.without_deletions().unwrap(), &contents).await;
    let kept = open(KEEPER, bucket).await.keep(KeepOptions::default()).await.unwrap();
    assert_eq!((kept.points, kept.hurt.len()), (3, 0), "{kept:?}");
    for point in &points {
        let proof = open(KEEPER, bucket).await.protection(point).await.unwrap();
        assert!(proof.unprotected.is_empty() && proof.earliest.unwrap().1 >= proof.promised_until.unwrap());
    }

    // With the bucket owner's credential, whom no policy binds; without its right to lift GOVERNANCE.
    let owner = Attacker { user: OWNER, bucket };
    owner.harm_objects();
    owner.harm_bucket();
    let after = versions(OWNER, bucket);
    assert!(before.iter().all(|version| after.contains(version)), "a locked version is gone");
    // The one thing that has to be mended: the owner may not read what others wrote unless the policy says so.
    set_policy(bucket);
    restores(&open(OWNER, bucket).await, &contents).await;
    let fresh = open(OWNER, bucket).await;
    let mut options = VerifyOptions::default();
    (options.mode, options.write) = (VerifyMode::Full, false);
    let report = fresh.verify(options).await.unwrap();
    assert!(report.hurt.is_empty(), "{:?}", report.hurt);
    // By the restore program, with plain options.
    for (point, content) in &contents {
        let to = tempfile::tempdir().unwrap();
        let file = to.path().join("disk");
        let name = point.to_string();
        let arguments = ["disk", &name, "0", "--to", file.to_str().unwrap()];
        let finished = restore(OWNER, bucket, &arguments);
        assert_eq!(finished.code, Some(0), "{finished:?}");
        assert!(std::fs::read(&file).unwrap() == *content, "{point}");
    }
    let listed = restore(OWNER, bucket, &["points"]);
    // The junk beside the points is named, and makes the exit code.
    assert!(listed.code == Some(9) && listed.stdout.contains("DAMAGED points/junk"), "{listed:?}");
    assert!(contents.iter().all(|(point, _)| listed.stdout.contains(&point.to_string())), "{listed:?}");
    let packs = report.disturbed.iter().filter(|disturbed| disturbed.object.starts_with("packs/")).count();
    assert!(packs > 8 && report.disturbed.iter().any(|disturbed| disturbed.object == "config"), "{packs}");
    drop(ceph);
}

#[tokio::test(flavor = "multi_thread")]
async fn points_under_compliance_locks_restore_after_an_attack() {
    attack("attacked-compliance", "compliance").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn points_under_governance_locks_restore_after_an_attack() {
    attack("attacked-governance", "governance").await;
}
