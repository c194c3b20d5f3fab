//! Answers of a pool in both encodings, and results of tasks: no bytes make the readers panic or run out of stack.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| xenvault_xenapi::decode_for_fuzzing(bytes));
