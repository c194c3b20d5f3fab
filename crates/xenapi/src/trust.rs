//! x
use crate::error::XenApiError;
use rustls::ClientConfig;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// The SHA-256 of a certificate's DER form.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Fingerprint([u8; 32]);

impl Sha256Fingerprint {
    /// Of these DER bytes.
    pub fn of(_der: &[u8]) -> Self {
        todo!()
    }
}
impl fmt::Display for Sha256Fingerprint {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
}
impl fmt::Debug for Sha256Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
impl FromStr for Sha256Fingerprint {
    type Err = XenApiError;
    fn from_str(_text: &str) -> Result<Self, XenApiError> {
        todo!()
    }
}

/// Whom to believe.
#[derive(Clone, Debug)]
pub enum Trust {
    /// The coordinator's certificate; members' certificates are learned over the connection that it secures.
    Fingerprint(Sha256Fingerprint),
    /// Certificates that were learned before.
    Pins(PinnedHosts),
    /// Certificates that a CA of this PEM file signed, for the name in the address.
    CaFile(PathBuf),
    /// None: everything, the password too, in clear text.
    PlainHttp,
}

/// The certificates of a pool's hosts that were confirmed or learned, to be kept between runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PinnedHosts {
    /// The pool that they belong to, if it is known.
    pub pool_uuid: Option<String>,
    /// Fingerprint by address (as in `host.address`, or the host in the address that was given).
    pub hosts: BTreeMap<String, Sha256Fingerprint>,
}

/// A certificate that a host showed, for a person to confirm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCertificate {
    /// Its DER form.
    pub der: Vec<u8>,
    /// Its fingerprint.
    pub fingerprint: Sha256Fingerprint,
}

/// What a server showed; nothing of it is verified but that the server holds the key of the first certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresentedCertificates {
    /// The server, as `host:port`.
    pub host: String,
    /// Its certificates, its own first.
    pub chain: Vec<HostCertificate>,
}

/// What the server at `url` shows, for a person to confirm; nothing secret is sent.
///
/// # Errors
/// [`XenApiError::Url`], [`XenApiError::Connection`], [`XenApiError::Timeout`], [`XenApiError::Tls`].
pub async fn fetch_certificates(_url: &str) -> Result<PresentedCertificates, XenApiError> {
    todo!()
}

/// TLS that accepts exactly this certificate (its DER form) and verifies that the server holds its key.
///
/// Also for the hosts' NBD servers.
///
/// # Errors
/// [`XenApiError::Trust`] if it is not a certificate.
pub fn pinned_client_config(_certificate: &[u8]) -> Result<Arc<ClientConfig>, XenApiError> {
    todo!()
}
