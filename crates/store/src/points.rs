//! Finding and reading restore points.

use xenvault_store_format::{Level, PointId, PointManifest};

use crate::StoreError;

/// A restore point with everything in its manifest.
pub type Point = PointManifest;

/// Which points are wanted; every field that is set must fit. The default fits every point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PointFilter {
    /// Only points of the pool with this UUID.
    pub pool_uuid: Option<String>,
    /// Only points of the VM with this UUID.
    pub vm_uuid: Option<String>,
    /// Only points of VMs with exactly this name.
    pub vm_name: Option<String>,
}

/// What a listing shows of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointSummary {
    /// Identity.
    pub id: PointId,
    /// UUID of the pool.
    pub pool_uuid: String,
    /// UUID of the VM.
    pub vm_uuid: String,
    /// The VM's name at that moment.
    pub vm_name: String,
    /// What was read.
    pub level: Level,
    /// Why.
    pub reason: String,
    /// The moment, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// How many disks it has.
    pub disks: usize,
    /// Sum of the disks' sizes in bytes.
    pub virtual_bytes: u64,
    /// Sum of the bytes that counted as changed.
    pub changed_bytes: u64,
}

/// A point's object that can not be read.
#[derive(Debug)]
pub struct DamagedPoint {
    /// Name of the object in the repository.
    pub object: String,
    /// What is wrong.
    pub error: StoreError,
}

/// All points that fit a filter, oldest first, and the ones that can not be read.
#[derive(Debug, Default)]
pub struct PointListing {
    /// Readable points, ascending by moment.
    pub points: Vec<PointSummary>,
    /// Points that exist and can not be read; whether they fit the filter may be unknown, so all of the folder count.
    pub damaged: Vec<DamagedPoint>,
}
