//! Restore points, and everything else that lies behind a seal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{decode_piece_list, decode_point, fuzzing};

fuzz_target!(|bytes: &[u8]| {
    let keys = fuzzing::keys().unwrap();
    let _ = decode_point(&keys, bytes);
    let _ = decode_point(&keys, &fuzzing::object(b"XVLTPONT", bytes));
    let _ = decode_piece_list(bytes, bytes.len() as u64 * 20_000);
    fuzzing::behind_the_seal(bytes);
});
