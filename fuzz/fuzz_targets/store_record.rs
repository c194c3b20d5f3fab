//! Records: tombstones, receipts, damage marks, results of verifications, intents and ends of sweeps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{
    DamageMark, Receipt, SweepEnd, SweepIntent, Tombstone, Undo, VerifyResult, decode_record, fuzzing,
};

fuzz_target!(|bytes: &[u8]| {
    let keys = fuzzing::keys().unwrap();
    for object in [bytes.to_vec(), fuzzing::object(b"XVLTRECD", bytes)] {
        let _ = decode_record::<Tombstone>(&keys, &object);
        let _ = decode_record::<Undo>(&keys, &object);
        let _ = decode_record::<Receipt>(&keys, &object);
        let _ = decode_record::<DamageMark>(&keys, &object);
        let _ = decode_record::<VerifyResult>(&keys, &object);
        let _ = decode_record::<SweepIntent>(&keys, &object);
        let _ = decode_record::<SweepEnd>(&keys, &object);
    }
    fuzzing::behind_the_seal(bytes);
});
