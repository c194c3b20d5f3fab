//! One disk of a restore: made, filled, and read again.

use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt as _;
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_nbd::{Export, ExportOptions};
use xenvault_store::{DiskReader, PointDisk, ReadOptions};
use xenvault_xenapi::transfer::{ChunkedImport, import_raw_vdi_chunked};
use xenvault_xenapi::{network, vdi};

use super::request::RestoredDisk;
use super::target::{Emptiness, Target};
use crate::EngineError;
use crate::backup::{Access, Dice, Field, access, choose, source};
use crate::marks::{self, Marks};
use crate::monitor::Stage;
use crate::options::MAX_SAMPLE_BLOCKS;
use crate::pool::{Doing as _, DoingInRepository as _, is_full};
use crate::run::Run;
use crate::state::Made;

/// Zeros are sent in pieces of this size, in bytes.
const ZERO_PIECE_BYTES: usize = 1024 * 1024;
/// Data is looked for in windows of this size, so that memory does not follow the disk.
const COUNT_WINDOW_BYTES: u64 = 64 * 1024 * 1024 * 1024;

/// A disk that was made for this restore.
#[derive(Clone, Debug)]
pub(super) struct NewDisk {
    pub(super) reference: vdi::Ref,
    pub(super) record: vdi::Record,
    pub(super) device: String,
    /// Name for when it is done.
    pub(super) name: String,
}

/// Bytes of data in a stored disk.
pub(crate) async fn data_bytes(reader: &DiskReader) -> Result<u64, EngineError> {
    let mut total = 0_u64;
    for window in ByteRange::up_to(reader.size()).pieces(COUNT_WINDOW_BYTES) {
        total += reader.extents(window).await.doing("read a disk's map")?.total_bytes();
    }
    Ok(total)
}

/// Makes an empty disk under a name that tells whose it is, and marks it.
pub(super) async fn create(
    run: &Run,
    target: &Target,
    stored: &PointDisk,
    original: Option<&vdi::Record>,
    marks_of_run: &Marks,
) -> Result<NewDisk, EngineError> {
    let session = run.session();
    let name = marks::operation_name("Xenvault restore", run.engine.instance(), run.id());
    run.intend(Made::Vdi, &name)?;
    let kind = match original.map(|record| &record.type_) {
        Some(vdi::Type::System) => vdi::Type::System,
        _ => vdi::Type::User,
    };
    // What the SR's driver keeps about the old disk (`sm_config`, `xenstore_data`) is not the new disk's.
    let wanted = vdi::Record {
        sr: target.reference.clone(),
        name_label: name,
        name_description: original.map(|record| record.name_description.clone()).unwrap_or_default(),
        virtual_size: i64::try_from(stored.virtual_size).unwrap_or(i64::MAX),
        type_: kind,
        sharable: original.is_some_and(|record| record.sharable),
        tags: original.map(|record| record.tags.clone()).unwrap_or_default(),
        ..Default::default()
    };
    let reference = match vdi::create(session, &wanted).await {
        Err(error) if is_full(&error) => {
            return Err(EngineError::SrFull {
                sr: target.record.name_label.clone(),
                action: format!("make disk {}", stored.device),
                source: Box::new(error),
            });
        }
        other => other.doing(format!("make disk {} of {} bytes", stored.device, stored.virtual_size))?,
    };
    let mut record = vdi::get_record(session, &reference).await.doing("read the new disk's record")?;
    run.created(Made::Vdi, &record.uuid)?;
    let present = original.map(|record| super::settings::other_config(&record.other_config)).unwrap_or_default();
    record.other_config = marks_of_run.applied(&record.uuid, &present);
    vdi::set_other_config(session, &reference, &record.other_config).await.doing("mark the new disk")?;
    Ok(NewDisk { reference, record, device: stored.device.clone(), name: stored.name.clone() })
}

