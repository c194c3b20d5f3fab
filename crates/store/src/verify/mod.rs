//! Verification: are the objects of the repository there, and do they hold what they should? If not, which points, VMs
//! and ranges of disks are hurt?
//!
//! Objects are judged first, without a look at points; then points are walked with what was found. A copy that is damaged
//! hurts nobody as long as there is another one. What was found is marked, so that the next backup that meets the
//! content stores it again. Sweeps may go on meanwhile: what they have condemned is not missed.

mod objects;
mod packs;
mod repair;
mod walk;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use xenvault_block::ByteRange;
use xenvault_store_format::{
    ChunkId, DamageMark, DamagedCopy, MAX_DAMAGED_COPIES, MAX_HURT_POINTS, PackId, PointId, RecordId, VerifyResult,
};

use crate::backend::Disturbed;
use crate::repository::Inner;
use crate::{MaintenanceMonitor, Repository, StoreError, names, records};

pub use repair::RepairReport;

/// How much is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum VerifyMode {
    /// Every small object, and of each pack its frame: header, directory, trailer, length, and the index against it.
    #[default]
    Quick,
    /// As quick, and of some packs, chosen by `seed`, every chunk.
    Sample {
        /// Share of the packs, in percent; at most 100.
        percent: u8,
        /// Chooses the packs; another one chooses others.
        seed: u64,
    },
    /// Every chunk is read, authenticated, unpacked and hashed again, and every point walked.
    Full,
}

/// How a verification goes about.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// How much is read.
    pub mode: VerifyMode,
    /// Whether to mark what is damaged, and to keep the result in the repository.
    pub write: bool,
    /// Is told of progress.
    pub monitor: MaintenanceMonitor,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { mode: VerifyMode::Quick, write: true, monitor: MaintenanceMonitor::default() }
    }
}

/// What is wrong with an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DamageKind {
    /// It should be there.
    Missing,
    /// Its bytes are not those that were written.
    Damaged,
    /// It is an object of another name, or of another repository, or none of ours.
    Misplaced,
}

impl std::fmt::Display for DamageKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Missing => "missing",
            Self::Damaged => "damaged",
            Self::Misplaced => "misplaced",
        })
    }
}

/// An object that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DamagedObject {
    /// Its name in the repository.
    pub object: String,
    /// What is wrong, for machines.
    pub kind: DamageKind,
    /// What is wrong, for people.
    pub reason: String,
}

/// A point that can not be restored completely.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HurtPoint {
    /// The point; `None` if its object can not be read and its name does not tell.
    pub id: Option<PointId>,
    /// UUID of its pool, as its object's name has it.
    pub pool_uuid: String,
    /// UUID of its VM, as its object's name has it.
    pub vm_uuid: String,
    /// The VM's name at that moment; empty if the point can not be read.
    pub vm_name: String,
    /// The moment of the point, in milliseconds since 1970-01-01 UTC; 0 if the point can not be read.
    pub created_unix_ms: u64,
    /// Whether the point itself can not be read, or is gone: then nothing of it can be restored.
    pub unreadable: bool,
    /// Whether the VM's configuration can not be read.
    pub configuration: bool,
    /// Disks with bytes that can not be read.
    pub disks: Vec<HurtDisk>,
}

/// A disk of which something can not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HurtDisk {
    /// Position (`userdevice`).
    pub device: String,
    /// UUID of the disk that was backed up.
    pub vdi_uuid: String,
    /// Its name at that moment.
    pub name: String,
    /// The ranges, ascending; at most [`MAX_RANGES`], the last one reaching to the end of what is hurt then.
    pub ranges: Vec<ByteRange>,
    /// Sum of the ranges in bytes, all of them counted.
    pub bytes: u64,
    /// Whether the list of changed blocks that is kept with the disk can not be read: restores do not need it.
    pub bitmap: bool,
}

/// Most ranges that are told of one disk.
pub const MAX_RANGES: usize = 1000;

/// What a verification has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Share of the packs that were read, in hundredths of a percent.
    pub share: u16,
    /// Packs that were read as a whole.
    pub packs: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Points that were read.
    pub points: u64,
    /// Objects that are not as they should be.
    pub damage: Vec<DamagedObject>,
    /// Points that can not be restored completely.
    pub hurt: Vec<HurtPoint>,
    /// Points without a receipt: a run that was not seen to its end, or a receipt that was lost. `repair` writes one for
    /// those that are complete.
    pub unconfirmed: Vec<PointId>,
    /// Objects that somebody has overwritten or deleted, and that are read as they were: the store keeps versions.
    pub disturbed: Vec<Disturbed>,
    /// Copies of chunks that were marked as damaged now.
    pub marked_copies: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.damage.is_empty() && self.hurt.is_empty()
    }
}

impl Repository {
    /// Verifies the repository. Memory: a filter of what is damaged, two packs, and 32 bytes for each map page.
    ///
    /// # Errors
    /// [`StoreError::Backend`] if something is out of reach: then nothing is known of it. Damage is no error, but the
    /// content of the report. With `write`, [`StoreError::Full`] if the marks can not be written.
    pub async fn verify(&self, options: VerifyOptions) -> Result<VerifyReport, StoreError> {
        if options.mode != VerifyMode::Quick {
            self.full("read what is in packs")?;
        }
        Verify::new(Arc::clone(&self.inner), options).run().await
    }
}

