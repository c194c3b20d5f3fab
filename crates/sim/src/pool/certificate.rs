//! Certificates of hosts: self-signed, RSA of 2048 bits, marked as a CA, as xapi makes them.

use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, SanType};
use rsa::pkcs8::EncodePrivateKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::SimError;

/// A host's certificate and key.
pub(super) struct Identity {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) pem: String,
    pub(super) key: PrivateKeyDer<'static>,
    /// What `get_nbd_info` gives as the subject.
    pub(super) subject: String,
}

/// Keys of this process by host: making one takes long, and a test starts many pools.
static KEYS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Hosts beyond these share keys, not certificates: a pool of 64 hosts would take a minute to start.
const DIFFERENT_KEYS: usize = 4;

fn key_of(index: usize) -> Result<Vec<u8>, SimError> {
    let index = index % DIFFERENT_KEYS;
    let mut keys = KEYS.lock().unwrap_or_else(PoisonError::into_inner);
    while keys.len() <= index {
        let mut random = rsa::rand_core::OsRng;
        let failure = |error: &dyn std::fmt::Display| SimError::Certificate(error.to_string());
        let key = rsa::RsaPrivateKey::new(&mut random, 2048).map_err(|error| failure(&error))?;
        let der = key.to_pkcs8_der().map_err(|error| failure(&error))?;
        keys.push(der.as_bytes().to_vec());
    }
    keys.get(index).cloned().ok_or_else(|| SimError::Certificate("no key".to_owned()))
}

/// Makes the certificate of a host. Every second host has one without a subjectAltName, as old hosts do.
pub(super) fn make(index: usize, name: &str, address: Ipv4Addr) -> Result<Identity, SimError> {
    let failure = |error: rcgen::Error| SimError::Certificate(error.to_string());
    let der = key_of(index)?;
    let pkcs8 = PrivatePkcs8KeyDer::from(der.clone());
    let key = KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_RSA_SHA256).map_err(failure)?;
    let with_names = index.is_multiple_of(2);
    let dns = format!("{name}.pool.invalid");
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    if with_names {
        let name = dns.as_str().try_into().map_err(failure)?;
        params.subject_alt_names = vec![SanType::DnsName(name), SanType::IpAddress(address.into())];
    }
    let certificate = params.self_signed(&key).map_err(failure)?;
    Ok(Identity {
        certificate: certificate.der().clone(),
        pem: certificate.pem(),
        key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der)),
        subject: if with_names { dns } else { name.to_owned() },
    })
}

/// SHA-256 of a certificate, lower-case hexadecimal.
pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hexadecimal(&ring::digest::SHA256, certificate)
}

/// SHA-1 of a certificate, lower-case hexadecimal.
pub(super) fn fingerprint_sha1(certificate: &CertificateDer<'_>) -> String {
    hexadecimal(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, certificate)
}

fn hexadecimal(algorithm: &'static ring::digest::Algorithm, bytes: &[u8]) -> String {
    let digest = ring::digest::digest(algorithm, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
