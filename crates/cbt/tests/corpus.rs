//! The bitmaps of real change logs: what a pool answers, and the extents that it means.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test says what is wrong by failing")]

use serde::Deserialize;
use xenvault_cbt::{CbtError, ChangedBlocks, FullReason};

#[path = "../../../tests/support/shared.rs"]
mod shared;

#[derive(Deserialize)]
struct Manifest {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    expect: String,
    error: Option<String>,
    virtual_size: Option<u64>,
    bitmap_base64: Option<String>,
    bitmap_bytes: Option<usize>,
    changed_blocks: Option<Vec<u64>>,
    changed_block_count: Option<u64>,
    extents: Option<Vec<(u64, u64)>>,
}

fn cases() -> Vec<Case> {
    let Some(path) = shared::shared("cbt-corpus/manifest.json") else { return Vec::new() };
    let manifest: Manifest = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(manifest.cases.iter().filter(|case| case.expect == "ok").count() >= 10);
    manifest.cases
}

fn good_cases() -> Vec<Case> {
    cases().into_iter().filter(|case| case.expect == "ok").collect()
}

#[test]
fn x14_every_recorded_bitmap_gives_its_extents() {
    for case in good_cases() {
        let (name, size) = (case.name, case.virtual_size.unwrap());
        let changes = ChangedBlocks::parse_base64(&case.bitmap_base64.unwrap(), size).unwrap();
        assert_eq!(changes.as_bytes().len(), case.bitmap_bytes.unwrap(), "{name}");
        let extents = changes.extents();
        let found: Vec<(u64, u64)> = extents.runs().iter().map(|run| (run.start(), run.len())).collect();
        assert_eq!(found, case.extents.unwrap(), "{name}");
        assert_eq!(changes.changed_bytes(), extents.total_bytes(), "{name}");
        let blocks: u64 = found.iter().map(|(_, length)| length.div_ceil(65_536)).sum();
        assert_eq!(blocks, case.changed_block_count.unwrap(), "{name}");
        for block in case.changed_blocks.unwrap_or_default() {
            assert!(extents.contains(block * 65_536), "{name}: block {block}");
        }
    }
}

#[test]
fn x14_every_recorded_bitmap_is_refused_for_a_disk_of_another_bitmap_length() {
    for case in good_cases() {
        let (text, size) = (case.bitmap_base64.unwrap(), case.virtual_size.unwrap());
        let step = 8 * 65_536;
        for other in [size + step, size.saturating_sub(step), size * 2 + step] {
            let error = ChangedBlocks::parse_base64(&text, other).unwrap_err();
            assert!(matches!(error, CbtError::WrongLength { virtual_size, .. } if virtual_size == other), "{error}");
        }
    }
}

#[test]
fn x12_every_recorded_failure_has_a_reason_of_its_own() {
    for case in cases().into_iter().filter(|case| case.expect == "error") {
        let code = case.error.unwrap();
        let expected = match code.as_str() {
            "SR_BACKEND_FAILURE_460" => FullReason::Unrelated,
            "SR_BACKEND_FAILURE_459" => FullReason::BitmapInvalid,
            _ => FullReason::ListingFailed,
        };
        assert_eq!(FullReason::from_failure(&code), expected, "{}", case.name);
    }
}
