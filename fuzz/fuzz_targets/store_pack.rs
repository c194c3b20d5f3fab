//! Packs: header, trailer, frames, directory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{ChunkKind, PackHeader, PackKey, PackSalt, PackTrailer, fuzzing};

fuzz_target!(|bytes: &[u8]| {
    let keys = fuzzing::keys().unwrap();
    let _ = PackHeader::decode(bytes);
    let _ = PackHeader::decode(&fuzzing::object(b"XVLTPACK", bytes));
    let key = PackKey::derive(&keys, &PackSalt::from_bytes([5; 32])).unwrap();
    let _ = key.open(ChunkKind::Data, 0, bytes.to_vec());
    if let Ok(trailer) = PackTrailer::decode(bytes, bytes.len() as u64) {
        let _ = key.open_directory(&trailer, bytes.to_vec());
    }
});
