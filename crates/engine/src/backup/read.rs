//! Moving one disk from the pool into the repository, and checking a sample of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use xenvault_block::{ByteRange, CBT_BLOCK_BYTES, ExtentSet, VHD_MAX_DISK_BYTES};
use xenvault_cbt::FullReason;
use xenvault_nbd::{Export, ExportOptions, ReadOptions};
use xenvault_store::{DiskOptions, DiskResult, KeyAccess, Level as StoredLevel, PointDisk, Repository, Writer};
use xenvault_vhd::{AllocationMap, HeadParser, HeadProgress};
use xenvault_xenapi::transfer::{ExportBody, ExportFormat, export_raw_vdi};
use xenvault_xenapi::{host, pbd};

use super::base::{DiskPlan, Kinship, Situation, fact, facts, unverified};
use super::endpoints::{Access, source};
use super::http_read;
use super::request::{DiskReport, Level, Verification};
use super::sample::{Dice, Field, Reservoir, choose};
use super::snapshot::Shot;
use super::verify::compare;
use crate::EngineError;
use crate::gaps::join_gaps;
use crate::monitor::Stage;
use crate::options::MAX_SAMPLE_BLOCKS;
use crate::pool::{Doing as _, DoingInRepository as _, is_live, keeps_vhds};
use crate::run::Run;

/// How long the head of an export may take (the host can be scanning a raw disk).
const HEAD_LIMIT: Duration = Duration::from_secs(60);
/// So many hosts are asked for it.
const HEAD_ATTEMPTS: usize = 3;
/// How many places with data a point remembers for later samples.
const KNOWN_PLACES: usize = 32;
/// The largest request.
const REQUEST_BYTES: u64 = 1024 * 1024;

/// What a whole read found about where data is.
enum Allocation {
    /// The blocks that hold data.
    Known(ExtentSet),
    /// Nothing is known: every byte is read.
    Unknown,
}

/// A disk that is stored.
pub(crate) struct Stored {
    pub(crate) disk: PointDisk,
    pub(crate) report: DiskReport,
    pub(crate) kinship: Kinship,
}

/// Everything about one disk that its transfer needs.
pub(crate) struct Job<'a> {
    pub(crate) run: &'a Run,
    pub(crate) repository: &'a Repository,
    pub(crate) writer: &'a Writer,
    pub(crate) access: Access,
    pub(crate) shot: &'a Shot,
    pub(crate) situation: &'a Situation,
}

/// One pass over a disk.
struct Pass {
    level: Level,
    reason: String,
    changed_bytes: u64,
    extents: ExtentSet,
    base: Option<PointDisk>,
}

/// The result of a pass.
struct Passed {
    result: DiskResult,
    data: Vec<u64>,
}

