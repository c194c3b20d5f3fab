//! Keys of packs that are sealed to a public key: RFC 9180 (HPKE), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
//! export only.
//!
//! Whoever writes knows the public key, draws a pair of his own for each pack, forgets its private half, and keeps only
//! the pack's key until the pack is written.

use std::convert::Infallible;
use std::fmt;

use hpke::aead::ExportOnlyAead;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256 as X25519;
use hpke::rand_core::{TryCryptoRng, TryRng};
use hpke::{Deserializable as _, HpkeError, Kem, OpModeR, OpModeS, Serializable as _};
use zeroize::Zeroizing;

use crate::keys::random_array;
use crate::{FormatError, RepositoryId};

const INFO: &[u8] = b"xenvault content pack ";
const EXPORTER_CONTEXT: &[u8] = b"xenvault frames";

type PrivateKey = <X25519 as Kem>::PrivateKey;

/// The pair that content is sealed to.
#[derive(Clone)]
pub(crate) struct KeyPair {
    private: PrivateKey,
    public: [u8; 32],
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyPair(redacted)")
    }
}

impl KeyPair {
    /// The pair with this private key, any 32 bytes.
    pub(crate) fn from_private(private: &[u8; 32]) -> Result<Self, FormatError> {
        let private = PrivateKey::from_bytes(private).map_err(|_| FormatError::Cryptography)?;
        let public = X25519::sk_to_pk(&private).to_bytes().into();
        Ok(Self { private, public })
    }

    /// The half that a writer knows.
    pub(crate) fn public(&self) -> [u8; 32] {
        self.public
    }

    /// The key that [`encapsulate`] gave together with these bytes.
    pub(crate) fn decapsulate(
        &self,
        repository: RepositoryId,
        encapsulated: &[u8; 32],
    ) -> Result<Zeroizing<[u8; 32]>, FormatError> {
        self.receive(encapsulated, &info(repository), EXPORTER_CONTEXT)
            .map_err(|_| FormatError::Authentication { what: "pack header" })
    }

    fn receive(&self, encapsulated: &[u8], info: &[u8], context: &[u8]) -> Result<Zeroizing<[u8; 32]>, HpkeError> {
        let encapsulated = <X25519 as Kem>::EncappedKey::from_bytes(encapsulated)?;
        let (mode, private) = (OpModeR::Base, &self.private);
        let ready = hpke::setup_receiver::<ExportOnlyAead, HkdfSha256, X25519>(&mode, private, &encapsulated, info)?;
        let mut key = Zeroizing::new([0; 32]);
        ready.export(context, &mut *key)?;
        Ok(key)
    }
}

/// A new key for whoever holds the private half, and the bytes by which he finds it again.
pub(crate) fn encapsulate(
    repository: RepositoryId,
    public: &[u8; 32],
) -> Result<([u8; 32], Zeroizing<[u8; 32]>), FormatError> {
    let seed = Seed(Zeroizing::new(random_array()?));
    send(public, seed, &info(repository), EXPORTER_CONTEXT).map_err(|_| FormatError::Cryptography)
}

fn send(
    public: &[u8; 32],
    mut seed: Seed,
    info: &[u8],
    context: &[u8],
) -> Result<([u8; 32], Zeroizing<[u8; 32]>), HpkeError> {
    let (mode, public) = (OpModeS::Base, <X25519 as Kem>::PublicKey::from_bytes(public)?);
    let (encapsulated, ready) =
        hpke::setup_sender_with_rng::<ExportOnlyAead, HkdfSha256, X25519>(&mode, &public, info, &mut seed)?;
    let mut key = Zeroizing::new([0; 32]);
    ready.export(context, &mut *key)?;
    Ok((encapsulated.to_bytes().into(), key))
}

fn info(repository: RepositoryId) -> Vec<u8> {
    [INFO, repository.as_bytes()].concat()
}

