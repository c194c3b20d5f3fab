//! Index segments; what passes the check must answer every look-up, and a header alone must lead nobody out of the bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{ChunkId, IndexLayout, fuzzing};

fuzz_target!(|bytes: &[u8]| {
    let keys = fuzzing::keys().unwrap();
    for object in [bytes.to_vec(), fuzzing::object(b"XVLTINDX", bytes)] {
        if let Ok(layout) = IndexLayout::open(&object, object.len() as u64, &keys) {
            let _ = layout.find(&object, &ChunkId::from_bytes([7; 32]), |page| layout.check_page(&object, page, &keys));
            assert!(layout.packs(&object).chain(layout.gone(&object)).count() <= object.len());
        }
        if let Ok(layout) = IndexLayout::check(&object, &keys) {
            for number in 0..layout.len() {
                let id = layout.entry(&object, number).unwrap().id;
                let found = layout.find(&object, &id, |page| layout.check_page(&object, page, &keys)).unwrap();
                assert!(found.contains(&number));
            }
        }
    }
});
