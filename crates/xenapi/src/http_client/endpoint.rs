//! Addresses: scheme, host and port.

use crate::error::XenApiError;
use rustls_pki_types::ServerName;
use std::net::IpAddr;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    Https,
    Http,
}

/// A host's API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) scheme: Scheme,
    /// Lower case, IPv6 without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Endpoint {
    /// Reads `https://HOST[:PORT][/]`.
    pub(crate) fn parse(url: &str) -> Result<Self, XenApiError> {
        if url.contains('@') {
            // The text may hold a password, wherever its parts begin and end, so nothing of it is shown.
            return Err(XenApiError::Url { url: "...".to_owned(), reason: "user and password are given apart" });
        }
        let failed = |reason| XenApiError::Url { url: url.to_owned(), reason };
        let (scheme, rest) = if let Some(rest) = url.strip_prefix("https://") {
            (Scheme::Https, rest)
        } else if let Some(rest) = url.strip_prefix("http://") {
            (Scheme::Http, rest)
        } else {
            return Err(failed("it must begin with https:// (or http:// where that was allowed)"));
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        if rest.len() > authority.len() + 1 {
            return Err(failed("nothing but a host and a port is expected"));
        }
        let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
            let (host, port) = rest.split_once(']').ok_or_else(|| failed("the bracket is not closed"))?;
            (host, port.strip_prefix(':'))
        } else {
            match authority.rsplit_once(':') {
                // More than one colon and no brackets: an IPv6 address.
                Some((before, _)) if before.contains(':') => (authority, None),
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            }
        };
        let port = match port {
            Some(port) => port.parse().map_err(|_| failed("the port is not a number up to 65535"))?,
            None if scheme == Scheme::Https => 443,
            None => 80,
        };
        let endpoint = Self { scheme, host: normal(host), port };
        endpoint.server_name().map_err(|_| failed("it names no host"))?;
        Ok(endpoint)
    }

    /// The same scheme and port at another host.
    pub(crate) fn at(&self, host: &str) -> Self {
        Self { host: normal(host), ..self.clone() }
    }

    /// For `Host` and for messages: the port only where it is not the usual one.
    pub(crate) fn display_host(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match (self.scheme, self.port) {
            (Scheme::Https, 443) | (Scheme::Http, 80) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }

    pub(crate) fn server_name(&self) -> Result<ServerName<'static>, XenApiError> {
        match self.host.parse::<IpAddr>() {
            Ok(address) => Ok(ServerName::from(address)),
            Err(_) => ServerName::try_from(self.host.clone())
                .map_err(|_| XenApiError::Url { url: self.host.clone(), reason: "it is not a host name" }),
        }
    }
}

/// How hosts are compared: lower case, no brackets, one spelling for each IP address.
pub(crate) fn normal(host: &str) -> String {
    let host = host.trim().trim_start_matches('[').trim_end_matches(']').to_lowercase();
    match host.parse::<IpAddr>() {
        Ok(address) => address.to_string(),
        Err(_) => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_in_every_form() {
        let parsed = |url: &str| Endpoint::parse(url).map(|e| (e.scheme == Scheme::Https, e.host.clone(), e.port));
        assert_eq!(parsed("https://Pool.Example").unwrap(), (true, "pool.example".into(), 443));
        assert_eq!(parsed("http://127.0.0.1:8080/").unwrap(), (false, "127.0.0.1".into(), 8080));
        assert_eq!(parsed("https://[2001:DB8::1]:4443").unwrap(), (true, "2001:db8::1".into(), 4443));
        assert_eq!(parsed("https://2001:db8::1").unwrap(), (true, "2001:db8::1".into(), 443));
        for url in
            ["pool", "ftp://pool", "https://", "https://pool:x", "https://pool/path", "https://[::1", "https://a b"]
        {
            assert!(parsed(url).is_err(), "{url}");
        }
        for url in
            ["https://root:hunter2@pool", "https://root:x/hunter2@pool", "root:hunter2@pool", "HTTPS://a:hunter2@b"]
        {
            let hidden = Endpoint::parse(url).unwrap_err();
            assert!(!format!("{hidden} {hidden:?}").contains("hunter2"), "{hidden:?}");
        }
    }

    proptest! {
        #[test]
        fn no_address_panics(url in "(https?://)?[ -~]{0,40}") {
            let _ = Endpoint::parse(&url);
        }
    }
}
