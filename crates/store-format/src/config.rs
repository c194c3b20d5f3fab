//! `config`: what a reader must know before it has a key.
//!
//! Readable without the key, and authenticated once there is one.

use serde::{Deserialize, Serialize};

use bincode::Options as _;

use crate::wire::{Fields, checked_body, put_crc, put_preamble, record_options};
use crate::{FormatError, Keys, RepositoryId};

const WHAT: &str = "config";
const MAGIC: &[u8; 8] = b"XVLTCONF";
const MAX_RECORD_BYTES: usize = 64 * 1024;
const MAC_BYTES: usize = 32;

/// What holds for the whole repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Identity of the repository.
    pub repository: RepositoryId,
    /// When it was made, in milliseconds since 1970-01-01 UTC.
    pub created_unix_ms: u64,
    /// A block ends a chunk where this many low bits of its hash are zero: 3 gives 32 KiB on average.
    pub cut_bits: u8,
    /// Largest chunk in blocks of 4 KiB.
    pub max_chunk_blocks: u16,
    /// Packs are closed when they reach this size in bytes.
    pub pack_target_bytes: u32,
    /// What protects objects from being changed: `none` on a plain folder.
    pub immutability: String,
}

impl Config {
    /// The settings of a new repository.
    pub fn new(repository: RepositoryId, created_unix_ms: u64) -> Self {
        Self {
            repository,
            created_unix_ms,
            cut_bits: 3,
            max_chunk_blocks: 32,
            pack_target_bytes: 32 * 1024 * 1024,
            immutability: "none".to_owned(),
        }
    }

    /// The bytes of the object.
    ///
    /// # Errors
    /// [`FormatError::Field`] if a setting is out of bounds; [`FormatError::Record`] if it is too long.
    pub fn encode(&self, keys: &Keys) -> Result<Vec<u8>, FormatError> {
        self.check()?;
        let record = record_options(MAX_RECORD_BYTES as u64)
            .serialize(self)
            .map_err(|source| FormatError::Record { what: WHAT, source })?;
        let length = u32::try_from(record.len()).map_err(|_| FormatError::Field {
            what: WHAT,
            field: "length",
            found: record.len() as u64,
        })?;
        let mut out = Vec::new();
        put_preamble(&mut out, MAGIC);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&record);
        let mac = blake3::keyed_hash(keys.config_key(), &out);
        out.extend_from_slice(mac.as_bytes());
        put_crc(&mut out);
        Ok(out)
    }

    fn check(&self) -> Result<(), FormatError> {
        let field = |field, found: u64| Err(FormatError::Field { what: WHAT, field, found });
        if self.cut_bits > 8 {
            return field("cut_bits", self.cut_bits.into());
        }
        if !(1..=256).contains(&self.max_chunk_blocks) {
            return field("max_chunk_blocks", self.max_chunk_blocks.into());
        }
        if !(64 * 1024..=32 * 1024 * 1024).contains(&self.pack_target_bytes) {
            return field("pack_target_bytes", self.pack_target_bytes.into());
        }
        Ok(())
    }
}

/// A config as it was read, not yet authenticated.
#[derive(Clone, Debug)]
pub struct StoredConfig {
    config: Config,
    authenticated: Vec<u8>,
    mac: [u8; MAC_BYTES],
}

impl StoredConfig {
    /// Reads the object.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let body = checked_body(WHAT, MAGIC, bytes)?;
        let mut fields = Fields::new(WHAT, body);
        fields.preamble(MAGIC)?;
        let length = fields.limited("length", MAX_RECORD_BYTES)?;
        let record = fields.take(length)?;
        let mac = fields.array()?;
        fields.end()?;
        let config: Config = record_options(MAX_RECORD_BYTES as u64)
            .deserialize(record)
            .map_err(|source| FormatError::Record { what: WHAT, source })?;
        config.check()?;
        let authenticated = body.get(..body.len() - MAC_BYTES).unwrap_or_default().to_vec();
        Ok(Self { config, authenticated, mac })
    }

    /// The repository that it says it describes; enough to derive keys, and to be believed in nothing else.
    pub fn repository(&self) -> RepositoryId {
        self.config.repository
    }

    /// The settings, authenticated.
    ///
    /// # Errors
    /// [`FormatError::Authentication`] if they were changed by somebody without the key.
    pub fn verify(self, keys: &Keys) -> Result<Config, FormatError> {
        // The comparison of blake3's hash type takes constant time.
        if blake3::keyed_hash(keys.config_key(), &self.authenticated) == blake3::Hash::from_bytes(self.mac) {
            Ok(self.config)
        } else {
            Err(FormatError::Authentication { what: WHAT })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{each_flip, golden, keys};

    #[test]
    fn the_bytes_of_a_config_are_fixed() {
        let config = Config::new(keys().repository(), 1_700_000_000_000);
        let bytes = config.encode(&keys()).unwrap();
        golden("config", &bytes);
        assert_eq!(StoredConfig::decode(&bytes).unwrap().verify(&keys()).unwrap(), config);
        each_flip(&bytes, |hurt| assert!(StoredConfig::decode(hurt).is_err()));
    }

    #[test]
    fn a_config_that_was_changed_with_its_checksum_is_not_believed() {
        let mut bytes = Config::new(keys().repository(), 1).encode(&keys()).unwrap();
        bytes.truncate(bytes.len() - 4);
        bytes[40] ^= 1;
        put_crc(&mut bytes);
        let stored = StoredConfig::decode(&bytes).unwrap();
        assert!(matches!(stored.verify(&keys()), Err(FormatError::Authentication { .. })));
    }

    #[test]
    fn a_newer_config_is_refused_by_its_version_even_with_another_layout() {
        let mut bytes = b"XVLTCONF".to_vec();
        bytes.extend_from_slice(&[2, 0, 9, 9, 9]);
        let error = StoredConfig::decode(&bytes).unwrap_err();
        assert!(matches!(error, FormatError::NewerVersion { found: 2, supported: 0, .. }), "{error}");
    }
}
