//! The master key and what is derived from it.
//!
//! Every key is HKDF-SHA-256 of one of three secrets: the *root* is behind the content of disks and blobs, the
//! *structure key* (itself derived from the root) behind everything that says what there is and where, the *dedup key*
//! behind the ids of chunks and the places where disks are cut. The salt is the repository's id (or a pack's or record's
//! own random salt), the info is a purpose from the list below followed by the repository's id. No key serves two
//! purposes.
//!
//! A *writer's key* holds structure key, dedup key and a public key: enough to write and to know what is there, not
//! enough to read content.

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use ring::{aead, hkdf};
use zeroize::Zeroizing;

use crate::keypair::{KeyPair, encapsulate};
use crate::{ChunkId, FormatError, KeyAccess, PackId, RepositoryId};

const KEY_BYTES: usize = 32;
/// Ids and cuts do not depend on the repository, so that two that share the dedup key know each other's chunks.
const SHARED: RepositoryId = RepositoryId::from_bytes([0; 16]);

/// What everything else is derived from. Random, never stored in the clear.
#[derive(Clone, PartialEq, Eq)]
pub struct MasterKey {
    root: Zeroizing<[u8; KEY_BYTES]>,
    dedup: Zeroizing<[u8; KEY_BYTES]>,
}

impl MasterKey {
    /// Draws a new key.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`] if the system gives no random bytes.
    pub fn random() -> Result<Self, FormatError> {
        Ok(Self { root: Zeroizing::new(random_array()?), dedup: Zeroizing::new(random_array()?) })
    }

    /// The key with these bytes as its root, and a dedup key that follows from them.
    pub fn from_bytes(root: [u8; KEY_BYTES]) -> Self {
        let dedup = Zeroizing::new(blake3::derive_key("xenvault dedup key", &root));
        Self { root: Zeroizing::new(root), dedup }
    }

    /// The same with the dedup key of other keys: equal content has equal ids in both repositories.
    #[must_use]
    pub fn sharing_ids_with(self, other: &Keys) -> Self {
        Self { dedup: other.dedup.clone(), ..self }
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(redacted)")
    }
}

/// What a datamover needs that writes and does not read content.
#[derive(Clone, PartialEq, Eq)]
pub struct WriterKey {
    structure: Zeroizing<[u8; KEY_BYTES]>,
    dedup: Zeroizing<[u8; KEY_BYTES]>,
    public: [u8; KEY_BYTES],
}

impl fmt::Debug for WriterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WriterKey(redacted)")
    }
}

/// What is in a key slot.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyMaterial {
    /// Everything.
    Full(MasterKey),
    /// What a writer needs.
    Writer(WriterKey),
}

impl KeyMaterial {
    /// What it allows.
    pub const fn access(&self) -> KeyAccess {
        match self {
            Self::Full(_) => KeyAccess::Full,
            Self::Writer(_) => KeyAccess::WriteOnly,
        }
    }

    /// Length of its bytes.
    pub(crate) const fn length(access: KeyAccess) -> usize {
        match access {
            KeyAccess::Full => 2 * KEY_BYTES,
            KeyAccess::WriteOnly => 3 * KEY_BYTES,
        }
    }

    pub(crate) fn expose(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(match self {
            Self::Full(MasterKey { root, dedup }) => [**root, **dedup].concat(),
            Self::Writer(WriterKey { structure, dedup, public }) => [**structure, **dedup, *public].concat(),
        })
    }

    pub(crate) fn from_exposed(access: KeyAccess, bytes: &[u8]) -> Result<Self, FormatError> {
        let (keys, rest) = bytes.as_chunks::<KEY_BYTES>();
        match (access, keys, rest) {
            (KeyAccess::Full, &[root, dedup], []) => {
                Ok(Self::Full(MasterKey { root: Zeroizing::new(root), dedup: Zeroizing::new(dedup) }))
            }
            (KeyAccess::WriteOnly, &[structure, dedup, public], []) => {
                let (structure, dedup) = (Zeroizing::new(structure), Zeroizing::new(dedup));
                Ok(Self::Writer(WriterKey { structure, dedup, public }))
            }
            _ => Err(FormatError::Field { what: "key slot", field: "length of the keys", found: bytes.len() as u64 }),
        }
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
    /// A blob, or a piece of one.
    Blob,
    /// The list of the pieces of a blob.
    List,
}

/// What a pack holds: chunks of one class only, so that one key opens all of it or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PackClass {
    /// Bytes of disks and blobs.
    Content,
    /// What says where they are: pages of disk maps, and lists of pieces.
    Structure,
}

