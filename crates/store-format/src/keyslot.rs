//! Key slots: the keys of a repository, wrapped by a key that Argon2id makes of a passphrase, or by a recovery key.
//!
//! A slot's own CRC-32 tells damage from a wrong secret. Parameters come from bytes that nobody has authenticated
//! yet, so they are bounded on both sides: never weaker than 64 MiB and 3 passes, never a way to exhaust memory.

use argon2::{Algorithm, Argon2, Params, Version};
use ring::aead::{Aad, LessSafeKey};
use zeroize::Zeroizing;

use crate::keys::{aead_key, derive, frame_nonce, random_array};
use crate::wire::{Fields, checked_body, put_crc, put_preamble};
use crate::{FormatError, KeyMaterial, RecoveryKey, RecoveryKeyError, RepositoryId, Secret};

const WHAT: &str = "key slot";
const MAGIC: &[u8; 8] = b"XVLTKEYS";
const PASSPHRASE: u32 = 1;
const RECOVERY: u32 = 2;
const TAG_BYTES: usize = 16;
const PURPOSE: &str = "recovery slot";

const MIN_MEMORY_KIB: u32 = 64 * 1024;
const MAX_MEMORY_KIB: u32 = 1024 * 1024;
const MIN_PASSES: u32 = 3;
const MAX_PASSES: u32 = 64;
const MAX_LANES: u32 = 16;

/// Longest label of a key slot in bytes.
pub const MAX_LABEL_BYTES: usize = 64;

/// Cost of deriving a key from a passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KdfParams {
    /// Memory in KiB, at least 65,536.
    pub memory_kib: u32,
    /// Passes over the memory, at least 3.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for KdfParams {
    fn default() -> Self {
        Self { memory_kib: MIN_MEMORY_KIB, passes: MIN_PASSES, lanes: 1 }
    }
}

impl KdfParams {
    fn check(self) -> Result<Self, FormatError> {
        let bounds = [
            ("Argon2 memory in KiB", self.memory_kib, MIN_MEMORY_KIB, MAX_MEMORY_KIB),
            ("Argon2 passes", self.passes, MIN_PASSES, MAX_PASSES),
            ("Argon2 lanes", self.lanes, 1, MAX_LANES),
        ];
        for (field, found, least, most) in bounds {
            let limit = if found < least { least } else { most };
            if found < least || found > most {
                return Err(FormatError::Limit { what: WHAT, field, found: found.into(), limit: limit.into() });
            }
        }
        Ok(self)
    }
}

/// What opens a key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotKind {
    /// A passphrase, by Argon2id.
    Passphrase(KdfParams),
    /// A recovery key.
    Recovery,
}

/// What a key slot gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyAccess {
    /// Everything.
    Full,
    /// Writing, and reading of structure; the content of disks and blobs can not be read.
    WriteOnly,
}

impl KeyAccess {
    const fn code(self) -> u32 {
        match self {
            Self::Full => 1,
            Self::WriteOnly => 2,
        }
    }
}

/// What somebody gives to open a slot.
#[derive(Clone, Debug)]
pub enum SlotSecret {
    /// A passphrase.
    Passphrase(Secret),
    /// A recovery key.
    Recovery(RecoveryKey),
}

impl SlotSecret {
    /// Tells the text of a recovery key from a passphrase: by its beginning, which no passphrase may have.
    ///
    /// # Errors
    /// [`RecoveryKeyError`] if it is meant as a recovery key and mistyped.
    pub fn new(secret: &Secret) -> Result<Self, RecoveryKeyError> {
        if RecoveryKey::is_meant_by(secret) {
            let text = std::str::from_utf8(secret.expose()).map_err(|_| RecoveryKeyError::Groups { found: 0 })?;
            RecoveryKey::from_text(text).map(Self::Recovery)
        } else {
            Ok(Self::Passphrase(secret.clone()))
        }
    }
}

/// What is in a slot besides the keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotHead {
    /// The repository that the slot says it belongs to.
    pub repository: RepositoryId,
    /// What opens it.
    pub kind: SlotKind,
    /// What it gives.
    pub access: KeyAccess,
    /// When it was made, in milliseconds since 1970-01-01 UTC, by the clock of whoever made it.
    pub created_unix_ms: u64,
    /// For people: whose it is. At most [`MAX_LABEL_BYTES`], without NUL.
    pub label: String,
    salt: [u8; 32],
}

