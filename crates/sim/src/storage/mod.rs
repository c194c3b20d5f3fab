//! The disks of the simulated pool: storage repositories, sparse files with copy-on-write snapshots, and changed
//! block tracking as XenServer's storage manager keeps it.
//!
//! Owns the data and what the storage manager knows (sizes, chains, change logs, space). Knows nothing of XenAPI's
//! records, sessions or VMs: whether a disk is a snapshot, what `snapshot_of` says, whether a VBD is in the way
//! (`VDI_IN_USE`), licences and allowed operations are the business of the caller. All calls are synchronous,
//! thread-safe and cheap: an empty disk of any size costs nothing.

pub mod cbt;
mod disk;
mod error;
mod garbage;
mod layer;
mod mirror;
mod space;
mod state;
mod usage;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use uuid::Uuid;
use xenvault_block::ReadAt;

pub use disk::Disk;
pub use error::SrError;
pub use garbage::{ChainChange, CoalesceStart, CoalesceSwitches, Coalescing};
use state::{Content, State};

/// What a storage repository is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SrKind {
    /// `ext`: VHD files, thin. Disks up to 2040 GiB.
    Ext,
    /// `lvm`: VHD in logical volumes, thick. A snapshot of a disk needs room for a leaf of the full virtual size.
    Lvm,
    /// `lvm` with raw volumes (`sm_config:type=raw`): new disks hold garbage; no snapshots, no clones, no CBT.
    LvmRaw,
    /// `gfs2`, a SMAPIv3 type: thin, above 2040 GiB, with snapshots and CBT, without an allocation map in VHD form.
    Large,
}

impl SrKind {
    /// The type as XenAPI names it in `SR.type` and `SM.type`.
    pub fn sm_type(self) -> &'static str {
        match self {
            Self::Ext => "ext",
            Self::Lvm | Self::LvmRaw => "lvm",
            Self::Large => "gfs2",
        }
    }

    /// How it provides space, where its `sm_config` says so.
    pub fn allocation(self) -> Option<&'static str> {
        matches!(self, Self::Lvm | Self::LvmRaw).then_some("thick")
    }

    /// Whether its disks are VHDs: at most 2040 GiB, with an allocation map.
    pub fn is_vhd(self) -> bool {
        matches!(self, Self::Ext | Self::Lvm)
    }
}

/// Space of a storage repository, in bytes, as in the fields of `SR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SrUsage {
    /// All the space that there is.
    pub physical_size: u64,
    /// Space in use.
    pub physical_utilisation: u64,
    /// Sum of the virtual sizes of all disks.
    pub virtual_allocation: u64,
}

/// What the storage manager knows of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VdiInfo {
    /// The disk.
    pub vdi: Uuid,
    /// Its storage repository.
    pub sr: Uuid,
    /// What that is made of.
    pub kind: SrKind,
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Space that the disk's own file or volume takes, in bytes.
    pub physical_utilisation: u64,
    /// Whether a change log with its name exists: `VDI.cbt_enabled`.
    pub cbt_enabled: bool,
    /// Whether the data is gone and only the change log is left: `VDI.type` is `cbt_metadata`.
    pub metadata_only: bool,
    /// The hidden base copy below the disk: `sm_config:vhd-parent`.
    pub parent: Option<Uuid>,
}

/// What the storage manager changed by itself, to be told as a pool message (`message.create`, priority 3, class VDI).
///
/// `cbt_enabled` of the disk is false from then on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CbtMessage {
    /// The disk.
    pub vdi: Uuid,
    /// Name of the message, such as `VDI_CBT_METADATA_INCONSISTENT`.
    pub name: &'static str,
    /// Its body.
    pub body: String,
}

/// What can be ordered to go wrong with the change log of a disk, once. Without a log at the time nothing happens, but
/// the order is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CbtFault {
    /// At the next resize the log can not grow: `VDI_CBT_RESIZE_FAILED`. The resize succeeds.
    Resize,
    /// At the next snapshot the new log can not be made: `VDI_CBT_SNAPSHOT_FAILED`. The snapshot succeeds and keeps
    /// the old log.
    Snapshot,
    /// At the next snapshot the host that runs the disk does not get the new log: the same message with another body.
    SnapshotOnHost,
    /// At the next read-write attach the log is found inconsistent: `VDI_CBT_METADATA_INCONSISTENT`.
    Inconsistent,
}

