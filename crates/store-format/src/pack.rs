//! Packs: sealed frames of chunks one after the other, and a sealed directory at the end.
//!
//! ```text
//! header | frame 0 | frame 1 | ... | directory frame | copy of the header | trailer
//! frame: length u32, CRC-32 u32, sealed bytes
//! ```
//! The CRC-32 finds damage without the key. Every pack has its own keys, from its own random salt: one for its frames,
//! which takes what its class asks for, and one for its directory, which every writer has. The nonce of a frame is its
//! number, the directory's is the number of chunks.

use ring::aead::{Aad, LessSafeKey};

use crate::keys::frame_nonce;
use crate::payload::{FRAME_HEADER_BYTES, PlainFrame, decode};
use crate::wire::{Fields, PREAMBLE_BYTES, put_crc, put_preamble};
use crate::{
    ChunkId, ChunkKind, FORMAT_VERSION, FormatError, Keys, PackClass, PackId, PackSalt, Payload, RepositoryId,
};

const MAGIC: &[u8; 8] = b"XVLTPACK";
const END_MAGIC: &[u8; 8] = b"XVLTPEND";
const DIRECTORY_PURPOSE: &str = "pack directory";
const DIRECTORY_KIND: u8 = 255;
const TAG_BYTES: usize = 16;
const ENTRY_BYTES: usize = 45;

/// Length of a pack's header.
pub const PACK_HEADER_BYTES: usize = PREAMBLE_BYTES + 16 + 32 + 4;
/// Length of a pack's trailer.
pub const PACK_TRAILER_BYTES: usize = 24;
/// Length of what ends a pack: a copy of its header, since without the salt nothing in it can be opened, and the trailer.
pub const PACK_END_BYTES: usize = PACK_HEADER_BYTES + PACK_TRAILER_BYTES;
/// Largest pack.
pub const MAX_PACK_BYTES: usize = 32 * 1024 * 1024;
/// Most chunks in a pack.
pub const MAX_PACK_CHUNKS: usize = 65_535;
/// What a frame adds to a payload, in bytes.
pub const FRAME_OVERHEAD_BYTES: usize = FRAME_HEADER_BYTES + TAG_BYTES;

/// Where a chunk lies within its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Placement {
    /// Offset of the frame in bytes.
    pub offset: u32,
    /// Length of the whole frame in bytes.
    pub length: u32,
    /// Number of the frame, which is its nonce.
    pub frame: u16,
    /// Number of the chunk among those of the frame.
    pub part: u8,
}

/// One line of a pack's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// The chunk.
    pub id: ChunkId,
    /// What it holds.
    pub kind: ChunkKind,
    /// Where it lies.
    pub placement: Placement,
    /// Length of the plain chunk in bytes.
    pub plain_length: u32,
}

/// Builds one pack.
#[derive(Debug)]
pub struct PackEncoder {
    repository: RepositoryId,
    id: PackId,
    salt: PackSalt,
    class: PackClass,
    key: LessSafeKey,
    directory: DirectoryKey,
    offset: usize,
    frames: u16,
    entries: Vec<DirectoryEntry>,
}

impl PackEncoder {
    /// Begins a pack with a salt of its own; also returns its header, the first bytes of the object.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`].
    pub fn new(keys: &Keys, class: PackClass) -> Result<(Self, Vec<u8>), FormatError> {
        let (salt, key) = keys.new_pack(class)?;
        Self::with(keys, salt, key)
    }

    fn with(keys: &Keys, salt: PackSalt, key: LessSafeKey) -> Result<(Self, Vec<u8>), FormatError> {
        let repository = keys.repository();
        let header = PackHeader { repository, salt }.encode();
        let (id, class, directory) = (salt.pack_id(), salt.sealing().class(), DirectoryKey::derive(keys, &salt)?);
        let (offset, entries) = (header.len(), Vec::new());
        Ok((Self { repository, id, salt, class, key, directory, offset, frames: 0, entries }, header))
    }

    /// Name of the pack.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// Salt of the pack.
    pub fn salt(&self) -> PackSalt {
        self.salt
    }