/// One wrapped copy of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    head: SlotHead,
    wrapped: Vec<u8>,
}

impl KeySlot {
    /// Wraps keys. With a passphrase it takes as long as the parameters say (some tenths of a second); they do not
    /// matter for a recovery key.
    ///
    /// # Errors
    /// [`FormatError::Limit`] if parameters or label are out of bounds; [`FormatError::Cryptography`].
    pub fn wrap(
        keys: &KeyMaterial,
        repository: RepositoryId,
        secret: &SlotSecret,
        params: KdfParams,
        label: &str,
        created_unix_ms: u64,
    ) -> Result<Self, FormatError> {
        let kind = match secret {
            SlotSecret::Passphrase(_) => SlotKind::Passphrase(params.check()?),
            SlotSecret::Recovery(_) => SlotKind::Recovery,
        };
        let (access, label, salt) = (keys.access(), checked_label(label)?, random_array()?);
        Self::wrap_with(keys, SlotHead { repository, kind, access, created_unix_ms, label, salt }, secret)
    }

    fn wrap_with(keys: &KeyMaterial, head: SlotHead, secret: &SlotSecret) -> Result<Self, FormatError> {
        let mut sealed = keys.expose();
        let key = wrapping_key(&head, secret)?.ok_or(FormatError::Cryptography)?;
        let tag = key.seal_in_place_separate_tag(frame_nonce(0), Aad::from(encode_head(&head)), &mut sealed);
        let mut wrapped = sealed.to_vec();
        wrapped.extend_from_slice(tag.map_err(|_| FormatError::Cryptography)?.as_ref());
        Ok(Self { head, wrapped })
    }

    /// Opens the slot: `None` if this is not its secret.
    ///
    /// # Errors
    /// [`FormatError::KeyDerivation`] if there is no memory for the derivation.
    pub fn unwrap(&self, secret: &SlotSecret) -> Result<Option<KeyMaterial>, FormatError> {
        let Some(key) = wrapping_key(&self.head, secret)? else { return Ok(None) };
        let mut opened = Zeroizing::new(self.wrapped.clone());
        let plain = key.open_in_place(frame_nonce(0), Aad::from(encode_head(&self.head)), &mut opened);
        let Ok(plain) = plain else { return Ok(None) };
        KeyMaterial::from_exposed(self.head.access, plain).map(Some)
    }

    /// What everybody may know of it.
    pub fn head(&self) -> &SlotHead {
        &self.head
    }

    /// The repository that the slot says it belongs to.
    pub fn repository(&self) -> RepositoryId {
        self.head.repository
    }

    /// The bytes of the slot.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = encode_head(&self.head);
        out.extend_from_slice(&self.wrapped);
        put_crc(&mut out);
        out
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes; the secret is not part of the question yet.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(WHAT, checked_body(WHAT, MAGIC, bytes)?);
        fields.preamble(MAGIC)?;
        let wrong = |field, found: u32| FormatError::Field { what: WHAT, field, found: found.into() };
        let repository = RepositoryId::from_bytes(fields.array()?);
        let (kind, access) = (fields.u32()?, fields.u32()?);
        let access = match access {
            1 => KeyAccess::Full,
            2 => KeyAccess::WriteOnly,
            other => return Err(wrong("access", other)),
        };
        let params = KdfParams { memory_kib: fields.u32()?, passes: fields.u32()?, lanes: fields.u32()? };
        let kind = match (kind, params) {
            (PASSPHRASE, params) => SlotKind::Passphrase(params.check()?),
            (RECOVERY, KdfParams { memory_kib: 0, passes: 0, lanes: 0 }) => SlotKind::Recovery,
            (RECOVERY, params) => return Err(wrong("Argon2 memory in KiB", params.memory_kib)),
            (other, _) => return Err(wrong("kind", other)),
        };
        let (created_unix_ms, salt) = (fields.u64()?, fields.array()?);
        let label = decode_label(fields.take(MAX_LABEL_BYTES)?)?;
        let wrapped = fields.take(KeyMaterial::length(access) + TAG_BYTES)?.to_vec();
        fields.end()?;
        Ok(Self { head: SlotHead { repository, kind, access, created_unix_ms, label, salt }, wrapped })
    }
}

