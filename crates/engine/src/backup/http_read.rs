//! Reading a whole disk over HTTP: the last resort, for servers that have no NBD.
//!
//! Such a server has neither change information nor random reads, so the disk comes from begin to end. That it is
//! complete is what the task and the length say ([`ExportBody::finish`]).
//!
//! Nothing but another whole read would read all of it again. What is cheap is checked: a second export is read a short
//! way from its begin and compared; and where the SR keeps an allocation map, places that it calls empty must be zeros
//! in what was stored, wherever on the disk they lie.

use std::time::Instant;

use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store::{DiskReader, DiskWriter};
use xenvault_xenapi::transfer::{ExportBody, ExportFormat, export_raw_vdi};
use xenvault_xenapi::{Session, host, vdi};

use super::sample::{Dice, Field, Reservoir, choose};
use crate::EngineError;
use crate::meter::Meter;
use crate::pool::{Doing as _, DoingInRepository as _};

/// Begins the export of every byte of `disk`, over a host that has its SR.
pub(crate) async fn begin(
    session: &Session,
    host: &host::Ref,
    disk: &vdi::Ref,
    virtual_size: u64,
) -> Result<ExportBody, EngineError> {
    export_raw_vdi(session, host, disk, ExportFormat::Raw { virtual_size }).await.doing("export a disk")
}

/// Writes what comes, and gives the number of bytes; `places` learns where data is.
pub(crate) async fn store(
    mut body: ExportBody,
    disk: &mut DiskWriter,
    places: &mut Reservoir,
    dice: &mut Dice,
    meter: &Meter,
) -> Result<u64, EngineError> {
    let mut offset = 0_u64;
    loop {
        let asked = Instant::now();
        let piece = match body.next().await {
            Ok(Some(piece)) => piece,
            Ok(None) => break,
            // The task knows the reason where the connection only broke.
            Err(broken) => {
                body.finish().await.doing("export a disk")?;
                return Err(broken).doing("export a disk");
            }
        };
        let came = Instant::now();
        let length = piece.len() as u64;
        if piece.iter().take(4096).any(|&byte| byte != 0) {
            places.offer(offset, dice);
        }
        Box::pin(disk.write(offset, piece)).await.doing("store a disk")?;
        offset += length;
        meter.moved(length, came.duration_since(asked), came.elapsed());
    }
    body.finish().await.doing("export a disk")?;
    Ok(offset)
}

/// What a check of a stored disk came to.
#[derive(Debug, Default)]
pub(crate) struct Sampled {
    /// Bytes that were compared.
    pub(crate) bytes: u64,
    /// The first range that is not what it should be.
    pub(crate) differs: Option<ByteRange>,
}

/// Compares the first `length` bytes of a second export with what was stored, then hangs up.
pub(crate) async fn compare_begin(
    mut again: ExportBody,
    stored: &DiskReader,
    length: u64,
) -> Result<Sampled, EngineError> {
    let mut sampled = Sampled::default();
    let wanted = length.min(stored.size());
    while sampled.bytes < wanted && sampled.differs.is_none() {
        let piece = match again.next().await {
            Ok(Some(piece)) => piece,
            // It is shorter than what was stored: the task knows why.
            Ok(None) => {
                again.finish().await.doing("export a disk again")?;
                sampled.differs = ByteRange::new(sampled.bytes, wanted).ok();
                return Ok(sampled);
            }
            Err(broken) => {
                again.finish().await.doing("export a disk again")?;
                return Err(broken).doing("export a disk again");
            }
        };
        let piece = piece.slice(..piece.len().min(usize::try_from(wanted - sampled.bytes).unwrap_or(usize::MAX)));
        let Ok(range) = ByteRange::with_length(sampled.bytes, piece.len() as u64) else { break };
        if stored.read_at(range).await.doing("read back a sample")? != piece {
            sampled.differs = Some(range);
        }
        sampled.bytes += range.len();
    }
    // The task fails because we hang up: that is expected and says nothing.
    if let Err(error) = again.close().await {
        tracing::debug!(%error, "closing the second export of a disk");
    }
    Ok(sampled)
}

/// Looks at some places that the SR has never allocated: what was stored for them must be zeros.
pub(crate) async fn compare_empty(
    allocated: &ExtentSet,
    stored: &DiskReader,
    count: usize,
    dice: &mut Dice,
) -> Result<Sampled, EngineError> {
    let empty = allocated.complement(stored.size());
    let mut sampled = Sampled::default();
    // Half of a choice falls anywhere, so that twice as many are chosen.
    let field = Field { virtual_size: stored.size(), read: &empty, known_data: &[] };
    let places = choose(&field, count.saturating_mul(2), dice);
    for range in places.into_iter().filter(|range| empty.within(*range).total_bytes() == range.len()).take(count) {
        let bytes = stored.read_at(range).await.doing("read back a sample")?;
        sampled.bytes += range.len();
        if bytes.iter().any(|byte| *byte != 0) {
            sampled.differs = Some(range);
            break;
        }
    }
    Ok(sampled)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use xenvault_store::{DiskOptions, Repository, Secret, WriterOptions};

    use super::*;

    #[tokio::test]
    async fn what_was_stored_where_the_sr_holds_nothing_is_noticed() {
        const SIZE: u64 = 8 << 20;
        let folder = tempfile::tempdir().unwrap();
        let secret = Secret::new("passphrase");
        let repository = Repository::init(&folder.path().join("repo"), &secret, Default::default()).await.unwrap();
        let writer = repository.writer(WriterOptions::default()).await.unwrap();
        let mut disk = writer.disk(DiskOptions { virtual_size: SIZE, base: None }).await.unwrap();
        // The first 2 MiB hold data, and so does the second half of the disk.
        for offset in [0, 4 << 20, 6 << 20] {
            disk.write(offset, Bytes::from(vec![7; 2 << 20])).await.unwrap();
        }
        let stored = disk.finish().await.unwrap();
        writer.flush().await.unwrap();
        let reader = repository.disk(&stored.map);

        let mut allocated = ExtentSet::from_range(ByteRange::up_to(2 << 20));
        let found = compare_empty(&allocated, &reader, 16, &mut Dice::new(1)).await.unwrap();
        assert!(found.differs.is_some_and(|range| range.start() >= 4 << 20), "{found:?}");
        allocated.insert(ByteRange::new(4 << 20, SIZE).unwrap());
        let found = compare_empty(&allocated, &reader, 16, &mut Dice::new(1)).await.unwrap();
        assert!(found.differs.is_none() && found.bytes > 0, "{found:?}");
        allocated.insert(ByteRange::up_to(SIZE));
        let found = compare_empty(&allocated, &reader, 16, &mut Dice::new(1)).await.unwrap();
        assert_eq!((found.differs, found.bytes), (None, 0));
    }
}