    /// What was appended so far.
    pub fn entries(&self) -> &[DirectoryEntry] {
        &self.entries
    }

    /// Length of the object if it ended now, in bytes.
    pub fn final_length(&self) -> usize {
        self.offset + FRAME_OVERHEAD_BYTES + 4 + self.entries.len() * ENTRY_BYTES + PACK_END_BYTES
    }

    /// Whether these chunks still fit.
    pub fn has_room_for(&self, payload: &Payload) -> bool {
        let entries = payload.chunks() * ENTRY_BYTES;
        self.entries.len() + payload.chunks() <= MAX_PACK_CHUNKS
            && self.final_length() + payload.body_length() + FRAME_OVERHEAD_BYTES + entries <= MAX_PACK_BYTES
    }

    /// Seals chunks of one kind as one frame, in the order in which they were prepared; returns the frame, the next
    /// bytes of the object.
    ///
    /// # Errors
    /// [`FormatError::PackFull`] if they do not fit (the pack is unchanged); [`FormatError::Field`] if there are not as
    /// many ids as chunks, or they are of another class than the pack; [`FormatError::Cryptography`].
    pub fn append(&mut self, ids: &[ChunkId], kind: ChunkKind, payload: Payload) -> Result<Vec<u8>, FormatError> {
        if ids.len() != payload.chunks() {
            return Err(FormatError::Field { what: "pack", field: "number of ids", found: ids.len() as u64 });
        }
        if kind.class() != self.class {
            return Err(FormatError::Field { what: "pack", field: "kind of chunk", found: kind.code().into() });
        }
        if !self.has_room_for(&payload) {
            return Err(FormatError::PackFull);
        }
        let frame = seal_frame(&self.key, self.frames.into(), &aad(&[], kind.code()), payload.frame)?;
        let offset = u32::try_from(self.offset).map_err(|_| FormatError::PackFull)?;
        let length = u32::try_from(frame.len()).map_err(|_| FormatError::PackFull)?;
        for (part, (id, plain_length)) in (0..=u8::MAX).zip(ids.iter().zip(payload.lengths)) {
            let placement = Placement { offset, length, frame: self.frames, part };
            self.entries.push(DirectoryEntry { id: *id, kind, placement, plain_length });
        }
        self.frames += 1;
        self.offset += frame.len();
        Ok(frame)
    }

    /// Ends the pack; returns its directory and trailer, the last bytes of the object, and what it holds.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`].
    pub fn finish(self) -> Result<(Vec<u8>, Vec<DirectoryEntry>), FormatError> {
        let full = |_| FormatError::PackFull;
        let count = u32::try_from(self.entries.len()).map_err(full)?;
        let mut body = vec![0; FRAME_HEADER_BYTES];
        body.reserve(4 + self.entries.len() * ENTRY_BYTES + TAG_BYTES + PACK_END_BYTES);
        body.extend_from_slice(&count.to_le_bytes());
        for entry in &self.entries {
            body.extend_from_slice(entry.id.as_bytes());
            body.push(entry.kind.code());
            for number in [entry.placement.offset, entry.placement.length, entry.plain_length] {
                body.extend_from_slice(&number.to_le_bytes());
            }
        }
        let mut out = seal_frame(&self.directory.key, count, &directory_aad(&self.id), body)?;
        let trailer = PackTrailer {
            directory_offset: u32::try_from(self.offset).map_err(full)?,
            directory_length: u32::try_from(out.len()).map_err(full)?,
            frames: count,
        };
        out.extend_from_slice(&PackHeader { repository: self.repository, salt: self.salt }.encode());
        out.extend_from_slice(&trailer.encode());
        Ok((out, self.entries))
    }
}

/// The first bytes of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackHeader {
    /// The repository that it belongs to.
    pub repository: RepositoryId,
    /// The pack's salt.
    pub salt: PackSalt,
}

