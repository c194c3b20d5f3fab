//! Answers of a pool in XML-RPC, and results of tasks, read as far as records go.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| xenvault_xenapi::decode_xml_for_fuzzing(bytes));
