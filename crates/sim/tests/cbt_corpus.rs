//! The change log engine of the simulator against logs that the real tools wrote.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test that meets the unexpected has failed"
)]

use proptest::prelude::*;
use serde_json::Value;
use uuid::Uuid;
use xenvault_sim::storage::cbt::{ChangeLog, ChangeLogError, ChangeLogs};

#[path = "../../../tests/support/shared.rs"]
mod shared;

fn uuid(value: &Value) -> Uuid {
    value.as_str().unwrap().parse().unwrap()
}

fn load(case: &Value, folder: &std::path::Path) -> Result<ChangeLogs, ChangeLogError> {
    let mut logs = ChangeLogs::default();
    for log in case["logs"].as_array().unwrap() {
        let Some(file) = log["file"].as_str() else { continue };
        let bytes = std::fs::read(folder.join(file)).unwrap();
        let read = ChangeLog::from_file(&bytes)?;
        assert_eq!(read.parent, uuid(&log["parent"]), "{file}");
        assert_eq!(read.child, uuid(&log["child"]), "{file}");
        assert_eq!(read.consistent, log["consistent"] != 0, "{file}");
        assert_eq!(read.size, log["size"].as_u64().unwrap(), "{file}");
        assert_eq!(read.bitmap.len() as u64, log["bitmap_len"].as_u64().unwrap(), "{file}");
        logs.insert(uuid(&log["uuid"]), read);
    }
    Ok(logs)
}

#[test]
fn every_case_of_the_corpus_gives_the_recorded_answer() {
    let Some(manifest) = shared::shared("cbt-corpus/manifest.json") else { return };
    let folder = manifest.parent().unwrap();
    let manifest: Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    assert!(cases.len() >= 19, "{}", cases.len());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let (from, to) = (uuid(&case["from"]), uuid(&case["to"]));
        let found = load(case, folder).map(|logs| logs.changed_blocks(from, to));
        if case["expect"] == "ok" {
            let bits = found.unwrap().unwrap();
            use base64::Engine as _;
            let text = base64::engine::general_purpose::STANDARD.encode(bits);
            assert_eq!(text, case["bitmap_base64"].as_str().unwrap(), "{name}");
            continue;
        }
        match (case["error"].as_str().unwrap(), found) {
            ("short log", found) => assert!(matches!(found, Err(ChangeLogError::Short { .. })), "{name}"),
            // The real storage manager never comes back from a circle; ours does.
            ("cycle", found) => assert_eq!(found.unwrap().unwrap_err().code, "SR_BACKEND_FAILURE_460", "{name}"),
            (code, found) => {
                let error = found.unwrap().unwrap_err();
                assert_eq!(error.code, code, "{name}");
                let texts = [
                    "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are same]",
                    "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are unrelated]",
                    "Changed block tracking log is in an inconsistent state. [opterr=Inconsistent bitmaps]",
                ];
                let [empty, text, also_empty] = <[String; 3]>::try_from(error.params).unwrap();
                assert_eq!((empty.as_str(), also_empty.as_str()), ("", ""), "{name}");
                assert!(texts.contains(&text.as_str()), "{name}: {text}");
            }
        }
    }
}

#[test]
fn a_log_shorter_than_its_header_says_is_refused() {
    assert_eq!(ChangeLog::from_file(&[0; 12]), Err(ChangeLogError::Short { found: 12, wanted: 48 }));
    let mut file = vec![0; 48];
    file[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(ChangeLog::from_file(&file), Err(ChangeLogError::Short { .. })));
}

proptest! {
    #[test]
    fn no_log_file_panics_and_the_union_is_as_long_as_the_last(
        mut first in proptest::collection::vec(any::<u8>(), 0..200),
        mut second in proptest::collection::vec(any::<u8>(), 48..200),
        sizes in proptest::array::uniform2(0_u64..40_000_000),
    ) {
        let _ = ChangeLog::from_file(&first);
        first.resize(300, 0);
        for (file, size) in [(&mut first, sizes[0]), (&mut second, sizes[1])] {
            file[40..48].copy_from_slice(&size.to_le_bytes());
        }
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let (Ok(mut older), Ok(newer)) = (ChangeLog::from_file(&first), ChangeLog::from_file(&second)) else {
            return Ok(());
        };
        older.child = two;
        let length = newer.bitmap.len();
        let mut logs = ChangeLogs::default();
        logs.insert(one, older);
        logs.insert(two, newer);
        prop_assert_eq!(logs.changed_blocks(one, two).map(|bits| bits.len()), Ok(length));
    }
}