impl Job<'_> {
    fn size(&self) -> u64 {
        u64::try_from(self.shot.record.virtual_size).unwrap_or(0)
    }

    fn device(&self) -> &str {
        &self.shot.live.device
    }

    /// Reads the disk as planned, stores it, and checks a sample. If blocks that nobody called changed turn out to be
    /// different, the changes were not to be trusted: the disk is read again as a whole.
    pub(crate) async fn store(&self, mut plan: DiskPlan) -> Result<Stored, EngineError> {
        let known = plan.previous.as_ref().map(known_places).unwrap_or_default();
        let mut line = Line { job: self, export: None, sample_bytes: 0, read_bytes: 0 };
        let mut pass = if plan.verify {
            self.whole(FullReason::Verification.to_string()).await
        } else {
            self.first_pass(&plan).await?
        };
        let stored = loop {
            let passed = Box::pin(line.transfer(&pass)).await?;
            match Box::pin(line.differing_block(&pass, &passed, &known)).await? {
                None => break passed,
                Some(range) if pass.base.is_some() => {
                    self.run.meter.warn(
                        "sample-differs",
                        format!(
                            "disk {}: {range} differ although they were not listed as changed; the disk is read as a \
                             whole. If this comes again, look at the host's storage log",
                            self.device()
                        ),
                    );
                    // A list that left out a change is no list to keep: others would join it with theirs.
                    plan.bitmap = None;
                    pass = self.whole("sample-differs".to_owned()).await;
                }
                Some(range) => {
                    return Err(EngineError::SampleDiffers { device: self.device().to_owned(), range });
                }
            }
        };
        line.close().await;
        let verification = self.verify(&mut plan, &stored).await?;
        let bitmap = match &plan.bitmap {
            Some(bitmap) => Some(self.writer.put_blob(bitmap.as_bytes()).await.doing("store the bitmap")?),
            None => None,
        };
        let mut report = self.report(&pass, &line);
        let mut disk = self.point_disk(&pass, &plan, stored, bitmap, &known);
        // A list that left something out once is checked again the next time.
        let missed = verification.as_ref().is_some_and(|found| found.unlisted_bytes > 0);
        let believed = pass.base.as_ref().or(plan.previous.as_ref().filter(|_| missed));
        let runs = believed.map_or(0, |base| unverified(base).saturating_add(1));
        disk.attributes.insert(fact::UNVERIFIED.to_owned(), runs.to_string());
        report.verification = verification;
        Ok(Stored { disk, report, kinship: plan.kinship })
    }

    /// Checks the pool's list of changes against what was read, if the plan says so.
    async fn verify(&self, plan: &mut DiskPlan, stored: &Passed) -> Result<Option<Verification>, EngineError> {
        let Some(changes) = plan.changes.as_ref().filter(|_| plan.verify) else { return Ok(None) };
        if self.repository.access() != KeyAccess::Full {
            self.run.meter.warn(
                "verification-skipped",
                format!(
                    "disk {}: it was read as a whole, and the list of changes was not checked: that takes a key that \
                     reads the last point, and this one only writes",
                    self.device()
                ),
            );
            return Ok(None);
        }
        self.run.meter.stage(&Stage::Verify { device: self.device().to_owned() });
        self.writer.flush().await.doing("complete its packs")?;
        let listed = changes.blocks.extents();
        let found = compare(self.repository, &changes.since.map, &stored.result.map, &listed).await?;
        if found.unlisted_bytes > 0 {
            let places: Vec<String> = found.unlisted.iter().take(8).map(ToString::to_string).collect();
            self.run.meter.warn(
                "cbt-incomplete",
                format!(
                    "disk {}: {} bytes had changed since the last point without being listed ({}{}); this point is \
                     right, incrementals since the last check may not be: look at the host's storage log, and check \
                     older points before they are relied on",
                    self.device(),
                    found.unlisted_bytes,
                    places.join(", "),
                    if found.unlisted.len() > places.len() { ", ..." } else { "" },
                ),
            );
            plan.bitmap = None;
        }
        Ok(Some(found))
    }

    async fn first_pass(&self, plan: &DiskPlan) -> Result<Pass, EngineError> {
        let Some(changes) = &plan.changes else { return Ok(self.whole(plan.reason.clone()).await) };
        Ok(Pass {
            level: Level::Incremental,
            reason: plan.reason.clone(),
            changed_bytes: changes.blocks.changed_bytes(),
            extents: self.readable_extents(join_gaps(&changes.blocks.extents()), &changes.since).await?,
            base: Some(changes.since.clone()),
        })
    }

    /// What has to be read of the changes: with a key that only writes, the unchanged bytes too that cutting needs.
    async fn readable_extents(&self, changed: ExtentSet, since: &PointDisk) -> Result<ExtentSet, EngineError> {
        match self.repository.access() {
            KeyAccess::Full => Ok(changed),
            _ => {
                let wanted = self.repository.ranges_to_cut(&since.map, self.size(), &changed).await;
                wanted.doing("read the map of the last point")
            }
        }
    }

    /// A pass over everything that can hold data.
    async fn whole(&self, reason: String) -> Pass {
        if self.access == Access::Http {
            let extents = ExtentSet::from_range(ByteRange::up_to(self.size()));
            return Pass { level: Level::Full, reason, changed_bytes: self.size(), extents, base: None };
        }
        let (extents, reason) = match self.allocation().await {
            Allocation::Known(extents) => (extents, reason),
            Allocation::Unknown => {
                (ExtentSet::from_range(ByteRange::up_to(self.size())), format!("{reason}, no-allocation-map"))
            }
        };
        Pass { level: Level::Full, reason, changed_bytes: extents.total_bytes(), extents, base: None }
    }

    /// The allocated blocks of a disk that is a VHD file, from the head of its export. Everything that goes wrong means
    /// that nothing is known, which costs time and never data.
    async fn allocation(&self) -> Allocation {
        if !keeps_vhds(&self.shot.live.sr, &self.shot.live.record) || self.size() > VHD_MAX_DISK_BYTES {
            return Allocation::Unknown;
        }
        match tokio::time::timeout(HEAD_LIMIT, self.head()).await {
            Ok(Ok(Some(map))) if map.virtual_size == self.size() => Allocation::Known(map.allocated),
            Ok(Ok(_)) => Allocation::Unknown,
            Ok(Err(error)) => {
                tracing::info!(device = self.device(), %error, "no allocation map");
                Allocation::Unknown
            }
            Err(_) => Allocation::Unknown,
        }
    }

    async fn head(&self) -> Result<Option<AllocationMap>, EngineError> {
        let mut failed = None;
        // A host that has just died is found out by asking it.
        for host in self.hosts().await?.into_iter().take(HEAD_ATTEMPTS) {
            match self.head_from(&host).await {
                Ok(map) => return Ok(map),
                Err(error) => {
                    tracing::info!(%error, host = host.as_str(), "no head of an export from this host");
                    failed = Some(error);
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    async fn head_from(&self, host: &host::Ref) -> Result<Option<AllocationMap>, EngineError> {
        let format = ExportFormat::Vhd { base: None };
        let mut body = export_raw_vdi(self.run.session(), host, &self.shot.reference, format)
            .await
            .doing("export the head of a disk")?;
        let map = parse_head(&mut body).await;
        // The task fails because we hang up: that is expected and says nothing.
        if let Err(error) = body.close().await {
            tracing::debug!(%error, "closing the export of a disk's head");
        }
        map
    }

    /// The export of the whole disk over HTTP.
    async fn begin_http(&self) -> Result<ExportBody, EngineError> {
        let Some(host) = self.host().await? else {
            return Err(EngineError::NoHost { device: self.device().to_owned() });
        };
        http_read::begin(self.run.session(), &host, &self.shot.reference, self.size()).await
    }

    /// A host that has the disk's SR, one that lives if there is any.
    async fn host(&self) -> Result<Option<host::Ref>, EngineError> {
        Ok(self.hosts().await?.into_iter().next())
    }

    /// The hosts that have the disk's SR, those that live first.
    async fn hosts(&self) -> Result<Vec<host::Ref>, EngineError> {
        let session = self.run.session();
        let pbds = pbd::get_all_records(session).await.doing("list the PBDs")?;
        let sr = &self.shot.record.sr;
        let (mut living, mut dead) = (Vec::new(), Vec::new());
        for pbd in pbds.into_values().filter(|pbd| pbd.sr == *sr && pbd.currently_attached) {
            match is_live(session, &pbd.host).await {
                true => living.push(pbd.host),
                false => dead.push(pbd.host),
            }
        }
        living.extend(dead);
        Ok(living)
    }

    fn report(&self, pass: &Pass, line: &Line<'_, '_>) -> DiskReport {
        DiskReport {
            device: self.device().to_owned(),
            vdi_uuid: self.shot.live.record.uuid.clone(),
            name: self.shot.live.record.name_label.clone(),
            virtual_size: self.size(),
            level: pass.level,
            reason: pass.reason.clone(),
            changed_bytes: pass.changed_bytes,
            read_bytes: line.read_bytes,
            sample_bytes: line.sample_bytes,
            verification: None,
        }
    }

    fn point_disk(
        &self,
        pass: &Pass,
        plan: &DiskPlan,
        stored: Passed,
        bitmap: Option<xenvault_store::BlobRef>,
        known: &[u64],
    ) -> PointDisk {
        let mut attributes: BTreeMap<String, String> = facts(self.situation, self.shot);
        let mut data = stored.data;
        data.extend(known.iter().copied().filter(|offset| *offset < self.size()));
        data.sort_unstable();
        data.dedup();
        // Old and new places in turn, if there are too many.
        let step = data.len().div_ceil(KNOWN_PLACES).max(1);
        let places: Vec<String> =
            data.iter().step_by(step).map(|offset| (offset / CBT_BLOCK_BYTES).to_string()).collect();
        attributes.insert(fact::DATA.to_owned(), places.join(","));
        if let Some(base) = &pass.base {
            attributes.insert(fact::BASE.to_owned(), base.snapshot_vdi_uuid.clone());
        } else if let (Some(_), Some(previous)) = (&bitmap, &plan.previous) {
            attributes.insert(fact::BASE.to_owned(), previous.snapshot_vdi_uuid.clone());
        }
        if plan.kinship != Kinship::Fine {
            attributes.insert(fact::UNRELATED.to_owned(), "true".to_owned());
        }
        PointDisk {
            vdi_uuid: self.shot.live.record.uuid.clone(),
            snapshot_vdi_uuid: self.shot.record.uuid.clone(),
            name: self.shot.live.record.name_label.clone(),
            device: self.device().to_owned(),
            virtual_size: self.size(),
            map: stored.result.map,
            level: match pass.level {
                Level::Full => StoredLevel::Full,
                Level::Incremental => StoredLevel::Inc,
            },
            reason: pass.reason.clone(),
            changed_bytes: pass.changed_bytes,
            bitmap,
            chain_nonce: self.shot.chain.clone(),
            attributes,
        }
    }
}

async fn parse_head(body: &mut ExportBody) -> Result<Option<AllocationMap>, EngineError> {
    let mut parser = HeadParser::new();
    while let Some(bytes) = body.next().await.doing("export the head of a disk")? {
        match parser.push(&bytes) {
            Ok(HeadProgress::Complete) => break,
            Ok(HeadProgress::Needs(_)) => {}
            Err(error) => {
                tracing::info!(%error, "the head of the export is not usable");
                return Ok(None);
            }
        }
    }
    Ok(parser.finish().ok())
}

/// Where the disk held data at earlier points, in bytes.
pub(crate) fn known_places(disk: &PointDisk) -> Vec<u64> {
    let list = disk.attributes.get(fact::DATA).map(String::as_str).unwrap_or_default();
    list.split(',').filter_map(|text| text.parse::<u64>().ok()?.checked_mul(CBT_BLOCK_BYTES)).collect()
}

/// The connection to one disk, opened when something has to be read.
struct Line<'a, 'b> {
    job: &'a Job<'b>,
    export: Option<Export>,
    sample_bytes: u64,
    read_bytes: u64,
}

impl Line<'_, '_> {
    async fn export(&mut self) -> Result<Export, EngineError> {
        if let Some(export) = &self.export {
            return Ok(export.clone());
        }
        let (job, options) = (self.job, self.job.run.engine.options());
        let source = source(job.run.session(), &job.shot.reference, job.access);
        let began = Instant::now();
        let opened = Export::open(
            source,
            ExportOptions {
                connections: options.connections_per_disk.max(1),
                request_bytes: REQUEST_BYTES.min(options.memory_bytes / 8).max(CBT_BLOCK_BYTES),
                budget: job.run.engine.budget(),
                ..ExportOptions::default()
            },
        )
        .await;
        job.run.meter.attached_for(began.elapsed());
        let export = opened.map_err(|source| self.failed(source))?;
        if export.size() != job.size() {
            return Err(EngineError::SizeDiffers {
                device: job.device().to_owned(),
                vdi: job.shot.live.record.uuid.clone(),
                export: export.size(),
                record: job.size(),
            });
        }
        self.export = Some(export.clone());
        Ok(export)
    }

    fn failed(&self, source: xenvault_nbd::NbdError) -> EngineError {
        EngineError::Read {
            device: self.job.device().to_owned(),
            vdi: self.job.shot.live.record.uuid.clone(),
            source: Box::new(source),
        }
    }

    /// Reads the extents of a pass and writes them. A disk of which nothing has to be read is not opened.
    async fn transfer(&mut self, pass: &Pass) -> Result<Passed, EngineError> {
        let job = self.job;
        let planned_bytes = pass.extents.total_bytes();
        job.run.meter.plan(planned_bytes);
        job.run.meter.stage(&Stage::ReadDisk {
            device: job.device().to_owned(),
            reason: pass.reason.clone(),
            planned_bytes,
        });
        let base = pass.base.as_ref().map(|disk| disk.map);
        let options = DiskOptions { virtual_size: job.size(), base };
        let mut disk = Box::pin(job.writer.disk(options)).await.doing("begin a disk")?;
        let mut dice = Dice::seeded_by(&[job.run.id(), job.device()]);
        let mut places = Reservoir::new(KNOWN_PLACES);
        if job.access == Access::Http {
            let body = job.begin_http().await?;
            self.read_bytes += http_read::store(body, &mut disk, &mut places, &mut dice, &job.run.meter).await?;
        } else if !pass.extents.is_empty() {
            let export = self.export().await?;
            let window_bytes = (job.run.engine.options().memory_bytes / 4).max(REQUEST_BYTES);
            let mut pieces = export.read_extents(pass.extents.clone(), ReadOptions { window_bytes });
            loop {
                let asked = Instant::now();
                let Some(piece) = pieces.next().await else { break };
                let (offset, bytes) = piece.map_err(|source| self.failed(source))?;
                let came = Instant::now();
                let length = bytes.len() as u64;
                if bytes.iter().take(4096).any(|&byte| byte != 0) {
                    places.offer(offset, &mut dice);
                }
                Box::pin(disk.write(offset, bytes)).await.doing("store a disk")?;
                self.read_bytes += length;
                job.run.meter.moved(length, came.duration_since(asked), came.elapsed());
            }
        }
        let result = Box::pin(disk.finish()).await.doing("complete a disk")?;
        job.run.meter.report();
        Ok(Passed { result, data: places.into_offsets() })
    }

    /// Reads a sample again and compares it with what the repository returns; gives the first block that differs.
    async fn differing_block(
        &mut self,
        pass: &Pass,
        passed: &Passed,
        known: &[u64],
    ) -> Result<Option<ByteRange>, EngineError> {
        let job = self.job;
        let count = job.run.engine.options().sample_blocks.min(MAX_SAMPLE_BLOCKS);
        let places = if pass.base.is_some() { known } else { &passed.data };
        let field = Field { virtual_size: job.size(), read: &pass.extents, known_data: places };
        let mut dice = Dice::seeded_by(&[job.run.id(), job.device(), "sample"]);
        let sample = choose(&field, count, &mut dice);
        if sample.is_empty() {
            return Ok(None);
        }
        if job.access == Access::Http && job.repository.access() != KeyAccess::Full {
            let text = format!(
                "disk {}: no sample was compared, since a key that only writes can not read the repository, and over \
                 HTTP there are no random reads",
                job.device()
            );
            job.run.meter.warn("sample-skipped", text);
            return Ok(None);
        }
        if job.access == Access::Http {
            return self.differing_over_http(passed, count, &mut dice).await;
        }
        job.run.meter.stage(&Stage::Verify { device: job.device().to_owned() });
        job.writer.flush().await.doing("complete its packs")?;
        let reader = job.repository.disk(&passed.result.map);
        let export = self.export().await?;
        let hashed = job.repository.access() != KeyAccess::Full;
        for range in sample {
            // Without a key that reads, whole chunks are compared, by their hashes.
            let range = match hashed {
                true => reader.range_to_compare(range).await.doing("read the map of a disk")?,
                false => range,
            };
            let again = export.read(range).await.map_err(|source| self.failed(source))?;
            self.sample_bytes += range.len();
            job.run.meter.sampled(range.len());
            let same = match hashed {
                true => reader.is_hash_of(range.start(), &again).await.doing("read the map of a disk")?,
                false => again == reader.read_at(range).await.doing("read back a sample")?,
            };
            if !same {
                return Ok(Some(range));
            }
        }
        Ok(None)
    }

    /// The same where there are no random reads: the begin of the disk, and what the SR calls empty.
    async fn differing_over_http(
        &mut self,
        passed: &Passed,
        count: usize,
        dice: &mut Dice,
    ) -> Result<Option<ByteRange>, EngineError> {
        let job = self.job;
        job.run.meter.stage(&Stage::Verify { device: job.device().to_owned() });
        job.writer.flush().await.doing("complete its packs")?;
        let reader = job.repository.disk(&passed.result.map);
        let mut checks = Vec::new();
        if let Allocation::Known(allocated) = job.allocation().await {
            checks.push(http_read::compare_empty(&allocated, &reader, count, dice).await?);
        }
        let begin = u64::try_from(count).unwrap_or(0).saturating_mul(CBT_BLOCK_BYTES);
        checks.push(http_read::compare_begin(job.begin_http().await?, &reader, begin).await?);
        for check in &checks {
            self.sample_bytes += check.bytes;
            job.run.meter.sampled(check.bytes);
        }
        Ok(checks.into_iter().find_map(|check| check.differs))
    }

    /// Closes the connections properly; the hosts detach the disk then. Failing that they do it by themselves, later.
    async fn close(&mut self) {
        let Some(export) = self.export.take() else { return };
        let began = Instant::now();
        if let Err(error) = export.close().await {
            self.job.run.meter.warn(
                "nbd-not-closed",
                format!("the NBD connections of disk {} were not closed properly: {error}", self.job.device()),
            );
        }
        self.job.run.meter.attached_for(began.elapsed());
    }
}
