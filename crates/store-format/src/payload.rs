//! The plain form of a sealed chunk: its bytes, compressed where that helps.

use std::io;

use crate::{ChunkId, ChunkKind, FormatError, Keys};

const WHAT: &str = "chunk";
const STORED: u8 = 0;
const ZSTD: u8 = 1;

/// Longest plain chunk that is written or read, in bytes.
pub const MAX_PLAIN_BYTES: usize = 1024 * 1024;

/// Encoding and plain length, in front of the content.
pub(crate) const PAYLOAD_HEADER_BYTES: usize = 5;

/// Room that is kept in front for the frame's header, so that sealing does not copy.
pub(crate) const FRAME_HEADER_BYTES: usize = 8;

/// A chunk that is ready to be sealed.
#[derive(Debug)]
pub struct Payload {
    pub(crate) frame: Vec<u8>,
    plain_length: u32,
}

impl Payload {
    /// Length of the plain chunk in bytes.
    pub fn plain_length(&self) -> u32 {
        self.plain_length
    }

    /// Length in bytes before sealing.
    pub(crate) fn body_length(&self) -> usize {
        self.frame.len() - FRAME_HEADER_BYTES
    }
}

/// Compresses chunks. Holds zstd's working memory (about 1 MiB); one per thread.
pub struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl Compressor {
    /// A compressor of the given zstd level.
    ///
    /// # Errors
    /// [`FormatError::Compression`] if the library refuses.
    pub fn new(level: i32) -> Result<Self, FormatError> {
        let zstd =
            zstd::bulk::Compressor::new(level).map_err(|source| FormatError::Compression { what: WHAT, source })?;
        Ok(Self { zstd, scratch: Vec::new() })
    }

    /// Prepares a chunk: compressed if that saves at least a sixteenth, as it is otherwise.
    ///
    /// # Errors
    /// [`FormatError::Limit`] if it is longer than [`MAX_PLAIN_BYTES`]; [`FormatError::Compression`].
    pub fn prepare(&mut self, plain: &[u8]) -> Result<Payload, FormatError> {
        let too_long = || FormatError::Limit {
            what: WHAT,
            field: "length",
            found: plain.len() as u64,
            limit: MAX_PLAIN_BYTES as u64,
        };
        if plain.len() > MAX_PLAIN_BYTES {
            return Err(too_long());
        }
        let plain_length = u32::try_from(plain.len()).map_err(|_| too_long())?;
        self.scratch.clear();
        self.scratch.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        let compressed = self
            .zstd
            .compress_to_buffer(plain, &mut self.scratch)
            .map_err(|source| FormatError::Compression { what: WHAT, source })?;
        let helps = compressed < plain.len() - plain.len() / 16;
        let (encoding, content) = if helps { (ZSTD, self.scratch.as_slice()) } else { (STORED, plain) };
        // With room for the seal's tag, so that sealing does not move it.
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + PAYLOAD_HEADER_BYTES + content.len() + 16);
        frame.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
        frame.push(encoding);
        frame.extend_from_slice(&plain_length.to_le_bytes());
        frame.extend_from_slice(content);
        Ok(Payload { frame, plain_length })
    }
}

/// Unpacks an opened frame and checks that it is the chunk that was asked for.
pub(crate) fn unpack(keys: &Keys, kind: ChunkKind, id: &ChunkId, body: &[u8]) -> Result<Vec<u8>, FormatError> {
    let plain = decode(body)?;
    if keys.chunk_id(kind, &plain) == *id { Ok(plain) } else { Err(FormatError::WrongContent { id: *id }) }
}

pub(crate) fn decode(body: &[u8]) -> Result<Vec<u8>, FormatError> {
    let mut fields = crate::wire::Fields::new(WHAT, body);
    let encoding = fields.u8()?;
    let length = fields.limited("length", MAX_PLAIN_BYTES)?;
    let content = body.get(PAYLOAD_HEADER_BYTES..).unwrap_or_default();
    let wrong_length = |found: usize| FormatError::Truncated { what: WHAT, wanted: length as u64, found: found as u64 };
    let plain = match encoding {
        STORED => content.to_vec(),
        ZSTD => zstd::bulk::decompress(content, length)
            .map_err(|source: io::Error| FormatError::Compression { what: WHAT, source })?,
        other => return Err(FormatError::Field { what: WHAT, field: "encoding", found: other.into() }),
    };
    if plain.len() == length { Ok(plain) } else { Err(wrong_length(plain.len())) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::noise;

    #[test]
    fn only_what_shrinks_is_compressed() {
        let mut compressor = Compressor::new(3).unwrap();
        assert!(compressor.prepare(&[7; 65_536]).unwrap().body_length() < 200);
        assert_eq!(compressor.prepare(&noise(1, 65_536)).unwrap().body_length(), 65_536 + PAYLOAD_HEADER_BYTES);
        assert!(compressor.prepare(&vec![0; MAX_PLAIN_BYTES + 1]).is_err());
    }

    #[test]
    fn a_length_that_lies_does_not_decide_what_is_allocated() {
        let mut body = vec![ZSTD];
        body.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(decode(&body), Err(FormatError::Limit { .. })));
    }

    proptest! {
        #[test]
        fn what_was_prepared_unpacks_to_the_same(data in proptest::collection::vec(0_u8..4, 0..9000)) {
            let payload = Compressor::new(3).unwrap().prepare(&data).unwrap();
            prop_assert_eq!(decode(&payload.frame[FRAME_HEADER_BYTES..]).unwrap(), data);
        }

        #[test]
        fn foreign_bytes_do_not_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&body);
        }
    }
}