/// 32 random bytes that were drawn where drawing may fail, which `hpke` can not be told. It takes just these; whatever
/// is asked for beyond is hashed from them and never repeats.
struct Seed(Zeroizing<[u8; 32]>);

impl TryRng for Seed {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, into: &mut [u8]) -> Result<(), Infallible> {
        for piece in into.chunks_mut(32) {
            piece.iter_mut().zip(*self.0).for_each(|(to, from)| *to = from);
            self.0 = Zeroizing::new(*blake3::hash(&*self.0).as_bytes());
        }
        Ok(())
    }
}

impl TryCryptoRng for Seed {}

#[cfg(test)]
mod tests {
    use super::*;

    const REPOSITORY: RepositoryId = RepositoryId::from_bytes([4; 16]);

    fn pair(private: u8) -> KeyPair {
        KeyPair::from_private(&[private; 32]).unwrap()
    }

    #[test]
    fn only_the_private_half_of_the_same_repository_finds_the_key() {
        let (encapsulated, key) = encapsulate(REPOSITORY, &pair(1).public()).unwrap();
        assert_eq!(pair(1).decapsulate(REPOSITORY, &encapsulated).unwrap(), key);
        assert_ne!(pair(2).decapsulate(REPOSITORY, &encapsulated).unwrap(), key);
        assert_ne!(pair(1).decapsulate(RepositoryId::from_bytes([5; 16]), &encapsulated).unwrap(), key);
        let (again, other) = encapsulate(REPOSITORY, &pair(1).public()).unwrap();
        assert!(again != encapsulated && other != key);
        // A point that would give everybody the same key.
        assert!(matches!(pair(1).decapsulate(REPOSITORY, &[0; 32]), Err(FormatError::Authentication { .. })));
    }

    #[test]
    fn the_highest_bit_of_an_encapsulated_key_is_not_set() {
        for _ in 0..64 {
            let (encapsulated, _) = encapsulate(REPOSITORY, &pair(1).public()).unwrap();
            assert_eq!(encapsulated[31] & 0x80, 0);
        }
    }

    fn hex<const N: usize>(text: &str) -> [u8; N] {
        let byte = |at: usize| u8::from_str_radix(text.get(at..at + 2).unwrap(), 16).unwrap();
        let bytes: Vec<u8> = (0..text.len()).step_by(2).map(byte).collect();
        bytes.try_into().unwrap()
    }

    /// Appendix A.7.1 of RFC 9180.
    #[test]
    fn the_vectors_of_the_standard_are_met_on_both_sides() {
        let info = b"Ode on a Grecian Urn";
        let receiver =
            KeyPair::from_private(&hex("33d196c830a12f9ac65d6e565a590d80f04ee9b19c83c87f2c170d972a812848")).unwrap();
        assert_eq!(receiver.public(), hex("194141ca6c3c3beb4792cd97ba0ea1faff09d98435012345766ee33aae2d7664"));
        let encapsulated: [u8; 32] = hex("e5e8f9bfff6c2f29791fc351d2c25ce1299aa5eaca78a757c0b4fb4bcd830918");
        for (context, exported) in [
            (&b""[..], "7a36221bd56d50fb51ee65edfd98d06a23c4dc87085aa5866cb7087244bd2a36"),
            (b"\0", "d5535b87099c6c3ce80dc112a2671c6ec8e811a2f284f948cec6dd1708ee33f0"),
            (b"TestContext", "ffaabc85a776136ca0c378e5d084c9140ab552b78f039d2e8775f26efff4c70e"),
        ] {
            assert_eq!(*receiver.receive(&encapsulated, info, context).unwrap(), hex(exported));
            let seed = Seed(Zeroizing::new(hex("55bc245ee4efda25d38f2d54d5bb6665291b99f8108a8c4b686c2b14893ea5d9")));
            let (sent, key) = send(&receiver.public(), seed, info, context).unwrap();
            assert_eq!((sent, *key), (encapsulated, hex(exported)));
        }
    }
}
