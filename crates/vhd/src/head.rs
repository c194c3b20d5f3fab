//! The head of a dynamic VHD stream to an allocation map.
//!
//! Strictly forward: footer copy, header, block allocation table, with gaps between them that are skipped. Everything
//! is checked before anything is allocated for it.

use xenvault_block::{ByteRange, ExtentSet, SECTOR_BYTES};

use crate::VhdError;
use crate::bytes::u32_at;
use crate::footer::{FOOTER_BYTES, Footer};
use crate::header::{HEADER_BYTES, Header};

/// Entries that are read at most: 2 TiB in blocks of 2 MiB, 4 MiB of table.
const MAX_ENTRIES: u64 = 1 << 20;
/// How far header and table may lie from the front. Real producers use a few KiB.
const MAX_HEAD_BYTES: u64 = 1 << 20;
/// A table entry of a block that is not allocated.
const UNUSED: u32 = u32::MAX;
const ENTRY_BYTES: u64 = 4;

/// Which bytes of a disk are allocated in its VHD; the rest reads as zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocationMap {
    /// Virtual size in bytes (the footer's current size).
    pub virtual_size: u64,
    /// Size of a block in bytes.
    pub block_bytes: u64,
    /// The allocated bytes in whole blocks, in virtual order, cut at the virtual size.
    pub allocated: ExtentSet,
    /// First byte of the file behind the head and all blocks: a file that is shorter has lost data.
    pub data_end: u64,
}

/// How far the head has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadProgress {
    /// At least this many bytes more are needed.
    Needs(u64),
    /// All is there: [`HeadParser::finish`] gives the map, the stream can be closed.
    Complete,
}

/// Reads the head of a dynamic VHD stream from pieces of any size. Memory is bounded by the table (at most 4 MiB, and
/// as much again while it is checked).
#[derive(Debug)]
pub struct HeadParser {
    /// Bytes taken from the stream so far.
    position: u64,
    state: State,
    /// What of the wanted structure is there.
    buffer: Vec<u8>,
    /// Once something was wrong, it stays wrong.
    failed: Option<VhdError>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Footer,
    Header(Footer),
    Table(Footer, Header),
    Done(Footer, Header),
}

impl Default for HeadParser {
    fn default() -> Self {
        Self::new()
    }
}

impl HeadParser {
    /// Begins at the front of a stream.
    pub fn new() -> Self {
        Self { position: 0, state: State::Footer, buffer: Vec::new(), failed: None }
    }

    /// Takes the next bytes of the stream. Bytes behind the head are ignored.
    ///
    /// # Errors
    /// Everything that makes the head unusable, as soon as it is seen; the same again for all later bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<HeadProgress, VhdError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.take(bytes).inspect_err(|error| self.failed = Some(error.clone()))
    }

    fn take(&mut self, mut bytes: &[u8]) -> Result<HeadProgress, VhdError> {
        while let Some(wanted) = self.wanted() {
            if bytes.is_empty() {
                return Ok(HeadProgress::Needs(wanted.end() - self.position));
            }
            // Skip the gap in front, then take what is wanted.
            let gap = wanted.start().saturating_sub(self.position);
            bytes = self.advance(bytes, gap).1;
            let missing = wanted.end() - self.position.max(wanted.start());
            let (taken, rest) = self.advance(bytes, missing);
            self.buffer.extend_from_slice(taken);
            bytes = rest;
            if self.position == wanted.end() {
                self.complete()?;
            }
        }
        Ok(HeadProgress::Complete)
    }

    /// Splits at most `count` bytes off the front and counts them.
    fn advance<'a>(&mut self, bytes: &'a [u8], count: u64) -> (&'a [u8], &'a [u8]) {
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(bytes.len());
        let (taken, rest) = bytes.split_at_checked(count).unwrap_or((bytes, &[]));
        self.position += taken.len() as u64;
        (taken, rest)
    }

    /// The place of the structure that comes next.
    fn wanted(&self) -> Option<ByteRange> {
        let (start, length) = match &self.state {
            State::Footer => (0, FOOTER_BYTES as u64),
            State::Header(footer) => (footer.data_offset, HEADER_BYTES as u64),
            State::Table(footer, header) => (header.table_offset, needed_entries(footer, header) * ENTRY_BYTES),
            State::Done(..) => return None,
        };
        ByteRange::with_length(start, length).ok()
    }

    /// The wanted structure is in the buffer.
    fn complete(&mut self) -> Result<(), VhdError> {
        self.state = match self.state {
            State::Footer => State::Header(decode_footer(&self.buffer)?),
            State::Header(footer) => State::Table(footer, decode_header(&self.buffer, &footer)?),
            State::Table(footer, header) => {
                self.state = State::Done(footer, header);
                return Ok(());
            }
            done @ State::Done(..) => done,
        };
        self.buffer.clear();
        Ok(())
    }

    /// Gives the map.
    ///
    /// # Errors
    /// [`VhdError::Truncated`] if the stream ended too early; what [`HeadParser::push`] said if it failed; a table whose
    /// blocks lie in the head or overlap.
    pub fn finish(self) -> Result<AllocationMap, VhdError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        match self.state {
            State::Done(footer, header) => map(&footer, &header, &self.buffer),
            _ => Err(VhdError::Truncated { got: self.position }),
        }
    }
}

