//! Reading and writing a disk's content over its chain of layers.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use uuid::Uuid;
use xenvault_block::{ByteRange, ExtentSet, ReadAt, SECTOR_BYTES, VHD_BLOCK_BYTES, WriteAt};

use super::layer::{Layer, PAGE_BYTES, page_mask, runs};
use super::state::State;
use super::{SrKind, Storage, space};

/// What a copy reads and looks at in one go.
pub(super) const COPY_BYTES: u64 = 1 << 20;

/// A disk's content. Cheap to clone.
///
/// Writing marks 64 KiB blocks in the change log if the disk has one, as tapdisk does: before the data is written, and
/// also for equal data. Any offset and length is taken; a part of a sector costs a read of it.
#[derive(Clone, Debug)]
pub struct Disk {
    storage: Storage,
    vdi: Uuid,
}

impl Disk {
    pub(super) fn new(storage: Storage, vdi: Uuid) -> Self {
        Self { storage, vdi }
    }

    /// The disk's uuid.
    pub fn vdi(&self) -> Uuid {
        self.vdi
    }

    /// What its storage repository is made of.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] once the disk is gone.
    pub fn kind(&self) -> io::Result<SrKind> {
        let state = self.storage.read();
        self.place(&state).map(|(_, _, kind)| kind)
    }

    /// The bytes of a range. Unallocated ones are zeros and cost no I/O.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] past the end, [`io::ErrorKind::NotFound`] once the disk is gone.
    pub fn read(&self, range: ByteRange) -> io::Result<Bytes> {
        let length = usize::try_from(range.len()).map_err(io::Error::other)?;
        let mut buffer = vec![0; length];
        self.fill(&mut buffer, range)?;
        Ok(buffer.into())
    }

    /// Writes zeros, as a guest does: explicit ones, which hide what lies below. The place in the file that was never
    /// written costs no I/O.
    ///
    /// # Errors
    /// As [`WriteAt::write_all_at`].
    pub fn zero(&self, range: ByteRange) -> io::Result<()> {
        let inner = range.start().next_multiple_of(SECTOR_BYTES).min(range.end());
        let tail = (range.end() / SECTOR_BYTES * SECTOR_BYTES).max(inner);
        for (start, end) in [(range.start(), inner), (tail, range.end())] {
            if start < end {
                let length = usize::try_from(end - start).map_err(io::Error::other)?;
                self.write_all_at(&vec![0; length], start)?;
            }
        }
        let whole = ByteRange::new(inner, tail).map_err(io::Error::other)?;
        if whole.is_empty() {
            return Ok(());
        }
        self.change(whole, |layer| layer.zero(&self.storage.inner.folder, whole))
    }

    /// The 2 MiB blocks that are allocated in any layer of the chain, clipped at the size: what the BAT of a VHD
    /// export names. All of the disk on raw volumes.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] once the disk is gone.
    pub fn allocated_blocks(&self) -> io::Result<ExtentSet> {
        let state = self.storage.read();
        let (top, size, kind) = self.place(&state)?;
        if kind == SrKind::LvmRaw {
            return Ok(ExtentSet::from_range(ByteRange::up_to(size)));
        }
        let blocks: BTreeSet<u64> = state.chain(top).flat_map(|(_, layer)| layer.blocks()).collect();
        Ok(block_extents(&blocks, size))
    }

    /// The bytes that were ever written (512-byte granularity, over the chain). All of the disk on raw volumes.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] once the disk is gone.
    pub fn written_extents(&self) -> io::Result<ExtentSet> {
        let state = self.storage.read();
        let (top, size, kind) = self.place(&state)?;
        if kind == SrKind::LvmRaw {
            return Ok(ExtentSet::from_range(ByteRange::up_to(size)));
        }
        let written = state.chain(top).fold(ExtentSet::new(), |all, (_, layer)| all.union(&layer.extents()));
        Ok(written.clipped(size))
    }

    /// The 2 MiB blocks that are allocated in a layer of either chain which the two do not share: what a VHD export
    /// with `base` sends.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] once a disk is gone.
    pub fn difference_blocks(&self, base: &Self) -> io::Result<ExtentSet> {
        let state = self.storage.read();
        let (top, size, _) = self.place(&state)?;
        let (base_top, _, _) = base.place(&state)?;
        let ids = |top| state.chain(top).map(|(id, _)| id).collect::<BTreeSet<u64>>();
        let (mine, theirs) = (ids(top), ids(base_top));
        let only = mine.symmetric_difference(&theirs).filter_map(|&id| state.layer(id));
        let blocks: BTreeSet<u64> = only.flat_map(Layer::blocks).collect();
        Ok(block_extents(&blocks, size))
    }

