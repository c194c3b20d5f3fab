//! Reading and writing fixed fields, little-endian, with every length checked.

use crate::{FORMAT_VERSION, FormatError};

/// Length of magic, version and flags, with which every object begins.
pub(crate) const PREAMBLE_BYTES: usize = 12;

/// Appends magic, version and flags.
pub(crate) fn put_preamble(out: &mut Vec<u8>, magic: &[u8; 8]) {
    out.extend_from_slice(magic);
    out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    out.extend_from_slice(&0_u16.to_le_bytes());
}

/// Appends the CRC-32 of everything in `out`.
pub(crate) fn put_crc(out: &mut Vec<u8>) {
    let crc = crc32fast::hash(out);
    out.extend_from_slice(&crc.to_le_bytes());
}

/// Takes fields off the front of foreign bytes.
pub(crate) struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
    total: usize,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes, total: bytes.len() }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            let at = self.total - self.rest.len();
            let wanted = (at as u64).saturating_add(count as u64);
            return Err(FormatError::Truncated { what: self.what, wanted, found: self.total as u64 });
        };
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FormatError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Magic, then version, then flags: in this order, so that a newer object is told by its version and nothing else.
    pub(crate) fn preamble(&mut self, magic: &[u8; 8]) -> Result<(), FormatError> {
        let what = self.what;
        if self.rest.len() >= 8 && !self.rest.starts_with(magic) {
            return Err(FormatError::Magic { what });
        }
        self.take(8)?;
        let found = self.u16()?;
        if found > FORMAT_VERSION {
            return Err(FormatError::NewerVersion { what, found, supported: FORMAT_VERSION });
        }
        match self.u16()? {
            0 => Ok(()),
            flags => Err(FormatError::UnknownFlags { what, flags }),
        }
    }

    /// A count or length that must not pass `limit`, as a `usize`.
    pub(crate) fn limited(&mut self, field: &'static str, limit: usize) -> Result<usize, FormatError> {
        let found = self.u32()?;
        usize::try_from(found).ok().filter(|&length| length <= limit).ok_or(FormatError::Limit {
            what: self.what,
            field,
            found: found.into(),
            limit: limit as u64,
        })
    }

    pub(crate) fn end(&self) -> Result<(), FormatError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(FormatError::TrailingBytes { what: self.what, extra: extra as u64 }),
        }
    }
}

/// Splits off the CRC-32 at the end, and checks it over everything before.
///
/// Magic and version are judged first, so that a foreign or newer object is not called damaged.
pub(crate) fn checked_body<'a>(what: &'static str, magic: &[u8; 8], bytes: &'a [u8]) -> Result<&'a [u8], FormatError> {
    Fields::new(what, bytes).preamble(magic)?;
    let (body, crc) = bytes.split_last_chunk::<4>().ok_or(FormatError::Truncated {
        what,
        wanted: (PREAMBLE_BYTES + 4) as u64,
        found: bytes.len() as u64,
    })?;
    let (found, computed) = (u32::from_le_bytes(*crc), crc32fast::hash(body));
    if found == computed { Ok(body) } else { Err(FormatError::Checksum { what, found, computed }) }
}

/// How records are laid out by `bincode`: fixed-width integers, little-endian, nothing after the end.
pub(crate) fn record_options(limit: u64) -> impl bincode::Options {
    use bincode::Options as _;
    bincode::options().with_fixint_encoding().with_little_endian().with_limit(limit).reject_trailing_bytes()
}
