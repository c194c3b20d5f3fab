//! Whom to believe: certificates that were pinned, learned or signed.
//!
//! XenServer's hosts have self-signed certificates, with the CA flag and often without a name, so the usual rules say
//! nothing about them. A pin compares the host's own certificate as a whole and verifies that the host holds its key;
//! nothing else of the certificate is looked at.

mod fingerprint;
mod verifier;

pub use fingerprint::{PinnedHosts, Sha256Fingerprint};
pub(crate) use verifier::Mismatch;

use crate::error::{Phase, XenApiError};
use crate::http_client::{Endpoint, Scheme, connect_tcp};
use crate::session_handle::Timeouts;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::path::PathBuf;
use std::sync::Arc;
use verifier::{AcceptAny, PinnedVerifier};

/// Whom to believe.
#[derive(Clone, Debug)]
pub enum Trust {
    /// The coordinator's certificate; members' certificates are learned over the connection that it secures.
    Fingerprint(Sha256Fingerprint),
    /// Certificates that were confirmed or learned before, by host.
    Pins(PinnedHosts),
    /// Certificates that a CA of this PEM file signed, for the name in the address.
    CaFile(PathBuf),
    /// Certificates that a CA of this machine signed, for the name in the address: the system's store, or what
    /// `SSL_CERT_FILE` and `SSL_CERT_DIR` name.
    SystemRoots,
    /// None: everything, the password too, in clear text.
    PlainHttp,
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
    /// The server, as `host` or `host:port`.
    pub host: String,
    /// Its certificates, its own first.
    pub chain: Vec<HostCertificate>,
}

/// What the server at `url` shows, for a person to confirm; nothing secret is sent.
///
/// # Errors
/// [`XenApiError::Url`], [`XenApiError::Connection`], [`XenApiError::Timeout`], [`XenApiError::TlsTooOld`],
/// [`XenApiError::Tls`].
pub async fn fetch_certificates(url: &str) -> Result<PresentedCertificates, XenApiError> {
    let endpoint = Endpoint::parse(url)?;
    if endpoint.scheme == Scheme::Http {
        return Err(XenApiError::Url { url: url.to_owned(), reason: "only https:// has certificates" });
    }
    let verifier = Arc::new(AcceptAny::new(provider()));
    let config = base_config()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    let timeouts = Timeouts::default();
    let tcp = connect_tcp(&endpoint, &timeouts).await?;
    let stream = handshake(&endpoint, Arc::new(config), tcp, &timeouts).await?;
    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain = shown.iter().map(|der| HostCertificate { der: der.to_vec(), fingerprint: Sha256Fingerprint::of(der) });
    Ok(PresentedCertificates { host: endpoint.display_host(), chain: chain.collect() })
}

/// TLS that accepts exactly this certificate (its DER form) and verifies that the server holds its key.
///
/// Also for the hosts' NBD servers: TLS 1.2 and 1.3, with secp384r1 among the key exchanges.
///
/// # Errors
/// [`XenApiError::Trust`] if it is not a certificate.
pub fn pinned_client_config(certificate: &[u8]) -> Result<Arc<ClientConfig>, XenApiError> {
    let invalid = |reason: String| XenApiError::Trust { what: "the certificate to pin".to_owned(), reason };
    let der = CertificateDer::from(certificate);
    // The same parser that the handshake's signature check uses.
    let mut probe = RootCertStore::empty();
    probe.add(der).map_err(|error| invalid(error.to_string()))?;
    pinned_config(Sha256Fingerprint::of(certificate))
}

