//! The disks of the simulated pool: storage repositories, sparse files with copy-on-write snapshots, and changed
//! block tracking as XenServer's storage manager keeps it.
//!
//! Owns the data and what the storage manager knows (sizes, chains, change logs, space). Knows nothing of XenAPI's
//! records, sessions or VMs: whether a disk is a snapshot, what `snapshot_of` says, whether a VBD is in the way
//! (`VDI_IN_USE`), licences and allowed operations are the business of the caller. All calls are synchronous,
//! thread-safe and cheap: an empty disk of any size costs nothing.

mod error;

use std::io;
use std::path::Path;

use bytes::Bytes;
use uuid::Uuid;
use xenvault_block::{ByteRange, ExtentSet, ReadAt, WriteAt};

pub use error::SrError;

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
pub struct Storage {}

#[allow(clippy::todo, unused_variables, reason = "skeleton")]
impl Storage {
    /// A storage without a repository, in a folder of its own that goes with the last clone.
    ///
    /// # Errors
    /// The temporary folder can not be made.
    pub fn new() -> io::Result<Self> {
        todo!()
    }

    /// The same, with its files under `parent` (for a file system with room).
    ///
    /// # Errors
    /// The folder can not be made.
    pub fn under(parent: &Path) -> io::Result<Self> {
        todo!()
    }

    /// Makes a storage repository of `physical_size` bytes.
    pub fn create_sr(&self, sr: Uuid, kind: SrKind, physical_size: u64) {
        todo!()
    }

    /// Removes a repository with all its disks.
    ///
    /// # Errors
    /// 47 if there is none.
    pub fn destroy_sr(&self, sr: Uuid) -> Result<(), SrError> {
        todo!()
    }

    /// Space of a repository.
    ///
    /// # Errors
    /// 47 if there is none.
    pub fn sr_usage(&self, sr: Uuid) -> Result<SrUsage, SrError> {
        todo!()
    }

    /// Takes space of a repository away for something that is not a disk of ours: a way to fill it. Sets, not adds.
    ///
    /// # Errors
    /// 47 if there is none.
    pub fn set_foreign_use(&self, sr: Uuid, bytes: u64) -> Result<(), SrError> {
        todo!()
    }

    /// What is known of a disk.
    ///
    /// # Errors
    /// 46 if there is none.
    pub fn vdi(&self, vdi: Uuid) -> Result<VdiInfo, SrError> {
        todo!()
    }

