//! A certificate authority and a server certificate, as nbdkit and qemu-nbd want them in a folder.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// Writes `ca-cert.pem`, `server-cert.pem` and `server-key.pem` for localhost.
pub fn write(folder: &Path) {
    let authority_key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(rcgen::DnType::CommonName, "authority of a test");
    let authority_certificate = authority.self_signed(&authority_key).expect("a certificate");
    let issuer = Issuer::new(authority, authority_key);

    let key = KeyPair::generate().expect("a key");
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let server = CertificateParams::new(names).expect("parameters");
    let certificate = server.signed_by(&key, &issuer).expect("a certificate");
    for (name, pem) in [
        ("ca-cert.pem", authority_certificate.pem()),
        ("server-cert.pem", certificate.pem()),
        ("server-key.pem", key.serialize_pem()),
    ] {
        std::fs::write(folder.join(name), pem).expect("a folder that can be written");
    }
}