/// How a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// The change log is not touched.
    ReadOnly,
    /// The change log is opened, and marked inconsistent until the detach.
    ReadWrite,
}

/// What becomes of change bits when a host dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostBits {
    /// All bits had reached the disk.
    None,
    /// Every bit set since the disk was attached is lost.
    SinceAttach,
}

/// All disks of the pool. Cheap to clone; all clones are one storage.
#[derive(Clone, Debug)]
pub struct Storage {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Where the layers' nameless files live.
    folder: PathBuf,
    /// Whether chains moved since they were asked for: so that asking costs nothing.
    moved: Arc<AtomicBool>,
    state: RwLock<State>,
}

impl Storage {
    /// A storage without a repository. Its files are nameless ones of the system's temporary folder.
    ///
    /// # Errors
    /// The temporary folder can not be used.
    pub fn new() -> io::Result<Self> {
        Self::under(&std::env::temp_dir())
    }

    /// The same, with its files in `folder` (of a file system with room). They have no names and go with the process.
    ///
    /// # Errors
    /// The folder can not be used.
    pub fn under(folder: &Path) -> io::Result<Self> {
        drop(tempfile::tempfile_in(folder)?);
        let moved = Arc::<AtomicBool>::default();
        let state = RwLock::new(State::new(Arc::clone(&moved)));
        let inner = Inner { folder: folder.to_owned(), moved, state };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes a storage repository of `physical_size` bytes.
    pub fn create_sr(&self, sr: Uuid, kind: SrKind, physical_size: u64) {
        self.write().create_sr(sr, kind, physical_size);
    }

    /// Removes a repository with all its disks.
    ///
    /// # Errors
    /// 47 if there is none.
    pub fn destroy_sr(&self, sr: Uuid) -> Result<(), SrError> {
        self.write().destroy_sr(sr)
    }

    /// Space of a repository.
    ///
    /// # Errors
    /// 47 if there is none.
    pub fn sr_usage(&self, sr: Uuid) -> Result<SrUsage, SrError> {
        self.read().usage(sr)
    }

    /// Takes space of a repository away for something that is not a disk of ours: a way to fill it. Sets, not adds.
    ///
    /// # Errors
    /// 47 if there is none.
    pub fn set_foreign_use(&self, sr: Uuid, bytes: u64) -> Result<(), SrError> {
        self.write().sr_mut(sr)?.foreign_bytes = bytes;
        Ok(())
    }

    /// Whether base copies that nothing needs are merged or removed at once (so it is at the start). Off, chains grow
    /// as they do while a real garbage collector waits, and [`Storage::begin_coalesce`] does its work step by step; on
    /// again, all waiting work is done.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn set_garbage_collection(&self, sr: Uuid, on: bool) -> Result<(), SrError> {
        let mut state = self.write();
        state.sr_mut(sr)?.collects_garbage = on;
        state.collect_garbage(&self.inner.folder, sr);
        Ok(())
    }

    /// What is known of a disk.
    ///
    /// # Errors
    /// 46 if there is none.
    pub fn vdi(&self, vdi: Uuid) -> Result<VdiInfo, SrError> {
        self.read().info(vdi)
    }

