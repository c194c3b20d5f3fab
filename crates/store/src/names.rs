//! Names of objects. The layout of a repository in one place.

use uuid::Uuid;
use xenvault_store_format::{PackId, PointId, RecordId};

use crate::StoreError;

pub(crate) const CONFIG: &str = "config";
pub(crate) const KEYS: &str = "keys";
pub(crate) const FIRST_KEY: &str = "keys/1";
/// What is under way, or left behind by what died under way; never part of the repository.
pub(crate) const TEMPORARY: &str = "tmp";
pub(crate) const PACKS: &str = "packs";
pub(crate) const INDEX: &str = "index";
pub(crate) const POINTS: &str = "points";
pub(crate) const RECORDS: &str = "records";
pub(crate) const TOMBSTONES: &str = "records/tombstones";
pub(crate) const UNDONE: &str = "records/undone";
pub(crate) const RECEIPTS: &str = "records/receipts";
pub(crate) const DAMAGE: &str = "records/damage";
pub(crate) const VERIFICATIONS: &str = "records/verifications";
pub(crate) const SWEEPS: &str = "sweeps";

pub(crate) fn key(number: u32) -> String {
    format!("{KEYS}/{number}")
}

pub(crate) fn pack(id: &PackId) -> String {
    format!("{}/{id}", pack_folder(id))
}

/// The folder that a pack of this id lies in.
pub(crate) fn pack_folder(id: &PackId) -> String {
    let [first, ..] = id.as_bytes();
    format!("{PACKS}/{first:02x}")
}

/// The pack that has this name; `None` for what is no pack of ours.
pub(crate) fn pack_id(name: &str) -> Option<PackId> {
    let id = name.rsplit('/').next()?.parse().ok()?;
    (pack(&id) == name).then_some(id)
}

pub(crate) fn new_index() -> String {
    format!("{INDEX}/{}", Uuid::new_v4().simple())
}

/// Name of a point's object.
pub(crate) fn point(pool_uuid: &str, vm_uuid: &str, id: &PointId) -> Result<String, StoreError> {
    for (field, segment) in [("pool_uuid", pool_uuid), ("vm_uuid", vm_uuid)] {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if segment.is_empty() || segment.len() > 64 || !segment.chars().all(allowed) {
            let what = format!("\"{segment}\" can not be the {field} of a restore point: expected a UUID");
            return Err(StoreError::Misuse { what });
        }
    }
    Ok(format!("{POINTS}/{pool_uuid}/{vm_uuid}/{id}"))
}

/// Pool, VM and id of the point with this name; `None` for what is no point of ours.
pub(crate) fn point_parts(name: &str) -> Option<(&str, &str, PointId)> {
    let mut parts = name.strip_prefix(POINTS)?.strip_prefix('/')?.split('/');
    let (pool, vm, id) = (parts.next()?, parts.next()?, parts.next()?);
    match parts.next() {
        None => id.parse().ok().map(|id| (pool, vm, id)),
        Some(_) => None,
    }
}

pub(crate) fn tombstone(point: &PointId, id: &RecordId) -> String {
    format!("{TOMBSTONES}/{point}.{id}")
}

pub(crate) fn undo(tombstone: &RecordId) -> String {
    format!("{UNDONE}/{tombstone}")
}

pub(crate) fn receipt(point: &PointId) -> String {
    format!("{RECEIPTS}/{point}")
}

/// The point of the receipt with this name.
pub(crate) fn receipt_point(name: &str) -> Option<PointId> {
    last_segment(name, RECEIPTS)?.parse().ok()
}

pub(crate) fn damage(id: &RecordId) -> String {
    format!("{DAMAGE}/{id}")
}

pub(crate) fn verification(id: &RecordId) -> String {
    format!("{VERIFICATIONS}/{id}")
}

pub(crate) fn intent(number: u64) -> String {
    format!("{SWEEPS}/{number}/intent")
}

pub(crate) fn end(number: u64) -> String {
    format!("{SWEEPS}/{number}/end")
}

/// Number of the sweep that this object is of, and whether it is the end.
pub(crate) fn sweep_parts(name: &str) -> Option<(u64, bool)> {
    let (number, what) = name.strip_prefix(SWEEPS)?.strip_prefix('/')?.split_once('/')?;
    let number: u64 = number.parse().ok()?;
    match what {
        "intent" if intent(number) == name => Some((number, false)),
        "end" if end(number) == name => Some((number, true)),
        _ => None,
    }
}

/// What follows the folder, if it is one segment.
pub(crate) fn last_segment<'a>(name: &'a str, folder: &str) -> Option<&'a str> {
    name.strip_prefix(folder)?.strip_prefix('/').filter(|rest| !rest.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_what_they_name() {
        let id = PackId::from_bytes([0xab; 16]);
        assert_eq!(pack(&id), format!("packs/ab/{}", "ab".repeat(16)));
        assert_eq!(pack_id(&pack(&id)), Some(id));
        assert_eq!(pack_id(&pack(&id).replace("packs/ab", "packs/ac")), None);
        let point_id = PointId::random();
        let name = point("pool-1", "vm_1", &point_id).unwrap();
        assert_eq!(point_parts(&name), Some(("pool-1", "vm_1", point_id)));
        let record = RecordId::random();
        assert_eq!(last_segment(&undo(&record), UNDONE), Some(record.to_string().as_str()));
        assert_eq!(receipt_point(&receipt(&point_id)), Some(point_id));
        assert_eq!((sweep_parts(&intent(7)), sweep_parts(&end(12))), (Some((7, false)), Some((12, true))));
        assert_eq!((sweep_parts("sweeps/07/intent"), sweep_parts("sweeps/7/middle")), (None, None));
    }

    #[test]
    fn a_name_can_not_leave_its_folder() {
        for bad in ["", "..", "a/b", "a\0", "é", &"x".repeat(65)] {
            assert!(point(bad, "vm", &PointId::random()).is_err(), "{bad}");
            assert!(point("pool", bad, &PointId::random()).is_err(), "{bad}");
        }
    }
}
