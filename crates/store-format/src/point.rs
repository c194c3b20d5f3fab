//! The manifest of a restore point: one VM at one moment.
//!
//! It names a disk map per disk and the VM's configuration, and carries the evidence that the next backup's choice of
//! a base needs. Fields that this crate has no opinion about are texts in `attributes`.

use std::collections::BTreeMap;
use std::fmt;

use bincode::Options as _;
use ring::aead::Aad;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::keys::{frame_nonce, random_array};
use crate::payload::{FRAME_HEADER_BYTES, decode};
use crate::wire::{Fields, checked_body, put_crc, put_preamble, record_options};
use crate::{BlobRef, Compressor, DiskMapRef, FormatError, Keys, MAX_PLAIN_BYTES, PointId, RepositoryId};

const WHAT: &str = "restore point";
const MAGIC: &[u8; 8] = b"XVLTPONT";
const PURPOSE: &str = "point";

/// Longest object of a restore point, in bytes.
pub const MAX_POINT_BYTES: usize = MAX_PLAIN_BYTES + 1024;

/// What a backup read. What it stored is a complete point at every level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Level {
    /// Everything.
    Full,
    /// What changed since the last full.
    Diff,
    /// What changed since the last backup.
    Inc,
    /// Everything, outside of every chain.
    Copy,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Full => "FULL",
            Self::Diff => "DIFF",
            Self::Inc => "INC",
            Self::Copy => "COPY",
        })
    }
}

/// One VM at one moment. Complete in itself: no other point is needed to restore it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointManifest {
    /// Identity of the point, drawn by whoever makes it.
    pub id: PointId,
    /// The run that made it.
    pub run_id: Uuid,
    /// Fencing number of that run's lease; of two points of one run the higher one counts.
    pub fencing: u64,
    /// The installation that made it.
    pub instance: String,
    /// UUID of the pool, as XenAPI writes it; one segment of the object's name.
    pub pool_uuid: String,
    /// UUID of the VM, as XenAPI writes it; one segment of the object's name.
    pub vm_uuid: String,
    /// The VM's name at that moment.
    pub vm_name: String,
    /// What was read, over all disks: `Full` if any disk was read as a whole.
    pub level: Level,
    /// Why that level, in one line for people.
    pub reason: String,
    /// The moment of the snapshot, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// The point that the bases came from.
    pub parent: Option<PointId>,
    /// Number of the newest sweep that the writer had seen; the writer fills it in when it publishes.
    pub newest_sweep_seen: u64,
    /// The disks, in the order of their device numbers.
    pub disks: Vec<PointDisk>,
    /// The VM's configuration, in whatever form the engine chose.
    pub vm_config: BlobRef,
    /// Further facts by name.
    pub attributes: BTreeMap<String, String>,
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// UUID of the VDI that was backed up.
    pub vdi_uuid: String,
    /// UUID of the snapshot that was read; the base of the next incremental.
    pub snapshot_vdi_uuid: String,
    /// The VDI's name at that moment.
    pub name: String,
    /// XenAPI's `userdevice` of the VBD.
    pub device: String,
    /// Size of the disk in bytes; equal to the map's.
    pub virtual_size: u64,
    /// The content.
    pub map: DiskMapRef,
    /// What was read of this disk.
    pub level: Level,
    /// Why that level, as a short token such as `changed-blocks` or `cbt-disabled`.
    pub reason: String,
    /// Bytes that counted as changed.
    pub changed_bytes: u64,
    /// The bitmap of this step, as XenAPI gave it.
    pub bitmap: Option<BlobRef>,
    /// Nonce of the unbroken chain of changed-block tracking that the snapshot belongs to.
    pub chain_nonce: Option<String>,
    /// Evidence for the next choice of a base, and further facts, by name.
    pub attributes: BTreeMap<String, String>,
}

/// The bytes of a point's object: a head with a salt of its own, then the sealed record.
///
/// # Errors
/// [`FormatError::Limit`] or [`FormatError::Record`] if it is longer than 1 MiB; [`FormatError::Cryptography`].
pub fn encode_point(keys: &Keys, manifest: &PointManifest) -> Result<Vec<u8>, FormatError> {
    encode_with_salt(keys, manifest, random_array()?)
}

