//! The repository as a program for measuring: makes one, writes disk images into it, reads one back to standard output.
//! `model` writes packs as candidates for the format would, which the repository itself can not. Run by
//! `cargo xtask bench store`, which takes the time and counts the bytes.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod model;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::sync::mpsc;
use xenvault_block::ByteRange;
use xenvault_store::{
    DiskOptions, InitOptions, Level, PointDisk, PointFilter, PointId, PointManifest, Repository, Secret, Writer,
    WriterOptions,
};

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

const PASSPHRASE: &str = "the passphrase of a benchmark";
const USAGE: &str = "store-bench init REPOSITORY [--cut-bits N] [--max-blocks N]
store-bench write REPOSITORY FOLDER [--level N] [--frame BYTES] [--memory BYTES]
store-bench read REPOSITORY DISK
store-bench model FOLDER DISKS... [--average BYTES] [--cut block|fixed|rolling] [--level N] [--frame BYTES] [--hash blake3|sha256] [--dictionary BYTES]";
/// Bytes that are read at once, as from NBD.
const READ_BYTES: usize = 1 << 20;

/// What stands on the command line: `--name value` pairs and the rest.
struct Arguments {
    rest: Vec<String>,
    options: BTreeMap<String, String>,
}

impl Arguments {
    fn parse() -> Self {
        let mut parsed = Self { rest: Vec::new(), options: BTreeMap::new() };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.strip_prefix("--") {
                Some(name) => {
                    parsed.options.insert(name.to_owned(), arguments.next().unwrap_or_default());
                }
                None => parsed.rest.push(argument),
            }
        }
        parsed
    }

    fn number<T: std::str::FromStr>(&self, name: &str, default: T) -> Outcome<T> {
        match self.options.get(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("--{name} {text} is no number").into()),
        }
    }

    fn text<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.options.get(name).map_or(default, String::as_str)
    }
}

#[tokio::main]
async fn main() -> Outcome {
    let arguments = Arguments::parse();
    let words: Vec<&str> = arguments.rest.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["init", repository] => init(repository.as_ref(), &arguments).await,
        ["write", repository, folder] => write(repository.as_ref(), folder.as_ref(), &arguments).await,
        ["read", repository, disk] => read(repository.as_ref(), disk).await,
        ["model", folder, disks @ ..] => {
            let disks: Vec<PathBuf> = disks.iter().map(PathBuf::from).collect();
            model::run(folder.as_ref(), &disks, &arguments)
        }
        _ => Err(USAGE.into()),
    }
}

async fn init(path: &Path, arguments: &Arguments) -> Outcome {
    let mut options = InitOptions::default();
    options.cut_bits = arguments.number("cut-bits", options.cut_bits)?;
    options.max_chunk_blocks = arguments.number("max-blocks", options.max_chunk_blocks)?;
    Repository::init(path, &Secret::new(PASSPHRASE), options).await?;
    Ok(())
}

/// One run: every disk of the folder is read as a whole and becomes a point of its own.
async fn write(path: &Path, folder: &Path, arguments: &Arguments) -> Outcome {
    let repository = Repository::open(path, &Secret::new(PASSPHRASE)).await?;
    let mut options = WriterOptions::default();
    options.compression_level = arguments.number("level", options.compression_level)?;
    options.frame_bytes = arguments.number("frame", options.frame_bytes)?;
    options.memory_bytes = arguments.number("memory", options.memory_bytes)?;
    let mut images: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    images.sort();
    for image in images {
        let name = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let writer = repository.writer(options).await?;
        let disk = write_disk(&writer, &image).await?;
        let vm_config = writer.put_blob(b"{}").await?;
        let progress = writer.counters().progress();
        eprintln!("{name}: {progress:?}");
        writer.publish(manifest(name, disk, vm_config)).await?;
    }
    Ok(())
}

async fn write_disk(writer: &Writer, image: &Path) -> Outcome<PointDisk> {
    let file = File::open(image)?;
    let virtual_size = file.metadata()?.len();
    let (send, mut pieces) = mpsc::channel::<std::io::Result<(u64, Bytes)>>(2);
    let reader = std::thread::spawn(move || {
        if let Err(error) = read_allocated(&file, virtual_size, &send) {
            let _ = send.blocking_send(Err(error));
        }
    });
    let mut disk = writer.disk(DiskOptions { virtual_size, base: None }).await?;
    while let Some(piece) = pieces.recv().await {
        let (offset, bytes) = piece?;
        disk.write(offset, bytes).await?;
    }
    reader.join().map_err(|_| "the reader died")?;
    let map = disk.finish().await?.map;
    Ok(PointDisk {
        vdi_uuid: "00000000-0000-0000-0000-000000000001".to_owned(),
        snapshot_vdi_uuid: "00000000-0000-0000-0000-000000000002".to_owned(),
        name: image.display().to_string(),
        device: "0".to_owned(),
        virtual_size,
        map,
        level: Level::Full,
        reason: "benchmark".to_owned(),
        changed_bytes: virtual_size,
        bitmap: None,
        chain_nonce: None,
        attributes: BTreeMap::new(),
    })
}

/// Reads what is allocated, as a backup does that knows it from the pool.
fn read_allocated(file: &File, size: u64, send: &mpsc::Sender<std::io::Result<(u64, Bytes)>>) -> std::io::Result<()> {
    use rustix::fs::SeekFrom;
    let mut at = 0;
    loop {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(at))?.min(size);
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
            let mut piece = vec![0; wanted];
            file.read_exact_at(&mut piece, at)?;
            at += wanted as u64;
            if send.blocking_send(Ok((at - wanted as u64, piece.into()))).is_err() {
                return Ok(());
            }
        }
    }
}

fn manifest(vm_name: String, disk: PointDisk, vm_config: xenvault_store::BlobRef) -> PointManifest {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    PointManifest {
        id: PointId::random(),
        run_id: uuid::Uuid::new_v4(),
        fencing: 1,
        instance: "benchmark".to_owned(),
        pool_uuid: "pool".to_owned(),
        vm_uuid: vm_name.clone(),
        vm_name,
        level: Level::Full,
        reason: "benchmark".to_owned(),
        created_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        parent: None,
        newest_sweep_seen: 0,
        disks: vec![disk],
        vm_config,
        attributes: BTreeMap::new(),
    }
}

/// The newest state of a disk to standard output, zeros included.
async fn read(path: &Path, disk: &str) -> Outcome {
    let repository = Repository::open(path, &Secret::new(PASSPHRASE)).await?;
    let filter = PointFilter { vm_name: Some(disk.to_owned()), ..PointFilter::default() };
    let listing = repository.points(&filter).await?;
    let newest = listing.points.last().ok_or("there is no point of this disk")?;
    let point = repository.point(&newest.id).await?;
    let map = point.disks.first().ok_or("the point has no disk")?.map;
    let size = map.virtual_size;
    let mut pieces = repository.disk(&map).stream(ByteRange::up_to(size), Default::default());
    let (mut out, zeros, mut position) = (std::io::stdout().lock(), vec![0; READ_BYTES], 0);
    let fill = |out: &mut std::io::StdoutLock<'_>, from: u64, to: u64| -> Outcome {
        let mut left = to - from;
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES);
            out.write_all(zeros.get(..part).unwrap_or_default())?;
            left -= part as u64;
        }
        Ok(())
    };
    while let Some(piece) = pieces.next().await {
        let (offset, bytes) = piece?;
        fill(&mut out, position, offset)?;
        out.write_all(&bytes)?;
        position = offset + bytes.len() as u64;
    }
    fill(&mut out, position, size)?;
    out.flush()?;
    Ok(())
}