    /// Copies the content to a new disk. Zeros are left out, unless `with_zeros`.
    pub(super) fn copy_to(&self, target: &Self, with_zeros: bool) -> io::Result<()> {
        let extents =
            if with_zeros { ExtentSet::from_range(ByteRange::up_to(self.size())) } else { self.written_extents()? };
        for piece in extents.runs().iter().flat_map(|run| run.pieces(COPY_BYTES)) {
            let data = self.read(piece)?;
            if data.iter().any(|&byte| byte != 0) {
                target.write_all_at(&data, piece.start())?;
            } else if with_zeros {
                target.zero(piece)?;
            }
        }
        Ok(())
    }

    /// Own layer, size and kind.
    fn place(&self, state: &State) -> io::Result<(u64, u64, SrKind)> {
        place(state, self.vdi)
    }

    fn fill(&self, buffer: &mut [u8], range: ByteRange) -> io::Result<()> {
        let state = self.storage.read();
        let (top, size, _) = self.place(&state)?;
        if range.end() > size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read_chain(&state, top, range, buffer)
    }

    /// Records a write in the change log, then does it to the disk's own layer, and to the copy while the disk is
    /// mirrored. `whole` is whole sectors.
    fn change(&self, whole: ByteRange, act: impl Fn(&Layer) -> io::Result<()>) -> io::Result<()> {
        let state = self.storage.read();
        change_in(&state, self.vdi, whole, &act)?;
        if let Some(mirror) = state.mirror_of(self.vdi)
            && change_in(&state, mirror.copy, whole, &act).is_err()
        {
            // The guest goes on; the migration does not.
            mirror.failed.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// A disk's own layer, its size and its kind.
pub(super) fn place(state: &State, vdi: Uuid) -> io::Result<(u64, u64, SrKind)> {
    let gone = |error| io::Error::new(io::ErrorKind::NotFound, error);
    let top = state.top_of(vdi).map_err(gone)?;
    let vdi = state.vdi(vdi).map_err(gone)?;
    let kind = state.sr(vdi.sr).map_err(gone)?.kind;
    Ok((top, vdi.size, kind))
}

/// A write to one disk.
pub(super) fn change_in(
    state: &State,
    id: Uuid,
    whole: ByteRange,
    act: &dyn Fn(&Layer) -> io::Result<()>,
) -> io::Result<()> {
    let (top, size, kind) = place(state, id)?;
    if whole.end() > size {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let vdi = state.vdi(id).map_err(io::Error::other)?;
    let layer = state.layer(top).ok_or(io::ErrorKind::NotFound)?;
    let sr = state.sr(vdi.sr).map_err(io::Error::other)?;
    sr.logs().record(id, whole.start(), whole.len());
    let _writing = layer.lock_writing();
    if kind != SrKind::Ext {
        let done = act(layer);
        sr.counted.forget();
        return done;
    }
    let blocks = layer.missing_blocks(whole);
    if blocks == 0 {
        return act(layer);
    }
    if state.free_bytes(vdi.sr).map_err(io::Error::other)? < blocks * VHD_BLOCK_BYTES {
        return Err(io::ErrorKind::StorageFull.into());
    }
    sr.counted.while_adding(space::vhd_file(0, blocks) - space::vhd_file(0, 0), || act(layer))
}

impl ReadAt for Disk {
    /// The size in bytes; 0 once the disk is gone.
    fn size(&self) -> u64 {
        self.storage.read().vdi(self.vdi).map(|vdi| vdi.size).unwrap_or_default()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let range = ByteRange::with_length(offset, buffer.len() as u64).map_err(io::Error::other)?;
        self.fill(buffer, range)
    }
}

impl WriteAt for Disk {
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let range = ByteRange::with_length(offset, data.len() as u64).map_err(io::Error::other)?;
        if range.is_empty() {
            return Ok(());
        }
        let whole = range.align_outward(SECTOR_BYTES, u64::MAX);
        let folder = &self.storage.inner.folder;
        if whole == range {
            return self.change(whole, |layer| layer.write(folder, offset, data));
        }
        // Parts of sectors: the rest of them is read first. Two writers of one sector are the guest's own affair.
        let mut buffer = vec![0; usize::try_from(whole.len()).map_err(io::Error::other)?];
        let first = ByteRange::with_length(whole.start(), SECTOR_BYTES).map_err(io::Error::other)?;
        let last = ByteRange::new(whole.end() - SECTOR_BYTES, whole.end()).map_err(io::Error::other)?;
        let sector = usize::try_from(SECTOR_BYTES).map_err(io::Error::other)?;
        if let Some(head) = buffer.first_chunk_mut::<512>() {
            self.fill(head, first).map_err(past_end)?;
        }
        let tail = buffer.len() - sector;
        if let Some(tail) = buffer.get_mut(tail..) {
            self.fill(tail, last).map_err(past_end)?;
        }
        let at = usize::try_from(offset - whole.start()).map_err(io::Error::other)?;
        if let Some(place) = buffer.get_mut(at..at + data.len()) {
            place.copy_from_slice(data);
        }
        self.change(whole, |layer| layer.write(folder, whole.start(), &buffer))
    }
}

/// A write past the end is told as one.
fn past_end(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { io::ErrorKind::WriteZero.into() } else { error }
}

/// Whole blocks by their index, as bytes.
fn block_extents(blocks: &BTreeSet<u64>, size: u64) -> ExtentSet {
    let ranges =
        blocks.iter().filter_map(|&block| ByteRange::with_length(block * VHD_BLOCK_BYTES, VHD_BLOCK_BYTES).ok());
    ranges.collect::<ExtentSet>().clipped(size)
}

/// Fills `buffer` with a range of a chain; each sector comes from the uppermost layer that has it.
pub(super) fn read_chain(state: &State, top: u64, range: ByteRange, buffer: &mut [u8]) -> io::Result<()> {
    let chain: Vec<&Layer> = state.chain(top).map(|(_, layer)| layer).collect();
    let mut pending: Option<(usize, ByteRange)> = None;
    for page in range.start() / PAGE_BYTES..range.end().div_ceil(PAGE_BYTES) {
        let mut found: Vec<(usize, ByteRange)> = Vec::new();
        let mut wanted = page_mask(page, range);
        for (at, layer) in chain.iter().enumerate() {
            if wanted == 0 {
                break;
            }
            let here = layer.page(page) & wanted;
            wanted &= !here;
            found.extend(runs(page, here).map(|run| (at, run)));
        }
        if chain.last().is_some_and(|bottom| bottom.garbage) {
            found.extend(runs(page, wanted).map(|run| (usize::MAX, run)));
        }
        found.sort_unstable_by_key(|(_, run)| run.start());
        for (at, run) in found {
            pending = match pending {
                Some((before, earlier)) if before == at && earlier.end() == run.start() => {
                    ByteRange::new(earlier.start(), run.end()).ok().map(|joined| (at, joined))
                }
                Some((before, earlier)) => {
                    read_run(&chain, before, earlier, range, buffer)?;
                    Some((at, run))
                }
                None => Some((at, run)),
            };
        }
    }
    pending.map_or(Ok(()), |(at, run)| read_run(&chain, at, run, range, buffer))
}

/// Reads a run of one layer (`usize::MAX`: garbage) into its place in the buffer of `range`.
fn read_run(chain: &[&Layer], at: usize, run: ByteRange, range: ByteRange, buffer: &mut [u8]) -> io::Result<()> {
    let Some(run) = run.intersect(range) else { return Ok(()) };
    let start = usize::try_from(run.start() - range.start()).map_err(io::Error::other)?;
    let end = usize::try_from(run.end() - range.start()).map_err(io::Error::other)?;
    let place = buffer.get_mut(start..end).ok_or(io::ErrorKind::UnexpectedEof)?;
    match chain.get(at) {
        Some(layer) => layer.read(run, place),
        None => {
            garbage(run.start(), place);
            Ok(())
        }
    }
}

/// What an old volume might hold: noise that depends on the offset alone.
fn garbage(offset: u64, buffer: &mut [u8]) {
    for (byte, at) in buffer.iter_mut().zip(offset..) {
        let mut word = (at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word ^= word >> 27;
        *byte = word.to_le_bytes().get(usize::try_from(at % 8).unwrap_or_default()).copied().unwrap_or_default();
    }
}