fn encode_with_salt(keys: &Keys, manifest: &PointManifest, salt: [u8; 32]) -> Result<Vec<u8>, FormatError> {
    let record = record_options(MAX_PLAIN_BYTES as u64)
        .serialize(manifest)
        .map_err(|source| FormatError::Record { what: WHAT, source })?;
    let mut out = head(keys.repository(), &salt);
    let frame = Compressor::new(3)?.prepare(&record)?.frame;
    let mut sealed = frame.get(FRAME_HEADER_BYTES..).unwrap_or_default().to_vec();
    keys.sealing_key(&salt, PURPOSE)?
        .seal_in_place_append_tag(frame_nonce(0), Aad::from(&out), &mut sealed)
        .map_err(|_| FormatError::Cryptography)?;
    let length = u32::try_from(sealed.len()).map_err(|_| FormatError::Cryptography)?;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&sealed);
    put_crc(&mut out);
    Ok(out)
}

/// Reads a point's object.
///
/// # Errors
/// Everything that is wrong with the bytes.
pub fn decode_point(keys: &Keys, bytes: &[u8]) -> Result<PointManifest, FormatError> {
    let mut fields = Fields::new(WHAT, checked_body(WHAT, MAGIC, bytes)?);
    fields.preamble(MAGIC)?;
    let repository = RepositoryId::from_bytes(fields.array()?);
    if repository != keys.repository() {
        return Err(FormatError::ForeignRepository { what: WHAT });
    }
    let salt = fields.array()?;
    let length = fields.limited("length", MAX_POINT_BYTES)?;
    let mut sealed = fields.take(length)?.to_vec();
    fields.end()?;
    let opened = keys
        .sealing_key(&salt, PURPOSE)?
        .open_in_place(frame_nonce(0), Aad::from(head(repository, &salt)), &mut sealed)
        .map_err(|_| FormatError::Authentication { what: WHAT })?;
    decode_record(&decode(opened)?.into_bytes())
}

pub(crate) fn decode_record(bytes: &[u8]) -> Result<PointManifest, FormatError> {
    let record = record_options(MAX_PLAIN_BYTES as u64).deserialize(bytes);
    record.map_err(|source| FormatError::Record { what: WHAT, source })
}

fn head(repository: RepositoryId, salt: &[u8; 32]) -> Vec<u8> {
    let mut out = Vec::new();
    put_preamble(&mut out, MAGIC);
    out.extend_from_slice(repository.as_bytes());
    out.extend_from_slice(salt);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ChunkId;
    use crate::testing::{each_flip, golden, keys};

    fn manifest() -> PointManifest {
        let map = DiskMapRef { root: Some(ChunkId::from_bytes([4; 32])), virtual_size: 1 << 30 };
        let disk = PointDisk {
            vdi_uuid: "vdi".into(),
            snapshot_vdi_uuid: "snapshot".into(),
            name: "root disk".into(),
            device: "0".into(),
            virtual_size: 1 << 30,
            map,
            level: Level::Inc,
            reason: "changed-blocks".into(),
            changed_bytes: 65_536,
            bitmap: Some(BlobRef { id: ChunkId::from_bytes([5; 32]), length: 2048 }),
            chain_nonce: Some("nonce".into()),
            attributes: BTreeMap::from([("host".into(), "h1".into())]),
        };
        PointManifest {
            id: PointId::from_bytes([1; 16]),
            run_id: Uuid::from_bytes([2; 16]),
            fencing: 7,
            instance: "instance".into(),
            pool_uuid: "pool".into(),
            vm_uuid: "vm".into(),
            vm_name: "Web 1".into(),
            level: Level::Inc,
            reason: "changed-blocks".into(),
            created_unix_ms: 1_700_000_000_000,
            parent: Some(PointId::from_bytes([3; 16])),
            newest_sweep_seen: 0,
            disks: vec![disk],
            vm_config: BlobRef { id: ChunkId::from_bytes([6; 32]), length: 12 },
            attributes: BTreeMap::new(),
        }
    }

    #[test]
    fn the_bytes_of_a_point_are_fixed() {
        let bytes = encode_with_salt(&keys(), &manifest(), [8; 32]).unwrap();
        golden("point", &bytes);
        assert_eq!(decode_point(&keys(), &bytes).unwrap(), manifest());
        each_flip(&bytes, |hurt| assert!(decode_point(&keys(), hurt).is_err()));
    }

    #[test]
    fn the_record_of_a_point_is_fixed() {
        golden("point-record", &record_options(1 << 20).serialize(&manifest()).unwrap());
    }

    proptest! {
        #[test]
        fn foreign_records_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = decode_record(&bytes);
            let _ = decode_point(&keys(), &bytes);
        }
    }
}
