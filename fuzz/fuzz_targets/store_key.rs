//! Key slots, and the text of recovery keys: what is read as a key writes the same key.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{KeySlot, RecoveryKey, Secret, SlotSecret, fuzzing};

fuzz_target!(|bytes: &[u8]| {
    let _ = SlotSecret::new(&Secret::new(bytes));
    if let Ok(key) = std::str::from_utf8(bytes).map(RecoveryKey::from_text)
        && let Ok(key) = key
    {
        assert!(RecoveryKey::from_text(&key.to_text()) == Ok(key));
    }
    for object in [bytes.to_vec(), fuzzing::object(b"XVLTKEYS", bytes)] {
        if let Ok(slot) = KeySlot::decode(&object) {
            assert_eq!(slot.encode(), object);
            // A passphrase would cost a derivation each time.
            let _ = slot.unwrap(&SlotSecret::Recovery(RecoveryKey::from_bytes([7; 32])));
        }
    }
});
