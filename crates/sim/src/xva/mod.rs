//! Archives of VMs (XVA): the bytes of the tar, the records in `ova.xml`, and compression.
//!
//! Knows nothing of HTTP: the handlers of `http` move the bytes.

mod compression;
mod objects;
mod records;
mod tar;
mod xxhash;

pub(crate) use compression::{Compressor, Expander};
pub(crate) use objects::{Created, Wishes, create, remove};
pub(crate) use records::{Archived, Selection, read, select, write};
pub(crate) use tar::{BLOCK, Header, end, file, padding, read_header};
pub(crate) use xxhash::xxh64;

/// Bytes of disk in one file of an archive.
pub(crate) const CHUNK: u64 = 1 << 20;
