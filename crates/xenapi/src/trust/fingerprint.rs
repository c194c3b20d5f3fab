//! Fingerprints of certificates, and the set of them that belongs to a pool.

use crate::error::XenApiError;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The SHA-256 of a certificate's DER form.
///
/// Written as 64 lower-case hexadecimal digits; read with or without colons and blanks, in either case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Fingerprint([u8; 32]);

impl Sha256Fingerprint {
    /// Of these DER bytes.
    pub fn of(der: &[u8]) -> Self {
        let mut bytes = [0; 32];
        for (to, from) in bytes.iter_mut().zip(ring::digest::digest(&ring::digest::SHA256, der).as_ref()) {
            *to = *from;
        }
        Self(bytes)
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Sha256Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Sha256Fingerprint {
    type Err = XenApiError;

    fn from_str(text: &str) -> Result<Self, XenApiError> {
        let invalid = || XenApiError::Trust {
            what: format!("`{text}`"),
            reason: "a SHA-256 fingerprint has 64 hexadecimal digits, with or without colons".to_owned(),
        };
        let digits: Vec<u32> = text
            .chars()
            .filter(|c| *c != ':' && !c.is_whitespace())
            .map(|c| c.to_digit(16).ok_or_else(invalid))
            .collect::<Result<_, _>>()?;
        if digits.len() != 64 {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let value = pair.iter().fold(0, |value, digit| value * 16 + digit);
            *byte = u8::try_from(value).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

/// The certificates of a pool's hosts that were confirmed or learned, to be kept between runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PinnedHosts {
    /// The pool that they belong to, if it is known.
    pub pool_uuid: Option<String>,
    /// Fingerprint by address (as in `host.address`, or the host in the address that was given), in lower case.
    pub hosts: BTreeMap<String, Sha256Fingerprint>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_in_every_usual_form() {
        let plain = Sha256Fingerprint::of(b"");
        assert_eq!(plain.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let spelled = plain.to_string().to_uppercase();
        let colons: Vec<String> =
            spelled.as_bytes().chunks(2).map(|pair| String::from_utf8(pair.to_vec()).unwrap()).collect();
        assert_eq!(colons.join(":").parse::<Sha256Fingerprint>().unwrap(), plain);
        assert_eq!(format!(" {spelled}\n").parse::<Sha256Fingerprint>().unwrap(), plain);
        for text in ["", "e3b0", &format!("{plain}00"), &format!("{}zz", &plain.to_string()[2..])] {
            assert!(text.parse::<Sha256Fingerprint>().is_err(), "{text}");
        }
    }
}
