//! A VHD stream onto a disk, as vhd-tool reads it: strictly forward, blocks in physical order, sector bitmaps obeyed.

use std::io;

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf};

use super::import::Target;
use super::request::Input;

const SECTOR: u64 = 512;

/// Most entries of an allocation table: that of a disk of 2040 GiB, and some.
const MOST_ENTRIES: u32 = 1 << 20;

/// A reader that knows where it is in the stream.
struct Cursor<'a, 'b, S> {
    input: &'a mut Input<ReadHalf<S>>,
    target: &'a mut Target<'b>,
    at: u64,
}

fn bad() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

impl<S: AsyncRead + AsyncWrite + Unpin> Cursor<'_, '_, S> {
    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let bytes = self.input.exactly(length).await?;
        self.target.count(bytes.len() as u64)?;
        self.at += length as u64;
        Ok(bytes)
    }

    /// Goes forward to a place; there is no way back.
    async fn skip_to(&mut self, place: u64) -> io::Result<()> {
        while self.at < place {
            let step = usize::try_from(place - self.at).unwrap_or(1 << 16).min(1 << 16);
            self.take(step).await?;
        }
        if self.at == place { Ok(()) } else { Err(bad()) }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes.get(at..at + N).and_then(|part| part.try_into().ok()).ok_or_else(bad)
}

fn checksum_is_right(bytes: &[u8], at: usize) -> bool {
    let sum: u32 = bytes
        .iter()
        .enumerate()
        .filter(|(index, _)| !(at..at + 4).contains(index))
        .fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)));
    number(bytes, at).is_ok_and(|stored| u32::from_be_bytes(stored) == !sum)
}

/// Writes the set sectors of every block of the stream.
pub(super) async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    input: &mut Input<ReadHalf<S>>,
    target: &mut Target<'_>,
    length: Option<u64>,
) -> io::Result<()> {
    let mut cursor = Cursor { input, target, at: 0 };
    let footer = cursor.take(512).await?;
    if !footer.starts_with(b"conectix") || !checksum_is_right(&footer, 64) {
        return Err(bad());
    }
    cursor.skip_to(u64::from_be_bytes(number(&footer, 16)?)).await?;
    let header = cursor.take(1024).await?;
    if !header.starts_with(b"cxsparse") || !checksum_is_right(&header, 36) {
        return Err(bad());
    }
    let entries = u32::from_be_bytes(number(&header, 28)?);
    let block = u64::from(u32::from_be_bytes(number(&header, 32)?));
    if entries > MOST_ENTRIES || !block.is_power_of_two() || !(SECTOR..=(64 << 20)).contains(&block) {
        return Err(bad());
    }
    cursor.skip_to(u64::from_be_bytes(number(&header, 16)?)).await?;
    let table = cursor.take(usize::try_from(entries).map_err(|_| bad())? * 4).await?;
    let mut places = std::collections::BTreeMap::new();
    for (index, entry) in table.chunks_exact(4).enumerate() {
        let sector = u32::from_be_bytes(number(entry, 0)?);
        if sector != u32::MAX {
            // Of two blocks in one place the later one wins.
            places.insert(u64::from(sector) * SECTOR, index as u64);
        }
    }
    for (place, index) in places {
        cursor.skip_to(place).await?;
        one_block(&mut cursor, index, block).await?;
    }
    // The tail footer: its place follows from the length.
    let tail = length.map_or(cursor.at, |length| (length.saturating_sub(1) / SECTOR) * SECTOR);
    cursor.skip_to(tail).await?;
    let footer = cursor.take(512).await?;
    if footer.starts_with(b"conectix") { Ok(()) } else { Err(bad()) }
}

async fn one_block<S: AsyncRead + AsyncWrite + Unpin>(
    cursor: &mut Cursor<'_, '_, S>,
    index: u64,
    block: u64,
) -> io::Result<()> {
    let sectors = block / SECTOR;
    let bitmap_bytes = sectors.div_ceil(8).div_ceil(SECTOR) * SECTOR;
    let bitmap = cursor.take(usize::try_from(bitmap_bytes).map_err(|_| bad())?).await?;
    let data = cursor.take(usize::try_from(block).map_err(|_| bad())?).await?;
    let start = index.checked_mul(block).ok_or_else(bad)?;
    let is_set = |sector: u64| {
        let byte = usize::try_from(sector / 8).ok().and_then(|at| bitmap.get(at)).copied().unwrap_or(0);
        byte & (0x80 >> (sector % 8)) != 0
    };
    let mut sector = 0;
    while sector < sectors {
        let first = sector;
        while sector < sectors && is_set(sector) {
            sector += 1;
        }
        if sector > first {
            let offset = start + first * SECTOR;
            // The last block may reach over the end of the disk.
            let end = (start + sector * SECTOR).min(cursor.target.size().max(offset));
            let from = usize::try_from(first * SECTOR).map_err(|_| bad())?;
            let to = from + usize::try_from(end - offset).map_err(|_| bad())?;
            let part = data.get(from..to).ok_or_else(bad)?.to_vec();
            if offset >= cursor.target.size() && part.is_empty() && part_has_data(&data, from) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            cursor.target.write(offset, part).await?;
        }
        sector += 1;
    }
    Ok(())
}

/// Whether anything but zeros would go beyond the end of the disk.
fn part_has_data(data: &[u8], from: usize) -> bool {
    data.get(from..).is_some_and(|rest| rest.iter().any(|byte| *byte != 0))
}