fn decode_footer(buffer: &[u8]) -> Result<Footer, VhdError> {
    let footer = Footer::decode(buffer.try_into().map_err(|_| VhdError::NotVhd)?)?;
    let offset = footer.data_offset;
    if !(FOOTER_BYTES as u64..=MAX_HEAD_BYTES).contains(&offset) {
        return Err(VhdError::HeaderOffset { offset });
    }
    Ok(footer)
}

fn decode_header(buffer: &[u8], footer: &Footer) -> Result<Header, VhdError> {
    let offset = footer.data_offset;
    let header = Header::decode(buffer.try_into().map_err(|_| VhdError::HeaderCookie { offset })?, offset)?;
    let needed = needed_entries(footer, &header);
    let found = u64::from(header.table_entries);
    if found < needed || found > MAX_ENTRIES || needed > MAX_ENTRIES {
        return Err(VhdError::TableEntries { found: header.table_entries, needed, limit: MAX_ENTRIES });
    }
    if !(offset + HEADER_BYTES as u64..=MAX_HEAD_BYTES).contains(&header.table_offset) {
        return Err(VhdError::TableOffset { offset: header.table_offset });
    }
    Ok(header)
}

fn needed_entries(footer: &Footer, header: &Header) -> u64 {
    footer.current_size.div_ceil(u64::from(header.block_bytes))
}

fn map(footer: &Footer, header: &Header, table: &[u8]) -> Result<AllocationMap, VhdError> {
    let block_bytes = u64::from(header.block_bytes);
    // All entries that the header claims are head, also those behind the disk's end.
    let head_end = header.table_offset + u64::from(header.table_entries) * ENTRY_BYTES;
    // One bit for each sector of the block, in whole sectors, stands in front of its data.
    let bitmap_bytes = (block_bytes / SECTOR_BYTES).div_ceil(8).next_multiple_of(SECTOR_BYTES);
    let place_bytes = bitmap_bytes + block_bytes;

    let mut allocated = ExtentSet::new();
    let mut places: Vec<u32> = Vec::new();
    for (block, entry) in (0_u64..).zip(table.chunks_exact(4)) {
        let sector = u32_at(entry, 0);
        if sector == UNUSED {
            continue;
        }
        let offset = u64::from(sector) * SECTOR_BYTES;
        if offset < head_end {
            return Err(VhdError::BlockInHead { block, offset });
        }
        places.push(sector);
        let start = block * block_bytes;
        allocated.extend(ByteRange::new(start, (start + block_bytes).min(footer.current_size)).ok());
    }
    places.sort_unstable();
    let mut data_end = head_end;
    for sector in places {
        let offset = u64::from(sector) * SECTOR_BYTES;
        if offset < data_end {
            return Err(VhdError::BlocksOverlap { offset });
        }
        data_end = offset + place_bytes;
    }
    Ok(AllocationMap { virtual_size: footer.current_size, block_bytes, allocated, data_end })
}
