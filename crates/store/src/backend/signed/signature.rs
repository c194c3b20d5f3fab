//! AWS Signature Version 4 of one request, as its headers carry it.

use std::fmt::Write as _;

use jiff::Timestamp;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ring::{digest, hmac};
use zeroize::Zeroizing;

/// What stays as it is in a signed path or query.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// The same for a path, whose slashes separate.
const PATH: &AsciiSet = &UNRESERVED.remove(b'/');

/// What signs.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) access_key: String,
    pub(super) secret_key: Zeroizing<String>,
    pub(super) region: String,
}

/// A request as far as the signature covers it.
pub(super) struct ToSign<'a> {
    pub(super) method: &'a str,
    /// Encoded, beginning with a slash.
    pub(super) path: &'a str,
    /// Encoded and in order, as it stands in the address.
    pub(super) query: &'a str,
    /// Names in lower case, in order; `host`, `x-amz-date` and `x-amz-content-sha256` among them.
    pub(super) headers: &'a [(String, String)],
    /// SHA-256 of the body in hexadecimal.
    pub(super) payload: &'a str,
}

/// A path with everything encoded that has to be.
pub(super) fn encoded_path(path: &str) -> String {
    utf8_percent_encode(path, PATH).to_string()
}

/// A query in the order and the form in which it is signed.
pub(super) fn encoded_query(pairs: &[(&str, &str)]) -> String {
    let encode = |text: &str| utf8_percent_encode(text, UNRESERVED).to_string();
    let mut pairs: Vec<(String, String)> = pairs.iter().map(|(name, value)| (encode(name), encode(value))).collect();
    pairs.sort();
    let pairs: Vec<String> = pairs.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    pairs.join("&")
}

/// SHA-256 of some bytes in hexadecimal.
pub(super) fn sha256_hex(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// A moment as `x-amz-date` has it.
pub(super) fn amz_date(moment: Timestamp) -> String {
    moment.strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// The value of the header `authorization`.
pub(super) fn authorization(credentials: &Credentials, request: &ToSign<'_>, moment: Timestamp) -> String {
    let names: Vec<&str> = request.headers.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(";");
    let mut canonical = format!("{}\n{}\n{}\n", request.method, request.path, request.query);
    for (name, value) in request.headers {
        // Writing to a string can not fail.
        let _ = writeln!(canonical, "{name}:{}", value.trim());
    }
    let _ = write!(canonical, "\n{names}\n{}", request.payload);
    let day = moment.strftime("%Y%m%d").to_string();
    let scope = format!("{day}/{}/s3/aws4_request", credentials.region);
    let to_sign = format!("AWS4-HMAC-SHA256\n{}\n{scope}\n{}", amz_date(moment), sha256_hex(canonical.as_bytes()));
    let first = Zeroizing::new(format!("AWS4{}", credentials.secret_key.as_str()));
    let key = [day.as_str(), &credentials.region, "s3", "aws4_request"]
        .into_iter()
        .fold(hmac::Key::new(hmac::HMAC_SHA256, first.as_bytes()), |key, part| {
            hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&key, part.as_bytes()).as_ref())
        });
    let signature = hex(hmac::sign(&key, to_sign.as_bytes()).as_ref());
    let access_key = &credentials.access_key;
    format!("AWS4-HMAC-SHA256 Credential={access_key}/{scope},SignedHeaders={names},Signature={signature}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of "Signature Calculations for the Authorization Header" in Amazon's S3 API reference.
    fn signature(method: &str, path: &str, query: &[(&str, &str)], more: &[(&str, &str)], body: &[u8]) -> String {
        let credentials = Credentials {
            access_key: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned().into(),
            region: "us-east-1".to_owned(),
        };
        let moment: Timestamp = "2013-05-24T00:00:00Z".parse().unwrap();
        let payload = sha256_hex(body);
        let mut headers = vec![
            ("host".to_owned(), "examplebucket.s3.amazonaws.com".to_owned()),
            ("x-amz-content-sha256".to_owned(), payload.clone()),
            ("x-amz-date".to_owned(), amz_date(moment)),
        ];
        headers.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        headers.sort();
        let (path, query) = (encoded_path(path), encoded_query(query));
        let request = ToSign { method, path: &path, query: &query, headers: &headers, payload: &payload };
        let signed = authorization(&credentials, &request, moment);
        signed.split_once("Signature=").unwrap().1.to_owned()
    }

    #[test]
    fn requests_are_signed_as_in_amazons_examples() {
        assert_eq!(
            signature("GET", "/test.txt", &[], &[("range", "bytes=0-9")], b""),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        let more = [("date", "Fri, 24 May 2013 00:00:00 GMT"), ("x-amz-storage-class", "REDUCED_REDUNDANCY")];
        assert_eq!(
            signature("PUT", "/test$file.text", &[], &more, b"Welcome to Amazon S3."),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
        );
        assert_eq!(
            signature("GET", "/", &[("lifecycle", "")], &[], b""),
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
        );
        assert_eq!(
            signature("GET", "/", &[("prefix", "J"), ("max-keys", "2")], &[], b""),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
    }

    #[test]
    fn paths_and_queries_are_encoded_byte_by_byte() {
        assert_eq!(encoded_path("/a b/ä+~"), "/a%20b/%C3%A4%2B~");
        assert_eq!(
            encoded_query(&[("versions", ""), ("prefix", "a/b c"), ("key-marker", "~")]),
            "key-marker=~&prefix=a%2Fb%20c&versions="
        );
    }
}