/// As [`pinned_client_config`], by fingerprint.
pub(crate) fn pinned_config(expected: Sha256Fingerprint) -> Result<Arc<ClientConfig>, XenApiError> {
    let verifier = Arc::new(PinnedVerifier::new(expected, provider()));
    let mut config = base_config()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    // A resumed session does not show its certificate again.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// TLS that believes the CAs of a PEM file.
pub(crate) fn ca_config(path: &std::path::Path) -> Result<Arc<ClientConfig>, XenApiError> {
    let failed = |reason: String| XenApiError::Trust { what: format!("CA file {}", path.display()), reason };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| failed(error.to_string()))? {
        let certificate = certificate.map_err(|error| failed(error.to_string()))?;
        roots.add(certificate).map_err(|error| failed(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(failed("holds no certificate in PEM form".to_owned()));
    }
    Ok(Arc::new(base_config()?.with_root_certificates(roots).with_no_client_auth()))
}

/// TLS that believes the CAs of this machine.
pub(crate) fn system_config() -> Result<Arc<ClientConfig>, XenApiError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Stores hold a few certificates that the parser does not take; the others count.
    let (_, ignored) = roots.add_parsable_certificates(found.certs);
    if ignored > 0 {
        tracing::debug!(ignored, "certificates of the system's store are not usable");
    }
    if roots.is_empty() {
        let causes: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        let reason = match causes.is_empty() {
            true => "holds no certificate authority; install the package ca-certificates, or give a CA file".to_owned(),
            false => format!("can not be read: {}", causes.join("; ")),
        };
        return Err(XenApiError::Trust { what: "the system's store of certificates".to_owned(), reason });
    }
    Ok(Arc::new(base_config()?.with_root_certificates(roots).with_no_client_auth()))
}

/// The DER form of the first certificate in a PEM text.
pub(crate) fn leaf_of_pem(pem: &str) -> Option<Vec<u8>> {
    CertificateDer::from_pem_slice(pem.as_bytes()).ok().map(|der| der.to_vec())
}

/// The TLS handshake over an open connection.
pub(crate) async fn handshake<S>(
    endpoint: &Endpoint,
    config: Arc<ClientConfig>,
    tcp: S,
    timeouts: &Timeouts,
) -> Result<tokio_rustls::client::TlsStream<S>, XenApiError>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let host = endpoint.display_host();
    let connecting = tokio_rustls::TlsConnector::from(config).connect(endpoint.server_name()?, tcp);
    match tokio::time::timeout(timeouts.tls, connecting).await {
        Err(_) => Err(XenApiError::Timeout { host, phase: Phase::Tls, waited: timeouts.tls }),
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(match Mismatch::in_error(&source) {
            Some(mismatch) => {
                XenApiError::Certificate { host, expected: Some(mismatch.expected), found: mismatch.found }
            }
            None if is_broken(&source) => XenApiError::Connection { host, phase: Phase::Tls, source: Box::new(source) },
            None if is_too_old(&source) => XenApiError::TlsTooOld { host, source },
            None => XenApiError::Tls { host, source },
        }),
    }
}

/// Whether the connection broke: a toolstack that restarts takes connections and closes them.
fn is_broken(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
}

/// Whether the two sides found nothing in common: the host is too old.
fn is_too_old(error: &std::io::Error) -> bool {
    use rustls::{AlertDescription, Error, InvalidMessage};
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
    matches!(
        cause,
        Some(
            Error::PeerIncompatible(_)
                | Error::InvalidMessage(InvalidMessage::UnknownProtocolVersion)
                | Error::AlertReceived(
                    AlertDescription::ProtocolVersion
                        | AlertDescription::HandshakeFailure
                        | AlertDescription::InsufficientSecurity
                )
        )
    )
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn base_config() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, XenApiError> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|error| XenApiError::Trust { what: "TLS".to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::NamedGroup;

    #[test]
    fn x28_nbd_servers_find_their_key_exchange_and_versions() {
        let certificate = rcgen::generate_simple_self_signed(vec!["host".into()]).unwrap();
        let config = pinned_client_config(certificate.cert.der()).unwrap();
        let groups: Vec<NamedGroup> = config.crypto_provider().kx_groups.iter().map(|group| group.name()).collect();
        assert!(groups.contains(&NamedGroup::secp384r1), "{groups:?}");
        assert!(pinned_client_config(b"no certificate").is_err());
    }
}
