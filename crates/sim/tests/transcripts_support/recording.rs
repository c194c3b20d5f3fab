//! Files of one request and its response, as they were recorded from a real server.

use std::path::Path;

use super::super::wire::{Answer, parse};

/// One file.
pub struct Recording {
    pub name: String,
    /// Name without encoding and ending: what was done.
    pub stem: String,
    /// Start line and headers of the request.
    pub request_head: Vec<String>,
    pub request_body: String,
    /// Everything of the response.
    pub response: String,
}

impl Recording {
    pub fn read(path: &Path) -> Self {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(path).unwrap();
        let (_, rest) = text.split_once("=== request ===\n").expect("a request");
        let (request, response) = rest.split_once("=== response ===\n").expect("a response");
        let (head, body) = request.split_once("\n\n").expect("an empty line");
        Self {
            stem: Self::read_stem(path),
            request_head: head.lines().map(str::to_owned).collect(),
            request_body: body.trim_end_matches('\n').to_owned(),
            response: response.to_owned(),
            name,
        }
    }

    /// What a file is about.
    pub fn read_stem(path: &Path) -> String {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let endings = [".jsonrpc1.txt", ".jsonrpc.txt", ".xmlrpc.txt", ".txt"];
        endings.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(&name).to_owned()
    }

    /// The recorded answer; `None` where there was none.
    pub fn answer(&self) -> Option<Answer> {
        if self.response.starts_with('[') {
            return None;
        }
        let (head, body) = self.response.split_once("\n\n").unwrap_or((&self.response, ""));
        let mut lines = head.lines();
        let start = lines.next()?.to_owned();
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        Some(Answer { start, headers, body: body.trim_end_matches('\n').as_bytes().to_vec() })
    }

    /// Whether the recorded server closed the connection without an answer, or gave none for as long as the client
    /// waited.
    pub fn is_silent(&self) -> bool {
        self.response.starts_with("[nothing")
    }

    /// References in the request, in the order of their first mention.
    pub fn references(&self) -> Vec<String> {
        let text = format!("{}\n{}", self.request_head.join("\n"), self.request_body);
        let mut found: Vec<String> = Vec::new();
        for (at, _) in text.match_indices("OpaqueRef:") {
            let reference: String =
                text[at..].chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, ':' | '-')).collect();
            if !found.contains(&reference) {
                found.push(reference);
            }
        }
        found
    }

    /// The request's bytes with other references, and with a real body in place of a described one.
    pub fn request(&self, replacements: &[(String, String)], binary: Option<&[u8]>) -> Vec<u8> {
        let replace =
            |text: &str| replacements.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from.as_str(), to));
        let mut body = replace(&self.request_body).into_bytes();
        if self.request_body.starts_with("[binary body") {
            body = binary.expect("a body for this request").to_vec();
        }
        if self.request_head.iter().any(|line| line.starts_with("Transfer-Encoding")) {
            body = replace(&self.request_body).replace('\n', "\r\n").into_bytes();
        }
        let mut out = Vec::new();
        for line in &self.request_head {
            let line = if line.starts_with("Content-Length:") {
                format!("Content-Length: {}", body.len())
            } else {
                replace(line)
            };
            out.extend_from_slice(line.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&body);
        out
    }
}

/// The number of bytes in `[binary body, N bytes, ...]`.
pub fn described_length(text: &str) -> Option<usize> {
    text.strip_prefix("[binary body, ")?.split(' ').next()?.parse().ok()
}

/// An answer from its bytes.
pub fn answer_of(data: &[u8]) -> Option<Answer> {
    parse(data, true)
}
