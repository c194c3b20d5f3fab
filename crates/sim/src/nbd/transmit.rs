//! The transmission phase: one request at a time, in order, in pieces of 512 KiB.

use std::io;
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use uuid::Uuid;
use xenvault_block::{ByteRange, SECTOR_BYTES};

use super::faults::Fault;
use super::server::{End, Shared};
use super::{BlockDevice, OpenDisk};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const READ: u32 = 0;
const WRITE: u32 = 1;
const DISC: u32 = 2;

const EPERM: u32 = 1;
const EINVAL: u32 = 22;

/// What the server reads from the device and writes to the socket at a time.
const PIECE_BYTES: u64 = 512 * 1024;

/// HAS_FLAGS and READ_ONLY.
const EXPORT_FLAGS: u16 = 3;

/// What a connection needs to serve one export.
pub(super) struct Transmission<'a> {
    shared: &'a Shared,
    vdi: Uuid,
    size: u64,
    device: Arc<dyn BlockDevice>,
    sent_bytes: u64,
    /// Faults that were drawn for this connection when it opened.
    drop_after: Option<u64>,
    stall_after: Option<u64>,
}

/// A request, as the real server reads it: flags are a part of the command.
struct Request {
    command: u32,
    handle: u64,
    offset: u64,
    length: u32,
}

impl<'a> Transmission<'a> {
    pub(super) fn new(shared: &'a Shared, disk: &OpenDisk) -> Self {
        let (host, vdi) = (shared.host, Some(disk.vdi));
        let drop_after = shared.faults.strike(host, vdi, |fault| match fault {
            Fault::DropAfter(bytes) => Some(*bytes),
            _ => None,
        });
        let stall_after = shared.faults.strike(host, vdi, |fault| match fault {
            Fault::StallAfter(bytes) => Some(*bytes),
            _ => None,
        });
        let device = Arc::clone(&disk.device);
        Self { shared, vdi: disk.vdi, size: disk.size, device, sent_bytes: 0, drop_after, stall_after }
    }

    /// Serves until the client or an error ends it.
    pub(super) async fn run<S: AsyncRead + AsyncWrite + Unpin>(&mut self, stream: &mut S) -> End {
        match self.serve(stream).await {
            Ok(end) => end,
            Err(_) => End::Broken,
        }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&mut self, stream: &mut S) -> io::Result<End> {
        let mut answer = [0; 134];
        if let Some(head) = answer.first_chunk_mut::<10>() {
            let (size, flags) = head.split_at_mut(8);
            size.copy_from_slice(&self.size.to_be_bytes());
            flags.copy_from_slice(&EXPORT_FLAGS.to_be_bytes());
        }
        stream.write_all(&answer).await?;
        stream.flush().await?;
        loop {
            let Some(request) = read_request(stream).await? else { return Ok(End::Orderly) };
            let refusal = match request.command {
                READ if is_aligned(&request) => {
                    if let Some(end) = self.read(stream, &request).await? {
                        return Ok(end);
                    }
                    continue;
                }
                DISC => return Ok(End::Orderly),
                WRITE => EPERM,
                _ => EINVAL,
            };
            reply(stream, request.handle, refusal).await?;
            stream.flush().await?;
            return Ok(End::Orderly);
        }
    }

    /// Answers a `READ`. Its success header goes out before anything is looked at; after a failure only the end of
    /// the connection is left.
    async fn read<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        request: &Request,
    ) -> io::Result<Option<End>> {
        let delay = self.shared.faults.strike(self.shared.host, Some(self.vdi), |fault| match fault {
            Fault::ReadDelay(delay) => Some(*delay),
            _ => None,
        });
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        reply(stream, request.handle, 0).await?;
        self.shared.counters.disk(self.shared.host, self.vdi, |host, vdi| {
            host.reads += 1;
            vdi.reads += 1;
        });
        // Lengths from 2 GiB and offsets from 2^63 are negative to the real server.
        let range = i32::try_from(request.length).ok().zip(i64::try_from(request.offset).ok());
        let range = range.and_then(|_| ByteRange::with_length(request.offset, u64::from(request.length)).ok());
        let Some(range) = range else { return Ok(Some(End::Orderly)) };
        for piece in range.pieces(PIECE_BYTES) {
            if piece.end() > self.size || self.is_broken(piece) {
                return Ok(Some(End::Orderly));
            }
            let Ok(data) = self.fetch(piece).await else { return Ok(Some(End::Orderly)) };
            if let Some(end) = self.send(stream, &data).await? {
                return Ok(Some(end));
            }
        }
        stream.flush().await?;
        Ok(None)
    }

    fn is_broken(&self, piece: ByteRange) -> bool {
        let strike = |fault: &Fault| match fault {
            Fault::MediaError(range) => range.intersect(piece).map(|_| ()),
            _ => None,
        };
        self.shared.faults.strike(self.shared.host, Some(self.vdi), strike).is_some()
    }

    async fn fetch(&self, piece: ByteRange) -> io::Result<Bytes> {
        let device = Arc::clone(&self.device);
        let length = usize::try_from(piece.len()).map_err(io::Error::other)?;
        tokio::task::spawn_blocking(move || device.read(piece.start(), length)).await.map_err(io::Error::other)?
    }

    /// Sends data, or as much of it as the faults of this connection let through.
    async fn send<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        data: &[u8],
    ) -> io::Result<Option<End>> {
        let limit = self.drop_after.into_iter().chain(self.stall_after).min();
        let left = limit.map(|limit| limit.saturating_sub(self.sent_bytes));
        let allowed = left.and_then(|left| usize::try_from(left).ok()).and_then(|left| data.get(..left));
        let sent = allowed.unwrap_or(data);
        stream.write_all(sent).await?;
        self.sent_bytes += sent.len() as u64;
        self.shared.counters.disk(self.shared.host, self.vdi, |host, vdi| {
            host.sent_bytes += sent.len() as u64;
            vdi.sent_bytes += sent.len() as u64;
        });
        if sent.len() == data.len() && limit.is_none_or(|limit| self.sent_bytes < limit) {
            return Ok(None);
        }
        stream.flush().await?;
        if self.drop_after.is_some_and(|limit| self.sent_bytes >= limit) {
            return Ok(Some(End::Reset));
        }
        // Nothing more comes, but the client's hang-up is noticed.
        let mut ignored = [0; 512];
        while stream.read(&mut ignored).await? > 0 {}
        Ok(Some(End::Broken))
    }
}

/// A read that the device can take.
fn is_aligned(request: &Request) -> bool {
    request.offset.is_multiple_of(SECTOR_BYTES) && u64::from(request.length).is_multiple_of(SECTOR_BYTES)
}

/// The next request; `None` after a wrong magic, which ends the connection as an error of ours would.
async fn read_request<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Option<Request>> {
    // One read for the whole header, and no buffer: what a client sends after it stays in the socket.
    let mut header = [0; 28];
    stream.read_exact(&mut header).await?;
    let mut fields = header.as_slice();
    let (magic, command) = (fields.get_u32(), fields.get_u32());
    let (handle, offset, length) = (fields.get_u64(), fields.get_u64(), fields.get_u32());
    Ok((magic == REQUEST_MAGIC).then_some(Request { command, handle, offset, length }))
}

async fn reply<S: AsyncWrite + Unpin>(stream: &mut S, handle: u64, error: u32) -> io::Result<()> {
    let value = u128::from(REPLY_MAGIC) << 96 | u128::from(error) << 64 | u128::from(handle);
    stream.write_all(&value.to_be_bytes()).await
}