/// One verification.
struct Verify {
    repository: Arc<Inner>,
    options: VerifyOptions,
    report: VerifyReport,
    bad: Bad,
}

/// Copies that can not be read.
#[derive(Debug, Default)]
struct Bad {
    copies: HashSet<(ChunkId, PackId)>,
    packs: HashSet<PackId>,
}

impl Verify {
    fn new(repository: Arc<Inner>, options: VerifyOptions) -> Self {
        Self { repository, options, report: VerifyReport::default(), bad: Bad::default() }
    }

    async fn run(mut self) -> Result<VerifyReport, StoreError> {
        let began_unix_ms = records::unix_ms();
        self.report.share = match self.options.mode {
            VerifyMode::Quick => 0,
            VerifyMode::Sample { percent, .. } => u16::from(percent.min(100)) * 100,
            VerifyMode::Full => 10_000,
        };
        self.check_config_and_keys().await?;
        self.check_sweeps_and_records().await?;
        self.check_index().await?;
        self.check_packs().await?;
        self.check_points().await?;
        self.check_versions().await?;
        if self.options.write {
            self.mark_damage().await?;
            let result = VerifyResult {
                id: RecordId::random(),
                began_unix_ms,
                ended_unix_ms: records::unix_ms(),
                share: self.report.share,
                packs: self.report.packs,
                read_bytes: self.report.read_bytes,
                points: self.report.points,
                damaged_objects: self.report.damage.len() as u64,
                hurt_points: self.report.hurt.iter().filter_map(|point| point.id).take(MAX_HURT_POINTS).collect(),
            };
            records::write(&self.repository, &names::verification(&result.id), &result).await?;
        }
        Ok(self.report)
    }

    /// What somebody has put over objects. Harms nobody, and should not be there.
    async fn check_versions(&mut self) -> Result<(), StoreError> {
        if !self.repository.backend.oldest_counts() {
            return Ok(());
        }
        let found = self.repository.backend.disturbed("").await;
        self.report.disturbed = found.map_err(|error| StoreError::io("list", "all objects", error))?;
        for disturbed in &self.report.disturbed {
            tracing::warn!(object = disturbed.object, "somebody has overwritten or deleted an object");
        }
        Ok(())
    }

    fn damaged(&mut self, object: &str, kind: DamageKind, reason: impl Into<String>) {
        let reason = reason.into();
        tracing::warn!(object, reason, "an object of the repository is {kind}");
        self.report.damage.push(DamagedObject { object: object.to_owned(), kind, reason });
    }

    /// Takes an error for damage of an object; what is out of reach ends the verification.
    fn take(&mut self, object: &str, error: StoreError) -> Result<(), StoreError> {
        if !error.is_loss() {
            return Err(error);
        }
        let kind = if error.is_gone() { DamageKind::Missing } else { DamageKind::Damaged };
        self.damaged(object, kind, reason(&error));
        Ok(())
    }

    /// Marks what was found and was not known before.
    async fn mark_damage(&mut self) -> Result<(), StoreError> {
        let barred = self.repository.index.barred();
        let new_copies = self.bad.copies.iter().filter(|(chunk, pack)| !barred.is_damaged(chunk, pack));
        // In a fixed order, so that a repeated verification writes the same.
        let mut copies: Vec<DamagedCopy> = new_copies.map(|&(chunk, pack)| DamagedCopy { chunk, pack }).collect();
        copies.sort_unstable();
        let new_packs = self.bad.packs.iter().filter(|pack| !barred.damaged_packs.contains(*pack));
        let mut packs: Vec<PackId> = new_packs.copied().collect();
        packs.sort_unstable();
        let (mut copies, mut packs) = (copies.chunks(MAX_DAMAGED_COPIES), packs.chunks(MAX_DAMAGED_COPIES));
        loop {
            let (copies, packs) = (copies.next().unwrap_or_default(), packs.next().unwrap_or_default());
            if copies.is_empty() && packs.is_empty() {
                return Ok(());
            }
            let mark = DamageMark {
                id: RecordId::random(),
                created_unix_ms: records::unix_ms(),
                copies: copies.to_vec(),
                packs: packs.to_vec(),
            };
            records::write(&self.repository, &names::damage(&mark.id), &mark).await?;
            self.report.marked_copies += copies.len() as u64;
        }
    }
}

/// The error with its causes, in one line.
fn reason(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// Ranges of one disk while they are gathered; neighbours become one.
#[derive(Debug, Default)]
struct Ranges {
    ranges: Vec<ByteRange>,
    bytes: u64,
}

impl Ranges {
    fn push(&mut self, range: ByteRange) {
        self.bytes += range.len();
        let full = self.ranges.len() >= MAX_RANGES;
        match self.ranges.last_mut() {
            Some(last) if last.end() == range.start() || full => {
                *last = ByteRange::new(last.start(), range.end()).unwrap_or(*last);
            }
            _ => self.ranges.push(range),
        }
    }
}

/// Points by id, with their objects' names.
type Listed = BTreeMap<PointId, String>;
