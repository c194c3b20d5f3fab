//! What can be wrong with a VHD.

/// Why bytes are no VHD that we can use, or why one can not be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VhdError {}
