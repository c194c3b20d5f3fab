//! What can be wrong with a VHD.

/// Why bytes are no VHD that we can use, or why one can not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VhdError {
    /// The stream ended inside its head.
    #[error("the VHD stream ended after {got} bytes, inside its head")]
    Truncated {
        /// Bytes that came.
        got: u64,
    },
    /// The first bytes are not those of a VHD.
    #[error("this is no VHD: it does not begin with the footer copy of a dynamic disk")]
    NotVhd,
    /// The footer's checksum is wrong.
    #[error("the VHD footer has checksum {found:#010x}, its content gives {computed:#010x}")]
    FooterChecksum {
        /// What it says.
        found: u32,
        /// What it should say.
        computed: u32,
    },
    /// The footer is of another version of the format.
    #[error("the VHD footer has version {found:#010x}; only version 1.0 is known")]
    FooterVersion {
        /// What it says.
        found: u32,
    },
    /// Not a dynamic disk.
    #[error("the VHD has disk type {found}, only dynamic disks (type 3) have an allocation table that stands alone")]
    DiskType {
        /// What the footer says (2 fixed).
        found: u32,
    },
    /// A differencing disk: its table names only what its parent does not hold.
    #[error("the VHD is a differencing disk: its allocation table says nothing about the parent's blocks")]
    Differencing,
    /// The virtual size is zero or no multiple of 512.
    #[error("a VHD of {found} bytes is not possible: the size must be a multiple of 512, and not 0")]
    VirtualSize {
        /// What the footer says, or what was asked for, in bytes.
        found: u64,
    },
    /// The size asked for passes what a VHD can hold.
    #[error("a disk of {wanted} bytes does not fit into a VHD, which ends at {limit} bytes")]
    TooLarge {
        /// What was asked for, in bytes.
        wanted: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The header is not at a sensible place.
    #[error("the VHD footer places the header at byte {offset}, which is not a place that a stream can have")]
    HeaderOffset {
        /// What the footer says.
        offset: u64,
    },
    /// The header's first bytes are wrong.
    #[error("the VHD header at byte {offset} does not begin with its mark")]
    HeaderCookie {
        /// Where it is.
        offset: u64,
    },
    /// The header's checksum is wrong.
    #[error("the VHD header has checksum {found:#010x}, its content gives {computed:#010x}")]
    HeaderChecksum {
        /// What it says.
        found: u32,
        /// What it should say.
        computed: u32,
    },
    /// The header is of another version of the format.
    #[error("the VHD header has version {found:#010x}; only version 1.0 is known")]
    HeaderVersion {
        /// What it says.
        found: u32,
    },
    /// The block size is no power of two between 512 bytes and 64 MiB.
    #[error("the VHD header names blocks of {found} bytes; a power of two from 512 bytes to 64 MiB is possible")]
    BlockSize {
        /// What it says.
        found: u32,
    },
    /// The number of table entries does not fit the disk.
    #[error(
        "the VHD header names {found} table entries, a disk of this size needs at least {needed} and at most {limit}"
    )]
    TableEntries {
        /// What it says.
        found: u32,
        /// Entries that the virtual size asks for.
        needed: u64,
        /// The most that we read.
        limit: u64,
    },
    /// The table is not at a sensible place.
    #[error(
        "the VHD header places the block allocation table at byte {offset}, which is not a place that a stream can have"
    )]
    TableOffset {
        /// What it says.
        offset: u64,
    },
    /// A table entry points into the head of the file.
    #[error("the allocation table places block {block} at byte {offset}, inside the head of the VHD")]
    BlockInHead {
        /// Number of the block.
        block: u64,
        /// Where it is said to be.
        offset: u64,
    },
    /// Two table entries share bytes.
    #[error("the allocation table places two blocks on the same bytes, the second at byte {offset}")]
    BlocksOverlap {
        /// Where the second block is said to begin.
        offset: u64,
    },
    /// The blocks of a VHD to be made do not ascend, or lie behind its end.
    #[error("block {block} is out of order or behind the end of the disk")]
    BlockOrder {
        /// Number of the block.
        block: u32,
    },
}
