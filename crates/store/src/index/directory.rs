//! The directory at the end of a pack: what the index is made from, and made again.

use xenvault_store_format::{
    DirectoryEntry, DirectoryKey, IndexEntry, Keys, PACK_HEADER_BYTES, PACK_TRAILER_BYTES, PackHeader, PackId,
    PackSalt, PackTrailer,
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
    let header = PackHeader::decode(&read(0, PACK_HEADER_BYTES).await?).map_err(damaged)?;
    if header.repository != keys.repository() || header.salt.pack_id() != id {
        let what = "the pack does not belong under this name".into();
        return Err(StoreError::Damaged { object: name.to_owned(), source: what });
    }
    let at = length.saturating_sub(PACK_TRAILER_BYTES as u64);
    let trailer = PackTrailer::decode(&read(at, PACK_TRAILER_BYTES).await?, length).map_err(damaged)?;
    let directory = read(trailer.directory_offset.into(), trailer.directory_length as usize).await?;
    let key = DirectoryKey::derive(keys, &header.salt).map_err(damaged)?;
    let entries = key.open_directory(&trailer, directory).map_err(damaged)?;
    Ok(PackDirectory { salt: header.salt, length, trailer, entries })
}