impl ChunkKind {
    /// The number that stands for the kind in the format.
    pub const fn code(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Map => 1,
            Self::Blob => 2,
            Self::List => 3,
        }
    }

    /// The kind with this number.
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Data),
            1 => Some(Self::Map),
            2 => Some(Self::Blob),
            3 => Some(Self::List),
            _ => None,
        }
    }

    /// The packs that such chunks lie in.
    pub const fn class(self) -> PackClass {
        match self {
            Self::Data | Self::Blob => PackClass::Content,
            Self::Map | Self::List => PackClass::Structure,
        }
    }
}

/// How the frames of a pack are sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PackSealing {
    /// Content, under a key from the root: by whoever can read it too.
    Content,
    /// Content, under a key that only the private key gives: by a writer. The salt is what HPKE calls `enc`.
    Wrapped,
    /// Structure, under a key from the structure key.
    Structure,
}

impl PackSealing {
    /// What packs that are sealed like this hold.
    pub const fn class(self) -> PackClass {
        match self {
            Self::Content | Self::Wrapped => PackClass::Content,
            Self::Structure => PackClass::Structure,
        }
    }
}

/// The random salt of one pack. Its hash names the pack.
///
/// The two highest bits of its last byte say how the pack is sealed: 00 and 01 mean wrapped (the salt is an X25519 public
/// key, whose highest bit is always 0), 10 content, 11 structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackSalt(pub(crate) [u8; 32]);

impl PackSalt {
    /// A salt that says how the pack is sealed, from random bytes.
    fn marked(mut bytes: [u8; 32], sealing: PackSealing) -> Self {
        let [.., last] = &mut bytes;
        *last = match sealing {
            PackSealing::Wrapped => *last & 0x7f,
            PackSealing::Content => *last & 0x3f | 0x80,
            PackSealing::Structure => *last | 0xc0,
        };
        Self(bytes)
    }

    /// How the pack is sealed.
    pub const fn sealing(&self) -> PackSealing {
        let [.., last] = self.0;
        match last >> 6 {
            2 => PackSealing::Content,
            3 => PackSealing::Structure,
            _ => PackSealing::Wrapped,
        }
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
    content: Content,
    structure: Zeroizing<[u8; KEY_BYTES]>,
    dedup: Zeroizing<[u8; KEY_BYTES]>,
    data_ids: Zeroizing<[u8; KEY_BYTES]>,
    map_ids: Zeroizing<[u8; KEY_BYTES]>,
    blob_ids: Zeroizing<[u8; KEY_BYTES]>,
    list_ids: Zeroizing<[u8; KEY_BYTES]>,
    cut: Zeroizing<[u8; KEY_BYTES]>,
    index: Zeroizing<[u8; KEY_BYTES]>,
    config: Zeroizing<[u8; KEY_BYTES]>,
}

/// What there is for the content of disks and blobs.
#[derive(Clone)]
enum Content {
    Full { master: MasterKey, pair: KeyPair },
    WriteOnly { public: [u8; KEY_BYTES] },
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = self.access();
        f.debug_struct("Keys").field("repository", &self.repository).field("access", &access).finish_non_exhaustive()
    }
}

impl Keys {
    /// Derives all keys of a repository.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`] if the derivation is refused; it never is for keys of this length.
    pub fn derive(master: MasterKey, repository: RepositoryId) -> Result<Self, FormatError> {
        let structure = derive(&master.root, repository, repository.as_bytes(), "structure")?;
        let pair =
            KeyPair::from_private(&*derive(&master.root, repository, repository.as_bytes(), "content key pair")?)?;
        let dedup = master.dedup.clone();
        Self::of(repository, structure, dedup, Content::Full { master, pair })
    }

    /// The keys of what was in a key slot.
    ///
    /// # Errors
    /// As [`Self::derive`].
    pub fn of_material(material: KeyMaterial, repository: RepositoryId) -> Result<Self, FormatError> {
        match material {
            KeyMaterial::Full(master) => Self::derive(master, repository),
            KeyMaterial::Writer(WriterKey { structure, dedup, public }) => {
                Self::of(repository, structure, dedup, Content::WriteOnly { public })
            }
        }
    }

