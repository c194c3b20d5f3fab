//! The plain form of a sealed frame: the bytes of one or more chunks, compressed together where that helps.
//!
//! Small chunks find what is known already; large frames compress well. So chunks that are new and lie near each other
//! share a frame.

use std::cell::RefCell;
use std::io;
use std::ops::Range;

use crate::{ChunkId, ChunkKind, FormatError, Keys};

const WHAT: &str = "frame";
const STORED: u8 = 0;
const ZSTD: u8 = 1;

/// Longest plain chunk, and longest plain content of a frame, in bytes.
pub const MAX_PLAIN_BYTES: usize = 1024 * 1024;

/// Most chunks in one frame.
pub const MAX_FRAME_CHUNKS: usize = 256;

/// Encoding and number of chunks, in front of their lengths and the content.
const PAYLOAD_HEADER_BYTES: usize = 3;

/// Room that is kept in front for the frame's header, so that sealing does not copy.
pub(crate) const FRAME_HEADER_BYTES: usize = 8;

/// Chunks that are ready to be sealed as one frame.
#[derive(Debug)]
pub struct Payload {
    pub(crate) frame: Vec<u8>,
    pub(crate) lengths: Vec<u32>,
}

impl Payload {
    /// Number of chunks in it.
    pub fn chunks(&self) -> usize {
        self.lengths.len()
    }

    /// Length in bytes before sealing.
    pub(crate) fn body_length(&self) -> usize {
        self.frame.len() - FRAME_HEADER_BYTES
    }
}

/// Compresses frames. Holds zstd's working memory (about 1 MiB); one per thread.
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

    /// A compressor with a dictionary: for measuring what one would save. No frame of this format has one, so what it
    /// prepares can not be unpacked.
    ///
    /// # Errors
    /// [`FormatError::Compression`] if the library refuses.
    #[doc(hidden)]
    pub fn with_dictionary(level: i32, dictionary: &[u8]) -> Result<Self, FormatError> {
        let zstd = zstd::bulk::Compressor::with_dictionary(level, dictionary)
            .map_err(|source| FormatError::Compression { what: WHAT, source })?;
        Ok(Self { zstd, scratch: Vec::new() })
    }

    /// Prepares a frame of one chunk.
    ///
    /// # Errors
    /// As [`Self::prepare_all`].
    pub fn prepare(&mut self, plain: &[u8]) -> Result<Payload, FormatError> {
        self.prepare_all(plain, &[plain.len()])
    }

    /// Prepares a frame of chunks that stand one behind the other in `plain` and have these lengths: compressed if that
    /// saves at least a sixteenth, as they are otherwise.
    ///
    /// # Errors
    /// [`FormatError::Limit`] if they are longer than [`MAX_PLAIN_BYTES`] or more than [`MAX_FRAME_CHUNKS`];
    /// [`FormatError::Field`] if the lengths do not add up; [`FormatError::Compression`].
    pub fn prepare_all(&mut self, plain: &[u8], lengths: &[usize]) -> Result<Payload, FormatError> {
        let over = |field, found: usize, limit: usize| {
            Err(FormatError::Limit { what: WHAT, field, found: found as u64, limit: limit as u64 })
        };
        if plain.len() > MAX_PLAIN_BYTES {
            return over("length", plain.len(), MAX_PLAIN_BYTES);
        }
        if lengths.len() > MAX_FRAME_CHUNKS {
            return over("chunks", lengths.len(), MAX_FRAME_CHUNKS);
        }
        let total = lengths.iter().fold(0_usize, |sum, &length| sum.saturating_add(length));
        if lengths.is_empty() || total != plain.len() {
            return Err(FormatError::Field { what: WHAT, field: "lengths", found: total as u64 });
        }
        let lengths: Vec<u32> = lengths.iter().map(|&length| u32::try_from(length).unwrap_or(u32::MAX)).collect();
        self.scratch.clear();
        self.scratch.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        let compressed = self
            .zstd
            .compress_to_buffer(plain, &mut self.scratch)
            .map_err(|source| FormatError::Compression { what: WHAT, source })?;
        let helps = compressed < plain.len() - plain.len() / 16;
        let (encoding, content) = if helps { (ZSTD, self.scratch.as_slice()) } else { (STORED, plain) };
        // With room for the seal's tag, so that sealing does not move it.
        let head = FRAME_HEADER_BYTES + PAYLOAD_HEADER_BYTES + 4 * lengths.len();
        let mut frame = Vec::with_capacity(head + content.len() + 16);
        frame.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
        frame.push(encoding);
        frame.extend_from_slice(&u16::try_from(lengths.len()).unwrap_or(u16::MAX).to_le_bytes());
        lengths.iter().for_each(|length| frame.extend_from_slice(&length.to_le_bytes()));
        frame.extend_from_slice(content);
        Ok(Payload { frame, lengths })
    }
}

/// A frame that was opened and unpacked: the bytes of its chunks.
#[derive(Debug)]
pub struct PlainFrame {
    bytes: Vec<u8>,
    /// Where each chunk ends.
    ends: Vec<usize>,
}

