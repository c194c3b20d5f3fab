//! Measures what forgetting costs: `expire FOLDER [POINTS]` makes a repository with that many points of 20 VMs and some
//! that stay, forgets them, and sweeps. Prints one figure a line.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a tool for developers")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use xenvault_store::{
    DiskMapRef, DiskOptions, Level, PointDisk, PointId, PointManifest, Repository, Secret, SweepOptions, Writer,
    WriterOptions,
};

const VMS: usize = 20;
const DISK_BYTES: u64 = 256 << 20;
/// Points of each VM that stay.
const STAYING: usize = 10;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().unwrap();
    let points: usize = arguments.next().map_or(1000, |points| points.parse().unwrap());
    let repository = Repository::init(folder.as_ref(), &Secret::new("expire"), Default::default()).await.unwrap();
    let (mut going, mut staying) = (Vec::new(), 0);
    for vm in 0..VMS {
        let mut base = None;
        let count = points / VMS + STAYING;
        for number in 0..count {
            let (id, map) = back_up(&repository, vm, number as u64, base).await;
            base = Some(map);
            if number + STAYING < count { going.push(id) } else { staying += 1 }
        }
    }
    let packs = packs(Path::new(&folder));
    println!("points {}", going.len() + staying);

    let began = Instant::now();
    repository.forget(&going, "expired").await.unwrap();
    println!("forgotten {}", going.len());
    println!("forget_seconds {}", began.elapsed().as_secs_f64());
    println!(
        "packs_changed_by_forget {}",
        packs.iter().zip(self::packs(Path::new(&folder))).filter(|(a, b)| *a != b).count()
    );

    let mut options = SweepOptions::default();
    (options.grace, options.confirm_many) = (Duration::from_secs(3600), true);
    let began = Instant::now();
    let announced = repository.sweep(options).await.unwrap();
    println!("announce_seconds {}", began.elapsed().as_secs_f64());
    println!("announced {}", announced.begun.map_or(0, |begun| begun.points.len()));
    let listed = Instant::now();
    let left = repository.points(&Default::default()).await.unwrap().points.len();
    println!("list_seconds {}", listed.elapsed().as_secs_f64());
    println!("left {left}");
    println!("staying {staying}");
}

/// One run of a VM: a new disk, or some changes over the one before.
async fn back_up(repository: &Repository, vm: usize, number: u64, base: Option<DiskMapRef>) -> (PointId, DiskMapRef) {
    let writer: Writer = repository.writer(WriterOptions::default()).await.unwrap();
    let mut disk = writer.disk(DiskOptions { virtual_size: DISK_BYTES, base }).await.unwrap();
    let mut places: Vec<u64> = match base {
        Some(_) => (0..4).map(|piece| (number * 7 + piece * 61) % 256).collect(),
        None => (0..32).map(|piece| piece * 8).collect(),
    };
    places.sort_unstable();
    for &place in &places {
        let mut bytes = vec![0_u8; 64 << 10];
        for (block, part) in (0_u64..).zip(bytes.chunks_mut(32)) {
            let words = [vm as u64, number, place, block].map(|word| (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            part.iter_mut().zip(words.iter().flat_map(|word| word.to_le_bytes())).for_each(|(to, from)| *to = from);
        }
        disk.write(place << 20, Bytes::from(bytes)).await.unwrap();
    }
    let map = disk.finish().await.unwrap().map;
    let vm_config = writer.put_blob(format!("configuration of VM {vm}").as_bytes()).await.unwrap();
    let disk = PointDisk {
        vdi_uuid: format!("vdi-{vm}"),
        snapshot_vdi_uuid: format!("snapshot-{number}"),
        name: "disk".to_owned(),
        device: "0".to_owned(),
        virtual_size: DISK_BYTES,
        map,
        level: Level::Inc,
        reason: "changed-blocks".to_owned(),
        changed_bytes: (places.len() as u64) << 16,
        bitmap: None,
        chain_nonce: None,
        attributes: BTreeMap::new(),
    };
    let id = PointId::random();
    let manifest = PointManifest {
        id,
        run_id: uuid::Uuid::new_v4(),
        fencing: 1,
        instance: "expire".to_owned(),
        pool_uuid: "pool".to_owned(),
        vm_uuid: format!("vm-{vm}"),
        vm_name: format!("vm {vm}"),
        level: Level::Inc,
        reason: "changed-blocks".to_owned(),
        created_unix_ms: 1_700_000_000_000 + number * 3_600_000,
        parent: None,
        newest_sweep_seen: 0,
        disks: vec![disk],
        vm_config,
        attributes: BTreeMap::new(),
    };
    (writer.publish(manifest).await.unwrap(), map)
}

/// Every pack with its length and time.
fn packs(folder: &Path) -> Vec<(std::path::PathBuf, u64, std::time::SystemTime)> {
    let mut found = Vec::new();
    for folder in std::fs::read_dir(folder.join("packs")).unwrap() {
        for pack in std::fs::read_dir(folder.unwrap().path()).unwrap() {
            let pack = pack.unwrap();
            let metadata = pack.metadata().unwrap();
            found.push((pack.path(), metadata.len(), metadata.modified().unwrap()));
        }
    }
    found.sort();
    found
}
