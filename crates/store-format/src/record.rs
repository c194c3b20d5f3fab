//! Small records that are no points: tombstones and their undoing, receipts, damage marks, results of verifications,
//! intents and ends of sweeps.
//!
//! All of them are sealed in the same way, each under a key from its own salt; the kind of record is authenticated, so
//! none can stand in for another. Each says itself what it is about, for whoever reads it under a wrong name to notice.

use std::fmt;

use bincode::Options as _;
use ring::aead::Aad;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::keys::{frame_nonce, random_array};
use crate::wire::{Fields, checked_body, put_crc, put_preamble, record_options};
use crate::{ChunkId, FormatError, Keys, PackId, PointId, RecordId, RepositoryId};

const MAGIC: &[u8; 8] = b"XVLTRECD";
const PURPOSE: &str = "record";
const TAG_BYTES: usize = 16;

/// Longest record before it is sealed, in bytes.
const MAX_PLAIN_RECORD_BYTES: usize = 24 * 1024 * 1024;

/// Longest object of a record, in bytes.
pub const MAX_RECORD_BYTES: usize = MAX_PLAIN_RECORD_BYTES + 1024;
/// Most packs that one sweep condemns: 32 TiB of packs of the usual size.
pub const MAX_CONDEMNED_PACKS: usize = 1 << 20;
/// Most points, and most records, that one sweep removes.
pub const MAX_FORGOTTEN_POINTS: usize = 1 << 15;
/// Most single chunks, and most whole packs, of one damage mark.
pub const MAX_DAMAGED_COPIES: usize = 1 << 18;
/// Most points that the result of a verification names.
pub const MAX_HURT_POINTS: usize = 1 << 16;
/// Longest text in a record, in bytes.
const MAX_TEXT_BYTES: usize = 4096;

mod sealed {
    pub trait Kind: serde::Serialize + serde::de::DeserializeOwned {
        /// The number that stands for the kind in the format.
        const KIND: u32;
        /// What it is, for messages.
        const WHAT: &'static str;

        /// Cross-checks and limits.
        fn check(&self) -> Result<(), crate::FormatError>;
    }
}

use sealed::Kind;

/// A kind of record. Implemented by the records of this crate only.
pub trait Record: Kind {}
impl<T: Kind> Record for T {}

/// A point is to be forgotten: it is not listed any more, and the next sweep removes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Identity of the tombstone; a point that was taken back can be forgotten again under another one.
    pub id: RecordId,
    /// The point.
    pub point: PointId,
    /// Pool of the point, as in its object's name.
    pub pool_uuid: String,
    /// VM of the point, as in its object's name.
    pub vm_uuid: String,
    /// When, by the clock of whoever wrote it, in milliseconds since 1970-01-01 UTC. For people only.
    pub created_unix_ms: u64,
    /// Why, for people.
    pub reason: String,
}

/// A tombstone is taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// The tombstone.
    pub tombstone: RecordId,
    /// The point that it was about.
    pub point: PointId,
    /// When, in milliseconds since 1970-01-01 UTC. For people only.
    pub created_unix_ms: u64,
}

/// A point is complete: somebody saw, after the point had appeared, that no sweep has taken anything from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The point.
    pub point: PointId,
    /// Pool of the point, as in its object's name.
    pub pool_uuid: String,
    /// VM of the point, as in its object's name.
    pub vm_uuid: String,
    /// Number of the newest sweep whose intent was there when its chunks were looked at; 0 if there was none.
    pub checked_sweep: u64,
    /// When, in milliseconds since 1970-01-01 UTC. For people only.
    pub created_unix_ms: u64,
}

/// One copy of a chunk that can not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DamagedCopy {
    /// The chunk.
    pub chunk: ChunkId,
    /// The pack that holds this copy.
    pub pack: PackId,
}

/// Copies of chunks that nobody should count on: whoever meets the content stores it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamageMark {
    /// Identity of the mark.
    pub id: RecordId,
    /// When, in milliseconds since 1970-01-01 UTC. For people only.
    pub created_unix_ms: u64,
    /// Single copies.
    pub copies: Vec<DamagedCopy>,
    /// Packs of which nothing can be read.
    pub packs: Vec<PackId>,
}

