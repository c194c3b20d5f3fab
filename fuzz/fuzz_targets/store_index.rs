//! Index segments; what passes the check must answer every look-up.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{ChunkId, IndexLayout, fuzzing};

fuzz_target!(|bytes: &[u8]| {
    let keys = fuzzing::keys().unwrap();
    for object in [bytes.to_vec(), fuzzing::object(b"XVLTINDX", bytes)] {
        if let Ok(layout) = IndexLayout::check(&object, &keys) {
            layout.ids(&object).for_each(|id| assert!(layout.find(&object, &id).is_some()));
            let _ = layout.find(&object, &ChunkId::from_bytes([7; 32]));
        }
    }
});
