//! Blobs: bytes that are no disk, such as bitmaps and configurations.
//!
//! Up to 1 MiB a blob is one chunk. A longer one is cut into pieces of 1 MiB, and its id is that of the list of them, which is a
//! chunk of a kind of its own: who keeps house must know the pieces, and need not know what is in them.

use crate::wire::Fields;
use crate::{BlobRef, ChunkId, ChunkKind, FormatError, MAX_PLAIN_BYTES};

const WHAT: &str = "list of blob pieces";

/// Length of each piece but the last, in bytes.
pub const BLOB_PIECE_BYTES: usize = MAX_PLAIN_BYTES;

/// Longest blob, in bytes: as many pieces as one list holds.
pub const MAX_BLOB_BYTES: u64 = (MAX_PLAIN_BYTES / ChunkId::BYTES) as u64 * BLOB_PIECE_BYTES as u64;

impl BlobRef {
    /// What the chunk is that the blob is named by: the blob itself, or the list of its pieces.
    pub const fn kind(&self) -> ChunkKind {
        if self.length <= BLOB_PIECE_BYTES as u64 { ChunkKind::Blob } else { ChunkKind::List }
    }
}

/// The bytes of a list of pieces.
pub fn encode_piece_list(pieces: &[ChunkId]) -> Vec<u8> {
    pieces.iter().flat_map(|id| id.as_bytes().iter().copied()).collect()
}

/// Reads the list of pieces of a blob that is `length` bytes long.
///
/// # Errors
/// [`FormatError::Limit`] if no blob is that long; [`FormatError::Truncated`] and [`FormatError::TrailingBytes`] if the
/// list is not of that length.
pub fn decode_piece_list(bytes: &[u8], length: u64) -> Result<Vec<ChunkId>, FormatError> {
    if length > MAX_BLOB_BYTES {
        return Err(FormatError::Limit { what: WHAT, field: "length", found: length, limit: MAX_BLOB_BYTES });
    }
    let mut fields = Fields::new(WHAT, bytes);
    let mut pieces = Vec::new();
    for _ in 0..length.div_ceil(BLOB_PIECE_BYTES as u64) {
        pieces.push(ChunkId::from_bytes(fields.array()?));
    }
    fields.end()?;
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_must_fit_the_length() {
        let pieces = [ChunkId::from_bytes([1; 32]), ChunkId::from_bytes([2; 32])];
        let bytes = encode_piece_list(&pieces);
        assert_eq!(decode_piece_list(&bytes, BLOB_PIECE_BYTES as u64 + 1).unwrap(), pieces);
        assert!(decode_piece_list(&bytes, BLOB_PIECE_BYTES as u64).is_err());
        assert!(decode_piece_list(&bytes, 2 * BLOB_PIECE_BYTES as u64 + 1).is_err());
        assert!(decode_piece_list(&bytes, u64::MAX).is_err());
    }
}