impl PackHeader {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PACK_HEADER_BYTES);
        put_preamble(&mut out, MAGIC);
        out.extend_from_slice(self.repository.as_bytes());
        out.extend_from_slice(&self.salt.0);
        put_crc(&mut out);
        out
    }

    /// Reads the first [`PACK_HEADER_BYTES`] of a pack.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "pack header";
        let mut fields = Fields::new(WHAT, crate::wire::checked_body(WHAT, MAGIC, bytes)?);
        fields.preamble(MAGIC)?;
        let header = Self { repository: RepositoryId::from_bytes(fields.array()?), salt: PackSalt(fields.array()?) };
        fields.end()?;
        Ok(header)
    }
}

/// The last bytes of a pack: where its directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackTrailer {
    /// Offset of the directory's frame in bytes.
    pub directory_offset: u32,
    /// Length of the directory's frame in bytes.
    pub directory_length: u32,
    /// Chunks in the pack, which is also the number of the directory's frame.
    pub frames: u32,
}

impl PackTrailer {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PACK_TRAILER_BYTES);
        for number in [self.directory_offset, self.directory_length, self.frames] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        put_crc(&mut out);
        out.extend_from_slice(END_MAGIC);
        out
    }

    /// Reads the last [`PACK_TRAILER_BYTES`] of a pack that is `pack_length` bytes long.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes, lengths that do not add up included.
    pub fn decode(bytes: &[u8], pack_length: u64) -> Result<Self, FormatError> {
        const WHAT: &str = "pack trailer";
        let mut fields = Fields::new(WHAT, bytes);
        let body = fields.take(12)?;
        let (found, computed) = (fields.u32()?, crc32fast::hash(body));
        if fields.take(8)? != END_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        fields.end()?;
        if found != computed {
            return Err(FormatError::Checksum { what: WHAT, found, computed });
        }
        let mut fields = Fields::new(WHAT, body);
        let trailer = Self { directory_offset: fields.u32()?, directory_length: fields.u32()?, frames: fields.u32()? };
        if trailer.frames as usize > MAX_PACK_CHUNKS {
            let (found, limit) = (trailer.frames.into(), MAX_PACK_CHUNKS as u64);
            return Err(FormatError::Limit { what: WHAT, field: "frames", found, limit });
        }
        let expected = FRAME_OVERHEAD_BYTES as u64 + 4 + u64::from(trailer.frames) * ENTRY_BYTES as u64;
        if u64::from(trailer.directory_length) != expected {
            return Err(FormatError::Field {
                what: WHAT,
                field: "directory length",
                found: trailer.directory_length.into(),
            });
        }
        let end = u64::from(trailer.directory_offset) + expected + PACK_END_BYTES as u64;
        if end != pack_length || pack_length > MAX_PACK_BYTES as u64 {
            return Err(FormatError::Field { what: WHAT, field: "length of the pack", found: pack_length });
        }
        Ok(trailer)
    }
}

/// Opens the frames of one pack.
#[derive(Clone, Debug)]
pub struct PackKey {
    class: PackClass,
    key: LessSafeKey,
}

impl PackKey {
    /// The key of the pack with this salt.
    ///
    /// # Errors
    /// [`FormatError::WriteOnly`] if these keys do not open its frames; [`FormatError::Authentication`] if the salt of a
    /// wrapped pack is no public key; [`FormatError::Cryptography`].
    pub fn derive(keys: &Keys, salt: &PackSalt) -> Result<Self, FormatError> {
        Ok(Self { class: salt.sealing().class(), key: keys.frames_key(salt)? })
    }

    /// Opens a frame: checksum, seal, compression. The chunks in it are yet to be hashed.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes.
    pub fn open(&self, kind: ChunkKind, number: u16, frame: Vec<u8>) -> Result<PlainFrame, FormatError> {
        let mut frame = frame;
        self.open_in_place(kind, number, &mut frame)
    }

    /// As [`Self::open`], of a frame in memory that may be overwritten.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_in_place(&self, kind: ChunkKind, number: u16, frame: &mut [u8]) -> Result<PlainFrame, FormatError> {
        const WHAT: &str = "frame";
        if kind.class() != self.class {
            return Err(FormatError::Authentication { what: WHAT });
        }
        decode(open_frame(WHAT, &self.key, number.into(), &aad(&[], kind.code()), frame)?)
    }
}

