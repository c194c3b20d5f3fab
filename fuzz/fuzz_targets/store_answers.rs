//! What an S3 service answers: lists of versions, retentions, settings of a bucket.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenvault_store::backend::signed::{lock_configuration, retention, version_page, versioning};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(page) = version_page(bytes) {
        assert!(page.versions.len() <= bytes.len());
    }
    let _ = (retention(bytes), versioning(bytes), lock_configuration(bytes));
});
