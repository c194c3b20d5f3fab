//! Mirrors: a copy of a disk that takes every write to it, which is how a storage migration keeps up with a guest.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use uuid::Uuid;
use xenvault_block::{ByteRange, ExtentSet, ReadAt};

use super::disk::{COPY_BYTES, change_in, place, read_chain};
use super::{AttachMode, SrError, SrKind, Storage, VdiInfo};

/// A copy that takes every write to a disk.
#[derive(Debug)]
pub(super) struct Mirror {
    pub(super) copy: Uuid,
    /// A write did not reach the copy.
    pub(super) failed: AtomicBool,
}

impl Storage {
    /// Makes `copy` in a repository, as large as the disk, and sends it every write to the disk from now on. It stays
    /// attached until [`Storage::end_mirror`]. It has no change log. What stands on the disk already follows with
    /// [`Storage::fill_mirror`].
    ///
    /// # Errors
    /// As [`Storage::create_vdi`]; 24 if the disk is mirrored already.
    pub fn begin_mirror(&self, vdi: Uuid, sr: Uuid, copy: Uuid) -> Result<VdiInfo, SrError> {
        let size = self.disk(vdi)?.size();
        let mut state = self.write();
        if state.mirror_of(vdi).is_some() {
            return Err(SrError::in_use());
        }
        let info = state.create(sr, copy, size, None)?;
        state.attach(copy, AttachMode::ReadWrite)?;
        state.set_mirror(vdi, Some(Mirror { copy, failed: AtomicBool::new(false) }));
        Ok(info)
    }

    /// Copies what stands on a mirrored disk; writes go on meanwhile, each before or after a piece of the copy.
    ///
    /// # Errors
    /// 46 if the disk is gone or not mirrored, 200 if reading or writing fails.
    pub fn fill_mirror(&self, vdi: Uuid) -> Result<(), SrError> {
        let copy = self.read().mirror_of(vdi).map(|mirror| mirror.copy).ok_or_else(|| SrError::no_such_vdi(vdi))?;
        let with_zeros = self.vdi(copy)?.kind == SrKind::LvmRaw;
        let disk = self.disk(vdi)?;
        let written = disk.written_extents().map_err(|error| SrError::io(&error))?;
        let extents = if with_zeros { ExtentSet::from_range(ByteRange::up_to(disk.size())) } else { written };
        for piece in extents.runs().iter().flat_map(|run| run.pieces(COPY_BYTES)) {
            self.fill_piece(vdi, copy, piece, with_zeros).map_err(|error| match error.kind() {
                io::ErrorKind::StorageFull => SrError::no_space(),
                _ => SrError::io(&error),
            })?;
        }
        Ok(())
    }

    fn fill_piece(&self, vdi: Uuid, copy: Uuid, piece: ByteRange, with_zeros: bool) -> io::Result<()> {
        // Alone, so that no write of the guest comes between the read and the write.
        let state = self.write();
        let (top, _, _) = place(&state, vdi)?;
        let mut data = vec![0; usize::try_from(piece.len()).map_err(io::Error::other)?];
        read_chain(&state, top, piece, &mut data)?;
        let folder = &self.inner.folder;
        if data.iter().any(|&byte| byte != 0) {
            change_in(&state, copy, piece, &|layer| layer.write(folder, piece.start(), &data))
        } else if with_zeros {
            change_in(&state, copy, piece, &|layer| layer.zero(folder, piece))
        } else {
            Ok(())
        }
    }

    /// Whether every write has reached the copy so far; true for a disk that is not mirrored.
    pub fn mirror_is_whole(&self, vdi: Uuid) -> bool {
        self.read().mirror_of(vdi).is_none_or(|mirror| !mirror.failed.load(Ordering::SeqCst))
    }

    /// Ends a mirror: the copy is a disk of its own then, detached. With `destroy` the disk itself goes in the same
    /// moment, so that no write is lost on it: a late one fails instead. Without effect on a disk that is not mirrored.
    ///
    /// # Errors
    /// 24 with `destroy` while the disk is attached; the mirror has ended all the same.
    pub fn end_mirror(&self, vdi: Uuid, destroy: bool) -> Result<(), SrError> {
        let mut state = self.write();
        let Some(mirror) = state.set_mirror(vdi, None) else { return Ok(()) };
        // A copy that was removed by force has nothing to be detached.
        drop(state.detach(mirror.copy, AttachMode::ReadWrite));
        if destroy { state.destroy(&self.inner.folder, vdi) } else { Ok(()) }
    }
}
