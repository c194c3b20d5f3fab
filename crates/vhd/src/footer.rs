//! The footer, 512 bytes big endian, and its copy at the front of a dynamic disk.
//!
//! The geometry is written for readers that want one and never read: it can not express most sizes.

use uuid::Uuid;
use xenvault_block::SECTOR_BYTES;

use crate::VhdError;
use crate::bytes::{array_at, checksum, put, u32_at, u64_at};

pub(crate) const FOOTER_BYTES: usize = 512;

const COOKIE: &[u8; 8] = b"conectix";
const VERSION_1_0: u32 = 0x0001_0000;
/// Bit 1 is reserved and always set.
const FEATURES: u32 = 2;
const CREATOR_VERSION: u32 = 0x0001_0000;
const TYPE_DYNAMIC: u32 = 3;
const TYPE_DIFFERENCING: u32 = 4;

mod at {
    pub(super) const COOKIE: usize = 0;
    pub(super) const FEATURES: usize = 8;
    pub(super) const VERSION: usize = 12;
    pub(super) const DATA_OFFSET: usize = 16;
    pub(super) const TIMESTAMP: usize = 24;
    pub(super) const CREATOR: usize = 28;
    pub(super) const CREATOR_VERSION: usize = 32;
    pub(super) const ORIGINAL_SIZE: usize = 40;
    pub(super) const CURRENT_SIZE: usize = 48;
    pub(super) const GEOMETRY: usize = 56;
    pub(super) const DISK_TYPE: usize = 60;
    pub(super) const CHECKSUM: usize = 64;
    pub(super) const UUID: usize = 68;
}

/// What we use of the footer of a dynamic disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Footer {
    /// Where the header is, in bytes from the start of the file.
    pub(crate) data_offset: u64,
    /// Virtual size in bytes.
    pub(crate) current_size: u64,
    /// Seconds since 2000-01-01 UTC.
    pub(crate) timestamp: u32,
    pub(crate) creator: [u8; 4],
    pub(crate) uuid: Uuid,
}

impl Footer {
    pub(crate) fn decode(bytes: &[u8; FOOTER_BYTES]) -> Result<Self, VhdError> {
        if !bytes.starts_with(COOKIE) {
            return Err(VhdError::NotVhd);
        }
        let (found, computed) = (u32_at(bytes, at::CHECKSUM), checksum(bytes, at::CHECKSUM));
        if found != computed {
            return Err(VhdError::FooterChecksum { found, computed });
        }
        let version = u32_at(bytes, at::VERSION);
        if version != VERSION_1_0 {
            return Err(VhdError::FooterVersion { found: version });
        }
        match u32_at(bytes, at::DISK_TYPE) {
            TYPE_DYNAMIC => {}
            TYPE_DIFFERENCING => return Err(VhdError::Differencing),
            found => return Err(VhdError::DiskType { found }),
        }
        let current_size = u64_at(bytes, at::CURRENT_SIZE);
        if current_size == 0 || !current_size.is_multiple_of(SECTOR_BYTES) {
            return Err(VhdError::VirtualSize { found: current_size });
        }
        Ok(Self {
            data_offset: u64_at(bytes, at::DATA_OFFSET),
            current_size,
            timestamp: u32_at(bytes, at::TIMESTAMP),
            creator: array_at(bytes, at::CREATOR),
            uuid: Uuid::from_bytes(array_at(bytes, at::UUID)),
        })
    }

