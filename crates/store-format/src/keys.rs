//! The master key and what is derived from it.
//!
//! Every key is HKDF-SHA-256 of the master key: the salt is the repository's id (or a pack's or record's own random
//! salt), the info is a purpose from the list below followed by the repository's id. No key serves two purposes.

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use ring::{aead, hkdf};
use zeroize::Zeroizing;

use crate::{ChunkId, FormatError, PackId, RepositoryId};

/// The key that everything else is derived from. Random, never stored in the clear.
#[derive(Clone, PartialEq, Eq)]
pub struct MasterKey(Zeroizing<[u8; 32]>);

impl MasterKey {
    /// Draws a new key.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`] if the system gives no random bytes.
    pub fn random() -> Result<Self, FormatError> {
        random_array().map(Self::from_bytes)
    }

    /// The key with these bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    pub(crate) fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(redacted)")
    }
}

/// What a chunk holds. Ids of different kinds are hashed under different keys, and the kind is authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ChunkKind {
    /// Bytes of a disk.
    Data,
    /// A page of a disk map.
    Map,
    /// A blob, a piece of one, or the list of its pieces.
    Blob,
}

impl ChunkKind {
    /// The number that stands for the kind in the format.
    pub const fn code(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Map => 1,
            Self::Blob => 2,
        }
    }

    /// The kind with this number.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Data),
            1 => Some(Self::Map),
            2 => Some(Self::Blob),
            _ => None,
        }
    }
}

/// The random salt of one pack. Its hash names the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackSalt(pub(crate) [u8; 32]);

impl PackSalt {
    /// Draws a new salt.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`] if the system gives no random bytes.
    pub fn random() -> Result<Self, FormatError> {
        random_array().map(Self)
    }

    /// The salt with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The name of the pack with this salt.
    pub fn pack_id(&self) -> PackId {
        let hash = *blake3::hash(&self.0).as_bytes();
        let mut id = [0; 16];
        id.iter_mut().zip(hash).for_each(|(to, from)| *to = from);
        PackId::from_bytes(id)
    }
}

/// The keys of one repository.
#[derive(Clone)]
pub struct Keys {
    repository: RepositoryId,
    master: MasterKey,
    data_ids: Zeroizing<[u8; 32]>,
    map_ids: Zeroizing<[u8; 32]>,
    blob_ids: Zeroizing<[u8; 32]>,
    cut: Zeroizing<[u8; 32]>,
    index: Zeroizing<[u8; 32]>,
    config: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("repository", &self.repository).finish_non_exhaustive()
    }
}

impl Keys {
    /// Derives the keys of a repository.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`] if the derivation is refused; it never is for keys of this length.
    pub fn derive(master: MasterKey, repository: RepositoryId) -> Result<Self, FormatError> {
        let fixed = |purpose: &str| derive(&master, repository, repository.as_bytes(), purpose);
        Ok(Self {
            repository,
            data_ids: fixed("data chunk ids")?,
            map_ids: fixed("map chunk ids")?,
            blob_ids: fixed("blob chunk ids")?,
            cut: fixed("cut points")?,
            index: fixed("index")?,
            config: fixed("config")?,
            master,
        })
    }

    /// The repository that these keys are for.
    pub fn repository(&self) -> RepositoryId {
        self.repository
    }

    /// The id of a chunk with this content.
    pub fn chunk_id(&self, kind: ChunkKind, plain: &[u8]) -> ChunkId {
        let key = match kind {
            ChunkKind::Data => &self.data_ids,
            ChunkKind::Map => &self.map_ids,
            ChunkKind::Blob => &self.blob_ids,
        };
        ChunkId::from_bytes(*blake3::keyed_hash(key, plain).as_bytes())
    }

    pub(crate) fn cut_key(&self) -> &[u8; 32] {
        &self.cut
    }

    pub(crate) fn index_key(&self) -> &[u8; 32] {
        &self.index
    }

    pub(crate) fn config_key(&self) -> &[u8; 32] {
        &self.config
    }

    /// The key of one pack or record, from its own random salt.
    pub(crate) fn sealing_key(&self, salt: &[u8; 32], purpose: &str) -> Result<aead::LessSafeKey, FormatError> {
        aead_key(&*derive(&self.master, self.repository, salt, purpose)?)
    }
}

pub(crate) fn aead_key(bytes: &[u8; 32]) -> Result<aead::LessSafeKey, FormatError> {
    let key = aead::UnboundKey::new(&aead::AES_256_GCM, bytes).map_err(|_| FormatError::Cryptography)?;
    Ok(aead::LessSafeKey::new(key))
}

/// The nonce of the frame with this counter. A key seals each counter at most once.
pub(crate) fn frame_nonce(counter: u32) -> aead::Nonce {
    let mut nonce = [0; aead::NONCE_LEN];
    nonce.iter_mut().zip(counter.to_le_bytes()).for_each(|(to, from)| *to = from);
    aead::Nonce::assume_unique_for_key(nonce)
}

pub(crate) fn random_array() -> Result<[u8; 32], FormatError> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).map_err(|_| FormatError::Cryptography)?;
    Ok(bytes)
}

struct KeyLength;

impl hkdf::KeyType for KeyLength {
    fn len(&self) -> usize {
        32
    }
}

fn derive(
    master: &MasterKey,
    repository: RepositoryId,
    salt: &[u8],
    purpose: &str,
) -> Result<Zeroizing<[u8; 32]>, FormatError> {
    let mut key = Zeroizing::new([0; 32]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(master.expose())
        .expand(&[b"xenvault ", purpose.as_bytes(), b" ", repository.as_bytes()], KeyLength)
        .and_then(|okm| okm.fill(&mut *key))
        .map_err(|_| FormatError::Cryptography)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(master: u8, repository: u8) -> Keys {
        Keys::derive(MasterKey::from_bytes([master; 32]), RepositoryId::from_bytes([repository; 16])).unwrap()
    }

    #[test]
    fn equal_content_meets_only_within_one_repository_and_kind() {
        let id = keys(1, 1).chunk_id(ChunkKind::Data, b"content");
        assert_eq!(id, keys(1, 1).chunk_id(ChunkKind::Data, b"content"));
        assert_ne!(id, keys(2, 1).chunk_id(ChunkKind::Data, b"content"));
        assert_ne!(id, keys(1, 2).chunk_id(ChunkKind::Data, b"content"));
        assert_ne!(id, keys(1, 1).chunk_id(ChunkKind::Map, b"content"));
    }

    #[test]
    fn derived_keys_are_fixed() {
        crate::testing::golden("chunk-id", keys(7, 9).chunk_id(ChunkKind::Data, b"xenvault").as_bytes());
    }

    #[test]
    fn no_key_is_printed() {
        assert_eq!(format!("{:?}", MasterKey::from_bytes([3; 32])), "MasterKey(redacted)");
        assert!(!format!("{:?}", keys(3, 4)).contains("master"));
    }
}
