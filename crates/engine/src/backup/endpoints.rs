//! Where a disk can be read over NBD, with the certificate that each host must show (X22, X24, X28).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use xenvault_nbd::{BoxError, Endpoint, EndpointSource, ExportName, Tls};
use xenvault_xenapi::{Session, network, pinned_client_config, vdi, vdi_nbd_server_info};

use super::finding::{Finding, FindingKind};
use crate::options::ClearText;

/// How the pool serves disks, by the purposes of its networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Over TLS.
    Tls,
    /// In clear text, with the operator's consent.
    Clear,
    /// Not at all: the server knows no NBD, and disks are read over HTTP from begin to end.
    Http,
}

/// What the purposes of the pool's networks allow (X23: the two kinds together make hosts refuse everything).
pub(crate) fn access<'a>(
    networks: impl Iterator<Item = &'a network::Record> + Clone,
    consent: ClearText,
) -> Result<Access, Finding> {
    let with = |purpose: network::Purpose| networks.clone().find(|record| record.purpose.contains(&purpose));
    match (with(network::Purpose::Nbd), with(network::Purpose::InsecureNbd)) {
        (Some(secure), Some(insecure)) => Err(Finding {
            kind: FindingKind::NbdMixed,
            text: format!(
                "network {:?} has the purpose nbd and network {:?} insecure_nbd: hosts refuse every connection then",
                secure.name_label, insecure.name_label
            ),
            remedy: format!(
                "run `xe network-param-remove param-name=purpose param-key=insecure_nbd uuid={}`",
                insecure.uuid
            ),
        }),
        (Some(_), None) => Ok(Access::Tls),
        (None, Some(_)) if consent == ClearText::Accept => Ok(Access::Clear),
        (None, Some(insecure)) => Err(Finding {
            kind: FindingKind::NbdClearText,
            text: format!("network {:?} offers NBD in clear text only", insecure.name_label),
            remedy: format!(
                "accept clear text explicitly, or change it with `xe network-param-remove param-name=purpose \
                 param-key=insecure_nbd uuid={0}` and `xe network-param-add param-name=purpose param-key=nbd uuid={0}`",
                insecure.uuid
            ),
        }),
        (None, None) => {
            let advice = networks.clone().find(|record| !record.pifs.is_empty());
            Err(Finding {
                kind: FindingKind::NbdNotEnabled,
                text: "no network of the pool has the purpose nbd, so no host serves disks".to_owned(),
                remedy: format!(
                    "enable it on the network that backups shall use with `xe network-param-add param-name=purpose \
                     param-key=nbd uuid={}`",
                    advice.map_or("NETWORK-UUID", |record| &record.uuid)
                ),
            })
        }
    }
}

/// Asks the pool for the addresses of one disk, whenever they are wanted: the names carry the session of that moment
/// (X04).
pub(crate) struct PoolEndpoints {
    pub(crate) session: Session,
    pub(crate) disk: vdi::Ref,
    pub(crate) access: Access,
}

impl EndpointSource for PoolEndpoints {
    fn endpoints(&self) -> BoxFuture<'_, Result<Vec<Endpoint>, BoxError>> {
        async move {
            let infos = vdi::get_nbd_info(&self.session, &self.disk).await?;
            endpoints(&infos, self.access)
        }
        .boxed()
    }
}

/// The endpoints in these records, IPv4 first (X24). A record that is not understood is left out if another one is.
fn endpoints(infos: &[vdi_nbd_server_info::Record], access: Access) -> Result<Vec<Endpoint>, BoxError> {
    let mut good = Vec::new();
    let mut bad = None;
    for info in infos {
        match endpoint(info, access) {
            Ok(endpoint) => good.push(endpoint),
            Err(error) => bad = Some(error),
        }
    }
    good.sort_by_key(|endpoint| endpoint.address.is_ipv6());
    match bad {
        Some(error) if good.is_empty() => Err(error),
        _ => Ok(good),
    }
}

