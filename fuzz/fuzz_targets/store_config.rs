//! `config` and key slots: the objects that are read before there is a key.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{KeySlot, StoredConfig, fuzzing};

fuzz_target!(|bytes: &[u8]| {
    let _ = StoredConfig::decode(bytes);
    let _ = KeySlot::decode(bytes);
    let _ = StoredConfig::decode(&fuzzing::object(b"XVLTCONF", bytes));
    let _ = KeySlot::decode(&fuzzing::object(b"XVLTKEYS", bytes));
});
