//! Candidates for the format that the repository itself does not offer: the same packs, frames, seals and index segments,
//! written by one thread, with other ways to cut, to name and to compress chunks. No disk maps and no points.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use xenvault_store_format::{
    ChunkId, ChunkKind, Chunker, Compressor, Config, CutRule, IndexEntry, Keys, MAX_FRAME_CHUNKS, MAX_PLAIN_BYTES,
    MasterKey, PackClass, PackEncoder, RepositoryId, RunPart, SegmentContent, encode_index,
};

use crate::{Arguments, Outcome};

const BLOCK: usize = 4096;
const PACK_BYTES: usize = 32 << 20;

/// How chunks are named.
#[derive(Clone, Copy)]
enum Naming {
    Blake3,
    Sha256,
}

struct Packer {
    folder: PathBuf,
    keys: Keys,
    naming: Naming,
    mac: ring::hmac::Key,
    known: HashSet<ChunkId>,
    compressor: Compressor,
    frame_bytes: usize,
    ids: Vec<ChunkId>,
    lengths: Vec<usize>,
    plain: Vec<u8>,
    pack: Option<(PackEncoder, Vec<u8>)>,
    entries: Vec<IndexEntry>,
    packs: usize,
    index_bytes: u64,
    chunks: u64,
    samples: Option<Samples>,
}

/// Chunks of the first disk, to train a dictionary with.
struct Samples {
    bytes: usize,
    level: i32,
    chunks: Vec<Vec<u8>>,
}

pub(crate) fn run(folder: &Path, disks: &[PathBuf], arguments: &Arguments) -> Outcome {
    std::fs::create_dir_all(folder)?;
    let average: usize = arguments.number("average", 65_536)?;
    let level = arguments.number("level", 3)?;
    let dictionary: usize = arguments.number("dictionary", 0)?;
    let keys = Keys::derive(MasterKey::random()?, RepositoryId::random())?;
    let naming = match arguments.text("hash", "blake3") {
        "sha256" => Naming::Sha256,
        _ => Naming::Blake3,
    };
    let mut packer = Packer {
        folder: folder.to_owned(),
        mac: ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &[7; 32]),
        naming,
        known: HashSet::new(),
        compressor: Compressor::new(level)?,
        frame_bytes: arguments.number::<usize>("frame", MAX_PLAIN_BYTES)?.min(MAX_PLAIN_BYTES),
        ids: Vec::new(),
        lengths: Vec::new(),
        plain: Vec::new(),
        pack: None,
        entries: Vec::new(),
        packs: 0,
        index_bytes: 0,
        chunks: 0,
        samples: (dictionary > 0).then(|| Samples { bytes: dictionary, level, chunks: Vec::new() }),
        keys,
    };
    for disk in disks {
        match arguments.text("cut", "block") {
            "fixed" => fixed(disk, average, &mut packer)?,
            "rolling" => rolling(disk, average, &mut packer)?,
            _ => by_blocks(disk, average, &mut packer)?,
        }
        packer.end_frame()?;
        packer.train()?;
    }
    packer.end_pack()?;
    packer.publish()?;
    println!("{} chunks, {} bytes of index", packer.chunks, packer.index_bytes);
    Ok(())
}

fn for_each_piece(disk: &Path, mut done: impl FnMut(&[u8]) -> Outcome) -> Outcome {
    let (mut file, mut buffer) = (File::open(disk)?, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            count => done(buffer.get(..count).unwrap_or_default())?,
        }
    }
}

fn by_blocks(disk: &Path, average: usize, packer: &mut Packer) -> Outcome {
    let mut config = Config::new(packer.keys.repository(), 0);
    config.cut_bits = u8::try_from((average / BLOCK).max(1).ilog2())?;
    config.max_chunk_blocks = u16::try_from((4 * average / BLOCK).clamp(1, 256))?;
    let mut chunker = Chunker::new(CutRule::new(&packer.keys, &config), 0);
    for_each_piece(disk, |piece| {
        let mut failed = Ok(());
        chunker.push(piece, &mut |_, chunk| {
            if failed.is_ok() {
                failed = packer.offer(chunk);
            }
        });
        failed
    })?;
    chunker.cut().map_or(Ok(()), |chunk| packer.offer(&chunk.bytes))
}

fn fixed(disk: &Path, average: usize, packer: &mut Packer) -> Outcome {
    for_each_piece(disk, |piece| {
        let is_data = |chunk: &&[u8]| chunk.iter().any(|&byte| byte != 0);
        piece.chunks(average).filter(is_data).try_for_each(|chunk| packer.offer(chunk))
    })
}

