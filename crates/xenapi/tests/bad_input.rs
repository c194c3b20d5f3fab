//! Answers that no pool should give: each ends in bounded time and memory with a clear error.
//!
//! One test, so that its peak of memory is its own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "helpers of tests")]

mod scripted;

use scripted::{Pool, Reply, Step};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use xenvault_xenapi::{Floor, Protocol, Repeat, Retry, Session, XenApiError};

/// MiB that one answer may take beyond its own length (and the copy in which the scripted host sends it).
const MIB: usize = 1 << 20;

/// Lets the kernel forget the highest use of memory so far.
fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// A figure of this process's memory in bytes.
fn memory(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

struct Case {
    name: &'static str,
    protocol: Protocol,
    body: Vec<u8>,
    /// What the causes say.
    says: &'static str,
    /// Memory in bytes, for each byte of the answer.
    factor: usize,
}

fn xml(value: &str) -> Vec<u8> {
    let begin = "<?xml version=\"1.0\"?><methodResponse><params><param>";
    format!("{begin}{value}</param></params></methodResponse>").into_bytes()
}

fn cases() -> Vec<Case> {
    let case = |name, protocol, body, says| Case { name, protocol, body, says, factor: 6 };
    let bomb = {
        let mut text = "<?xml version=\"1.0\"?><!DOCTYPE a [<!ENTITY a \"aaaaaaaaaa\">".to_owned();
        for level in 0..30 {
            let (this, last) = (char::from(b'b' + level % 25), char::from(b'a' + level % 25));
            text.push_str(&format!("<!ENTITY {this}{level} \"{}\">", format!("&{last};").repeat(10)));
        }
        text + "]><methodResponse><params><param><value>&z;</value></param></params></methodResponse>"
    };
    let wide = |item: &str, count: usize| format!("<value><array><data>{}</data></array></value>", item.repeat(count));
    let html = "<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>";
    let unclosed = "<value><struct><member><name>Status</name><value>Success</value></member>";
    vec![
        case("an entity bomb", Protocol::Xml, bomb.into_bytes(), "declares a document type"),
        case("ten million elements", Protocol::Xml, xml(&wide("<value/>", 10_000_000)), "more than 8388608 elements"),
        case("deep XML", Protocol::Xml, xml(&"<value><array><data>".repeat(1_000_000)), "nested deeper than 256"),
        case("an unknown entity", Protocol::Xml, xml("<value>&bomb;</value>"), "not well-formed"),
        case("a document that ends early", Protocol::Xml, xml(unclosed), "not well-formed"),
        case("a page", Protocol::Xml, html.into(), "declares a document type"),
        case("XML that is none", Protocol::Xml, vec![0xff; 1000], "not UTF-8"),
        case("another document", Protocol::Xml, xml("<value>x</value>"), "not an answer of XenAPI"),
        case("nothing", Protocol::Xml, Vec::new(), "not well-formed"),
        case("deep JSON", Protocol::Json, vec![b'['; MIB], "not JSON-RPC"),
        case("deep maps", Protocol::Json, b"{\"a\":".repeat(MIB / 4), "not JSON-RPC"),
        case(
            "ten million values",
            Protocol::Json,
            format!("{{\"id\":1,\"result\":[{}0]}}", "0,".repeat(10_000_000)).into_bytes(),
            "more than 8388608 values",
        ),
        case(
            "four million small maps",
            Protocol::Json,
            format!("{{\"id\":1,\"result\":[{}0]}}", "{\"\":0},".repeat(4_000_000)).into_bytes(),
            "more than 8388608 values",
        ),
        case(
            "a million small maps",
            Protocol::Xml,
            xml(&wide("<value><struct><member><name/><value/></member></struct></value>", 1_000_000)),
            "more than 8388608 elements",
        ),
        case(
            "JSON that ends early",
            Protocol::Json,
            br#"{"jsonrpc":"2.0","result":["OpaqueRef:1""#.to_vec(),
            "not JSON-RPC",
        ),
        case("a page for JSON", Protocol::Json, html.into(), "not JSON-RPC"),
        case("an answer to another call", Protocol::Json, br#"{"id":-5,"result":[]}"#.to_vec(), "answers another call"),
        case("nothing in JSON", Protocol::Json, Vec::new(), "not JSON-RPC"),
    ]
}

/// The answers of a login in XML-RPC, which the scripted host does not have.
fn login_in_xml(method: &str) -> Option<Vec<u8>> {
    let value = match method {
        "session.login_with_password" => "<value>OpaqueRef:session</value>",
        "pool.get_all_records" => {
            "<value><struct><member><name>OpaqueRef:p</name><value><struct><member><name>uuid</name><value>u</value>\
             </member></struct></value></member></struct></value>"
        }
        "host.get_all_records" => "<value><struct></struct></value>",
        "session.logout" => "<value></value>",
        _ => return None,
    };
    Some(xml(&format!(
        "<value><struct><member><name>Status</name><value>Success</value></member><member><name>Value</name>{value}\
         </member></struct></value>"
    )))
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

async fn meets(case: &Case) -> XenApiError {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", case.body.len());
    let body = Arc::new(case.body.clone());
    let xml = case.protocol == Protocol::Xml;
    let pool = Pool::one(move |call| {
        if call.method == "VM.get_all_records" {
            return Some(Reply::Steps(vec![Step::Send(head.clone().into_bytes()), Step::Share(Arc::clone(&body))]));
        }
        if xml { login_in_xml(&call.method).map(|body| Reply::Http(200, vec![], body)) } else { None }
    })
    .await;
    let mut options = pool.options();
    options.protocol = case.protocol;
    let session = Session::login(options).await.unwrap();
    let before = memory("VmRSS");
    forget_peak();
    let began = Instant::now();
    let error = session.call("VM.get_all_records", Repeat::Never, vec![]).await.unwrap_err();
    let (took, peak) = (began.elapsed(), memory("VmHWM").saturating_sub(before));
    let allowed = case.factor * case.body.len() + 64 * MIB;
    assert!(peak <= allowed, "{}: {} MiB for {} bytes", case.name, peak / MIB, case.body.len());
    assert!(took < Duration::from_secs(120), "{}: {took:?}", case.name);
    // A session lives on behind an answer that can not be read.
    session.logout().await.unwrap();
    error
}

#[tokio::test]
async fn answers_that_can_not_be_read_cost_little_and_say_why() {
    for case in cases() {
        let error = meets(&case).await;
        assert!(matches!(error, XenApiError::Response { .. }), "{}: {error:?}", case.name);
        assert_eq!(error.retry(), Retry::Never, "{}", case.name);
        let text = causes(&error);
        assert!(text.contains("VM.get_all_records") && text.contains(case.says), "{}: {text}", case.name);
        assert!(text.len() < 1000, "{}: {} bytes of text", case.name, text.len());
    }
    bodies_that_end_early().await;
    answers_without_end().await;
    answers_that_are_just_small_enough();
}

/// What passes the limit is bounded in memory too, whatever it is made of: small maps take most for their length.
fn answers_that_are_just_small_enough() {
    let json = |item: &str, count: usize| format!("{{\"id\":1,\"result\":[{}0]}}", item.repeat(count)).into_bytes();
    let wide = |item: &str, count: usize| {
        let envelope = "<member><name>Status</name><value>Success</value></member><member><name>Value</name>";
        let values = format!("<value><array><data>{}</data></array></value>", item.repeat(count));
        xml(&format!("<value><struct>{envelope}{values}</member></struct></value>"))
    };
    let in_xml = "<value><struct><member><name/><value/></member></struct></value>";
    for (name, answer) in [
        ("maps", json("{\"\":0},", 390_000)),
        ("lists", json("[0],", 1_600_000)),
        ("texts", json("\"a\",", 8_000_000)),
        ("maps in XML", wide(in_xml, 330_000)),
    ] {
        let before = memory("VmRSS");
        forget_peak();
        xenvault_xenapi::decode_for_fuzzing(&answer);
        let peak = memory("VmHWM").saturating_sub(before);
        // As little would be a mistake of this test: nothing was read.
        assert!(peak > 64 * MIB && peak < 896 * MIB, "{name}: {} MiB", peak / MIB);
    }
}

async fn bodies_that_end_early() {
    let pool = Pool::one(|call| {
        let step = |text: &str| Some(Reply::Steps(vec![Step::Send(text.as_bytes().to_vec())]));
        match call.method.as_str() {
            "A.get" => step("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"jsonrpc\""),
            "B.get" => {
                step("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"jso\r\nFFFFFFFFFFFFFFFFF\r\n")
            }
            "C.get" => step("HTTP/1.1 2"),
            "D.get" => step("SSH-2.0-OpenSSH_9.2\r\n"),
            _ => None,
        }
    })
    .await;
    let session = Session::login(pool.options()).await.unwrap();
    for method in ["A.get", "B.get", "C.get", "D.get"] {
        let error = session.call(method, Repeat::Never, vec![]).await.unwrap_err();
        assert!(matches!(error, XenApiError::Connection { .. }), "{method}: {error:?}");
        assert_eq!(error.retry(), Retry::Later);
    }
    session.logout().await.unwrap();
}

async fn answers_without_end() {
    let pool = Pool::one(|call| {
        let endless = |head: &str, piece: Vec<u8>| {
            let body = Step::Repeat(piece, usize::MAX, Duration::ZERO);
            Some(Reply::Steps(vec![Step::Send(head.as_bytes().to_vec()), body]))
        };
        match call.method.as_str() {
            "A.get" => endless("HTTP/1.1 200 OK\r\n\r\n", vec![b'x'; MIB]),
            "B.get" => endless("HTTP/1.1 200 OK\r\n", b"x: y\r\n".repeat(1000)),
            "C.get" => endless("HTTP/1.1 200 OK\r\nx: ", vec![b'y'; 10_000]),
            "D.get" => Some(Reply::Result(json!("fine"))),
            _ => None,
        }
    })
    .await;
    let mut options = pool.options();
    options.limits.response_bytes = 16 * MIB;
    options.timeouts.floor = Floor { bytes: 1, window: Duration::from_secs(60) };
    let session = Session::login(options).await.unwrap();
    let before = memory("VmRSS");
    forget_peak();
    let error = session.call("A.get", Repeat::Never, vec![]).await.unwrap_err();
    assert!(matches!(error, XenApiError::ResponseTooLarge { .. }), "{error:?}");
    for method in ["B.get", "C.get"] {
        let error = session.call(method, Repeat::Never, vec![]).await.unwrap_err();
        assert!(matches!(error, XenApiError::Connection { .. }), "{method}: {error:?}");
    }
    let peak = memory("VmHWM").saturating_sub(before);
    assert!(peak < 96 * MIB, "{} MiB", peak / MIB);
    assert!(session.call("D.get", Repeat::Never, vec![]).await.is_ok());
    session.logout().await.unwrap();
}