fn checked_label(label: &str) -> Result<String, FormatError> {
    let (found, limit) = (label.len() as u64, MAX_LABEL_BYTES as u64);
    if label.len() > MAX_LABEL_BYTES {
        return Err(FormatError::Limit { what: WHAT, field: "length of the label", found, limit });
    }
    match label.bytes().position(|byte| byte == 0) {
        None => Ok(label.to_owned()),
        Some(at) => Err(FormatError::Field { what: WHAT, field: "label (NUL at this byte)", found: at as u64 }),
    }
}

/// A label up to its padding of zeros.
fn decode_label(bytes: &[u8]) -> Result<String, FormatError> {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let text = bytes.get(..end).and_then(|bytes| std::str::from_utf8(bytes).ok());
    checked_label(text.ok_or(FormatError::Field { what: WHAT, field: "label", found: end as u64 })?)
}

fn encode_head(head: &SlotHead) -> Vec<u8> {
    let (kind, params) = match head.kind {
        SlotKind::Passphrase(params) => (PASSPHRASE, [params.memory_kib, params.passes, params.lanes]),
        SlotKind::Recovery => (RECOVERY, [0; 3]),
    };
    let mut out = Vec::with_capacity(512);
    put_preamble(&mut out, MAGIC);
    out.extend_from_slice(head.repository.as_bytes());
    for number in [kind, head.access.code()].iter().chain(&params) {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&head.created_unix_ms.to_le_bytes());
    out.extend_from_slice(&head.salt);
    let mut label = [0; MAX_LABEL_BYTES];
    label.iter_mut().zip(head.label.bytes()).for_each(|(to, from)| *to = from);
    out.extend_from_slice(&label);
    out
}