/// Classic content-defined chunking by a rolling hash over all bytes, as backup programs do it; runs of zeros are left out.
fn rolling(disk: &Path, average: usize, packer: &mut Packer) -> Outcome {
    let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    let (least, most) = (number(average / 4), number((average * 4).min(MAX_PLAIN_BYTES)));
    let mut buffer: Vec<u8> = Vec::new();
    let cut = |buffer: &mut Vec<u8>, end: bool, packer: &mut Packer| -> Outcome {
        let mut done = 0;
        for chunk in fastcdc::v2020::FastCDC::new(buffer, least, number(average), most) {
            if !end && chunk.offset + chunk.length == buffer.len() {
                break;
            }
            let bytes = buffer.get(chunk.offset..chunk.offset + chunk.length).unwrap_or_default();
            if bytes.iter().any(|&byte| byte != 0) {
                packer.offer(bytes)?;
            }
            done = chunk.offset + chunk.length;
        }
        buffer.drain(..done);
        Ok(())
    };
    for_each_piece(disk, |piece| {
        buffer.extend_from_slice(piece);
        if buffer.len() >= 8 << 20 { cut(&mut buffer, false, packer) } else { Ok(()) }
    })?;
    cut(&mut buffer, true, packer)
}

impl Packer {
    fn offer(&mut self, chunk: &[u8]) -> Outcome {
        self.chunks += 1;
        let id = match self.naming {
            Naming::Blake3 => self.keys.chunk_id(ChunkKind::Data, chunk),
            Naming::Sha256 => {
                let mac = ring::hmac::sign(&self.mac, chunk);
                ChunkId::from_bytes(mac.as_ref().try_into()?)
            }
        };
        if !self.known.insert(id) {
            return Ok(());
        }
        if let Some(samples) = self.samples.as_mut() {
            samples.chunks.push(chunk.to_vec());
        }
        if self.plain.len() + chunk.len() > self.frame_bytes || self.ids.len() == MAX_FRAME_CHUNKS {
            self.end_frame()?;
        }
        self.plain.extend_from_slice(chunk);
        self.ids.push(id);
        self.lengths.push(chunk.len());
        Ok(())
    }

    fn end_frame(&mut self) -> Outcome {
        if self.ids.is_empty() {
            return Ok(());
        }
        let payload = self.compressor.prepare_all(&self.plain, &self.lengths)?;
        if self.pack.as_ref().is_some_and(|(pack, _)| pack.final_length() >= PACK_BYTES || !pack.has_room_for(&payload))
        {
            self.end_pack()?;
        }
        let (pack, bytes) = match self.pack.as_mut() {
            Some(pack) => pack,
            None => self.pack.insert(PackEncoder::new(&self.keys, PackClass::Content)?),
        };
        bytes.extend_from_slice(&pack.append(&self.ids, ChunkKind::Data, payload)?);
        self.ids.clear();
        self.lengths.clear();
        self.plain.clear();
        Ok(())
    }

    fn end_pack(&mut self) -> Outcome {
        let Some((pack, mut bytes)) = self.pack.take() else { return Ok(()) };
        let id = pack.id();
        let (end, directory) = pack.finish()?;
        bytes.extend_from_slice(&end);
        std::fs::write(self.folder.join(id.to_string()), bytes)?;
        let entry = |entry: xenvault_store_format::DirectoryEntry| IndexEntry {
            id: entry.id,
            kind: entry.kind,
            pack: id,
            placement: entry.placement,
        };
        self.entries.extend(directory.into_iter().map(entry));
        self.packs += 1;
        if self.packs.is_multiple_of(4) { self.publish() } else { Ok(()) }
    }

    fn publish(&mut self) -> Outcome {
        let mut name = [0; 16];
        name[..8].copy_from_slice(&self.packs.to_le_bytes());
        let packs = self.entries.iter().map(|entry| entry.pack).collect();
        let content = SegmentContent { packs, entries: std::mem::take(&mut self.entries), gone: Vec::new() };
        let bytes = encode_index(&self.keys, RunPart::alone(name), content)?;
        self.index_bytes += bytes.len() as u64;
        std::fs::write(self.folder.join(format!("index-{}", self.packs)), bytes)?;
        Ok(())
    }

    /// After the first disk: the dictionary that the others are compressed with, which is part of what is stored.
    fn train(&mut self) -> Outcome {
        let Some(samples) = self.samples.take() else { return Ok(()) };
        // The trainer wants about a hundred times the dictionary; the beginnings of chunks serve.
        let step = (samples.chunks.len() * 8192 / (samples.bytes * 100)).max(1);
        let chosen: Vec<&[u8]> =
            samples.chunks.iter().step_by(step).map(|chunk| chunk.get(..8192).unwrap_or(chunk)).collect();
        let dictionary = zstd::dict::from_samples(&chosen, samples.bytes)?;
        std::fs::write(self.folder.join("dictionary"), &dictionary)?;
        self.compressor = Compressor::with_dictionary(samples.level, &dictionary)?;
        Ok(())
    }
}