/// Opens the directory of one pack. Every key of the repository gives it, those that can not read the frames too.
#[derive(Clone, Debug)]
pub struct DirectoryKey {
    id: PackId,
    class: PackClass,
    key: LessSafeKey,
}

impl DirectoryKey {
    /// The key of the directory of the pack with this salt.
    ///
    /// # Errors
    /// [`FormatError::Cryptography`].
    pub fn derive(keys: &Keys, salt: &PackSalt) -> Result<Self, FormatError> {
        let key = keys.sealing_key(&salt.0, DIRECTORY_PURPOSE)?;
        Ok(Self { id: salt.pack_id(), class: salt.sealing().class(), key })
    }

    /// Opens the directory's frame.
    ///
    /// # Errors
    /// Everything that is wrong with the bytes.
    pub fn open_directory(&self, trailer: &PackTrailer, frame: Vec<u8>) -> Result<Vec<DirectoryEntry>, FormatError> {
        const WHAT: &str = "pack directory";
        let mut frame = frame;
        let body = open_frame(WHAT, &self.key, trailer.frames, &directory_aad(&self.id), &mut frame)?;
        let entries = decode_directory(body)?;
        match entries.iter().find(|entry| entry.kind.class() != self.class) {
            Some(entry) => Err(FormatError::Field { what: WHAT, field: "kind", found: entry.kind.code().into() }),
            None => Ok(entries),
        }
    }
}

/// Reads an opened directory.
pub(crate) fn decode_directory(body: &[u8]) -> Result<Vec<DirectoryEntry>, FormatError> {
    const WHAT: &str = "pack directory";
    let mut fields = Fields::new(WHAT, body);
    let count = fields.limited("chunks", MAX_PACK_CHUNKS)?;
    let mut entries: Vec<DirectoryEntry> = Vec::new();
    for _ in 0..count {
        let id = ChunkId::from_bytes(fields.array()?);
        let code = fields.u8()?;
        let kind =
            ChunkKind::from_code(code).ok_or(FormatError::Field { what: WHAT, field: "kind", found: code.into() })?;
        let (offset, length, plain_length) = (fields.u32()?, fields.u32()?, fields.u32()?);
        // Chunks of one frame stand together, and every frame has an offset of its own.
        let (frame, part) = match entries.last().map(|last| (last.kind, last.placement)) {
            None => (0, Some(0)),
            Some((_, last)) if last.offset != offset => (last.frame + 1, Some(0)),
            Some((before, last)) if before == kind && last.length == length => (last.frame, last.part.checked_add(1)),
            Some(_) => (0, None),
        };
        let part = part.ok_or(FormatError::Field { what: WHAT, field: "chunk of a frame", found: offset.into() })?;
        entries.push(DirectoryEntry { id, kind, placement: Placement { offset, length, frame, part }, plain_length });
    }
    fields.end()?;
    Ok(entries)
}

fn directory_aad(id: &PackId) -> Vec<u8> {
    aad(id.as_bytes(), DIRECTORY_KIND)
}

fn aad(name: &[u8], kind: u8) -> Vec<u8> {
    let mut aad = name.to_vec();
    aad.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    aad.push(kind);
    aad
}

/// Seals what stands after the room for the frame's header, and fills the header.
fn seal_frame(key: &LessSafeKey, counter: u32, aad: &[u8], mut frame: Vec<u8>) -> Result<Vec<u8>, FormatError> {
    let body = frame.get_mut(FRAME_HEADER_BYTES..).ok_or(FormatError::Cryptography)?;
    let tag = key
        .seal_in_place_separate_tag(frame_nonce(counter), Aad::from(aad), body)
        .map_err(|_| FormatError::Cryptography)?;
    frame.extend_from_slice(tag.as_ref());
    let length = u32::try_from(frame.len() - FRAME_HEADER_BYTES).map_err(|_| FormatError::PackFull)?.to_le_bytes();
    let crc = frame_crc(length, frame.get(FRAME_HEADER_BYTES..).unwrap_or_default()).to_le_bytes();
    frame.iter_mut().zip(length.into_iter().chain(crc)).for_each(|(to, from)| *to = from);
    Ok(frame)
}

