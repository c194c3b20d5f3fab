//! No text makes the reader of bitmaps panic, and what it names lies inside the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_cbt::ChangedBlocks;

fuzz_target!(|input: (u64, &[u8])| {
    let (virtual_size, bytes) = input;
    let text = String::from_utf8_lossy(bytes);
    for parsed in [ChangedBlocks::parse(bytes, virtual_size), ChangedBlocks::parse_base64(&text, virtual_size)] {
        if let Ok(changes) = parsed {
            let extents = changes.extents();
            assert_eq!(extents.total_bytes(), changes.changed_bytes());
            assert!(extents.runs().iter().all(|run| run.end() <= virtual_size));
        }
    }
});