    fn of(
        repository: RepositoryId,
        structure: Zeroizing<[u8; KEY_BYTES]>,
        dedup: Zeroizing<[u8; KEY_BYTES]>,
        content: Content,
    ) -> Result<Self, FormatError> {
        let shared = |purpose: &str| derive(&dedup, SHARED, SHARED.as_bytes(), purpose);
        let own = |purpose: &str| derive(&structure, repository, repository.as_bytes(), purpose);
        Ok(Self {
            repository,
            data_ids: shared("data chunk ids")?,
            map_ids: shared("map chunk ids")?,
            blob_ids: shared("blob chunk ids")?,
            list_ids: shared("list chunk ids")?,
            cut: shared("cut points")?,
            index: own("index")?,
            config: own("config")?,
            content,
            structure,
            dedup,
        })
    }

    /// The repository that these keys are for.
    pub fn repository(&self) -> RepositoryId {
        self.repository
    }

    /// What they allow.
    pub const fn access(&self) -> KeyAccess {
        match self.content {
            Content::Full { .. } => KeyAccess::Full,
            Content::WriteOnly { .. } => KeyAccess::WriteOnly,
        }
    }

    /// What a slot that gives all this holds.
    pub fn material(&self) -> KeyMaterial {
        match &self.content {
            Content::Full { master, .. } => KeyMaterial::Full(master.clone()),
            Content::WriteOnly { .. } => KeyMaterial::Writer(self.writer_key()),
        }
    }

    /// The part of it that a writer needs.
    pub fn writer_key(&self) -> WriterKey {
        let public = match &self.content {
            Content::Full { pair, .. } => pair.public(),
            Content::WriteOnly { public } => *public,
        };
        WriterKey { structure: self.structure.clone(), dedup: self.dedup.clone(), public }
    }

    /// Whether equal content has equal ids under both.
    pub fn shares_ids_with(&self, other: &Self) -> bool {
        self.dedup == other.dedup
    }

