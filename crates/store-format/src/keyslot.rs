//! Key slots: the master key, wrapped by a key that Argon2id makes of a passphrase.
//!
//! A slot's own CRC-32 tells damage from a wrong passphrase. Parameters come from bytes that nobody has authenticated
//! yet, so they are bounded on both sides: never weaker than 64 MiB and 3 passes, never a way to exhaust memory.

use argon2::{Algorithm, Argon2, Params, Version};
use ring::aead::{Aad, LessSafeKey};
use zeroize::Zeroizing;

use crate::keys::{aead_key, frame_nonce, random_array};
use crate::wire::{Fields, checked_body, put_crc, put_preamble};
use crate::{FormatError, MasterKey, RepositoryId, Secret};

const WHAT: &str = "key slot";
const MAGIC: &[u8; 8] = b"XVLTKEYS";
const PASSPHRASE: u32 = 1;
const WRAPPED_BYTES: usize = 48;

const MIN_MEMORY_KIB: u32 = 64 * 1024;
const MAX_MEMORY_KIB: u32 = 1024 * 1024;
const MIN_PASSES: u32 = 3;
const MAX_PASSES: u32 = 64;
const MAX_LANES: u32 = 16;

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

/// One wrapped copy of the master key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    repository: RepositoryId,
    params: KdfParams,
    salt: [u8; 32],
    wrapped: [u8; WRAPPED_BYTES],
}

impl KeySlot {
    /// Wraps the master key. Takes as long as the parameters say (some tenths of a second).
    ///
    /// # Errors
    /// [`FormatError::Limit`] if the parameters are out of bounds; [`FormatError::Cryptography`].
    pub fn wrap(
        master: &MasterKey,
        repository: RepositoryId,
        passphrase: &Secret,
        params: KdfParams,
    ) -> Result<Self, FormatError> {
        Self::wrap_with_salt(master, repository, passphrase, params, random_array()?)
    }

    fn wrap_with_salt(
        master: &MasterKey,
        repository: RepositoryId,
        passphrase: &Secret,
        params: KdfParams,
        salt: [u8; 32],
    ) -> Result<Self, FormatError> {
        let mut slot = Self { repository, params: params.check()?, salt, wrapped: [0; WRAPPED_BYTES] };
        let mut sealed = Zeroizing::new(master.expose().to_vec());
        slot.wrapping_key(passphrase)?
            .seal_in_place_append_tag(frame_nonce(0), Aad::from(slot.head()), &mut *sealed)
            .map_err(|_| FormatError::Cryptography)?;
        slot.wrapped.iter_mut().zip(sealed.iter()).for_each(|(to, from)| *to = *from);
        Ok(slot)
    }

    /// Opens the slot: `None` if this is not its passphrase.
    ///
    /// # Errors
    /// [`FormatError::KeyDerivation`] if there is no memory for the derivation.
    pub fn unwrap(&self, passphrase: &Secret) -> Result<Option<MasterKey>, FormatError> {
        let key = self.wrapping_key(passphrase)?;
        let mut opened = Zeroizing::new(self.wrapped);
        let plain = key.open_in_place(frame_nonce(0), Aad::from(self.head()), opened.as_mut_slice());
        let Ok(plain) = plain else { return Ok(None) };
        let mut master = [0; 32];
        master.iter_mut().zip(plain.iter()).for_each(|(to, from)| *to = *from);
        Ok(Some(MasterKey::from_bytes(master)))
    }

    /// The repository that the slot says it belongs to.
    pub fn repository(&self) -> RepositoryId {
        self.repository
    }

    /// The bytes of the slot.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.head();
        out.extend_from_slice(&self.wrapped);
        put_crc(&mut out);
        out
    }

    /// Reads a slot.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes; the passphrase is not part of the question yet.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(WHAT, checked_body(WHAT, MAGIC, bytes)?);
        fields.preamble(MAGIC)?;
        let repository = RepositoryId::from_bytes(fields.array()?);
        let kind = fields.u32()?;
        if kind != PASSPHRASE {
            return Err(FormatError::Field { what: WHAT, field: "kind", found: kind.into() });
        }
        let params = KdfParams { memory_kib: fields.u32()?, passes: fields.u32()?, lanes: fields.u32()? }.check()?;
        let slot = Self { repository, params, salt: fields.array()?, wrapped: fields.array()? };
        fields.end()?;
        Ok(slot)
    }

    fn head(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        put_preamble(&mut out, MAGIC);
        out.extend_from_slice(self.repository.as_bytes());
        for number in [PASSPHRASE, self.params.memory_kib, self.params.passes, self.params.lanes] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.salt);
        out
    }

    fn wrapping_key(&self, passphrase: &Secret) -> Result<LessSafeKey, FormatError> {
        let refused = |source: argon2::Error| FormatError::KeyDerivation { source: source.to_string().into() };
        let KdfParams { memory_kib, passes, lanes } = self.params;
        let params = Params::new(memory_kib, passes, lanes, Some(32)).map_err(refused)?;
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(passphrase.expose(), &self.salt, &mut *key)
            .map_err(refused)?;
        aead_key(&key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> KeySlot {
        let master = MasterKey::from_bytes([1; 32]);
        let repository = RepositoryId::from_bytes([2; 16]);
        KeySlot::wrap_with_salt(&master, repository, &Secret::new("pass"), KdfParams::default(), [3; 32]).unwrap()
    }

    #[test]
    fn only_the_passphrase_opens_a_slot_and_its_bytes_are_fixed() {
        let slot = slot();
        let bytes = slot.encode();
        assert_eq!(bytes.len(), 128);
        crate::testing::golden("keyslot", &bytes);
        let read = KeySlot::decode(&bytes).unwrap();
        assert_eq!(read, slot);
        assert_eq!(read.unwrap(&Secret::new("pass")).unwrap(), Some(MasterKey::from_bytes([1; 32])));
        assert_eq!(read.unwrap(&Secret::new("Pass")).unwrap(), None);
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
    fn every_flipped_bit_is_damage_and_not_a_wrong_passphrase() {
        let bytes = slot().encode();
        crate::testing::each_flip(&bytes, |hurt| assert!(KeySlot::decode(hurt).is_err()));
    }
}