/// What a verification found, for later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// Identity of the result.
    pub id: RecordId,
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub began_unix_ms: u64,
    /// When it ended, in milliseconds since 1970-01-01 UTC.
    pub ended_unix_ms: u64,
    /// Share of the packs that were read, in hundredths of a percent: 0 quick, 10,000 full.
    pub share: u16,
    /// Packs that were read as a whole.
    pub packs: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Points that were walked.
    pub points: u64,
    /// Objects that are damaged, missing, or not what their names say.
    pub damaged_objects: u64,
    /// Points that can not be restored completely.
    pub hurt_points: Vec<PointId>,
}

/// A point that a sweep removes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgottenPoint {
    /// The point.
    pub point: PointId,
    /// Pool of the point, as in its object's name.
    pub pool_uuid: String,
    /// VM of the point, as in its object's name.
    pub vm_uuid: String,
    /// The tombstone that says so; all zero if the point's object was gone before the sweep.
    pub tombstone: RecordId,
}

/// What a sweep is going to remove. From the moment it is there, no writer refers to a condemned pack any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SweepIntent {
    /// Number of the sweep, from 1, without gaps.
    pub number: u64,
    /// When, in milliseconds since 1970-01-01 UTC. For people only: the time of the object itself counts.
    pub created_unix_ms: u64,
    /// How long writers have to notice before anything is removed, in seconds.
    pub grace_seconds: u64,
    /// Points that go.
    pub forgotten: Vec<ForgottenPoint>,
    /// Packs that go, ascending; what is still needed of them is stored again first.
    pub condemned: Vec<PackId>,
    /// Records that have become pointless, by their names below `records/`, and go too.
    pub stale_records: Vec<String>,
}

/// A sweep has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SweepEnd {
    /// Number of the sweep.
    pub number: u64,
    /// When, in milliseconds since 1970-01-01 UTC. For people only.
    pub ended_unix_ms: u64,
    /// Points that were removed.
    pub removed_points: u64,
    /// Packs that were removed.
    pub removed_packs: u64,
    /// Bytes of these packs.
    pub removed_bytes: u64,
    /// Bytes of chunks that were stored again.
    pub carried_bytes: u64,
    /// Condemned packs that are still there, ascending: something in them is needed and can not be read. They stay
    /// condemned.
    pub kept: Vec<PackId>,
}

fn limit(what: &'static str, field: &'static str, found: usize, limit: usize) -> Result<(), FormatError> {
    if found <= limit {
        return Ok(());
    }
    Err(FormatError::Limit { what, field, found: found as u64, limit: limit as u64 })
}

fn texts<'a>(what: &'static str, texts: impl IntoIterator<Item = &'a String>) -> Result<(), FormatError> {
    texts.into_iter().try_for_each(|text| limit(what, "length of a text", text.len(), MAX_TEXT_BYTES))
}

fn ascending(what: &'static str, packs: &[PackId]) -> Result<(), FormatError> {
    match packs.iter().zip(packs.iter().skip(1)).position(|(before, after)| before >= after) {
        Some(at) => Err(FormatError::Field { what, field: "order of packs", found: at as u64 }),
        None => limit(what, "packs", packs.len(), MAX_CONDEMNED_PACKS),
    }
}

fn numbered(what: &'static str, number: u64) -> Result<(), FormatError> {
    if number > 0 { Ok(()) } else { Err(FormatError::Field { what, field: "number", found: number }) }
}

impl Kind for Tombstone {
    const KIND: u32 = 1;
    const WHAT: &'static str = "tombstone";

    fn check(&self) -> Result<(), FormatError> {
        texts(Self::WHAT, [&self.pool_uuid, &self.vm_uuid, &self.reason])
    }
}

impl Kind for Undo {
    const KIND: u32 = 2;
    const WHAT: &'static str = "undoing of a tombstone";

    fn check(&self) -> Result<(), FormatError> {
        Ok(())
    }
}

impl Kind for Receipt {
    const KIND: u32 = 3;
    const WHAT: &'static str = "receipt of a point";

    fn check(&self) -> Result<(), FormatError> {
        texts(Self::WHAT, [&self.pool_uuid, &self.vm_uuid])
    }
}