    /// The id of a chunk with this content.
    pub fn chunk_id(&self, kind: ChunkKind, plain: &[u8]) -> ChunkId {
        let key = match kind {
            ChunkKind::Data => &self.data_ids,
            ChunkKind::Map => &self.map_ids,
            ChunkKind::Blob => &self.blob_ids,
            ChunkKind::List => &self.list_ids,
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

    /// Salt and key of the frames of a new pack.
    pub(crate) fn new_pack(&self, class: PackClass) -> Result<(PackSalt, aead::LessSafeKey), FormatError> {
        let sealing = match (class, &self.content) {
            (PackClass::Content, Content::WriteOnly { public }) => {
                let (encapsulated, key) = encapsulate(self.repository, public)?;
                let salt = PackSalt(encapsulated);
                // It can not be: the number is below 2^255.
                let fits = salt.sealing() == PackSealing::Wrapped;
                return if fits { Ok((salt, aead_key(&key)?)) } else { Err(FormatError::Cryptography) };
            }
            (PackClass::Content, Content::Full { .. }) => PackSealing::Content,
            (PackClass::Structure, _) => PackSealing::Structure,
        };
        let salt = PackSalt::marked(random_array()?, sealing);
        Ok((salt, self.frames_key(&salt)?))
    }

    /// The key of the frames of one pack.
    pub(crate) fn frames_key(&self, salt: &PackSalt) -> Result<aead::LessSafeKey, FormatError> {
        match (salt.sealing(), &self.content) {
            (PackSealing::Structure, _) => self.sealing_key(&salt.0, "structure pack"),
            (PackSealing::Content, Content::Full { master, .. }) => {
                aead_key(&*derive(&master.root, self.repository, &salt.0, "content pack")?)
            }
            (PackSealing::Wrapped, Content::Full { pair, .. }) => {
                aead_key(&*pair.decapsulate(self.repository, &salt.0)?)
            }
            (PackSealing::Content | PackSealing::Wrapped, Content::WriteOnly { .. }) => Err(FormatError::WriteOnly),
        }
    }

    /// The key of one pack's directory or structure, or of one point or record, from its own random salt.
    pub(crate) fn sealing_key(&self, salt: &[u8; 32], purpose: &str) -> Result<aead::LessSafeKey, FormatError> {
        aead_key(&*derive(&self.structure, self.repository, salt, purpose)?)
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

/// HKDF-SHA-256 of a secret.
pub(crate) fn derive(
    secret: &[u8; KEY_BYTES],
    repository: RepositoryId,
    salt: &[u8],
    purpose: &str,
) -> Result<Zeroizing<[u8; KEY_BYTES]>, FormatError> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
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
    fn equal_content_meets_only_under_one_dedup_key_and_kind() {
        let id = keys(1, 1).chunk_id(ChunkKind::Data, b"content");
        assert_eq!(id, keys(1, 1).chunk_id(ChunkKind::Data, b"content"));
        assert_ne!(id, keys(2, 1).chunk_id(ChunkKind::Data, b"content"));
        assert_ne!(id, keys(2, 2).chunk_id(ChunkKind::Data, b"content"));
        assert_ne!(id, keys(1, 1).chunk_id(ChunkKind::Map, b"content"));
    }

    #[test]
    fn a_salt_says_how_its_pack_is_sealed() {
        for bytes in [[0; 32], [0xff; 32], [0x55; 32], [0xaa; 32]] {
            for sealing in [PackSealing::Content, PackSealing::Wrapped, PackSealing::Structure] {
                assert_eq!(PackSalt::marked(bytes, sealing).sealing(), sealing);
            }
        }
        let writer = Keys::of_material(KeyMaterial::Writer(keys(1, 1).writer_key()), keys(1, 1).repository()).unwrap();
        for (keys, class, sealing) in [
            (&keys(1, 1), PackClass::Content, PackSealing::Content),
            (&keys(1, 1), PackClass::Structure, PackSealing::Structure),
            (&writer, PackClass::Content, PackSealing::Wrapped),
            (&writer, PackClass::Structure, PackSealing::Structure),
        ] {
            let (salt, _) = keys.new_pack(class).unwrap();
            assert_eq!((salt.sealing(), salt.sealing().class()), (sealing, class));
        }
    }

    #[test]
    fn derived_keys_are_fixed() {
        crate::testing::golden("chunk-id", keys(7, 9).chunk_id(ChunkKind::Data, b"xenvault").as_bytes());
    }

    #[test]
    fn a_writers_key_gives_the_same_ids_and_structure_and_nothing_of_the_root() {
        let full = keys(7, 9);
        let material = KeyMaterial::Writer(full.writer_key());
        let writer = Keys::of_material(material.clone(), full.repository()).unwrap();
        assert_eq!((full.access(), writer.access()), (KeyAccess::Full, KeyAccess::WriteOnly));
        for kind in [ChunkKind::Data, ChunkKind::Map, ChunkKind::Blob] {
            assert_eq!(full.chunk_id(kind, b"content"), writer.chunk_id(kind, b"content"));
        }
        assert_eq!((full.index_key(), full.cut_key()), (writer.index_key(), writer.cut_key()));
        assert_eq!((writer.writer_key(), writer.material()), (full.writer_key(), material));
        let exposed = writer.material().expose();
        assert!(!exposed.windows(32).any(|window| window == [7; 32]), "the root");
    }

    #[test]
    fn repositories_may_share_ids_and_nothing_else() {
        let (one, master) = (keys(1, 1), MasterKey::from_bytes([2; 32]));
        let other = Keys::derive(master.sharing_ids_with(&one), RepositoryId::from_bytes([2; 16])).unwrap();
        assert!(one.shares_ids_with(&other) && !one.shares_ids_with(&keys(2, 2)));
        assert_eq!(one.chunk_id(ChunkKind::Blob, b"content"), other.chunk_id(ChunkKind::Blob, b"content"));
        assert_eq!(one.cut_key(), other.cut_key());
        assert_ne!(one.index_key(), other.index_key());
        assert_ne!(one.writer_key().public, other.writer_key().public);
    }

    #[test]
    fn no_key_is_printed() {
        assert_eq!(format!("{:?}", keys(3, 4).material()), "Full(MasterKey(redacted))");
        assert_eq!(format!("{:?}", keys(3, 4).writer_key()), "WriterKey(redacted)");
        assert_eq!(format!("{:?}", MasterKey::from_bytes([3; 32])), "MasterKey(redacted)");
        assert!(!format!("{:?}", keys(3, 4)).contains("master"));
    }
}
