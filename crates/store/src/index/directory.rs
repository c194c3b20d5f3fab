//! The directory at the end of a pack: what the index is made from, and made again.

use xenvault_store_format::{
    DirectoryEntry, DirectoryKey, IndexEntry, Keys, PACK_END_BYTES, PACK_HEADER_BYTES, PackHeader, PackId, PackSalt,
    PackTrailer,
};

use crate::StoreError;
use crate::backend::Backend;

/// What a pack says that it holds.
#[derive(Debug)]
pub(crate) struct PackDirectory {
    pub(crate) salt: PackSalt,
    /// Length of the object in bytes.
    pub(crate) length: u64,
    pub(crate) trailer: PackTrailer,
    pub(crate) entries: Vec<DirectoryEntry>,
    /// What is wrong with one of the two copies of the header, if the other one is whole.
    pub(crate) lost_header: Option<StoreError>,
}

impl PackDirectory {
    /// The same as entries of the index.
    pub(crate) fn index_entries(&self) -> impl Iterator<Item = IndexEntry> + '_ {
        let entry = |entry: &DirectoryEntry| IndexEntry {
            id: entry.id,
            kind: entry.kind,
            pack: self.salt.pack_id(),
            placement: entry.placement,
        };
        self.entries.iter().map(entry)
    }
}

/// Reads the directory at the end of a pack, which must belong under its name.
pub(crate) async fn read_directory(
    backend: &dyn Backend,
    keys: &Keys,
    id: PackId,
    name: &str,
) -> Result<PackDirectory, StoreError> {
    let damaged = |error| StoreError::format(name, error);
    let read = |offset: u64, length: usize| async move {
        backend.read(name, offset, length).await.map_err(|error| StoreError::io("read", name, error))
    };
    let length = backend.length(name).await.map_err(|error| StoreError::io("read", name, error))?;
    let first = header_of(keys, id, name, &read(0, PACK_HEADER_BYTES).await?);
    let end = read(length.saturating_sub(PACK_END_BYTES as u64), PACK_END_BYTES).await?;
    let (copy, trailer) = end.split_at_checked(PACK_HEADER_BYTES).unwrap_or((&[], &end));
    let second = header_of(keys, id, name, copy);
    let trailer = PackTrailer::decode(trailer, length).map_err(damaged)?;
    let (header, lost_header) = match (first, second) {
        (Ok(header), Ok(_)) => (header, None),
        (Ok(header), Err(error)) | (Err(error), Ok(header)) => (header, Some(error)),
        (Err(error), Err(_)) => return Err(error),
    };
    let directory = read(trailer.directory_offset.into(), trailer.directory_length as usize).await?;
    let key = DirectoryKey::derive(keys, &header.salt).map_err(damaged)?;
    let entries = key.open_directory(&trailer, directory).map_err(damaged)?;
    Ok(PackDirectory { salt: header.salt, length, trailer, entries, lost_header })
}

/// The header of a pack, which must belong under its name.
pub(crate) fn header_of(keys: &Keys, id: PackId, name: &str, bytes: &[u8]) -> Result<PackHeader, StoreError> {
    let header = PackHeader::decode(bytes).map_err(|error| StoreError::format(name, error))?;
    if header.repository != keys.repository() || header.salt.pack_id() != id {
        let source = "the pack does not belong under this name".into();
        return Err(StoreError::Damaged { object: name.to_owned(), source });
    }
    Ok(header)
}
