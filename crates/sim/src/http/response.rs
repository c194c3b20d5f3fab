//! Answers as xapi writes them: header names in its own mixture of cases, pages of its own wording.

/// The answer to an RPC call.
pub(super) fn rpc(version: &str, keep: bool, content_type: &str, body: &str) -> Vec<u8> {
    let connection = if keep { "keep-alive" } else { "close" };
    format!(
        "HTTP/{version} 200 OK\r\ncontent-length: {}\r\nconnection: {connection}\r\n\
         cache-control: no-cache, no-store\r\ncontent-type: {content_type}\r\nAccess-Control-Allow-Origin: *\r\n\
         Access-Control-Allow-Headers: X-Requested-With\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The answer to OPTIONS.
pub(super) fn options(keep: bool) -> Vec<u8> {
    let connection = if keep { "keep-alive" } else { "close" };
    format!(
        "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: {connection}\r\ncache-control: no-cache, no-store\r\n\
         Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Headers: X-Requested-With\r\n\
         Access-Control-Allow-Methods: PUT\r\n\r\n"
    )
    .into_bytes()
}

fn page(status: &str, extra: &str, body: &str) -> Vec<u8> {
    let body = format!("<html><body>{body}</body></html>");
    format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-type: text/html\r\nconnection: close\r\n\
         cache-control: no-cache, no-store\r\n{extra}\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// 500 with xapi's additional information, which is already HTML.
pub(super) fn internal_error(information: &str) -> Vec<u8> {
    page(
        "500 Internal Error",
        "",
        &format!(
            "<h1>HTTP 500 internal server error</h1>An unexpected error occurred; please wait a while and try again. \
             If the problem persists, please contact your support representative.<h1> Additional information </h1>\
             {information}"
        ),
    )
}

/// 400.
pub(super) fn bad_request() -> Vec<u8> {
    page(
        "400 Bad Request",
        "",
        "<h1>HTTP 400 bad request</h1>The HTTP request was malformed. Please correct and retry.",
    )
}

/// 401.
pub(super) fn unauthorised(realm: &str) -> Vec<u8> {
    page(
        "401 Unauthorised",
        &format!("WWW-Authenticate: Basic realm=\"{realm}\"\r\n"),
        "<h1>HTTP 401 unauthorised</h1>Please check your credentials and retry.",
    )
}

/// 403.
pub(super) fn forbidden() -> Vec<u8> {
    page("403 Forbidden", "", "<h1>HTTP 403 forbidden</h1>Access to the requested resource is forbidden.")
}

/// 431.
pub(super) fn too_large() -> Vec<u8> {
    page(
        "431 Request Header Fields Too Large",
        "",
        "<h1>HTTP 431 request header fields too large</h1>Exceeded the maximum header size.",
    )
}

/// 501.
pub(super) fn not_implemented(method: &str) -> Vec<u8> {
    page(
        "501 Method not implemented",
        "",
        &format!("<h1>HTTP 501 Method Not Implemented</h1><p>Unknown {method} not supported.<br /></p>"),
    )
}

/// A status line and the headers that xapi's transfers have, with more of them.
pub(super) fn transfer(status: &str, more: &[String]) -> Vec<u8> {
    let mut text = format!("{status}\r\nConnection: close\r\nCache-Control: no-cache, no-store\r\n");
    for header in more {
        text.push_str(header);
        text.push_str("\r\n");
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// Makes a text safe within HTML, as xapi does.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;").replace('"', "&quot;")
}
