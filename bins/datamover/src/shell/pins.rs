//! A pool's members as they were learned at the last login, kept in the state folder: with them the next login still
//! works when the coordinator has moved to another host.
//!
//! With a fingerprint, each member's certificate is kept; the operator's fingerprint stays the root of trust: pins that
//! contradict it are not used. With an authority, only addresses are kept, which are no trust.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use xenvault_xenapi::{KnownPool, PinnedHosts, Sha256Fingerprint};

/// The file for the pool at `url`: one for each host and port, whatever characters a name has.
fn file(state: &Path, url: &str) -> PathBuf {
    let (host, port) = authority(url);
    let mut name = String::new();
    for byte in host.bytes() {
        match byte {
            b'.' | b'-' => name.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => name.push(char::from(byte.to_ascii_lowercase())),
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    if let Some(port) = port.filter(|&port| port != "443") {
        name.push('_');
        name.extend(port.chars().filter(char::is_ascii_digit));
    }
    state.join("pins").join(name + ".json")
}

/// The host in an address, without scheme, port and path.
fn host(url: &str) -> &str {
    authority(url).0
}

/// Host and port of an address.
fn authority(url: &str) -> (&str, Option<&str>) {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = authority.split('/').next().unwrap_or(authority);
    if let Some((address, rest)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (address, rest.strip_prefix(':'));
    }
    match authority.split_once(':') {
        // An IPv6 address without brackets has no port.
        Some((_, rest)) if rest.contains(':') => (authority, None),
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    }
}

/// The pins of the pool at `url`, if they were learned under the certificate that the operator confirms now.
pub fn load(state: &Path, url: &str, confirmed: Sha256Fingerprint) -> Option<PinnedHosts> {
    let pins = remembered(state, url)?;
    (pins.hosts.get(host(url)) == Some(&confirmed)).then_some(pins)
}

/// What is remembered of the pool at `url`, under whatever certificate it was learned: no trust by itself.
pub fn remembered(state: &Path, url: &str) -> Option<PinnedHosts> {
    decode(&std::fs::read_to_string(file(state, url)).ok()?)
}

/// Keeps what was learned. That this fails is no reason to fail: it is learned again next time.
pub fn save(state: &Path, url: &str, confirmed: Sha256Fingerprint, learned: PinnedHosts) {
    let mut pins = learned;
    pins.hosts.insert(host(url).to_owned(), confirmed);
    keep(&file(state, url), &encode(&pins));
}

/// Where the members of the pool at `url` were, for trust in an authority.
pub fn load_known(state: &Path, url: &str) -> Option<KnownPool> {
    let text = std::fs::read_to_string(known_file(state, url)).ok()?;
    let value: serde_json::Value = serde_json::from_str(&text).ok()?;
    let pool_uuid = value.get("pool_uuid")?.as_str().map(str::to_owned);
    let addresses = value.get("addresses")?.as_array()?.iter();
    Some(KnownPool { pool_uuid, addresses: addresses.filter_map(|text| text.as_str().map(str::to_owned)).collect() })
}

/// Keeps where the members are.
pub fn save_known(state: &Path, url: &str, known: &KnownPool) {
    let value = serde_json::json!({ "pool_uuid": known.pool_uuid, "addresses": known.addresses });
    keep(&known_file(state, url), &value.to_string());
}

fn known_file(state: &Path, url: &str) -> PathBuf {
    file(state, url).with_extension("members.json")
}

/// That this fails is no reason to fail.
fn keep(path: &Path, text: &str) {
    let temporary = path.with_extension("new");
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&temporary, text))
        .and_then(|()| std::fs::rename(&temporary, path));
    if let Err(error) = written {
        tracing::warn!(%error, path = %path.display(), "the pool's members could not be kept");
    }
}

fn encode(pins: &PinnedHosts) -> String {
    let hosts: BTreeMap<&str, String> =
        pins.hosts.iter().map(|(host, fingerprint)| (host.as_str(), fingerprint.to_string())).collect();
    serde_json::json!({ "pool_uuid": pins.pool_uuid, "hosts": hosts }).to_string()
}

fn decode(text: &str) -> Option<PinnedHosts> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let pool_uuid = value.get("pool_uuid")?.as_str().map(str::to_owned);
    let mut hosts = BTreeMap::new();
    for (host, fingerprint) in value.get("hosts")?.as_object()? {
        hosts.insert(host.clone(), fingerprint.as_str()?.parse().ok()?);
    }
    Some(PinnedHosts { pool_uuid, hosts })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_an_address() {
        for (url, expected) in [
            ("https://a.example:443/x", "a.example"),
            ("192.0.2.1", "192.0.2.1"),
            ("https://[2001:db8::1]:443", "2001:db8::1"),
            ("2001:db8::1", "2001:db8::1"),
        ] {
            assert_eq!(host(url), expected);
        }
    }

    #[test]
    fn every_host_and_port_has_a_file_of_its_own() {
        let state = Path::new("state");
        let different = [
            "https://gw:8443",
            "https://gw:9443",
            "https://gw",
            "https://a-b",
            "https://a.b",
            "https://a_b",
            "2001:db8::1",
            "https://[2001:db8::2]:8443",
            "https://[2001:db8::2]",
        ];
        let files: std::collections::BTreeSet<_> = different.iter().map(|url| file(state, url)).collect();
        assert_eq!(files.len(), different.len(), "{files:?}");
        assert_eq!(file(state, "https://GW:443/x"), file(state, "gw"));
        assert_eq!(file(state, "https://[2001:db8::1]"), file(state, "2001:db8::1"));
        assert!(file(state, "https://../../x").starts_with("state/pins"));
    }

    #[test]
    fn pins_count_only_under_the_confirmed_certificate() {
        let state = tempfile::tempdir().unwrap();
        let [first, second] = [Sha256Fingerprint::of(b"one"), Sha256Fingerprint::of(b"two")];
        let url = "https://192.0.2.1";
        assert_eq!(load(state.path(), url, first), None);
        let learned =
            PinnedHosts { pool_uuid: Some("a pool".to_owned()), hosts: [("192.0.2.2".to_owned(), second)].into() };
        save(state.path(), url, first, learned.clone());
        let loaded = load(state.path(), url, first).unwrap();
        assert_eq!(loaded.pool_uuid, learned.pool_uuid);
        assert_eq!(loaded.hosts.get("192.0.2.2"), Some(&second));
        assert_eq!(load(state.path(), url, second), None);

        assert_eq!(remembered(state.path(), url).unwrap().hosts.len(), 2);
        std::fs::write(file(state.path(), url), "not what we wrote").unwrap();
        assert_eq!(load(state.path(), url, first), None);
        assert_eq!(remembered(state.path(), url), None);
    }

    #[test]
    fn addresses_are_kept_apart_from_certificates() {
        let state = tempfile::tempdir().unwrap();
        let url = "https://pool.example";
        assert_eq!(load_known(state.path(), url), None);
        let known = KnownPool { pool_uuid: Some("a pool".into()), addresses: vec!["192.0.2.2".into()] };
        save_known(state.path(), url, &known);
        assert_eq!(load_known(state.path(), url), Some(known));
        assert_eq!(load(state.path(), url, Sha256Fingerprint::of(b"x")), None);
        std::fs::write(known_file(state.path(), url), "{}").unwrap();
        assert_eq!(load_known(state.path(), url), None);
    }
}
