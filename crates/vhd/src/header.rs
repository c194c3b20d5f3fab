//! The header of a dynamic disk, 1024 bytes big endian.

use crate::VhdError;
use crate::bytes::{checksum, put, u32_at, u64_at};

pub(crate) const HEADER_BYTES: usize = 1024;

const COOKIE: &[u8; 8] = b"cxsparse";
const VERSION_1_0: u32 = 0x0001_0000;
/// No block of a producer known to us is larger; bounds what a reader of blocks would allocate.
const MAX_BLOCK_BYTES: u32 = 64 << 20;

mod at {
    pub(super) const COOKIE: usize = 0;
    pub(super) const DATA_OFFSET: usize = 8;
    pub(super) const TABLE_OFFSET: usize = 16;
    pub(super) const VERSION: usize = 24;
    pub(super) const TABLE_ENTRIES: usize = 28;
    pub(super) const BLOCK_BYTES: usize = 32;
    pub(super) const CHECKSUM: usize = 36;
}

/// What we use of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Where the block allocation table is, in bytes from the start of the file.
    pub(crate) table_offset: u64,
    pub(crate) table_entries: u32,
    pub(crate) block_bytes: u32,
}

impl Header {
    /// `offset` is where the bytes came from, for the error.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], offset: u64) -> Result<Self, VhdError> {
        if !bytes.starts_with(COOKIE) {
            return Err(VhdError::HeaderCookie { offset });
        }
        let (found, computed) = (u32_at(bytes, at::CHECKSUM), checksum(bytes, at::CHECKSUM));
        if found != computed {
            return Err(VhdError::HeaderChecksum { found, computed });
        }
        let version = u32_at(bytes, at::VERSION);
        if version != VERSION_1_0 {
            return Err(VhdError::HeaderVersion { found: version });
        }
        let block_bytes = u32_at(bytes, at::BLOCK_BYTES);
        if !block_bytes.is_power_of_two() || !(512..=MAX_BLOCK_BYTES).contains(&block_bytes) {
            return Err(VhdError::BlockSize { found: block_bytes });
        }
        Ok(Self {
            table_offset: u64_at(bytes, at::TABLE_OFFSET),
            table_entries: u32_at(bytes, at::TABLE_ENTRIES),
            block_bytes,
        })
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        put(&mut bytes, at::COOKIE, COOKIE);
        put(&mut bytes, at::DATA_OFFSET, &u64::MAX.to_be_bytes());
        put(&mut bytes, at::TABLE_OFFSET, &self.table_offset.to_be_bytes());
        put(&mut bytes, at::VERSION, &VERSION_1_0.to_be_bytes());
        put(&mut bytes, at::TABLE_ENTRIES, &self.table_entries.to_be_bytes());
        put(&mut bytes, at::BLOCK_BYTES, &self.block_bytes.to_be_bytes());
        let sum = checksum(&bytes, at::CHECKSUM);
        put(&mut bytes, at::CHECKSUM, &sum.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_bytes_are_fixed() {
        let header = Header { table_offset: 2048, table_entries: 4, block_bytes: 2 << 20 };
        let bytes = header.encode();
        let mut expected = Vec::new();
        expected.extend(b"cxsparse");
        expected.extend([0xFF; 8]); // no further structure
        expected.extend([0, 0, 0, 0, 0, 0, 8, 0]); // table at 2048
        expected.extend([0, 1, 0, 0]); // version
        expected.extend([0, 0, 0, 4]); // entries
        expected.extend([0, 0x20, 0, 0]); // 2 MiB
        assert_eq!(bytes[..36], expected);
        assert!(bytes[40..].iter().all(|&byte| byte == 0));
        assert_eq!(Header::decode(&bytes, 512), Ok(header));
    }

    #[test]
    fn every_damaged_byte_is_noticed() {
        let good = Header { table_offset: 2048, table_entries: 4, block_bytes: 2 << 20 }.encode();
        for at in 0..HEADER_BYTES {
            let mut bad = good;
            bad[at] ^= 0x10;
            assert!(Header::decode(&bad, 512).is_err(), "byte {at}");
        }
    }
}