    pub(crate) fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = [0; FOOTER_BYTES];
        put(&mut bytes, at::COOKIE, COOKIE);
        put(&mut bytes, at::FEATURES, &FEATURES.to_be_bytes());
        put(&mut bytes, at::VERSION, &VERSION_1_0.to_be_bytes());
        put(&mut bytes, at::DATA_OFFSET, &self.data_offset.to_be_bytes());
        put(&mut bytes, at::TIMESTAMP, &self.timestamp.to_be_bytes());
        put(&mut bytes, at::CREATOR, &self.creator);
        put(&mut bytes, at::CREATOR_VERSION, &CREATOR_VERSION.to_be_bytes());
        put(&mut bytes, at::ORIGINAL_SIZE, &self.current_size.to_be_bytes());
        put(&mut bytes, at::CURRENT_SIZE, &self.current_size.to_be_bytes());
        put(&mut bytes, at::GEOMETRY, &geometry(self.current_size));
        put(&mut bytes, at::DISK_TYPE, &TYPE_DYNAMIC.to_be_bytes());
        put(&mut bytes, at::UUID, self.uuid.as_bytes());
        let sum = checksum(&bytes, at::CHECKSUM);
        put(&mut bytes, at::CHECKSUM, &sum.to_be_bytes());
        bytes
    }
}

/// Cylinders (16 bit), heads, sectors per track, by the rule of the specification; never more than the size.
fn geometry(size: u64) -> [u8; 4] {
    const LARGEST: u64 = 65_535 * 16 * 255;
    let sectors = (size / SECTOR_BYTES).min(LARGEST);
    let (per_track, heads) = if sectors >= 65_535 * 16 * 63 {
        (255, 16)
    } else {
        let heads = (sectors / 17).div_ceil(1024).max(4);
        if heads <= 16 && sectors / 17 < heads * 1024 {
            (17, heads)
        } else if sectors / 31 < 16 * 1024 {
            (31, 16)
        } else {
            (63, 16)
        }
    };
    let cylinders = u16::try_from(sectors / per_track / heads).unwrap_or(u16::MAX);
    let [high, low] = cylinders.to_be_bytes();
    let byte = |value: u64| u8::try_from(value).unwrap_or(u8::MAX);
    [high, low, byte(heads), byte(per_track)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Footer {
        Footer {
            data_offset: 512,
            current_size: 0x0080_0000,
            timestamp: 0x0102_0304,
            creator: *b"caml",
            uuid: Uuid::from_bytes([7; 16]),
        }
    }

    #[test]
    fn footer_bytes_are_fixed() {
        let bytes = sample().encode();
        let mut expected = Vec::new();
        expected.extend(b"conectix");
        expected.extend([0, 0, 0, 2, 0, 1, 0, 0]); // features, version
        expected.extend([0, 0, 0, 0, 0, 0, 2, 0]); // header at 512
        expected.extend([1, 2, 3, 4]); // time
        expected.extend(b"caml");
        expected.extend([0, 1, 0, 0, 0, 0, 0, 0]); // creator version, creator's system
        expected.extend([0, 0, 0, 0, 0, 0x80, 0, 0]); // size when made
        expected.extend([0, 0, 0, 0, 0, 0x80, 0, 0]); // size now
        expected.extend([0, 240, 4, 17]); // geometry
        expected.extend([0, 0, 0, 3]); // dynamic
        expected.extend([0xFF, 0xFF, 0xF8, 0x7D]); // checksum
        expected.extend([7; 16]);
        expected.resize(FOOTER_BYTES, 0);
        assert_eq!(bytes[..], expected[..]);
        assert_eq!(Footer::decode(&bytes), Ok(sample()));
    }

    #[test]
    fn a_geometry_never_passes_the_size() {
        for size in [512, 1 << 20, 8 << 20, 500 << 20, 1 << 30, 10 << 30, 127 << 30, 130 << 30, 2040 << 30] {
            let [high, low, heads, per_track] = geometry(size);
            let sectors = u64::from(u16::from_be_bytes([high, low])) * u64::from(heads) * u64::from(per_track);
            assert!(sectors * 512 <= size, "{size}");
            assert!((4..=16).contains(&heads));
        }
        // 8 MiB and 1 GiB as other producers write them.
        assert_eq!(geometry(1 << 30), [0x08, 0x20, 16, 63]);
    }

    #[test]
    fn every_damaged_byte_is_noticed() {
        let good = sample().encode();
        for at in 0..FOOTER_BYTES {
            let mut bad = good;
            bad[at] ^= 0x10;
            assert!(Footer::decode(&bad).is_err(), "byte {at}");
        }
    }
}
