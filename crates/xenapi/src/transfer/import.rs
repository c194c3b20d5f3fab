//! Writing a disk: in xapi's own chunk protocol, or from begin to end.
//!
//! The requests are written by hand: an upload with neither a length nor a transfer coding is what hosts want for
//! chunks, and what HTTP libraries refuse to send.

use super::{Handler, Reply, TASK_END_LIMIT, reason, start, success};
use crate::error::{BoxError, Phase, XenApiError};
use crate::http_client::{HttpClient, Pace, Stream, TooSlow, USER_AGENT, check_request_head, read_head};
use crate::session_handle::{Floor, Session};
use crate::tasks::TaskGuard;
use crate::{host, vdi};
use bytes::Bytes;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, WriteHalf};

const OPERATION: &str = "/import_raw_vdi";

/// Bytes that are handed to the connection at once.
const PIECE_BYTES: usize = 1 << 20;

/// An upload that the host has accepted.
struct Upload {
    writer: WriteHalf<Box<dyn Stream>>,
    /// Reads what the host sends while we send, so that it is never kept from going on.
    reader: tokio::task::JoinHandle<()>,
    guard: TaskGuard,
    host: String,
    floor: Floor,
    pace: Pace,
    sent: u64,
    failed: bool,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload").field("host", &self.host).field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // The other half of the connection: it closes with the last of them.
        self.reader.abort();
    }
}

impl Upload {
    async fn start(
        session: &Session,
        host: &host::Ref,
        query: Vec<(&'static str, String)>,
        length: Option<u64>,
    ) -> Result<Self, XenApiError> {
        let handler = Handler { path: OPERATION, query };
        let timeouts = &session.options().timeouts;
        let wait = timeouts.work_call;
        let sent = start(session, host, &handler, |client, target| async move {
            let at = client.endpoint.display_host();
            Ok(match request(&client, &target, length, wait).await? {
                Reply::Accepted(stream) => Reply::Accepted((stream, at)),
                Reply::Elsewhere(location) => Reply::Elsewhere(location),
                Reply::Refused(status) => Reply::Refused(status),
            })
        });
        let ((stream, at), guard) = sent.await?;
        let (mut read_half, writer) = tokio::io::split(stream);
        let reader = tokio::spawn(async move {
            // What comes is at most a second response; the task has the same reason in a better form.
            let _ = tokio::io::copy(&mut read_half, &mut tokio::io::sink()).await;
        });
        let floor = timeouts.floor.clone();
        let pace = Pace::new(&floor);
        Ok(Self { writer, reader, guard, host: at, floor, pace, sent: 0, failed: false })
    }

    /// Hands bytes to the connection and returns when it has taken them.
    async fn send(&mut self, data: &[u8]) -> Result<(), XenApiError> {
        let mut rest = data;
        while !rest.is_empty() {
            let piece = rest.get(..PIECE_BYTES).unwrap_or(rest);
            match self.pace.wait(self.writer.write(piece)).await {
                Ok(Ok(0)) => return Err(self.broken("the connection takes no more bytes".into())),
                Ok(Ok(count)) => {
                    self.pace.moved(count);
                    rest = rest.get(count..).unwrap_or_default();
                }
                Ok(Err(source)) => return Err(self.broken(source.into())),
                Err(TooSlow) => return Err(self.stalled()),
            }
        }
        Ok(())
    }

    fn broken(&self, source: BoxError) -> XenApiError {
        XenApiError::Connection { host: self.host.clone(), phase: Phase::Send, source }
    }

    fn stalled(&self) -> XenApiError {
        XenApiError::too_slow(self.host.clone(), Phase::Send, &self.floor)
    }

    /// The real reason of a failed write. The connection is closed by then.
    async fn explain(&mut self, error: XenApiError) -> XenApiError {
        self.failed = true;
        self.reader.abort();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.writer.shutdown()).await;
        let guard = self.guard.take();
        reason(OPERATION, guard, TASK_END_LIMIT).await.unwrap_or(error)
    }

    /// Sends what is buffered and waits for the task.
    async fn finish(mut self) -> Result<(), XenApiError> {
        if self.failed {
            return Err(self.broken("the transfer had failed before".into()));
        }
        match self.pace.wait(self.writer.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(source)) => {
                let error = self.broken(source.into());
                return Err(self.explain(error).await);
            }
            Err(TooSlow) => {
                let error = self.stalled();
                return Err(self.explain(error).await);
            }
        }
        success(OPERATION, self.guard.take()).await
    }
}

/// Sends the head of the request and reads the head of the answer, which comes before the host reads on.
async fn request(
    client: &HttpClient,
    target: &str,
    length: Option<u64>,
    wait: Duration,
) -> Result<Reply<Box<dyn Stream>>, XenApiError> {
    let host = client.endpoint.display_host();
    let length = length.map(|length| format!("Content-Length: {length}\r\n")).unwrap_or_default();
    let head = format!(
        "PUT {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {USER_AGENT}\r\nConnection: close\r\n{length}\r\n"
    );
    check_request_head(OPERATION, head.len())?;
    let mut stream = client.open().await?;
    let exchange = async {
        stream.write_all(head.as_bytes()).await?;
        stream.flush().await?;
        read_head(&mut stream).await
    };
    let answer = match tokio::time::timeout(wait, exchange).await {
        Err(_) => return Err(XenApiError::Timeout { host, phase: Phase::Response, waited: wait }),
        Ok(Err(source)) => return Err(XenApiError::Connection { host, phase: Phase::Response, source }),
        Ok(Ok(answer)) => answer,
    };
    Ok(match (answer.status, answer.location) {
        (200, _) => Reply::Accepted(stream),
        (302, Some(location)) => Reply::Elsewhere(location),
        (status, _) => Reply::Refused(status),
    })
}

