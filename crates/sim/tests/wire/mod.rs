//! A client of a few lines over plain sockets, so that tests see every byte of an answer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests, of which each test uses its part"
)]

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use xenvault_sim::SimPool;

/// An answer, in parts.
#[derive(Debug)]
pub struct Answer {
    pub start: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Sends bytes to a host of the pool and reads one answer: to its length, or to the end of the connection.
pub async fn exchange(url: &str, request: &[u8]) -> Answer {
    let address = url.split("://").nth(1).expect("a URL");
    let mut stream = TcpStream::connect(address).await.expect("connects");
    stream.write_all(request).await.expect("sends");
    read_answer(&mut stream).await
}

pub async fn read_answer(stream: &mut TcpStream) -> Answer {
    let mut data = Vec::new();
    loop {
        if let Some(answer) = parse(&data, false) {
            return answer;
        }
        let mut piece = vec![0; 65536];
        match stream.read(&mut piece).await {
            Ok(0) | Err(_) => break,
            Ok(read) => data.extend_from_slice(&piece[..read]),
        }
    }
    parse(&data, true).unwrap_or(Answer { start: String::new(), headers: Vec::new(), body: Vec::new() })
}

pub fn parse(data: &[u8], ended: bool) -> Option<Answer> {
    let end = data.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&data[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let start = lines.next()?.to_owned();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect();
    let length = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let body = &data[end + 4..];
    match length {
        Some((_, length)) => {
            let length: usize = length.parse().expect("a length");
            (body.len() >= length).then(|| Answer { start, headers, body: body[..length].to_vec() })
        }
        None => ended.then(|| Answer { start, headers, body: body.to_vec() }),
    }
}

/// A POST of JSON.
pub fn post(path: &str, body: &str) -> Vec<u8> {
    format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// A JSON-RPC 2.0 client with a session.
pub struct Client {
    pub url: String,
    pub session: String,
}

/// A failed call: code and parameters.
pub type Failed = (String, Vec<String>);

impl Client {
    pub async fn login(pool: &SimPool) -> Self {
        let url = pool.url();
        let params = json!([pool.user(), pool.password(), "1.0", "test"]);
        let session = raw_call(&url, "session.login_with_password", params).await.expect("logs in");
        Self { url, session: session.as_str().expect("a reference").to_owned() }
    }

    pub async fn call(&self, method: &str, params: &[Value]) -> Result<Value, Failed> {
        let mut all = vec![json!(self.session)];
        all.extend(params.iter().cloned());
        raw_call(&self.url, method, Value::Array(all)).await
    }

    /// A call that succeeds.
    pub async fn ok(&self, method: &str, params: &[Value]) -> Value {
        match self.call(method, params).await {
            Ok(value) => value,
            Err(failed) => panic!("{method}: {failed:?}"),
        }
    }

    /// A call that gives a reference.
    pub async fn reference(&self, method: &str, params: &[Value]) -> String {
        self.ok(method, params).await.as_str().expect("a reference").to_owned()
    }

    /// A call that fails.
    pub async fn failure(&self, method: &str, params: &[Value]) -> Failed {
        match self.call(method, params).await {
            Ok(value) => panic!("{method} succeeded: {value}"),
            Err(failed) => failed,
        }
    }

    /// The end of a task: its record.
    pub async fn wait(&self, task: &str) -> Value {
        loop {
            let record = self.ok("task.get_record", &[json!(task)]).await;
            if record["status"] != "pending" {
                return record;
            }
            let class = format!("task/{task}");
            let token = "";
            self.ok("event.from", &[json!([class]), json!(token), json!(0.05)]).await;
        }
    }
}

pub async fn raw_call(url: &str, method: &str, params: Value) -> Result<Value, Failed> {
    let body = json!({"jsonrpc": "2.0", "method": method, "params": params, "id": 1}).to_string();
    let answer = exchange(url, &post("/jsonrpc", &body)).await;
    assert_eq!(answer.start, "HTTP/1.1 200 OK", "{method}: {}", answer.text());
    let value: Value = serde_json::from_slice(&answer.body).expect("JSON");
    match value.get("error") {
        None => Ok(value["result"].clone()),
        Some(error) => {
            let params = error["data"].as_array().expect("parameters");
            let params = params.iter().map(|param| param.as_str().expect("text").to_owned()).collect();
            Err((error["message"].as_str().expect("a code").to_owned(), params))
        }
    }
}
