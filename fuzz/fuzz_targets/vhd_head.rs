//! No stream makes the reader of VHD heads panic, take much memory, or name bytes outside of the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_vhd::{HeadParser, HeadProgress};

fuzz_target!(|data: &[u8]| {
    let mut parser = HeadParser::new();
    for piece in data.chunks(511) {
        match parser.push(piece) {
            Ok(HeadProgress::Needs(_)) => {}
            Ok(HeadProgress::Complete) | Err(_) => break,
        }
    }
    if let Ok(map) = parser.finish() {
        assert!(map.allocated.runs().iter().all(|run| run.end() <= map.virtual_size));
    }
});