fn open_frame<'a>(
    what: &'static str,
    key: &LessSafeKey,
    counter: u32,
    aad: &[u8],
    frame: &'a mut [u8],
) -> Result<&'a [u8], FormatError> {
    let total = frame.len();
    let mut fields = Fields::new(what, frame);
    let length = fields.array::<4>()?;
    let found = fields.u32()?;
    let wanted = u64::from(u32::from_le_bytes(length)) + FRAME_HEADER_BYTES as u64;
    if wanted != total as u64 {
        return Err(FormatError::Truncated { what, wanted, found: total as u64 });
    }
    let sealed = frame.get_mut(FRAME_HEADER_BYTES..).unwrap_or_default();
    let computed = frame_crc(length, sealed);
    if found != computed {
        return Err(FormatError::Checksum { what, found, computed });
    }
    let opened = key.open_in_place(frame_nonce(counter), Aad::from(aad), sealed);
    opened.map(|body| &*body).map_err(|_| FormatError::Authentication { what })
}

fn frame_crc(length: [u8; 4], sealed: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&length);
    crc.update(sealed);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Compressor;
    use crate::testing::{each_flip, golden, keys, noise};

    /// A salt with this last byte, which says how the pack is sealed.
    fn salt(last: u8) -> PackSalt {
        let mut bytes = [5; 32];
        bytes[31] = last;
        PackSalt::from_bytes(bytes)
    }

    const CONTENT: u8 = 0x85;
    const STRUCTURE: u8 = 0xc5;
    const WRAPPED: u8 = 0x05;

    fn pack(frames: &[(ChunkKind, Vec<Vec<u8>>)]) -> (Vec<u8>, Vec<DirectoryEntry>) {
        pack_with(CONTENT, frames)
    }

    fn pack_with(last: u8, frames: &[(ChunkKind, Vec<Vec<u8>>)]) -> (Vec<u8>, Vec<DirectoryEntry>) {
        // Whoever can read finds the key by any salt; a writer could not choose one.
        let key = keys().frames_key(&salt(last)).unwrap();
        let (mut encoder, mut bytes) = PackEncoder::with(&keys(), salt(last), key).unwrap();
        for (kind, chunks) in frames {
            let lengths: Vec<usize> = chunks.iter().map(Vec::len).collect();
            let ids: Vec<ChunkId> = chunks.iter().map(|plain| keys().chunk_id(*kind, plain)).collect();
            let payload = Compressor::new(3).unwrap().prepare_all(&chunks.concat(), &lengths).unwrap();
            bytes.extend(encoder.append(&ids, *kind, payload).unwrap());
        }
        let expected = encoder.final_length();
        let (end, entries) = encoder.finish().unwrap();
        bytes.extend(end);
        assert_eq!(bytes.len(), expected);
        (bytes, entries)
    }

    fn open_all(bytes: &[u8]) -> Result<Vec<(DirectoryEntry, Vec<u8>)>, FormatError> {
        let header = PackHeader::decode(bytes.get(..PACK_HEADER_BYTES).unwrap_or(bytes))?;
        let split = bytes.len() - PACK_TRAILER_BYTES;
        // Whoever checks a pack holds the two copies against each other.
        let copy = PackHeader::decode(&bytes[split - PACK_HEADER_BYTES..split])?;
        if copy != header {
            return Err(FormatError::Authentication { what: "pack header" });
        }
        let trailer = PackTrailer::decode(&bytes[split..], bytes.len() as u64)?;
        let key = PackKey::derive(&keys(), &header.salt)?;
        let directory = DirectoryKey::derive(&keys(), &header.salt)?;
        let directory = directory
            .open_directory(&trailer, bytes[trailer.directory_offset as usize..split - PACK_HEADER_BYTES].to_vec())?;
        let open = |entry: DirectoryEntry| {
            let Placement { offset, length, frame, part } = entry.placement;
            let sealed = bytes[offset as usize..(offset + length) as usize].to_vec();
            let frame = key.open(entry.kind, frame, sealed)?;
            Ok((entry, frame.chunk(&keys(), entry.kind, &entry.id, part)?.to_vec()))
        };
        directory.into_iter().map(open).collect()
    }

    #[test]
    fn the_bytes_of_a_pack_are_fixed() {
        let frames = [
            (ChunkKind::Data, vec![noise(1, 4096), vec![9; 8192], noise(3, 40)]),
            (ChunkKind::Blob, vec![vec![7; 4096]]),
            (ChunkKind::Data, vec![vec![1; 4096]]),
        ];
        let (bytes, entries) = pack(&frames);
        golden("pack", &bytes);
        let opened = open_all(&bytes).unwrap();
        assert_eq!(opened.iter().map(|(entry, _)| *entry).collect::<Vec<_>>(), entries);
        let places: Vec<_> = entries.iter().map(|entry| (entry.placement.frame, entry.placement.part)).collect();
        assert_eq!(places, [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]);
        let plain: Vec<_> = frames.iter().flat_map(|(_, chunks)| chunks).collect();
        assert!(opened.iter().zip(plain).all(|((_, plain), expected)| plain == expected));
    }

    #[test]
    fn the_bytes_of_wrapped_packs_and_of_structure_are_fixed() {
        for (name, last, kinds) in [
            ("pack-wrapped", WRAPPED, [ChunkKind::Data, ChunkKind::Blob]),
            ("pack-structure", STRUCTURE, [ChunkKind::Map, ChunkKind::List]),
        ] {
            let frames: Vec<_> = kinds.into_iter().map(|kind| (kind, vec![noise(1, 300), vec![9; 8192]])).collect();
            let (bytes, _) = pack_with(last, &frames);
            golden(name, &bytes);
            let opened = open_all(&bytes).unwrap();
            let plain: Vec<_> = frames.iter().flat_map(|(_, chunks)| chunks).collect();
            assert!(opened.iter().zip(plain).all(|((_, plain), expected)| plain == expected));
        }
    }

    fn writer() -> Keys {
        Keys::of_material(crate::KeyMaterial::Writer(keys().writer_key()), keys().repository()).unwrap()
    }

    #[test]
    fn what_a_writer_has_sealed_it_can_not_open_and_the_full_key_can() {
        let plain = noise(3, 5000);
        let id = keys().chunk_id(ChunkKind::Data, &plain);
        let (mut encoder, mut bytes) = PackEncoder::new(&writer(), PackClass::Content).unwrap();
        let salt = encoder.salt();
        bytes.extend(
            encoder.append(&[id], ChunkKind::Data, Compressor::new(1).unwrap().prepare(&plain).unwrap()).unwrap(),
        );
        let (end, entries) = encoder.finish().unwrap();
        bytes.extend(end);
        assert_eq!(open_all(&bytes).unwrap(), [(entries[0], plain)]);

        assert!(matches!(PackKey::derive(&writer(), &salt), Err(FormatError::WriteOnly)));
        let split = bytes.len() - PACK_TRAILER_BYTES;
        let trailer = PackTrailer::decode(&bytes[split..], bytes.len() as u64).unwrap();
        let directory = bytes[trailer.directory_offset as usize..split - PACK_HEADER_BYTES].to_vec();
        let read = DirectoryKey::derive(&writer(), &salt).unwrap().open_directory(&trailer, directory).unwrap();
        assert_eq!(read, entries);
        // Not with any key that can be made of what it has, for whatever purpose.
        let at = entries[0].placement;
        let frame = bytes[at.offset as usize..(at.offset + at.length) as usize].to_vec();
        let refused = |key: LessSafeKey| {
            let mut frame = frame.clone();
            let opened = open_frame("frame", &key, 0, &aad(&[], ChunkKind::Data.code()), &mut frame);
            assert!(matches!(opened, Err(FormatError::Authentication { .. })));
        };
        let material = writer().material().expose();
        for secret in material.as_chunks::<32>().0 {
            for purpose in ["content pack", "structure pack", "pack directory", "pack", "content key pair", "structure"]
            {
                let derived = crate::keys::derive(secret, keys().repository(), &salt.0, purpose).unwrap();
                refused(crate::keys::aead_key(&derived).unwrap());
            }
            let pair = crate::keypair::KeyPair::from_private(secret).unwrap();
            refused(crate::keys::aead_key(&pair.decapsulate(keys().repository(), &salt.0).unwrap()).unwrap());
        }
        // Nor what others have sealed under the root.
        let (bytes, entries) = pack(&[(ChunkKind::Data, vec![noise(1, 64)])]);
        assert!(matches!(
            PackKey::derive(&writer(), &PackHeader::decode(&bytes[..PACK_HEADER_BYTES]).unwrap().salt),
            Err(FormatError::WriteOnly)
        ));
        assert_eq!(entries.len(), 1);
    }

    #[test]
    fn a_pack_holds_chunks_of_one_class() {
        for (class, kind) in [
            (PackClass::Content, ChunkKind::Map),
            (PackClass::Content, ChunkKind::List),
            (PackClass::Structure, ChunkKind::Data),
            (PackClass::Structure, ChunkKind::Blob),
        ] {
            let (mut encoder, _) = PackEncoder::new(&keys(), class).unwrap();
            let payload = Compressor::new(1).unwrap().prepare(b"page").unwrap();
            let error = encoder.append(&[ChunkId::from_bytes([1; 32])], kind, payload).unwrap_err();
            assert!(matches!(error, FormatError::Field { .. }), "{error}");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for (last, one, other) in [
            (CONTENT, ChunkKind::Data, ChunkKind::Blob),
            (WRAPPED, ChunkKind::Data, ChunkKind::Blob),
            (STRUCTURE, ChunkKind::Map, ChunkKind::List),
        ] {
            let (bytes, _) = pack_with(last, &[(one, vec![noise(1, 64), noise(4, 30)]), (other, vec![vec![7; 400]])]);
            each_flip(&bytes, |hurt| assert!(open_all(hurt).is_err()));
        }
    }

    #[test]
    fn a_frame_opens_only_as_what_it_was_sealed_and_a_chunk_is_only_itself() {
        let (bytes, entries) = pack(&[(ChunkKind::Data, vec![noise(1, 64), noise(2, 64)])]);
        let key = PackKey::derive(&keys(), &salt(CONTENT)).unwrap();
        let at = entries[0].placement;
        let frame = bytes[at.offset as usize..(at.offset + at.length) as usize].to_vec();
        for (kind, number) in [(ChunkKind::Map, 0), (ChunkKind::Blob, 0), (ChunkKind::Data, 1)] {
            let wrong = key.open(kind, number, frame.clone());
            assert!(matches!(wrong, Err(FormatError::Authentication { .. })));
        }
        let plain = key.open(ChunkKind::Data, 0, frame).unwrap();
        assert!(plain.chunk(&keys(), ChunkKind::Data, &entries[1].id, 1).is_ok());
        let wrong = plain.chunk(&keys(), ChunkKind::Data, &entries[1].id, 0);
        assert!(matches!(wrong, Err(FormatError::WrongContent { .. })));
    }

    #[test]
    fn a_full_pack_refuses_and_stays_within_its_limit() {
        let (mut encoder, header) = PackEncoder::new(&keys(), PackClass::Content).unwrap();
        let mut compressor = Compressor::new(1).unwrap();
        let plain = noise(9, MAX_PACK_BYTES / 32);
        let mut length = header.len();
        let full = (0..40_u8).find_map(|n| {
            let payload = compressor.prepare(&plain).unwrap();
            match encoder.append(&[ChunkId::from_bytes([n; 32])], ChunkKind::Data, payload) {
                Ok(frame) => {
                    length += frame.len();
                    None
                }
                Err(error) => Some(error),
            }
        });
        assert!(matches!(full, Some(FormatError::PackFull)));
        let (end, entries) = encoder.finish().unwrap();
        assert_eq!(entries.len(), 31);
        assert!(length + end.len() <= MAX_PACK_BYTES);
    }

    proptest! {
        #[test]
        fn foreign_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), number in any::<u16>()) {
            let _ = PackHeader::decode(&bytes);
            let _ = PackTrailer::decode(&bytes, bytes.len() as u64);
            let key = PackKey::derive(&keys(), &salt(CONTENT)).unwrap();
            let _ = key.open(ChunkKind::Data, number, bytes);
        }
    }
}
