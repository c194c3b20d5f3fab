//! Answers of a pool in JSON-RPC, read as far as records and failures go.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| xenvault_xenapi::decode_json_for_fuzzing(bytes));