    /// All disks of a repository, `cbt_metadata` ones too; hidden base copies are not disks.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn vdis(&self, sr: Uuid) -> Result<Vec<VdiInfo>, SrError> {
        todo!()
    }

    /// The hidden base copies of a repository: `managed=false` disks named "base copy" in a real one.
    ///
    /// # Errors
    /// 47 if there is no such repository.
    pub fn base_copies(&self, sr: Uuid) -> Result<Vec<VdiInfo>, SrError> {
        todo!()
    }

    /// Makes a disk. The size is rounded up to what the type can have (2 MiB for VHD); the true one is in the answer.
    ///
    /// # Errors
    /// 79 for a size that the type can not have, 44 without space, 47 without the repository, 43 if it exists.
    pub fn create_vdi(&self, sr: Uuid, vdi: Uuid, virtual_size: u64) -> Result<VdiInfo, SrError> {
        todo!()
    }

    /// Makes a disk with the content of a file, as large as it (rounded up). Holes of the file stay unallocated.
    /// Nothing is copied: the file's data is shared where the file system can, and the file must stay unchanged.
    ///
    /// # Errors
    /// As [`Storage::create_vdi`]; 200 if the file can not be read.
    pub fn create_vdi_from_file(&self, sr: Uuid, vdi: Uuid, path: &Path) -> Result<VdiInfo, SrError> {
        todo!()
    }

    /// `VDI.snapshot`: `snapshot` gets the present content, and the change log by renaming.
    /// The message, if any, says that CBT was switched off because the new log could not be made.
    ///
    /// # Errors
    /// 44 without space, 109 for a chain of over 30, 38 for raw volumes, `VDI_INCOMPATIBLE_TYPE` without data.
    pub fn snapshot(&self, vdi: Uuid, snapshot: Uuid) -> Result<(VdiInfo, Option<CbtMessage>), SrError> {
        todo!()
    }

    /// `VDI.clone`: as a snapshot, without CBT. `VM.revert` is made of it (clone of the snapshot, then the old disk goes).
    ///
    /// # Errors
    /// As [`Storage::snapshot`].
    pub fn clone_vdi(&self, vdi: Uuid, clone: Uuid) -> Result<VdiInfo, SrError> {
        todo!()
    }

    /// `VDI.copy` into a repository: a full copy without shared data and without CBT; zeros are left out.
    ///
    /// # Errors
    /// As [`Storage::create_vdi`].
    pub fn copy(&self, vdi: Uuid, sr: Uuid, copy: Uuid) -> Result<VdiInfo, SrError> {
        todo!()
    }

    /// `VDI.resize`. Growing only; the new part reads as zeros (garbage on raw volumes). Gives the true size.
    ///
    /// # Errors
    /// 79 for shrinking or a size that the type can not have, 44 without space.
    pub fn resize(&self, vdi: Uuid, virtual_size: u64) -> Result<(u64, Option<CbtMessage>), SrError> {
        todo!()
    }

    /// `VDI.destroy`. The change log is ORed into its child's, and its neighbours are joined. Base copies that nothing
    /// needs any more are merged or removed at once (a real garbage collector takes its time).
    /// An unknown disk is no error, as in the storage manager.
    ///
    /// # Errors
    /// 24 while it is attached.
    pub fn destroy(&self, vdi: Uuid) -> Result<(), SrError> {
        todo!()
    }

    /// `VDI.data_destroy`: the data goes, the change log stays. Idempotent.
    ///
    /// # Errors
    /// `VDI_NO_CBT_METADATA` without a change log, 24 while it is attached, 46 if there is none.
    pub fn data_destroy(&self, vdi: Uuid) -> Result<(), SrError> {
        todo!()
    }

    /// `VDI.enable_cbt`, idempotent. `is_snapshot` as in the record.
    ///
    /// # Errors
    /// 66 for raw volumes and snapshots, 457 without space for a log, `VDI_INCOMPATIBLE_TYPE` without data.
    pub fn enable_cbt(&self, vdi: Uuid, is_snapshot: bool) -> Result<(), SrError> {
        todo!()
    }

    /// `VDI.disable_cbt`, idempotent: the disk's log goes, the logs of its snapshots stay.
    ///
    /// # Errors
    /// 66 for raw volumes and snapshots, `VDI_INCOMPATIBLE_TYPE` without data.
    pub fn disable_cbt(&self, vdi: Uuid, is_snapshot: bool) -> Result<(), SrError> {
        todo!()
    }

    /// `VDI.list_changed_blocks`: the bitmap in XenAPI's order, highest bit first, not yet in base64.
    ///
    /// # Errors
    /// 460 for the same disk twice, disks without a log, or unrelated ones; 459 for bitmaps that contradict.
    pub fn list_changed_blocks(&self, from: Uuid, to: Uuid) -> Result<Vec<u8>, SrError> {
        todo!()
    }

    /// Attaches and activates a disk; ended by [`Storage::detach`], once for each attach.
    /// The message, if any, says that CBT was switched off because the log was not consistent.
    ///
    /// # Errors
    /// 46 if there is none or its data is gone.
    pub fn attach(&self, vdi: Uuid, mode: AttachMode) -> Result<Option<CbtMessage>, SrError> {
        todo!()
    }

    /// The clean end of an attach: the change log counts as consistent again after the last read-write one.
    ///
    /// # Errors
    /// 46 if there is no such disk.
    pub fn detach(&self, vdi: Uuid, mode: AttachMode) -> Result<(), SrError> {
        todo!()
    }

    /// The end of all attaches of a disk by the death of its host: the log stays marked as inconsistent.
    ///
    /// # Errors
    /// 46 if there is no such disk.
    pub fn crash(&self, vdi: Uuid, lost: LostBits) -> Result<(), SrError> {
        todo!()
    }

    /// A handle for reading and writing; it stays good over snapshots and resizes, and fails once the disk is gone.
    ///
    /// # Errors
    /// 46 if there is none or its data is gone.
    pub fn disk(&self, vdi: Uuid) -> Result<Disk, SrError> {
        todo!()
    }
}

/// A disk's content. Cheap to clone.
///
/// Writing marks 64 KiB blocks in the change log if the disk has one, as tapdisk does: also for equal data.
#[derive(Clone, Debug)]
pub struct Disk {}

#[allow(clippy::todo, unused_variables, reason = "skeleton")]
impl Disk {
    /// The disk's uuid.
    pub fn vdi(&self) -> Uuid {
        todo!()
    }

    /// The bytes of a range. Unallocated ones are zeros and cost no I/O.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] past the end, [`io::ErrorKind::NotFound`] once the disk is gone.
    pub fn read(&self, range: ByteRange) -> io::Result<Bytes> {
        todo!()
    }

    /// Writes zeros, as a guest does: explicit ones, which hide what lies below.
    ///
    /// # Errors
    /// As [`WriteAt::write_all_at`].
    pub fn zero(&self, range: ByteRange) -> io::Result<()> {
        todo!()
    }

    /// The 2 MiB blocks that are allocated in any layer of the chain, clipped at the size: what the BAT of a VHD
    /// export names. All of the disk on raw volumes.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] once the disk is gone.
    pub fn allocated_blocks(&self) -> io::Result<ExtentSet> {
        todo!()
    }

    /// The bytes that were ever written (512-byte granularity, over the chain). All of the disk on raw volumes.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] once the disk is gone.
    pub fn written_extents(&self) -> io::Result<ExtentSet> {
        todo!()
    }

    /// The 2 MiB blocks that are allocated in a layer of either chain which the two do not share: what a VHD export
    /// with `base` sends.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] once a disk is gone.
    pub fn difference_blocks(&self, base: &Disk) -> io::Result<ExtentSet> {
        todo!()
    }
}

#[allow(clippy::todo, unused_variables, reason = "skeleton")]
impl ReadAt for Disk {
    fn size(&self) -> u64 {
        todo!()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        todo!()
    }
}

#[allow(clippy::todo, unused_variables, reason = "skeleton")]
impl WriteAt for Disk {
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        todo!()
    }
}
