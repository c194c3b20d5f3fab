//! An index of any size, for measuring: `make` writes segments for chunks that were never stored, as backups and merges
//! leave them, `look` opens the repository and looks chunks up. Run by `cargo xtask measure index`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use xenvault_store::{InitOptions, Repository, Secret, WriterOptions};
use xenvault_store_format::{
    ChunkId, ChunkKind, IndexEntry, KeySlot, Keys, PackId, Placement, RunPart, SegmentContent, SlotSecret,
    encode_index, parts_for,
};

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

const PASSPHRASE: &str = "the passphrase of a benchmark";
/// Chunks of 32 KiB that fill a pack of 32 MiB when they shrink to two thirds.
const CHUNKS_PER_PACK: u64 = 1_536;
/// How many of a thousand chunks lie in how many runs of which level: what sixteen-fold merging leaves.
const SHAPE: [(u8, u64, u64); 4] = [(3, 700, 1), (2, 276, 6), (1, 22, 10), (0, 2, 10)];

/// One run of the index.
#[derive(Clone, Copy)]
struct Run {
    number: u64,
    level: u8,
    entries: u64,
    /// Number of its first pack.
    first_pack: u64,
    parts: u32,
}

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["make", folder, chunks] => make(Path::new(folder), chunks.parse()?),
        ["look", folder, chunks, lookups] => look(Path::new(folder), chunks.parse()?, lookups.parse()?),
        _ => Err("index-scale make REPOSITORY CHUNKS\nindex-scale look REPOSITORY CHUNKS LOOKUPS".into()),
    }
}

fn runs(chunks: u64) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut first_pack = 0;
    for (level, thousandths, count) in SHAPE {
        for _ in 0..count {
            let entries = (chunks / 1_000 * thousandths / count).max(1);
            let number = runs.len() as u64;
            runs.push(Run { number, level, entries, first_pack, parts: parts_for(entries) });
            first_pack += entries.div_ceil(CHUNKS_PER_PACK);
        }
    }
    runs
}

impl Run {
    fn packs(&self) -> u64 {
        self.entries.div_ceil(CHUNKS_PER_PACK)
    }

    /// Entry `number` of the run: ids rise with the number, evenly but for some noise.
    fn entry(&self, number: u64) -> IndexEntry {
        let step = u64::MAX / self.entries;
        let key = step * number + mix(self.number << 48 ^ number) % step.max(1);
        let mut id = [0; 32];
        for (at, part) in id.chunks_exact_mut(8).enumerate() {
            let seed = mix(self.number << 40 ^ number ^ (at as u64) << 60);
            part.copy_from_slice(&(if at == 0 { key.to_be_bytes() } else { seed.to_le_bytes() }));
        }
        let pack = self.first_pack + mix(number ^ 0x5eed) % self.packs();
        let offset = u32::try_from(mix(number) % (32 << 20)).unwrap_or(0);
        let placement = Placement { offset, length: 180_000, frame: 7, part: 3 };
        IndexEntry { id: ChunkId::from_bytes(id), pack: pack_id(pack), placement, kind: ChunkKind::Data }
    }
}

fn pack_id(number: u64) -> PackId {
    let mut id = [0; 16];
    let (left, right) = id.split_at_mut(8);
    left.copy_from_slice(&mix(number ^ 0xaaaa).to_be_bytes());
    right.copy_from_slice(&number.to_be_bytes());
    PackId::from_bytes(id)
}

