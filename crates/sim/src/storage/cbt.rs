//! The change logs of one storage repository, as the storage manager and tapdisk keep them.
//!
//! A log is named after a disk. On a snapshot the live disk's log is renamed to the snapshot's, and a new one is made
//! for the live disk; child pointers lead from older to newer. Bitmaps are in the order of the files: lowest bit
//! first. XenAPI's order, highest bit first, appears only in [`ChangeLogs::changed_blocks`].

use std::collections::BTreeMap;

use uuid::Uuid;
use xenvault_block::CBT_BLOCK_BYTES;

use super::SrError;

/// Length of a log's header in its file.
const HEADER_BYTES: usize = 48;

/// One change log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeLog {
    /// Log before this one; nil is none.
    pub parent: Uuid,
    /// Log after this one; nil is none.
    pub child: Uuid,
    /// Whether the bitmap is known to be complete: false while the disk is attached read-write, and after a crash.
    pub consistent: bool,
    /// Size of the disk in bytes.
    pub size: u64,
    /// One bit for each 64 KiB, lowest bit first.
    pub bitmap: Vec<u8>,
    /// Blocks whose bits were set since the disk was attached.
    fresh: Vec<u64>,
}

/// Why a file is no change log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeLogError {
    /// The file ends before its bitmap does.
    #[error("the change log has {found} bytes, its header asks for {wanted}")]
    Short {
        /// Bytes there.
        found: usize,
        /// Bytes needed.
        wanted: u64,
    },
}

/// Bytes of the bitmap of a disk of `size` bytes.
fn bitmap_bytes(size: u64) -> usize {
    let blocks = size.div_ceil(CBT_BLOCK_BYTES);
    usize::try_from(blocks.div_ceil(8)).unwrap_or(usize::MAX)
}

impl ChangeLog {
    /// An empty, consistent log.
    fn new(size: u64) -> Self {
        Self {
            parent: Uuid::nil(),
            child: Uuid::nil(),
            consistent: true,
            size,
            bitmap: vec![0; bitmap_bytes(size)],
            fresh: Vec::new(),
        }
    }

    /// Reads a `.cbtlog` file. Bytes after the bitmap are ignored: a logical volume has them.
    ///
    /// # Errors
    /// [`ChangeLogError::Short`].
    pub fn from_file(bytes: &[u8]) -> Result<Self, ChangeLogError> {
        let short = |wanted: u64| ChangeLogError::Short { found: bytes.len(), wanted };
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or_else(|| short(HEADER_BYTES as u64))?;
        let [parent, child] = [0, 16].map(|at| header.get(at..at + 16).and_then(|id| Uuid::from_slice(id).ok()));
        let consistent = header.get(32..36) != Some(&[0; 4]);
        let size = header.last_chunk().map(|size| u64::from_le_bytes(*size)).unwrap_or_default();
        let wanted = bitmap_bytes(size);
        let end = wanted.checked_add(HEADER_BYTES).ok_or_else(|| short(u64::MAX))?;
        let bitmap = bytes.get(HEADER_BYTES..end).ok_or_else(|| short(end as u64))?.to_vec();
        let (parent, child) = (parent.unwrap_or_default(), child.unwrap_or_default());
        Ok(Self { parent, child, consistent, size, bitmap, fresh: Vec::new() })
    }

    /// Sets the bits of all blocks that a write touches.
    fn record(&mut self, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        for block in offset / CBT_BLOCK_BYTES..=(offset + length - 1) / CBT_BLOCK_BYTES {
            let (byte, mask) = (usize::try_from(block / 8).unwrap_or(usize::MAX), 1 << (block % 8));
            if let Some(bits) = self.bitmap.get_mut(byte)
                && *bits & mask == 0
            {
                *bits |= mask;
                self.fresh.push(block);
            }
        }
    }

    /// Clears the bits that were set since the disk was attached.
    fn lose_fresh(&mut self) {
        for block in self.fresh.drain(..) {
            if let Some(bits) = usize::try_from(block / 8).ok().and_then(|byte| self.bitmap.get_mut(byte)) {
                *bits &= !(1 << (block % 8));
            }
        }
    }

    /// What the file of the log takes, in bytes.
    pub(super) fn file_bytes(&self) -> u64 {
        (HEADER_BYTES + self.bitmap.len()) as u64
    }
}

/// All change logs of one storage repository, by disk.
#[derive(Clone, Debug, Default)]
pub struct ChangeLogs {
    logs: BTreeMap<Uuid, ChangeLog>,
}

impl ChangeLogs {
    /// Puts a log into its place.
    pub fn insert(&mut self, vdi: Uuid, log: ChangeLog) {
        self.logs.insert(vdi, log);
    }

    /// The log of a disk.
    pub fn get(&self, vdi: Uuid) -> Option<&ChangeLog> {
        self.logs.get(&vdi)
    }

    /// Whether the disk has one: `cbt_enabled`.
    pub fn contains(&self, vdi: Uuid) -> bool {
        self.logs.contains_key(&vdi)
    }

