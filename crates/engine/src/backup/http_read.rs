//! Reading a whole disk over HTTP: the last resort, for servers that have no NBD.
//!
//! Such a server has neither change information nor random reads, so the disk comes from begin to end. That it is
//! complete is what the task and the length say ([`ExportBody::finish`]); there is no sample to read again.

use std::time::Instant;

use xenvault_store::DiskWriter;
use xenvault_xenapi::transfer::{ExportBody, ExportFormat, export_raw_vdi};
use xenvault_xenapi::{Session, host, vdi};

use super::sample::{Dice, Reservoir};
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
