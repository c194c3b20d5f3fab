//! Reading and writing of sealed records, and of whole folders of them.

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use xenvault_store_format::{MAX_RECORD_BYTES, Record, decode_record, encode_record};

use crate::StoreError;
use crate::backend::{get, put};
use crate::repository::Inner;

/// Records that are read or written at the same time.
pub(crate) const PARALLEL: usize = 16;

/// Versions of a record that are tried.
const MAX_VERSIONS: usize = 64;

/// Reads a record; whether it fits its name is the caller's to check.
///
/// Names of records can be guessed, so where versions are kept somebody without the key may have taken one first: the
/// oldest version that opens counts.
pub(crate) async fn read<R: Record>(repository: &Inner, name: &str) -> Result<R, StoreError> {
    read_with_bytes(repository, name).await.map(|(record, _)| record)
}

/// As [`read`], with the bytes of the object.
pub(crate) async fn read_with_bytes<R: Record>(repository: &Inner, name: &str) -> Result<(R, Vec<u8>), StoreError> {
    let decode = |bytes: &[u8]| decode_record(&repository.keys, bytes).map_err(|error| StoreError::format(name, error));
    let bytes = get(&*repository.backend, name, MAX_RECORD_BYTES).await;
    let first = match bytes.map_err(|error| StoreError::io("read", name, error)) {
        Ok(bytes) => match decode(&bytes) {
            Ok(record) => return Ok((record, bytes)),
            Err(error) => error,
        },
        Err(error) if error.is_loss() && !error.is_gone() => error,
        Err(error) => return Err(error),
    };
    for number in 1..MAX_VERSIONS {
        let later = repository.backend.later_version(name, number, MAX_RECORD_BYTES).await;
        let Some(bytes) = later.map_err(|error| StoreError::io("read", name, error))? else { break };
        if let Ok(record) = decode(&bytes) {
            tracing::warn!(object = name, version = number, "a record's name was taken by something else first");
            return Ok((record, bytes));
        }
    }
    Err(first)
}

/// Writes a record; one of this name is replaced.
pub(crate) async fn write<R: Record>(repository: &Inner, name: &str, record: &R) -> Result<(), StoreError> {
    let bytes = encode_record(&repository.keys, record).map_err(|error| StoreError::format(name, error))?;
    let written = put(&*repository.backend, name, Bytes::from(bytes)).await;
    written.map_err(|error| StoreError::io("write", name, error))
}

/// Reads all records of a folder, in the order of their names.
pub(crate) async fn read_all<R: Record + Send>(
    repository: &Inner,
    folder: &str,
) -> Result<Vec<(String, Result<R, StoreError>)>, StoreError> {
    let names = list(repository, folder).await?;
    let read = |name: String| async move {
        let record = read(repository, &name).await;
        (name, record)
    };
    Ok(stream::iter(names).map(read).buffered(PARALLEL).collect().await)
}

pub(crate) async fn list(repository: &Inner, folder: &str) -> Result<Vec<String>, StoreError> {
    repository.backend.list(folder).await.map_err(|error| StoreError::io("list", folder, error))
}

/// Whether an object is there, asked by its name.
pub(crate) async fn exists(repository: &Inner, name: &str) -> Result<bool, StoreError> {
    let exists = crate::backend::exists(&*repository.backend, name).await;
    exists.map_err(|error| StoreError::io("look for", name, error))
}

pub(crate) async fn remove(repository: &Inner, name: &str) -> Result<(), StoreError> {
    repository.backend.remove(name).await.map_err(|error| StoreError::io("remove", name, error))
}

/// This machine's clock, for people only.
pub(crate) fn unix_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