/// The key that wraps; `None` if the secret is of another kind than the slot.
fn wrapping_key(head: &SlotHead, secret: &SlotSecret) -> Result<Option<LessSafeKey>, FormatError> {
    let mut key = Zeroizing::new([0; 32]);
    match (head.kind, secret) {
        (SlotKind::Passphrase(KdfParams { memory_kib, passes, lanes }), SlotSecret::Passphrase(passphrase)) => {
            let refused = |source: argon2::Error| FormatError::KeyDerivation { source: source.to_string().into() };
            let params = Params::new(memory_kib, passes, lanes, Some(32)).map_err(refused)?;
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_into(passphrase.expose(), &head.salt, &mut *key)
                .map_err(refused)?;
        }
        (SlotKind::Recovery, SlotSecret::Recovery(recovery)) => {
            key = derive(recovery.expose(), head.repository, &head.salt, PURPOSE)?;
        }
        (SlotKind::Passphrase(_), SlotSecret::Recovery(_)) | (SlotKind::Recovery, SlotSecret::Passphrase(_)) => {
            return Ok(None);
        }
    }
    aead_key(&key).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Keys, MasterKey};
    use proptest::prelude::*;

    const REPOSITORY: RepositoryId = RepositoryId::from_bytes([2; 16]);

    fn full() -> KeyMaterial {
        KeyMaterial::Full(MasterKey::from_bytes([1; 32]))
    }

    fn writer() -> KeyMaterial {
        let KeyMaterial::Full(master) = full() else { panic!("no writer's") };
        KeyMaterial::Writer(Keys::derive(master, REPOSITORY).unwrap().writer_key())
    }

    fn passphrase(text: &str) -> SlotSecret {
        SlotSecret::new(&Secret::new(text)).unwrap()
    }

    fn recovery(bytes: u8) -> SlotSecret {
        SlotSecret::Recovery(RecoveryKey::from_bytes([bytes; 32]))
    }

    fn slot(keys: &KeyMaterial, secret: &SlotSecret) -> KeySlot {
        let kind = match secret {
            SlotSecret::Passphrase(_) => SlotKind::Passphrase(KdfParams::default()),
            SlotSecret::Recovery(_) => SlotKind::Recovery,
        };
        let (access, created_unix_ms) = (keys.access(), 1_700_000_000_000);
        let label = "Büro".to_owned();
        let head = SlotHead { repository: REPOSITORY, kind, access, created_unix_ms, label, salt: [3; 32] };
        KeySlot::wrap_with(keys, head, secret).unwrap()
    }

    #[test]
    fn only_the_secret_opens_a_slot_and_its_bytes_are_fixed() {
        for (name, keys, secret, wrong, length) in [
            ("keyslot", full(), passphrase("pass"), passphrase("Pass"), 236),
            ("keyslot-recovery", full(), recovery(5), recovery(6), 236),
            ("keyslot-writer", writer(), recovery(5), recovery(6), 268),
        ] {
            let slot = slot(&keys, &secret);
            let bytes = slot.encode();
            assert_eq!(bytes.len(), length);
            crate::testing::golden(name, &bytes);
            let read = KeySlot::decode(&bytes).unwrap();
            assert_eq!((&read, read.head().label.as_str()), (&slot, "Büro"));
            assert_eq!(read.unwrap(&secret).unwrap(), Some(keys));
            assert_eq!(read.unwrap(&wrong).unwrap(), None);
        }
        // A secret of the other kind is no derivation at all.
        assert_eq!(slot(&full(), &passphrase("pass")).unwrap(&recovery(5)).unwrap(), None);
        assert_eq!(slot(&full(), &recovery(5)).unwrap(&passphrase("pass")).unwrap(), None);
    }

    #[test]
    fn a_slot_can_not_be_made_to_give_more_or_to_be_of_another_repository() {
        let bytes = slot(&writer(), &recovery(5)).encode();
        // Repository, label, time of creation: whatever is in the clear is authenticated.
        for at in [12, 50, 90] {
            let mut forged = bytes[..bytes.len() - 4].to_vec();
            forged[at] ^= 1;
            put_crc(&mut forged);
            assert_eq!(KeySlot::decode(&forged).unwrap().unwrap(&recovery(5)).unwrap(), None, "byte {at}");
        }
        let mut forged = bytes[..bytes.len() - 4].to_vec();
        forged[32] = 1;
        put_crc(&mut forged);
        assert!(matches!(KeySlot::decode(&forged), Err(FormatError::TrailingBytes { .. })));
    }

    #[test]
    fn weak_or_monstrous_parameters_are_refused() {
        for params in [
            KdfParams { memory_kib: 65_535, ..KdfParams::default() },
            KdfParams { memory_kib: u32::MAX, ..KdfParams::default() },
            KdfParams { passes: 2, ..KdfParams::default() },
            KdfParams { lanes: 0, ..KdfParams::default() },
        ] {
            assert!(matches!(params.check(), Err(FormatError::Limit { .. })), "{params:?}");
        }
    }

    #[test]
    fn every_flipped_bit_is_damage_and_not_a_wrong_secret() {
        for secret in [passphrase("pass"), recovery(5)] {
            let bytes = slot(&full(), &secret).encode();
            crate::testing::each_flip(&bytes, |hurt| assert!(KeySlot::decode(hurt).is_err()));
        }
    }

    #[test]
    fn what_is_meant_as_a_recovery_key_is_no_passphrase() {
        let text = RecoveryKey::from_bytes([5; 32]).to_text();
        assert!(matches!(SlotSecret::new(&Secret::new(text.as_bytes())), Ok(SlotSecret::Recovery(_))));
        let mistyped = text.replacen("-0", "-1", 1);
        assert_ne!(mistyped, *text);
        assert_eq!(SlotSecret::new(&Secret::new(mistyped)).unwrap_err(), RecoveryKeyError::Group { group: 1 });
    }

    proptest! {
        #[test]
        fn labels_read_back(label in "[^\0]{0,40}", created: u64, key: [u8; 32]) {
            let secret = SlotSecret::Recovery(RecoveryKey::from_bytes(key));
            let made = KeySlot::wrap(&full(), REPOSITORY, &secret, KdfParams::default(), &label, created);
            if label.len() > MAX_LABEL_BYTES {
                let refused = matches!(made, Err(FormatError::Limit { .. }));
                prop_assert!(refused);
            } else {
                let read = KeySlot::decode(&made.unwrap().encode()).unwrap();
                prop_assert_eq!(&read.head().label, &label);
                prop_assert_eq!(read.head().created_unix_ms, created);
                prop_assert_eq!(read.unwrap(&secret).unwrap(), Some(full()));
            }
        }

        #[test]
        fn no_bytes_behind_a_fitting_checksum_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = KeySlot::decode(&crate::fuzzing::object(MAGIC, &bytes));
        }
    }
}
