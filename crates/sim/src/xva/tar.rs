//! The tar of an archive, as xapi writes it: plain headers, no directories, two empty blocks at the end.

/// Unit of a tar.
pub(crate) const BLOCK: usize = 512;

/// Head of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) name: String,
    pub(crate) size: u64,
}

/// A whole file: head, content, and zeros up to the next block.
pub(crate) fn file(name: &str, content: &[u8]) -> Vec<u8> {
    let mut out = vec![0; BLOCK];
    let mut put = |at: usize, text: &str| {
        if let Some(field) = out.get_mut(at..at + text.len()) {
            field.copy_from_slice(text.as_bytes());
        }
    };
    put(0, name);
    put(100, "0000400\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", content.len()));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\0");
    put(263, "00");
    let sum: u64 = out.iter().map(|byte| u64::from(*byte)).sum();
    let sum = format!("{sum:06o}\0 ");
    if let Some(field) = out.get_mut(148..156) {
        field.copy_from_slice(sum.as_bytes());
    }
    out.extend_from_slice(content);
    out.resize(out.len() + padding(content.len() as u64), 0);
    out
}

/// Zeros after a file of that length.
pub(crate) fn padding(size: u64) -> usize {
    let over = usize::try_from(size % BLOCK as u64).unwrap_or_default();
    if over == 0 { 0 } else { BLOCK - over }
}

/// What ends an archive.
pub(crate) fn end() -> Vec<u8> {
    vec![0; 2 * BLOCK]
}

/// Reads a head: `Ok(None)` for an empty block, an error for anything that is not a head with a right check sum.
pub(crate) fn read_header(block: &[u8]) -> Result<Option<Header>, ()> {
    if block.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let field = |from: usize, to: usize| {
        let bytes = block.get(from..to).ok_or(())?;
        let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        std::str::from_utf8(bytes).map(str::trim).map_err(|_| ())
    };
    let number = |from, to| u64::from_str_radix(field(from, to)?, 8).map_err(|_| ());
    let sum: u64 = block
        .iter()
        .enumerate()
        .map(|(at, byte)| if (148..156).contains(&at) { u64::from(b' ') } else { u64::from(*byte) })
        .sum();
    if number(148, 156)? != sum {
        return Err(());
    }
    let name = field(0, 100)?;
    let prefix = if block.get(257..262) == Some(b"ustar") { field(345, 500)? } else { "" };
    let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
    Ok(Some(Header { name, size: number(124, 136)? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let whole = file("Ref:5/00000000", b"abc");
        assert_eq!(whole.len(), 2 * BLOCK);
        let header = read_header(&whole[..BLOCK]).unwrap().unwrap();
        assert_eq!(header, Header { name: "Ref:5/00000000".into(), size: 3 });
        assert_eq!(read_header(&[0; BLOCK]), Ok(None));
        assert_eq!(read_header(&[b'x'; BLOCK]), Err(()));
    }
}
