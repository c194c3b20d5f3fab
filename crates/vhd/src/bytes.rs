//! Big-endian fields in byte arrays, and the checksum of footer and header. Never panics: what is missing reads as 0.

/// One's complement of the sum of all bytes but those of the checksum itself.
pub(crate) fn checksum(bytes: &[u8], field_at: usize) -> u32 {
    let own = field_at..field_at.saturating_add(4);
    let counted = bytes.iter().enumerate().filter(|(at, _)| !own.contains(at));
    !counted.fold(0_u32, |sum, (_, &byte)| sum.wrapping_add(u32::from(byte)))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let field = at.checked_add(N).and_then(|end| bytes.get(at..end));
    field.and_then(|field| field.try_into().ok()).unwrap_or([0; N])
}

/// Writes a field of one of our own fixed layouts. What does not fit is left out; the golden tests would show it.
pub(crate) fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(target) = at.checked_add(field.len()).and_then(|end| bytes.get_mut(at..end)) {
        target.copy_from_slice(field);
    }
}