    /// All logs and their disks.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Uuid, &ChangeLog)> {
        self.logs.iter().map(|(&vdi, log)| (vdi, log))
    }

    /// Enables tracking: a new log without neighbours, not consistent if the disk is attached read-write.
    pub(super) fn enable(&mut self, vdi: Uuid, size: u64, running: bool) {
        self.logs.entry(vdi).or_insert_with(|| ChangeLog { consistent: !running, ..ChangeLog::new(size) });
    }

    /// Disables tracking: the log goes, and its parent no longer points to it.
    pub(super) fn disable(&mut self, vdi: Uuid) {
        if let Some(log) = self.logs.remove(&vdi)
            && let Some(parent) = self.logs.get_mut(&log.parent)
        {
            parent.child = Uuid::nil();
        }
    }

    /// Deletes a log and looks at nothing else: what the storage manager does on an error of its own.
    pub(super) fn drop_log(&mut self, vdi: Uuid) {
        self.logs.remove(&vdi);
    }

    /// Renames the log of `live` to `snapshot`, and makes a new one for `live` if there is `room` for one, not
    /// consistent if the disk is `running`; gives whether it was made. What the old log's mark said is lost with this.
    pub(super) fn snapshot(&mut self, live: Uuid, snapshot: Uuid, size: u64, room: bool, running: bool) -> bool {
        let Some(mut log) = self.logs.remove(&live) else { return true };
        let next = log.child;
        log.consistent = true;
        log.fresh = Vec::new();
        log.child = if room { live } else { next };
        if let Some(parent) = self.logs.get_mut(&log.parent) {
            parent.child = snapshot;
        }
        self.logs.insert(snapshot, log);
        if room {
            let new = ChangeLog { parent: snapshot, child: next, consistent: !running, ..ChangeLog::new(size) };
            self.logs.insert(live, new);
        }
        room
    }

    /// Deletes the log of a disk that is destroyed: its bits go into the child's, its neighbours are joined. If the
    /// child's bitmap is the shorter one, the log stays as it is.
    pub(super) fn delete(&mut self, vdi: Uuid) {
        let Some(log) = self.logs.get(&vdi).cloned() else { return };
        if let Some(child) = self.logs.get_mut(&log.child) {
            if log.bitmap.len() > child.bitmap.len() {
                return;
            }
            for (into, bits) in child.bitmap.iter_mut().zip(&log.bitmap) {
                *into |= bits;
            }
            child.parent = log.parent;
        }
        if let Some(parent) = self.logs.get_mut(&log.parent) {
            parent.child = log.child;
        }
        self.logs.remove(&vdi);
    }

    /// Grows the disk of a log; gives whether the log could follow.
    pub(super) fn resize(&mut self, vdi: Uuid, size: u64) -> bool {
        let Some(log) = self.logs.get_mut(&vdi) else { return true };
        if size < log.size {
            return false;
        }
        log.size = size;
        log.bitmap.resize(bitmap_bytes(size), 0);
        true
    }

    /// A read-write activation. An inconsistent log, or one that is to count as such, is deleted; gives whether that
    /// happened.
    pub(super) fn activate(&mut self, vdi: Uuid, broken: bool) -> bool {
        let Some(log) = self.logs.get_mut(&vdi) else { return false };
        if broken || !log.consistent {
            self.logs.remove(&vdi);
            return true;
        }
        log.consistent = false;
        log.fresh = Vec::new();
        false
    }

    /// The clean end of a read-write activation.
    pub(super) fn deactivate(&mut self, vdi: Uuid) {
        if let Some(log) = self.logs.get_mut(&vdi) {
            log.consistent = true;
            log.fresh = Vec::new();
        }
    }

    /// The death of the host while the disk was active.
    pub(super) fn crash(&mut self, vdi: Uuid, lose: bool) {
        if let Some(log) = self.logs.get_mut(&vdi) {
            if lose {
                log.lose_fresh();
            }
            log.fresh = Vec::new();
        }
    }

    /// A guest write, before it reaches the disk.
    pub(super) fn record(&mut self, vdi: Uuid, offset: u64, length: u64) {
        if let Some(log) = self.logs.get_mut(&vdi) {
            log.record(offset, length);
        }
    }

    /// The union of all logs after that of `from` up to that of `to`, highest bit first.
    ///
    /// A circle of child pointers, on which the storage manager runs for ever, counts as "unrelated" here.
    ///
    /// # Errors
    /// 460 for the same disk, for disks without a log, and for unrelated ones; 459 for sizes that contradict.
    pub fn changed_blocks(&self, from: Uuid, to: Uuid) -> Result<Vec<u8>, SrError> {
        if from == to {
            return Err(SrError::changed_blocks("Source and target VDI are same"));
        }
        let unrelated = || SrError::changed_blocks("Source and target VDI are unrelated");
        self.logs.get(&to).ok_or_else(unrelated)?;
        let mut current = self.logs.get(&from).ok_or_else(unrelated)?;
        let mut union: Option<(u64, Vec<u8>)> = None;
        for _ in 0..self.logs.len() {
            let name = current.child;
            current = self.logs.get(&name).ok_or_else(unrelated)?;
            union = Some(merge(union, current)?);
            if name == to {
                let (_, bits) = union.unwrap_or_default();
                return Ok(bits.into_iter().map(u8::reverse_bits).collect());
            }
        }
        Err(unrelated())
    }
}

/// Adds one more log to a union, by the storage manager's rules on sizes. Lengths count in whole bytes of bitmap.
fn merge(union: Option<(u64, Vec<u8>)>, log: &ChangeLog) -> Result<(u64, Vec<u8>), SrError> {
    if log.bitmap.len() as u64 * 8 < log.size / CBT_BLOCK_BYTES {
        return Err(SrError::inconsistent_bitmaps());
    }
    // An empty union counts as none: the storage manager tests it for truth.
    let Some((size, mut bits)) = union.filter(|(_, bits)| !bits.is_empty()) else {
        return Ok((log.size, log.bitmap.clone()));
    };
    let grown = log.size > size;
    if log.size < size || log.bitmap.len() < bits.len() || (grown && log.bitmap.len() == bits.len()) {
        return Err(SrError::inconsistent_bitmaps());
    }
    if grown {
        bits.resize(log.bitmap.len(), 0);
    }
    for (into, more) in bits.iter_mut().zip(&log.bitmap) {
        *into |= more;
    }
    Ok((log.size, bits))
}