    /// All disks of a repository, `cbt_metadata` ones too; hidden base copies are not disks.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn vdis(&self, sr: Uuid) -> Result<Vec<VdiInfo>, SrError> {
        self.read().infos(sr)
    }

    /// The hidden base copies of a repository: `managed=false` disks named "base copy" in a real one.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn base_copies(&self, sr: Uuid) -> Result<Vec<VdiInfo>, SrError> {
        self.read().base_copies(sr)
    }

    /// Makes a disk. The size is rounded up to what the type can have (2 MiB for VHD); the true one is in the answer.
    /// It reads as zeros, but as garbage on raw volumes.
    ///
    /// # Errors
    /// 79 for a size that the type can not have, 44 without space, 47 without the repository, 43 if it exists.
    pub fn create_vdi(&self, sr: Uuid, vdi: Uuid, virtual_size: u64) -> Result<VdiInfo, SrError> {
        self.write().create(sr, vdi, virtual_size, None)
    }

    /// Makes a disk with the content of a file, as large as it (rounded up). Holes of the file stay unallocated.
    /// Nothing is copied: the file is read in place, so it must stay as it is for as long as the disk lives.
    ///
    /// # Errors
    /// As [`Storage::create_vdi`]; 200 if the file can not be read.
    pub fn create_vdi_from_file(&self, sr: Uuid, vdi: Uuid, path: &Path) -> Result<VdiInfo, SrError> {
        let broken = |error: io::Error| SrError::io(&error);
        let file = File::open(path).map_err(broken)?;
        let length = file.metadata().map_err(broken)?.len();
        let content = layer::data_extents(&file, length).map_err(broken)?;
        self.write().create(sr, vdi, length, Some(Content::File(file, content)))
    }

    /// Makes a disk whose first `bytes` (to the end of the sector) are noise that does not compress, the same for the
    /// same seed. It costs nothing until it is read.
    ///
    /// # Errors
    /// As [`Storage::create_vdi`].
    pub fn create_vdi_with_noise(
        &self,
        sr: Uuid,
        vdi: Uuid,
        virtual_size: u64,
        seed: u64,
        bytes: u64,
    ) -> Result<VdiInfo, SrError> {
        self.write().create(sr, vdi, virtual_size, Some(Content::Noise { seed, bytes }))
    }

    /// `VDI.snapshot`: `snapshot` gets the present content, and the change log by renaming.
    /// The message, if any, says that CBT was switched off because the new log could not be made.
    ///
    /// # Errors
    /// 44 without space, 109 for a chain of 30 or more, 38 for raw volumes, 82 for a base copy, `VDI_INCOMPATIBLE_TYPE`
    /// without data.
    pub fn snapshot(&self, vdi: Uuid, snapshot: Uuid) -> Result<(VdiInfo, Option<CbtMessage>), SrError> {
        self.write().snapshot(vdi, snapshot)
    }

    /// `VDI.clone`: as a snapshot, without CBT. `VM.revert` is made of it (clone of the snapshot, then the old disk goes).
    ///
    /// # Errors
    /// As [`Storage::snapshot`].
    pub fn clone_vdi(&self, vdi: Uuid, clone: Uuid) -> Result<VdiInfo, SrError> {
        self.write().clone_disk(vdi, clone)
    }

    /// `VDI.copy` into a repository: a full copy without shared data and without CBT; zeros are left out, except on
    /// raw volumes.
    ///
    /// # Errors
    /// As [`Storage::create_vdi`]; 200 if reading or writing fails.
    pub fn copy(&self, vdi: Uuid, sr: Uuid, copy: Uuid) -> Result<VdiInfo, SrError> {
        let source = self.disk(vdi)?;
        let target = self.create_vdi(sr, copy, source.size())?;
        let copied = self
            .disk(copy)
            .and_then(|disk| source.copy_to(&disk, target.kind == SrKind::LvmRaw).map_err(|error| SrError::io(&error)));
        if let Err(error) = copied {
            self.destroy(copy)?;
            return Err(error);
        }
        self.vdi(copy)
    }

    /// `VDI.resize`. Growing only; the new part reads as zeros (garbage on raw volumes). Gives the true size, and the
    /// message if CBT was switched off because its log could not grow.
    ///
    /// # Errors
    /// 79 for shrinking or a size that the type can not have, 44 without space.
    pub fn resize(&self, vdi: Uuid, virtual_size: u64) -> Result<(u64, Option<CbtMessage>), SrError> {
        self.write().resize(vdi, virtual_size)
    }

    /// `VDI.destroy`. The change log is ORed into its child's, and its neighbours are joined. Base copies that nothing
    /// needs any more are merged or removed at once, or later ([`Storage::set_garbage_collection`]).
    /// An unknown disk is no error, as in the storage manager.
    ///
    /// # Errors
    /// 24 while it is attached, 80 for a base copy.
    pub fn destroy(&self, vdi: Uuid) -> Result<(), SrError> {
        self.write().destroy(&self.inner.folder, vdi)
    }

    /// `VDI.data_destroy`: the data goes, the change log stays. Idempotent.
    ///
    /// # Errors
    /// `VDI_NO_CBT_METADATA` without a change log, 24 while it is attached, 46 if there is none.
    pub fn data_destroy(&self, vdi: Uuid) -> Result<(), SrError> {
        self.write().data_destroy(&self.inner.folder, vdi)
    }

    /// `VDI.enable_cbt`, idempotent. `is_snapshot` as in the record.
    ///
    /// # Errors
    /// 66 for raw volumes and snapshots, 457 without space for a log, `VDI_INCOMPATIBLE_TYPE` without data.
    pub fn enable_cbt(&self, vdi: Uuid, is_snapshot: bool) -> Result<(), SrError> {
        self.write().configure_cbt(vdi, is_snapshot, true)
    }

    /// `VDI.disable_cbt`, idempotent: the disk's log goes, the logs of its snapshots stay.
    ///
    /// # Errors
    /// 66 for raw volumes and snapshots, `VDI_INCOMPATIBLE_TYPE` without data.
    pub fn disable_cbt(&self, vdi: Uuid, is_snapshot: bool) -> Result<(), SrError> {
        self.write().configure_cbt(vdi, is_snapshot, false)
    }

    /// `VDI.list_changed_blocks`: the bitmap in XenAPI's order, highest bit first, not yet in base64. Both disks are
    /// looked up in the repository of `to`. [`SrKind::Large`] answers by the same rules: what a SMAPIv3 plugin returns
    /// is its own affair, and this one uses 64 KiB blocks.
    ///
    /// # Errors
    /// 460 for the same disk twice, disks without a log, or unrelated ones; 459 for bitmaps that contradict.
    pub fn list_changed_blocks(&self, from: Uuid, to: Uuid) -> Result<Vec<u8>, SrError> {
        self.read().changed_blocks(from, to)
    }

    /// Deletes the change log of a disk behind everybody's back, as a person at the host's shell can.
    ///
    /// # Errors
    /// 46 if there is no such disk.
    pub fn lose_change_log(&self, vdi: Uuid) -> Result<(), SrError> {
        self.write().lose_change_log(vdi)
    }

    /// Orders that the change log of a disk fails, once for each call.
    ///
    /// # Errors
    /// 46 if there is no such disk.
    pub fn fail_cbt(&self, vdi: Uuid, fault: CbtFault) -> Result<(), SrError> {
        self.write().fail_cbt(vdi, fault)
    }

    /// Attaches and activates a disk; ended by [`Storage::detach`], once for each attach.
    /// The message, if any, says that CBT was switched off because the log was not consistent.
    ///
    /// # Errors
    /// 46 if there is none or its data is gone; 180 if a thick repository has no room to write to a snapshot.
    pub fn attach(&self, vdi: Uuid, mode: AttachMode) -> Result<Option<CbtMessage>, SrError> {
        self.write().attach(vdi, mode)
    }

    /// The clean end of an attach: the change log counts as consistent again after the last read-write one.
    ///
    /// # Errors
    /// 46 if there is no such disk.
    pub fn detach(&self, vdi: Uuid, mode: AttachMode) -> Result<(), SrError> {
        self.write().detach(vdi, mode)
    }

    /// The end of all attaches of a disk by the death of its host: the log stays marked as inconsistent.
    ///
    /// # Errors
    /// 46 if there is no such disk.
    pub fn crash(&self, vdi: Uuid, lost: LostBits) -> Result<(), SrError> {
        self.write().crash(vdi, lost)
    }

    /// A handle for reading and writing; it stays good over snapshots and resizes, and fails once the disk is gone.
    ///
    /// # Errors
    /// 46 if there is none or its data is gone.
    pub fn disk(&self, vdi: Uuid) -> Result<Disk, SrError> {
        self.read().top_of(vdi).map_err(|_| SrError::no_such_vdi(vdi))?;
        Ok(Disk::new(self.clone(), vdi))
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.inner.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.inner.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}
