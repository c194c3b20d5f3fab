//! Positional access to something disk-like. Synchronous: asynchronous users wrap these on their own floor.

use std::io;

/// Random reads from something with a fixed size.
pub trait ReadAt {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` from the bytes at `offset`.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the range passes the end; whatever the medium reports otherwise.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// Random writes.
pub trait WriteAt: ReadAt {
    /// Writes all of `data` at `offset`. Durable only after a flush of the medium, which is the owner's affair.
    ///
    /// # Errors
    /// [`io::ErrorKind::WriteZero`] if the range passes the end; whatever the medium reports otherwise.
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end_of_file = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let start = usize::try_from(offset).map_err(|_| end_of_file())?;
        let end = start.checked_add(buffer.len()).ok_or_else(end_of_file)?;
        buffer.copy_from_slice(self.get(start..end).ok_or_else(end_of_file)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_past_the_end_of_a_slice_is_an_error() {
        let disk = [1_u8, 2, 3];
        let mut buffer = [0; 2];
        disk[..].read_exact_at(&mut buffer, 1).unwrap();
        assert_eq!(buffer, [2, 3]);
        let past = disk[..].read_exact_at(&mut buffer, 2).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }
}