/// Sends what the repository holds. Only the task's success says that it arrived.
pub(super) async fn fill(
    run: &Run,
    target: &Target,
    disk: &NewDisk,
    reader: &DiskReader,
    planned_bytes: u64,
) -> Result<RestoredDisk, EngineError> {
    run.meter.stage(&Stage::WriteDisk { device: disk.device.clone(), planned_bytes });
    let sending = || format!("write disk {}", disk.device);
    let import = import_raw_vdi_chunked(run.session(), &target.host, &disk.reference).await.doing(sending())?;
    let mut sink = Sink { run, import, at: 0, sent: 0, emptiness: target.emptiness(&disk.record), what: sending() };
    let window_bytes = (run.engine.options().memory_bytes / 4).max(1024 * 1024);
    let mut pieces = reader.stream(ByteRange::up_to(reader.size()), ReadOptions { window_bytes });
    loop {
        let asked = Instant::now();
        let Some(piece) = pieces.next().await else { break };
        let (offset, bytes) = piece.doing("read a disk")?;
        let came = Instant::now();
        let length = bytes.len() as u64;
        sink.zeros_up_to(offset).await?;
        sink.data(offset, bytes).await?;
        run.meter.moved(length, came.duration_since(asked), came.elapsed());
    }
    let end = u64::try_from(disk.record.virtual_size).unwrap_or(0).max(reader.size());
    sink.zeros_up_to(end).await?;
    let sent_bytes = sink.sent;
    sink.import.finish().await.doing(sending())?;
    run.meter.report();
    Ok(RestoredDisk {
        device: disk.device.clone(),
        vdi_uuid: disk.record.uuid.clone(),
        virtual_size: u64::try_from(disk.record.virtual_size).unwrap_or(0),
        sent_bytes,
    })
}

/// The way to the new disk, in ascending order.
struct Sink<'a> {
    run: &'a Run,
    import: ChunkedImport,
    at: u64,
    sent: u64,
    emptiness: Emptiness,
    what: String,
}

impl Sink<'_> {
    async fn data(&mut self, offset: u64, bytes: Bytes) -> Result<(), EngineError> {
        let length = bytes.len() as u64;
        self.import.write(offset, bytes).await.doing(self.what.clone())?;
        self.at = offset.saturating_add(length);
        self.sent = self.sent.saturating_add(length);
        Ok(())
    }

    /// Covers the gap up to `offset`, where the disk would hold garbage otherwise.
    async fn zeros_up_to(&mut self, offset: u64) -> Result<(), EngineError> {
        if self.emptiness == Emptiness::Zeros {
            return Ok(());
        }
        while self.at < offset {
            let length = usize::try_from(offset - self.at).unwrap_or(usize::MAX).min(ZERO_PIECE_BYTES);
            let zeros = Bytes::from_static(&ZEROS).slice(..length);
            self.data(self.at, zeros).await?;
            self.run.meter.report_seldom();
        }
        Ok(())
    }
}

static ZEROS: [u8; ZERO_PIECE_BYTES] = [0; ZERO_PIECE_BYTES];

/// Reads a sample of the new disk over NBD and compares it with the repository. Where the pool does not offer NBD the
/// task's success has to do, which is reported.
pub(super) async fn verify(
    run: &Run,
    disk: &NewDisk,
    stored: &PointDisk,
    reader: &DiskReader,
) -> Result<(), EngineError> {
    run.meter.stage(&Stage::Verify { device: disk.device.clone() });
    let Some(access) = nbd_access(run).await? else {
        run.meter.warn(
            "restore-not-sampled",
            format!("disk {} was not read again: the pool does not offer NBD", disk.device),
        );
        return Ok(());
    };
    let options = run.engine.options();
    let known = crate::backup::known_places(stored);
    let nothing = ExtentSet::new();
    let field = Field { virtual_size: stored.virtual_size, read: &nothing, known_data: &known };
    let mut dice = Dice::seeded_by(&[run.id(), &disk.device]);
    let sample = choose(&field, options.sample_blocks.min(MAX_SAMPLE_BLOCKS), &mut dice);
    let failed = |source| EngineError::Read {
        device: disk.device.clone(),
        vdi: disk.record.uuid.clone(),
        source: Box::new(source),
    };
    let began = Instant::now();
    let export = Export::open(
        source(run.session(), &disk.reference, access),
        ExportOptions { connections: 1, budget: run.engine.budget(), ..ExportOptions::default() },
    )
    .await
    .map_err(failed)?;
    run.meter.attached_for(began.elapsed());
    for range in sample {
        let written = export.read(range).await.map_err(failed)?;
        run.meter.sampled(range.len());
        let wanted = reader.read_at(range).await.doing("read back a sample")?;
        if written != wanted {
            return Err(EngineError::RestoreDiffers { device: disk.device.clone(), range });
        }
    }
    if let Err(error) = export.close().await {
        run.meter.warn("nbd-not-closed", format!("the NBD connection of disk {} was not closed: {error}", disk.device));
    }
    Ok(())
}

async fn nbd_access(run: &Run) -> Result<Option<Access>, EngineError> {
    let networks = network::get_all_records(run.session()).await.doing("list the networks")?;
    Ok(access(networks.values(), run.engine.options().clear_text).ok())
}