impl PlainFrame {
    /// The bytes of all its chunks.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The same without taking them over.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Length of all its chunks, in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether its chunks are empty.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes of chunk number `part`, after hashing them again.
    ///
    /// # Errors
    /// [`FormatError::Field`] if there is no such chunk; [`FormatError::WrongContent`] if it is another one.
    pub fn chunk(&self, keys: &Keys, kind: ChunkKind, id: &ChunkId, part: u8) -> Result<&[u8], FormatError> {
        let plain = self.bytes.get(self.place(part)?).unwrap_or_default();
        if keys.chunk_id(kind, plain) == *id { Ok(plain) } else { Err(FormatError::WrongContent { id: *id }) }
    }

    /// Where in [`Self::into_bytes`] chunk number `part` is.
    ///
    /// # Errors
    /// [`FormatError::Field`] if there is no such chunk.
    pub fn place(&self, part: u8) -> Result<Range<usize>, FormatError> {
        let end = self.ends.get(usize::from(part));
        let end = end.ok_or(FormatError::Field { what: WHAT, field: "number of the chunk", found: part.into() })?;
        let start = usize::from(part).checked_sub(1).and_then(|before| self.ends.get(before)).copied();
        Ok(start.unwrap_or(0)..*end)
    }
}

/// Unpacks an opened frame.
pub(crate) fn decode(body: &[u8]) -> Result<PlainFrame, FormatError> {
    let mut fields = crate::wire::Fields::new(WHAT, body);
    let encoding = fields.u8()?;
    let count = usize::from(fields.u16()?);
    if count == 0 || count > MAX_FRAME_CHUNKS {
        return Err(FormatError::Field { what: WHAT, field: "chunks", found: count as u64 });
    }
    let (mut ends, mut length) = (Vec::with_capacity(count), 0);
    for _ in 0..count {
        length += fields.limited("length", MAX_PLAIN_BYTES)?;
        ends.push(length);
    }
    if length > MAX_PLAIN_BYTES {
        let (found, limit) = (length as u64, MAX_PLAIN_BYTES as u64);
        return Err(FormatError::Limit { what: WHAT, field: "length", found, limit });
    }
    let content = body.get(PAYLOAD_HEADER_BYTES + 4 * count..).unwrap_or_default();
    let bytes = match encoding {
        STORED => content.to_vec(),
        ZSTD => decompress(content, length).map_err(|source| FormatError::Compression { what: WHAT, source })?,
        other => return Err(FormatError::Field { what: WHAT, field: "encoding", found: other.into() }),
    };
    if bytes.len() != length {
        return Err(FormatError::Truncated { what: WHAT, wanted: length as u64, found: bytes.len() as u64 });
    }
    Ok(PlainFrame { bytes, ends })
}

/// With the working memory of the thread: making it anew costs as much as unpacking a small frame.
fn decompress(content: &[u8], length: usize) -> io::Result<Vec<u8>> {
    thread_local! {
        static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        decompressor.decompress(content, length)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{keys, noise};

    #[test]
    fn only_what_shrinks_is_compressed() {
        let mut compressor = Compressor::new(3).unwrap();
        assert!(compressor.prepare(&[7; 65_536]).unwrap().body_length() < 200);
        assert_eq!(compressor.prepare(&noise(1, 65_536)).unwrap().body_length(), 65_536 + PAYLOAD_HEADER_BYTES + 4);
        assert!(compressor.prepare(&vec![0; MAX_PLAIN_BYTES + 1]).is_err());
    }

    #[test]
    fn lengths_that_do_not_add_up_and_too_many_chunks_are_refused() {
        let mut compressor = Compressor::new(3).unwrap();
        assert!(compressor.prepare_all(&[1; 10], &[4, 5]).is_err());
        assert!(compressor.prepare_all(&[], &[]).is_err());
        assert!(compressor.prepare_all(&[1; 257], &[1; 257]).is_err());
        assert_eq!(compressor.prepare_all(&[1; 256], &[1; 256]).unwrap().chunks(), MAX_FRAME_CHUNKS);
    }

    #[test]
    fn a_length_that_lies_does_not_decide_what_is_allocated() {
        let mut body = vec![ZSTD, 1, 0];
        body.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(decode(&body), Err(FormatError::Limit { .. })));
        let mut body = vec![ZSTD, 200, 0];
        (0..200).for_each(|_| body.extend_from_slice(&(1_u32 << 20).to_le_bytes()));
        assert!(matches!(decode(&body), Err(FormatError::Limit { .. })));
    }

    proptest! {
        #[test]
        fn what_was_prepared_unpacks_to_the_same(chunks in proptest::collection::vec(
            proptest::collection::vec(0_u8..4, 0..900), 1..20,
        )) {
            let lengths: Vec<usize> = chunks.iter().map(Vec::len).collect();
            let payload = Compressor::new(3).unwrap().prepare_all(&chunks.concat(), &lengths).unwrap();
            let frame = decode(&payload.frame[FRAME_HEADER_BYTES..]).unwrap();
            for (part, chunk) in (0_u8..).zip(&chunks) {
                let id = keys().chunk_id(ChunkKind::Data, chunk);
                prop_assert_eq!(frame.chunk(&keys(), ChunkKind::Data, &id, part).unwrap(), &chunk[..]);
                prop_assert!(chunk.is_empty() || frame.chunk(&keys(), ChunkKind::Map, &id, part).is_err());
            }
            prop_assert!(frame.place(u8::try_from(chunks.len()).unwrap()).is_err());
        }

        #[test]
        fn foreign_bytes_do_not_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&body);
        }
    }
}
