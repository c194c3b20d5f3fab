//! A few requests of S3, signed here and sent over a plain connection: what the product's own client has no words for,
//! and an eye of its own for what the product has stored.

use crate::Outcome;
use ring::{digest, hmac};
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

/// No answer of a gateway takes longer on any machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Somebody with keys of a service that answers without TLS.
#[derive(Clone, Debug)]
pub struct Client {
    /// `127.0.0.1:7480`.
    pub host: String,
    /// Access key.
    pub access_key: String,
    /// Secret key.
    pub secret_key: String,
}

/// One request. What is not named is empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// `PUT`.
    pub method: &'a str,
    /// `/bucket/folder/object`, without characters that an address has to escape.
    pub path: &'a str,
    /// `versioning=`, sorted and escaped.
    pub query: &'a str,
    /// More headers, with names in small letters.
    pub headers: &'a [(&'a str, &'a str)],
    /// What is sent.
    pub body: &'a [u8],
}

/// What the service said.
#[derive(Clone, Debug)]
pub struct Answer {
    /// 200.
    pub status: u16,
    /// The head, as it came.
    pub head: String,
    /// What was sent back.
    pub body: Vec<u8>,
}

impl Answer {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    /// Sends a request and waits for the answer, whatever it says.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn send(&self, request: Request<'_>) -> Outcome<Answer> {
        let head = self.head(&request, &jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string());
        let mut stream = TcpStream::connect(&self.host)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(head.as_bytes())?;
        stream.write_all(request.body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or("an answer without a head")?;
        let body = answer.split_off(end + 4);
        let head = String::from_utf8(answer)?;
        let status =
            head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or("an answer without a status")?;
        Ok(Answer { status, head, body })
    }

    /// As [`Self::send`], and the answer must be a good one.
    ///
    /// # Errors
    /// What the service says.
    pub fn expect(&self, request: Request<'_>) -> Outcome<Answer> {
        let answer = self.send(request)?;
        match answer.status {
            200..300 => Ok(answer),
            status => Err(format!("{} {}: {status} {}", request.method, request.path, answer.text()).into()),
        }
    }

    /// The head of a request with its signature of version 4.
    fn head(&self, request: &Request<'_>, time: &str) -> String {
        let day = time.get(..8).unwrap_or_default();
        let content = hex(digest::digest(&digest::SHA256, request.body).as_ref());
        let mut headers: Vec<(&str, &str)> =
            vec![("host", &self.host), ("x-amz-content-sha256", &content), ("x-amz-date", time)];
        headers.extend_from_slice(request.headers);
        headers.sort_unstable();
        let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let listed: String = headers.iter().map(|(name, value)| format!("{name}:{}\n", value.trim())).collect();
        let canonical =
            format!("{}\n{}\n{}\n{listed}\n{names}\n{content}", request.method, request.path, request.query);
        let scope = format!("{day}/us-east-1/s3/aws4_request");
        let hashed = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
        let to_sign = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{hashed}");
        let first = format!("AWS4{}", self.secret_key).into_bytes();
        let key = [day, "us-east-1", "s3", "aws4_request"].iter().fold(first, |key, part| sign(&key, part));
        let signature = hex(&sign(&key, &to_sign));
        let query = if request.query.is_empty() { String::new() } else { format!("?{}", request.query) };
        let mut head = format!("{} {}{query} HTTP/1.1\r\n", request.method, request.path);
        for (name, value) in headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        let _ = write!(
            head,
            "authorization: AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={signature}\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            self.access_key,
            request.body.len()
        );
        head
    }
}

fn sign(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
