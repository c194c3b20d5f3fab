//! Heads of HTTP messages where `hyper` is not used (uploads without a length), and the limit of request heads.

use crate::error::{BoxError, XenApiError};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of a request's head that every host accepts (1006 passed a real one, 1007 did not).
pub(crate) const HEAD_LIMIT: usize = 1000;

/// Bytes of a response's head that are read at most.
const RESPONSE_HEAD_LIMIT: usize = 16 << 10;

/// Refuses a request whose head would be too long for hosts.
pub(crate) fn check_request_head(operation: &str, length: usize) -> Result<(), XenApiError> {
    if length > HEAD_LIMIT {
        return Err(XenApiError::RequestHead { operation: operation.to_owned(), length, limit: HEAD_LIMIT });
    }
    Ok(())
}

/// What matters of a response's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) location: Option<String>,
}

impl Head {
    /// Reads the head's text, without the empty line.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut lines = text.split('\n').map(|line| line.trim_end_matches('\r'));
        let mut words = lines.next()?.split(' ');
        if !words.next()?.starts_with("HTTP/1.") {
            return None;
        }
        let status = words.next()?.parse().ok().filter(|status| (100..=999).contains(status))?;
        let location = lines
            .filter_map(|line| line.split_once(':'))
            .find_map(|(name, value)| name.trim().eq_ignore_ascii_case("location").then(|| value.trim().to_owned()));
        Some(Self { status, location })
    }
}

/// Reads a response's head and nothing behind it; bytes come one at a time, since what follows is not ours to take.
pub(crate) async fn read_head<S: AsyncRead + Unpin + ?Sized>(stream: &mut S) -> Result<Head, BoxError> {
    let mut bytes = Vec::new();
    loop {
        bytes.push(stream.read_u8().await?);
        if bytes.ends_with(b"\r\n\r\n") || bytes.ends_with(b"\n\n") {
            break;
        }
        if bytes.len() >= RESPONSE_HEAD_LIMIT {
            return Err("the head of the response does not end".into());
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    Head::parse(&text).ok_or_else(|| "the response is not HTTP".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heads_in_the_manner_of_hosts() {
        let text = "HTTP/1.1 200 OK\r\nConnection: close\r\ntask-id:OpaqueRef:1\r\n\r\n";
        assert_eq!(Head::parse(text), Some(Head { status: 200, location: None }));
        let text = "HTTP/1.1 302 Found\r\nlocation: https://10.0.0.2/export_raw_vdi?a=b\r\n\r\n";
        let location = Some("https://10.0.0.2/export_raw_vdi?a=b".to_owned());
        assert_eq!(Head::parse(text), Some(Head { status: 302, location }));
        for text in ["", "HTTP/1.1", "HTTP/1.1 x", "SSH-2.0 200 OK", "HTTP/1.1 99 no", "HTTP/1.1  200 OK"] {
            assert_eq!(Head::parse(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn an_endless_head_is_an_error() {
        let long = vec![b'x'; 1 << 20];
        assert!(read_head(&mut long.as_slice()).await.is_err());
        assert!(read_head(&mut b"HTTP/1.1 200 OK\r\n".as_slice()).await.is_err());
        let mut both = b"HTTP/1.1 200 OK\r\n\r\nbody".as_slice();
        assert_eq!(read_head(&mut both).await.unwrap().status, 200);
        assert_eq!(both, b"body");
    }

    proptest! {
        #[test]
        fn no_head_panics(text in "(HTTP/1\\.[01] )?\\PC{0,60}") {
            let _ = Head::parse(&text);
        }
    }
}
