//! Reading requests: one block of headers of bounded size, then a body of known length.

use std::io;

use percent_encoding::percent_decode_str;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Most bytes that start line and headers may have together.
const HEADER_LIMIT: usize = 1006;

/// A request without its body.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) query: Vec<(String, String)>,
    pub(super) cookies: Vec<(String, String)>,
    /// `1.0` or `1.1`.
    pub(super) version: String,
    pub(super) content_length: Option<u64>,
    pub(super) transfer_encoding: Option<String>,
    pub(super) authorization: Option<String>,
    pub(super) close: bool,
}

impl Request {
    /// A parameter; cookies come before the query, as in xapi.
    pub(super) fn param(&self, name: &str) -> Option<&str> {
        let find = |items: &'_ [(String, String)]| items.iter().position(|(known, _)| known == name);
        if let Some(index) = find(&self.cookies) {
            return self.cookies.get(index).map(|(_, value)| value.as_str());
        }
        find(&self.query).and_then(|index| self.query.get(index)).map(|(_, value)| value.as_str())
    }
}

/// Why there is no request.
pub(super) enum NoRequest {
    /// The client closed the connection.
    End,
    /// Too many bytes of headers.
    TooLarge,
    /// Not HTTP.
    Malformed,
}

/// A stream with the bytes that were read too far.
pub(super) struct Input<R> {
    stream: R,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Input<R> {
    pub(super) fn new(stream: R) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// Reads start line and headers.
    pub(super) async fn request(&mut self) -> Result<Request, NoRequest> {
        let end = loop {
            if let Some(end) = header_end(&self.buffer) {
                break end;
            }
            if self.buffer.len() > HEADER_LIMIT {
                return Err(NoRequest::TooLarge);
            }
            let read = self.stream.read_buf(&mut self.buffer).await.map_err(|_| NoRequest::End)?;
            if read == 0 {
                return Err(NoRequest::End);
            }
        };
        if end > HEADER_LIMIT {
            return Err(NoRequest::TooLarge);
        }
        let block: Vec<u8> = self.buffer.drain(..end).collect();
        parse(&String::from_utf8_lossy(&block)).ok_or(NoRequest::Malformed)
    }

    /// Reads at most that many bytes of the body; empty at its end.
    pub(super) async fn some(&mut self, most: usize) -> io::Result<Vec<u8>> {
        if self.buffer.is_empty() {
            let mut piece = vec![0; most.min(1 << 18)];
            let read = self.stream.read(&mut piece).await?;
            piece.truncate(read);
            return Ok(piece);
        }
        let take = most.min(self.buffer.len());
        Ok(self.buffer.drain(..take).collect())
    }

    /// Reads exactly that many bytes.
    pub(super) async fn exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut body = Vec::with_capacity(length.min(1 << 20));
        while body.len() < length {
            let piece = self.some(length - body.len()).await?;
            if piece.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }
}

/// The length of the block of headers with its empty line.
fn header_end(buffer: &[u8]) -> Option<usize> {
    let crlf = buffer.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
    let lf = buffer.windows(2).position(|window| window == b"\n\n").map(|at| at + 2);
    match (crlf, lf) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

fn parse(block: &str) -> Option<Request> {
    let mut lines = block.lines();
    let mut start = lines.next()?.split(' ').filter(|part| !part.is_empty());
    let (method, target, version) = (start.next()?, start.next()?, start.next()?);
    let version = version.trim().strip_prefix("HTTP/")?.to_owned();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method: method.to_owned(),
        path: decode(path),
        query: query.split('&').filter(|part| !part.is_empty()).map(pair).collect(),
        close: version == "1.0",
        version,
        ..Request::default()
    };
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        match name.to_lowercase().as_str() {
            "content-length" => request.content_length = Some(value.parse().ok()?),
            "transfer-encoding" => request.transfer_encoding = Some(value.to_owned()),
            "authorization" => request.authorization = Some(value.to_owned()),
            "cookie" => {
                let parts = value.split([';', '&']).map(str::trim).filter(|part| !part.is_empty());
                request.cookies.extend(parts.map(pair));
            }
            "connection" if value.eq_ignore_ascii_case("close") => request.close = true,
            "connection" if value.eq_ignore_ascii_case("keep-alive") => request.close = false,
            _ => {}
        }
    }
    Some(request)
}

fn pair(part: &str) -> (String, String) {
    let (name, value) = part.split_once('=').unwrap_or((part, ""));
    (decode(name), decode(value))
}

fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_head_panics(head in ".{0,300}", query in "[ -~]{0,100}") {
            let _ = parse(&head);
            let _ = parse(&format!("GET /a?{query} HTTP/1.1\r\nCookie: {query}\r\n{head}\r\n\r\n"));
        }
    }

    #[test]
    fn cookies_come_before_the_query() {
        let text =
            "GET /export_raw_vdi?vdi=a&session_id=OpaqueRef%3Ax HTTP/1.1\r\nCookie: session_id=OpaqueRef:y\r\n\r\n";
        let request = parse(text).unwrap();
        assert_eq!(request.param("session_id"), Some("OpaqueRef:y"));
        assert_eq!(request.param("vdi"), Some("a"));
        assert!(!request.close);
    }
}
