//! Ways past checksums and seals, for the fuzz targets only: what lies behind them must not trust its bytes either.

use crate::{FormatError, Keys, MasterKey, RepositoryId};

/// Some keys.
///
/// # Errors
/// [`FormatError::Cryptography`], never in practice.
pub fn keys() -> Result<Keys, FormatError> {
    Keys::derive(MasterKey::from_bytes([42; 32]), RepositoryId::from_bytes([17; 16]))
}

/// An object with this magic, the version of this release, these bytes, and a checksum that fits.
pub fn object(magic: &[u8; 8], bytes: &[u8]) -> Vec<u8> {
    let mut object = Vec::new();
    crate::wire::put_preamble(&mut object, magic);
    object.extend_from_slice(bytes);
    crate::wire::put_crc(&mut object);
    object
}

/// Everything that is decoded only after its seal has opened.
pub fn behind_the_seal(bytes: &[u8]) {
    let _ = crate::payload::decode(bytes);
    let _ = crate::pack::decode_directory(bytes);
    let _ = crate::point::decode_record(bytes);
    crate::record::decode_each(bytes);
}
