//! Pages of disk maps: what decodes encodes to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store_format::{LeafPage, NodePage};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(page) = LeafPage::decode(bytes) {
        assert_eq!(page.encode().as_deref(), Some(bytes));
    }
    let level = bytes.get(1).copied().unwrap_or_default();
    if let Ok(page) = NodePage::decode(bytes, level) {
        assert_eq!(page.encode().as_deref(), Some(bytes));
    }
});
