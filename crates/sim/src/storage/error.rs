//! Failures of storage, in the form in which XenAPI hands them to a client.

/// A failure with XenAPI's code and parameters, such as `SR_BACKEND_FAILURE_44` and `["", "text", ""]`.
///
/// The numbers and descriptions are those of the storage manager's own error table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {}", params.join(", "))]
pub struct SrError {
    /// XenAPI's error code.
    pub code: String,
    /// Its parameters, in order.
    pub params: Vec<String>,
}

impl SrError {
    /// A failure of the storage manager: number, description, and the detail that it puts into `[opterr=...]`.
    pub fn backend(number: u16, description: &str, detail: Option<&str>) -> Self {
        let text = match detail {
            Some(detail) => format!("{description} [opterr={detail}]"),
            None => description.to_owned(),
        };
        Self { code: format!("SR_BACKEND_FAILURE_{number}"), params: vec![String::new(), text, String::new()] }
    }

    /// Any other code of XenAPI.
    pub fn api(code: &str, params: &[&str]) -> Self {
        Self { code: code.to_owned(), params: params.iter().map(|&param| param.to_owned()).collect() }
    }

    /// The storage manager has no such disk (46, `VDIUnavailable`).
    pub(crate) fn no_such_vdi(vdi: uuid::Uuid) -> Self {
        Self::backend(46, "The VDI is not available", Some(&format!("VDI {vdi} not found")))
    }

    /// There is no such storage repository (47, `SRUnavailable`).
    pub(crate) fn no_such_sr(sr: uuid::Uuid) -> Self {
        Self::backend(47, "The SR is not available", Some(&format!("no such directory {sr}")))
    }

    /// Not enough space (44, `SRNoSpace`).
    pub(crate) fn no_space() -> Self {
        Self::backend(44, "There is insufficient space", None)
    }

    /// The driver can not do that to such a disk (38, `Unimplemented`).
    pub(crate) fn unimplemented(detail: Option<&str>) -> Self {
        Self::backend(38, "The requested method is not supported/implemented", detail)
    }

    /// A size that the type of disk can not have (79, `VDISize`).
    pub(crate) fn bad_size(detail: &str) -> Self {
        Self::backend(79, "VDI Invalid size", Some(detail))
    }

    /// A kind of disk that the call refuses (66, `VDIType`).
    pub(crate) fn bad_type(detail: &str) -> Self {
        Self::backend(66, "Invalid VDI type", Some(detail))
    }

    /// The medium or the file system failed (200, `EIO`).
    pub(crate) fn io(error: &std::io::Error) -> Self {
        Self::backend(200, "General IO error", Some(&error.to_string()))
    }

    /// The disk is attached (24, `VDIInUse`).
    pub(crate) fn in_use() -> Self {
        Self::backend(24, "The VDI is currently in use", None)
    }

    /// The disk exists (43, `VDIExists`).
    pub(crate) fn exists() -> Self {
        Self::backend(43, "The VDI already exists", None)
    }

    /// Over 30 files in a chain (109, `SnapshotChainTooLong`).
    pub(crate) fn chain_too_long() -> Self {
        Self::backend(109, "The snapshot chain is too long", None)
    }

    /// A base copy is asked for a snapshot (82, `VDISnapshot`) or a clone (81, `VDIClone`).
    pub(crate) fn hidden(snapshot: bool) -> Self {
        let (number, text) = if snapshot { (82, "Failed to snapshot VDI") } else { (81, "Failed to clone VDI") };
        Self::backend(number, text, Some("hidden VDI"))
    }

    /// A base copy is to be deleted (80, `VDIDelete`).
    pub(crate) fn not_a_leaf() -> Self {
        Self::backend(80, "Failed to mark VDI hidden", Some("Deleting non-leaf node not permitted"))
    }

    /// A thick repository has no room for a volume that is to be written (180, `LVMProvisionAttach`).
    pub(crate) fn no_space_to_attach() -> Self {
        let text = "Volume Group out of space. The SR is over-provisioned, and out of space. Unable to grow the \
                    underlying volume to accommodate the virtual size of the disk.";
        Self::backend(180, text, None)
    }

    /// The union of change logs failed (460, `CBTChangedBlocksError`).
    pub(crate) fn changed_blocks(detail: &str) -> Self {
        Self::backend(460, "Failed to calculate changed blocks for given VDIs.", Some(detail))
    }

    /// Change logs that contradict each other (459, `CBTMetadataInconsistent`).
    pub(crate) fn inconsistent_bitmaps() -> Self {
        Self::backend(459, "Changed block tracking log is in an inconsistent state.", Some("Inconsistent bitmaps"))
    }
}
