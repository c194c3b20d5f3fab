//! Being built.

/// Behaviour of an SR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SrKind {
    /// VHD files, thin.
    Ext,
}