/// SplitMix64.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[tokio::main(flavor = "multi_thread")]
async fn make(folder: &Path, chunks: u64) -> Outcome {
    let passphrase = Secret::new(PASSPHRASE);
    let repository = Repository::init(folder, &passphrase, InitOptions::default()).await?;
    let slot = first_file(&folder.join("keys"))?;
    let secret = SlotSecret::new(&passphrase)?;
    let material = KeySlot::decode(&std::fs::read(slot)?)?.unwrap(&secret)?.ok_or("the slot does not open")?;
    let keys = Keys::of_material(material, repository.id())?;
    let runs = runs(chunks);
    for number in 0..=u8::MAX {
        std::fs::create_dir_all(folder.join(format!("packs/{number:02x}")))?;
    }
    let packs: u64 = runs.iter().map(Run::packs).sum();
    for number in 0..packs {
        // Only its name counts here: the index says what is in it.
        let id = pack_id(number);
        std::fs::File::create(folder.join(format!("packs/{:02x}/{id}", id.as_bytes()[0])))?;
    }
    std::fs::create_dir_all(folder.join("index"))?;
    let jobs: Vec<(Run, u32)> = runs.iter().flat_map(|run| (0..run.parts).map(|part| (*run, part))).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let work = || -> Outcome {
            while let Some((run, part)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                std::fs::write(
                    folder.join(format!("index/{:08x}{part:08x}", run.number)),
                    segment(&keys, *run, *part)?,
                )?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread died")?)
    })?;
    let bytes: u64 = std::fs::read_dir(folder.join("index"))?
        .map(|entry| entry.and_then(|entry| entry.metadata()).map(|data| data.len()))
        .sum::<Result<u64, _>>()?;
    println!("chunks {}", runs.iter().map(|run| run.entries).sum::<u64>());
    println!("packs {packs}\nsegments {}\nindex_bytes {bytes}", jobs.len());
    Ok(())
}

fn segment(keys: &Keys, run: Run, part: u32) -> Outcome<Vec<u8>> {
    let mut name = [0; 16];
    name[..8].copy_from_slice(&(run.number + 1).to_le_bytes());
    let place = RunPart { run: name, part, parts: run.parts, level: run.level };
    // Numbers near the borders of the part may belong to its neighbours.
    let per_part = run.entries / u64::from(run.parts);
    let from = (per_part * u64::from(part)).saturating_sub(run.entries / 1_000 + 1_000);
    let to = (per_part * (u64::from(part) + 1) + run.entries / 1_000 + 1_000).min(run.entries);
    let entries = (from..to).map(|number| run.entry(number));
    let entries: Vec<_> = entries.filter(|entry| RunPart::of_chunk(&entry.id, run.parts) == part).collect();
    let packs = (run.first_pack..run.first_pack + run.packs()).map(pack_id);
    let packs = packs.filter(|pack| RunPart::of_pack(pack, run.parts) == part).collect();
    Ok(encode_index(keys, place, SegmentContent { packs, entries, gone: Vec::new() })?)
}

#[tokio::main(flavor = "multi_thread")]
async fn look(folder: &Path, chunks: u64, lookups: u64) -> Outcome {
    let began = Instant::now();
    let repository = Repository::open(folder, &Secret::new(PASSPHRASE)).await?;
    println!("unlock_seconds {:.3}", began.elapsed().as_secs_f64());
    let began = Instant::now();
    let writer = repository.writer(WriterOptions::default()).await?;
    println!("open_seconds {:.3}", began.elapsed().as_secs_f64());
    println!("open_anonymous_bytes {}", anonymous()?);
    let runs = runs(chunks);
    let total: u64 = runs.iter().map(|run| run.entries).sum();
    let mut seconds = [0.0; 2];
    for (known, seconds) in [true, false].into_iter().zip(&mut seconds) {
        let wanted = |number: u64| {
            let mut at = mix(number ^ u64::from(known) << 50) % total;
            let run = runs.iter().find(|run| match at.checked_sub(run.entries) {
                Some(rest) => {
                    at = rest;
                    false
                }
                None => true,
            });
            run.map(|run| {
                let mut id = *run.entry(at).id.as_bytes();
                id[31] ^= u8::from(!known);
                id[20] ^= u8::from(!known);
                ChunkId::from_bytes(id)
            })
        };
        let began = Instant::now();
        let found = (0..lookups).filter_map(wanted).filter(|id| repository.knows(id, ChunkKind::Data)).count() as u64;
        *seconds = began.elapsed().as_secs_f64();
        if found != if known { lookups } else { 0 } {
            return Err(format!("{found} of {lookups} chunks were found").into());
        }
    }
    println!("lookups {lookups}\nknown_seconds {:.3}\nunknown_seconds {:.3}", seconds[0], seconds[1]);
    println!("anonymous_bytes {}", anonymous()?);
    drop(writer);
    Ok(())
}

/// Memory that no file stands behind, in bytes.
fn anonymous() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

fn first_file(folder: &Path) -> Outcome<PathBuf> {
    Ok(std::fs::read_dir(folder)?.next().ok_or("no key slot")??.path())
}
