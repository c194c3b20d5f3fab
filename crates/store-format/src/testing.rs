//! What the tests of this crate share.

use std::path::Path;

use crate::{Keys, MasterKey, RepositoryId};

/// The keys that the golden files were made with.
pub(crate) fn keys() -> Keys {
    Keys::derive(MasterKey::from_bytes([42; 32]), RepositoryId::from_bytes([17; 16])).unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Compares with `tests/golden/<name>.hex`; with `XENVAULT_BLESS=1` in the environment, writes it.
pub(crate) fn golden(name: &str, bytes: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.hex"));
    let lines = bytes.chunks(32).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n");
    let text: String = lines.collect();
    if std::env::var_os("XENVAULT_BLESS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{} differs: a change of the format is a change of its version", path.display());
}

/// Calls `check` with every single bit of `bytes` flipped in turn.
pub(crate) fn each_flip(bytes: &[u8], mut check: impl FnMut(&[u8])) {
    let mut hurt = bytes.to_vec();
    for at in 0..bytes.len() * 8 {
        hurt[at / 8] ^= 1 << (at % 8);
        check(&hurt);
        hurt[at / 8] ^= 1 << (at % 8);
    }
}
