//! Measures a repository in one process: `throughput FOLDER [MIB]` writes noise, text, the same again, and zeros as
//! disks of that size, publishes a point of each, reads it back as a stream, and prints rates and the peak of memory.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, reason = "a tool for developers")]

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;
use futures::TryStreamExt as _;
use xenvault_store::{
    ByteRange, DiskOptions, Level, PointDisk, PointId, PointManifest, Repository, Secret, WriterOptions,
};

const PIECE: usize = 1 << 20;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().unwrap();
    let mib: u64 = arguments.next().map_or(1024, |mib| mib.parse().unwrap());
    let repository = Repository::init(folder.as_ref(), &Secret::new("throughput"), Default::default()).await.unwrap();
    println!("{mib} MiB each, peak of memory after opening {} MiB", peak_mib());
    let noise = random(32 << 20);
    // About what zstd makes of ordinary files: half of each run of 64 bytes repeats.
    let text: Vec<u8> = noise.chunks(32).flat_map(|part| [part, &[b'x'; 32]].concat()).take(32 << 20).collect();
    println!("peak of memory with the sources {} MiB, now {} MiB", memory_mib("VmHWM:"), memory_mib("VmRSS:"));
    for (name, source, salt) in [("noise", &noise, 1), ("text", &text, 2), ("text again", &text, 2)] {
        let writer = repository.writer(WriterOptions::default()).await.unwrap();
        let counters = writer.counters();
        let began = Instant::now();
        let mut disk = writer.disk(DiskOptions { virtual_size: mib << 20, base: None }).await.unwrap();
        for number in 0..mib {
            let at = usize::try_from(number % 31).unwrap() << 20;
            let mut piece = source[at..at + PIECE].to_vec();
            // Every block of every piece is another one.
            piece.chunks_mut(4096).enumerate().for_each(|(block, bytes)| {
                bytes[..16].copy_from_slice(&(u128::from(number) << 64 | (block as u128) << 8 | salt).to_le_bytes());
            });
            disk.write(number << 20, Bytes::from(piece)).await.unwrap();
        }
        let result = disk.finish().await.unwrap();
        let config = writer.put_blob(b"{}").await.unwrap();
        writer.publish(manifest(result.map, config)).await.unwrap();
        let seconds = began.elapsed().as_secs_f64();
        let progress = counters.progress();
        println!(
            "write {name}: {:.0} MiB/s, stored {} MiB, busiest {:?}, {:?}",
            mib as f64 / seconds,
            progress.stored_bytes >> 20,
            progress.busiest(),
            progress.busy
        );
        let began = Instant::now();
        let mut stream = repository.disk(&result.map).stream(ByteRange::up_to(mib << 20), Default::default());
        let mut read = 0;
        while let Some((_, bytes)) = stream.try_next().await.unwrap() {
            read += bytes.len() as u64;
        }
        println!("read {name}: {:.0} MiB/s", (read >> 20) as f64 / began.elapsed().as_secs_f64());
        println!("peak of memory {} MiB", peak_mib());
    }
}

fn random(length: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

fn peak_mib() -> u64 {
    memory_mib("VmHWM:")
}

fn memory_mib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024
}

fn manifest(map: xenvault_store::DiskMapRef, vm_config: xenvault_store::BlobRef) -> PointManifest {
    let disk = PointDisk {
        vdi_uuid: "vdi".to_owned(),
        snapshot_vdi_uuid: "snapshot".to_owned(),
        name: "disk".to_owned(),
        device: "0".to_owned(),
        virtual_size: map.virtual_size,
        map,
        level: Level::Full,
        reason: "measurement".to_owned(),
        changed_bytes: map.virtual_size,
        bitmap: None,
        chain_nonce: None,
        attributes: BTreeMap::new(),
    };
    PointManifest {
        id: PointId::random(),
        run_id: uuid::Uuid::new_v4(),
        fencing: 0,
        instance: "measurement".to_owned(),
        pool_uuid: "pool".to_owned(),
        vm_uuid: "vm".to_owned(),
        vm_name: "vm".to_owned(),
        level: Level::Full,
        reason: "measurement".to_owned(),
        created_unix_ms: 0,
        parent: None,
        newest_sweep_seen: 0,
        disks: vec![disk],
        vm_config,
        attributes: BTreeMap::new(),
    }
}
