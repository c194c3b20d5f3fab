//! The TLS that xapi-nbd speaks: version 1.2, two cipher suites, one curve. Nothing else, so that a client which needs
//! anything else fails here as it fails there.

use std::io;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider, kx_group};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// The server's side, with all certificates given, the leaf first.
pub(super) fn server_config(
    certificates: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> io::Result<Arc<ServerConfig>> {
    let provider = CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
            cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![kx_group::SECP384R1],
        ..default_provider()
    };
    // Without a look at whether they belong together: a host with the wrong key is a case that clients must survive.
    let key = provider.key_provider.load_private_key(key).map_err(io::Error::other)?;
    let resolver = SingleCertAndKey::from(CertifiedKey::new(certificates, key));
    let config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    Ok(Arc::new(config))
}