/// A disk that is being written with xapi's chunk protocol: places may be left out, and keep their content.
///
/// Dropping it without [`ChunkedImport::finish`] ends the transfer as a failure.
#[derive(Debug)]
pub struct ChunkedImport {
    upload: Upload,
}

impl ChunkedImport {
    /// Writes `data` at `offset` (bytes). Returns when the network has taken it, so the sender is held back to the
    /// host's speed.
    ///
    /// # Errors
    /// The task's failure where the host gave up, else [`XenApiError::Connection`] or [`XenApiError::TooSlow`]. Nothing
    /// can be written after an error, nor after a write whose future was dropped before it was done.
    pub async fn write(&mut self, offset: u64, data: Bytes) -> Result<(), XenApiError> {
        if self.upload.failed {
            return Err(self.upload.broken("the transfer had failed before".into()));
        }
        // Until all of it is sent: a write that is dropped half-way leaves the two sides out of step.
        self.upload.failed = true;
        let mut at = offset;
        for piece in data.chunks(PIECE_BYTES) {
            let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            let sending = async {
                self.upload.send(&header(at, length)).await?;
                self.upload.send(piece).await
            };
            if let Err(error) = sending.await {
                return Err(self.upload.explain(error).await);
            }
            at = at.saturating_add(u64::from(length));
            self.upload.sent = self.upload.sent.saturating_add(u64::from(length));
        }
        self.upload.failed = false;
        Ok(())
    }

    /// Bytes of disk content that were written so far.
    pub fn sent_bytes(&self) -> u64 {
        self.upload.sent
    }

    /// Ends the stream and waits for the task: only its success says that the data is on the disk.
    ///
    /// # Errors
    /// As [`ChunkedImport::write`], [`XenApiError::TaskVanished`].
    pub async fn finish(mut self) -> Result<(), XenApiError> {
        if !self.upload.failed
            && let Err(error) = self.upload.send(&header(0, 0)).await
        {
            return Err(self.upload.explain(error).await);
        }
        self.upload.finish().await
    }
}

/// What stands in front of each chunk: offset and length, little-endian. Both zero: the end.
fn header(offset: u64, length: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    let parts = offset.to_le_bytes().into_iter().chain(length.to_le_bytes());
    for (to, from) in bytes.iter_mut().zip(parts) {
        *to = from;
    }
    bytes
}

/// Starts writing to `vdi` over `host`, which should have the disk's SR attached.
///
/// # Errors
/// As [`super::export_raw_vdi`].
pub async fn import_raw_vdi_chunked(
    session: &Session,
    host: &host::Ref,
    vdi: &vdi::Ref,
) -> Result<ChunkedImport, XenApiError> {
    let query = vec![("vdi", vdi.as_str().to_owned()), ("format", "raw".to_owned()), ("chunked", "true".to_owned())];
    Ok(ChunkedImport { upload: Upload::start(session, host, query, None).await? })
}

/// A disk that is being written from its start, without gaps.
///
/// Dropping it without [`RawImport::finish`] ends the transfer as a failure.
#[derive(Debug)]
pub struct RawImport {
    upload: Upload,
    length: u64,
}

impl RawImport {
    /// Writes the next bytes. Returns when the network has taken them.
    ///
    /// # Errors
    /// As [`ChunkedImport::write`]; [`XenApiError::Length`] for more than was announced, which are not sent.
    pub async fn write(&mut self, data: Bytes) -> Result<(), XenApiError> {
        if self.upload.failed {
            return Err(self.upload.broken("the transfer had failed before".into()));
        }
        let found = self.upload.sent.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        if found > self.length {
            return Err(XenApiError::Length { operation: OPERATION.to_owned(), expected: self.length, found });
        }
        // Until all of it is sent, as above.
        self.upload.failed = true;
        if let Err(error) = self.upload.send(&data).await {
            return Err(self.upload.explain(error).await);
        }
        self.upload.failed = false;
        self.upload.sent = found;
        Ok(())
    }

    /// Waits for the task.
    ///
    /// # Errors
    /// As [`RawImport::write`]; [`XenApiError::Length`] for less than was announced: the host would take that for a
    /// success.
    pub async fn finish(self) -> Result<(), XenApiError> {
        let found = self.upload.sent;
        if !self.upload.failed && found != self.length {
            return Err(XenApiError::Length { operation: OPERATION.to_owned(), expected: self.length, found });
        }
        self.upload.finish().await
    }
}

/// Starts writing exactly `length` bytes to `vdi`, which should be its size: the host does not compare them.
///
/// # Errors
/// As [`super::export_raw_vdi`].
pub async fn import_raw_vdi(
    session: &Session,
    host: &host::Ref,
    vdi: &vdi::Ref,
    length: u64,
) -> Result<RawImport, XenApiError> {
    let query = vec![("vdi", vdi.as_str().to_owned()), ("format", "raw".to_owned())];
    Ok(RawImport { upload: Upload::start(session, host, query, Some(length)).await?, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_headers_are_little_endian() {
        assert_eq!(header(0x0102_0304, 0x0506), [4, 3, 2, 1, 0, 0, 0, 0, 6, 5, 0, 0]);
        assert_eq!(header(0, 0), [0; 12]);
    }
}