impl Kind for DamageMark {
    const KIND: u32 = 4;
    const WHAT: &'static str = "damage mark";

    fn check(&self) -> Result<(), FormatError> {
        limit(Self::WHAT, "copies", self.copies.len(), MAX_DAMAGED_COPIES)?;
        limit(Self::WHAT, "packs", self.packs.len(), MAX_DAMAGED_COPIES)
    }
}

impl Kind for VerifyResult {
    const KIND: u32 = 5;
    const WHAT: &'static str = "result of a verification";

    fn check(&self) -> Result<(), FormatError> {
        limit(Self::WHAT, "share", self.share.into(), 10_000)?;
        limit(Self::WHAT, "hurt points", self.hurt_points.len(), MAX_HURT_POINTS)
    }
}

impl Kind for SweepIntent {
    const KIND: u32 = 6;
    const WHAT: &'static str = "intent of a sweep";

    fn check(&self) -> Result<(), FormatError> {
        numbered(Self::WHAT, self.number)?;
        limit(Self::WHAT, "forgotten points", self.forgotten.len(), MAX_FORGOTTEN_POINTS)?;
        limit(Self::WHAT, "stale records", self.stale_records.len(), MAX_FORGOTTEN_POINTS)?;
        texts(Self::WHAT, self.forgotten.iter().flat_map(|point| [&point.pool_uuid, &point.vm_uuid]))?;
        texts(Self::WHAT, &self.stale_records)?;
        ascending(Self::WHAT, &self.condemned)
    }
}

impl Kind for SweepEnd {
    const KIND: u32 = 7;
    const WHAT: &'static str = "end of a sweep";

    fn check(&self) -> Result<(), FormatError> {
        numbered(Self::WHAT, self.number)?;
        ascending(Self::WHAT, &self.kept)
    }
}

/// The bytes of a record's object.
///
/// # Errors
/// [`FormatError::Limit`], [`FormatError::Field`] or [`FormatError::Record`] if it holds more than a record may;
/// [`FormatError::Cryptography`].
pub fn encode_record<R: Record>(keys: &Keys, record: &R) -> Result<Vec<u8>, FormatError> {
    encode_with_salt(keys, record, random_array()?)
}

fn encode_with_salt<R: Record>(keys: &Keys, record: &R, salt: [u8; 32]) -> Result<Vec<u8>, FormatError> {
    record.check()?;
    let mut sealed = record_options(MAX_PLAIN_RECORD_BYTES as u64)
        .serialize(record)
        .map_err(|source| FormatError::Record { what: R::WHAT, source })?;
    let mut out = head(keys.repository(), R::KIND, &salt);
    keys.sealing_key(&salt, PURPOSE)?
        .seal_in_place_append_tag(frame_nonce(0), Aad::from(&out), &mut sealed)
        .map_err(|_| FormatError::Cryptography)?;
    let length = u32::try_from(sealed.len()).map_err(|_| FormatError::Cryptography)?;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&sealed);
    put_crc(&mut out);
    Ok(out)
}

/// Reads a record's object.
///
/// # Errors
/// Everything that is wrong with the bytes; [`FormatError::Field`] if it is a record of another kind.
pub fn decode_record<R: Record>(keys: &Keys, bytes: &[u8]) -> Result<R, FormatError> {
    let what = R::WHAT;
    let mut fields = Fields::new(what, checked_body(what, MAGIC, bytes)?);
    fields.preamble(MAGIC)?;
    let repository = RepositoryId::from_bytes(fields.array()?);
    if repository != keys.repository() {
        return Err(FormatError::ForeignRepository { what });
    }
    let kind = fields.u32()?;
    if kind != R::KIND {
        return Err(FormatError::Field { what, field: "kind", found: kind.into() });
    }
    let salt = fields.array()?;
    let length = fields.limited("length", MAX_PLAIN_RECORD_BYTES + TAG_BYTES)?;
    let mut sealed = fields.take(length)?.to_vec();
    fields.end()?;
    let opened = keys
        .sealing_key(&salt, PURPOSE)?
        .open_in_place(frame_nonce(0), Aad::from(head(repository, kind, &salt)), &mut sealed)
        .map_err(|_| FormatError::Authentication { what })?;
    decode_opened(opened)
}