pub(crate) fn endpoint(info: &vdi_nbd_server_info::Record, access: Access) -> Result<Endpoint, BoxError> {
    let ip: IpAddr = info.address.parse()?;
    let address = SocketAddr::new(ip, u16::try_from(info.port)?);
    let tls = match access {
        Access::Clear | Access::Http => None,
        Access::Tls => {
            let certificate = CertificateDer::from_pem_slice(info.cert.as_bytes())?;
            // The certificate itself is compared; the name is only what the handshake announces.
            let server_name =
                ServerName::try_from(info.subject.clone()).unwrap_or_else(|_| ServerName::IpAddress(ip.into()));
            Some(Tls { config: pinned_client_config(&certificate)?, server_name })
        }
    };
    Ok(Endpoint { address, tls, export_name: ExportName::new(info.exportname.clone()) })
}

/// The source as NBD wants it.
pub(crate) fn source(session: &Session, disk: &vdi::Ref, access: Access) -> Arc<dyn EndpointSource> {
    Arc::new(PoolEndpoints { session: session.clone(), disk: disk.clone(), access })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(purposes: &[network::Purpose]) -> network::Record {
        network::Record {
            uuid: "n-uuid".into(),
            purpose: purposes.to_vec(),
            pifs: vec![xenvault_xenapi::pif::Ref::new("OpaqueRef:1")],
            ..Default::default()
        }
    }

    fn check(purposes: &[&[network::Purpose]], consent: ClearText) -> Result<Access, FindingKind> {
        let records: Vec<_> = purposes.iter().map(|list| with(list)).collect();
        access(records.iter(), consent).map_err(|finding| finding.kind)
    }

    #[test]
    fn x22_without_a_purpose_the_remedy_is_the_exact_command() {
        let finding = access([with(&[])].iter(), ClearText::Refuse).unwrap_err();
        assert_eq!(finding.kind, FindingKind::NbdNotEnabled);
        assert!(finding.remedy.contains("`xe network-param-add param-name=purpose param-key=nbd uuid=n-uuid`"));
    }

    #[test]
    fn x23_both_kinds_are_a_finding_and_a_second_kind_is_never_offered() {
        let (nbd, insecure) = (network::Purpose::Nbd, network::Purpose::InsecureNbd);
        assert_eq!(
            check(&[std::slice::from_ref(&nbd), std::slice::from_ref(&insecure)], ClearText::Accept),
            Err(FindingKind::NbdMixed)
        );
        let mixed = [with(&[nbd]), with(&[insecure])];
        let finding = access(mixed.iter(), ClearText::Accept).unwrap_err();
        assert!(!finding.remedy.contains("param-add"), "{finding}");
    }

    #[test]
    fn x28_clear_text_needs_consent() {
        let insecure = [network::Purpose::InsecureNbd];
        assert_eq!(check(&[&insecure], ClearText::Refuse), Err(FindingKind::NbdClearText));
        assert_eq!(check(&[&insecure], ClearText::Accept), Ok(Access::Clear));
        assert_eq!(check(&[&[network::Purpose::Nbd]], ClearText::Accept), Ok(Access::Tls));
    }

    #[test]
    fn x24_ipv6_addresses_come_last_and_odd_records_do_no_harm() {
        let info =
            |address: &str| vdi_nbd_server_info::Record { address: address.into(), port: 10809, ..Default::default() };
        let list = [info("2001:db8::1"), info("nonsense"), info("192.0.2.1")];
        let found = endpoints(&list, Access::Clear).unwrap();
        let addresses: Vec<String> = found.iter().map(|endpoint| endpoint.address.ip().to_string()).collect();
        assert_eq!(addresses, ["192.0.2.1", "2001:db8::1"]);
        assert!(endpoints(&[info("nonsense")], Access::Clear).is_err());
        assert!(endpoints(&[], Access::Clear).unwrap().is_empty());
    }
}
