//! Names of objects. The layout of a repository in one place.

use uuid::Uuid;
use xenvault_store_format::{PackId, PointId};

use crate::StoreError;

pub(crate) const CONFIG: &str = "config";
pub(crate) const KEYS: &str = "keys";
pub(crate) const FIRST_KEY: &str = "keys/1";
pub(crate) const PACKS: &str = "packs";
pub(crate) const INDEX: &str = "index";
pub(crate) const POINTS: &str = "points";

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
    }

    #[test]
    fn a_name_can_not_leave_its_folder() {
        for bad in ["", "..", "a/b", "a\0", "é", &"x".repeat(65)] {
            assert!(point(bad, "vm", &PointId::random()).is_err(), "{bad}");
            assert!(point("pool", bad, &PointId::random()).is_err(), "{bad}");
        }
    }
}