fn decode_opened<R: Kind + DeserializeOwned>(bytes: &[u8]) -> Result<R, FormatError> {
    let record: R = record_options(MAX_PLAIN_RECORD_BYTES as u64)
        .deserialize(bytes)
        .map_err(|source| FormatError::Record { what: R::WHAT, source })?;
    record.check()?;
    Ok(record)
}

/// Reads opened bytes as every kind of record, for the fuzz targets.
pub(crate) fn decode_each(bytes: &[u8]) {
    let _ = decode_opened::<Tombstone>(bytes);
    let _ = decode_opened::<Undo>(bytes);
    let _ = decode_opened::<Receipt>(bytes);
    let _ = decode_opened::<DamageMark>(bytes);
    let _ = decode_opened::<VerifyResult>(bytes);
    let _ = decode_opened::<SweepIntent>(bytes);
    let _ = decode_opened::<SweepEnd>(bytes);
}

fn head(repository: RepositoryId, kind: u32, salt: &[u8; 32]) -> Vec<u8> {
    let mut out = Vec::new();
    put_preamble(&mut out, MAGIC);
    out.extend_from_slice(repository.as_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(salt);
    out
}

impl fmt::Display for DamagedCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {} in pack {}", self.chunk, self.pack)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{each_flip, golden, keys};

    fn tombstone() -> Tombstone {
        Tombstone {
            id: RecordId::from_bytes([1; 16]),
            point: PointId::from_bytes([2; 16]),
            pool_uuid: "pool".into(),
            vm_uuid: "vm".into(),
            created_unix_ms: 1_700_000_000_000,
            reason: "expired".into(),
        }
    }

    fn intent() -> SweepIntent {
        SweepIntent {
            number: 3,
            created_unix_ms: 1_700_000_000_000,
            grace_seconds: 172_800,
            forgotten: vec![ForgottenPoint {
                point: PointId::from_bytes([2; 16]),
                pool_uuid: "pool".into(),
                vm_uuid: "vm".into(),
                tombstone: RecordId::from_bytes([1; 16]),
            }],
            condemned: vec![PackId::from_bytes([4; 16]), PackId::from_bytes([5; 16])],
            stale_records: vec!["tombstones/a.b".into()],
        }
    }

    fn check<R: Record + PartialEq + fmt::Debug>(name: &str, record: &R) {
        let bytes = encode_with_salt(&keys(), record, [8; 32]).unwrap();
        golden(name, &bytes);
        assert_eq!(&decode_record::<R>(&keys(), &bytes).unwrap(), record);
        each_flip(&bytes, |hurt| assert!(decode_record::<R>(&keys(), hurt).is_err()));
        (0..bytes.len()).for_each(|end| assert!(decode_record::<R>(&keys(), &bytes[..end]).is_err()));
    }

    #[test]
    fn the_bytes_of_every_record_are_fixed() {
        let (id, point) = (RecordId::from_bytes([1; 16]), PointId::from_bytes([2; 16]));
        let created_unix_ms = 1_700_000_000_000;
        check("record-tombstone", &tombstone());
        check("record-undo", &Undo { tombstone: id, point, created_unix_ms });
        let (pool_uuid, vm_uuid) = ("pool".to_owned(), "vm".to_owned());
        check("record-receipt", &Receipt { point, pool_uuid, vm_uuid, checked_sweep: 7, created_unix_ms });
        let copies = vec![DamagedCopy { chunk: ChunkId::from_bytes([6; 32]), pack: PackId::from_bytes([4; 16]) }];
        let packs = vec![PackId::from_bytes([5; 16])];
        check("record-damage", &DamageMark { id, created_unix_ms, copies, packs });
        let result = VerifyResult {
            id,
            began_unix_ms: created_unix_ms,
            ended_unix_ms: created_unix_ms + 1,
            share: 10_000,
            packs: 2,
            read_bytes: 3,
            points: 4,
            damaged_objects: 5,
            hurt_points: vec![point],
        };
        check("record-verification", &result);
        check("record-sweep-intent", &intent());
        let end = SweepEnd {
            number: 3,
            ended_unix_ms: created_unix_ms,
            removed_points: 1,
            removed_packs: 2,
            removed_bytes: 3,
            carried_bytes: 4,
            kept: vec![PackId::from_bytes([4; 16])],
        };
        check("record-sweep-end", &end);
    }

    #[test]
    fn no_record_stands_in_for_another_kind_or_another_repository() {
        let bytes = encode_record(&keys(), &tombstone()).unwrap();
        assert!(matches!(decode_record::<Undo>(&keys(), &bytes), Err(FormatError::Field { field: "kind", .. })));
        // Nor with the number of its kind changed and the checksum made to fit.
        let mut changed = bytes.clone();
        changed.truncate(bytes.len() - 4);
        changed[28] = 2;
        put_crc(&mut changed);
        assert!(matches!(decode_record::<Undo>(&keys(), &changed), Err(FormatError::Authentication { .. })));
        let other = Keys::derive(crate::MasterKey::from_bytes([42; 32]), RepositoryId::from_bytes([1; 16])).unwrap();
        let error = decode_record::<Tombstone>(&other, &bytes).unwrap_err();
        assert!(matches!(error, FormatError::ForeignRepository { .. }), "{error}");
    }

    #[test]
    fn what_passes_a_limit_is_neither_written_nor_read() {
        let long = Tombstone { reason: "x".repeat(MAX_TEXT_BYTES + 1), ..tombstone() };
        assert!(matches!(encode_record(&keys(), &long), Err(FormatError::Limit { .. })));
        let twice = SweepIntent { condemned: vec![PackId::from_bytes([4; 16]); 2], ..intent() };
        assert!(matches!(encode_record(&keys(), &twice), Err(FormatError::Field { .. })));
        assert!(encode_record(&keys(), &SweepIntent { number: 0, ..intent() }).is_err());
        let bytes = record_options(1 << 20).serialize(&twice).unwrap();
        assert!(decode_opened::<SweepIntent>(&bytes).is_err());
        // The largest intent fits.
        let forgotten = ForgottenPoint {
            point: PointId::from_bytes([2; 16]),
            pool_uuid: "p".repeat(36),
            vm_uuid: "v".repeat(36),
            tombstone: RecordId::from_bytes([1; 16]),
        };
        let pack = |number: u32| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&number.to_be_bytes());
            PackId::from_bytes(id)
        };
        let largest = SweepIntent {
            forgotten: vec![forgotten; MAX_FORGOTTEN_POINTS],
            stale_records: vec!["r".repeat(84); MAX_FORGOTTEN_POINTS],
            condemned: (0..1 << 20).map(pack).collect(),
            ..intent()
        };
        let bytes = encode_record(&keys(), &largest).unwrap();
        assert!(bytes.len() <= MAX_RECORD_BYTES);
        assert_eq!(decode_record::<SweepIntent>(&keys(), &bytes).unwrap(), largest);
    }

    proptest! {
        #[test]
        fn records_survive(
            number in 1_u64..,
            condemned in proptest::collection::btree_set(any::<[u8; 16]>(), 0..20),
            points in proptest::collection::vec((any::<[u8; 16]>(), "[a-z0-9-]{1,36}"), 0..5),
            stale in proptest::collection::vec(".{0,40}", 0..5),
        ) {
            let forgotten = points.into_iter().map(|(id, vm_uuid)| ForgottenPoint {
                point: PointId::from_bytes(id),
                pool_uuid: "pool".into(),
                vm_uuid,
                tombstone: RecordId::from_bytes(id),
            });
            let record = SweepIntent {
                number,
                forgotten: forgotten.collect(),
                condemned: condemned.into_iter().map(PackId::from_bytes).collect(),
                stale_records: stale,
                ..intent()
            };
            let bytes = encode_record(&keys(), &record).unwrap();
            prop_assert_eq!(decode_record::<SweepIntent>(&keys(), &bytes).unwrap(), record);
        }

        #[test]
        fn foreign_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            decode_each(&bytes);
            let _ = decode_record::<Tombstone>(&keys(), &bytes);
            let object = crate::fuzzing::object(MAGIC, &bytes);
            let _ = decode_record::<SweepIntent>(&keys(), &object);
        }
    }
}
