//! Requests to an S3 service that are signed here: what `object_store` has no interface for.
//!
//! One object version is written in one request with its lock and a checksum that services check; versions are listed,
//! read, kept longer, and removed. Requests go by the same courier as the others, and are repeated as they are.

mod answers;
mod signature;

use std::io;
use std::time::{Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::{Method, header};
use jiff::Timestamp;
use md5::{Digest as _, Md5};
use object_store::client::{HttpError, HttpRequestBody, HttpService as _};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use self::answers::MAX_ANSWER_BYTES;
use self::signature::{Credentials, ToSign, amz_date, authorization, encoded_path, encoded_query, sha256_hex};
use super::bucket::courier::{Courier, HEARD};
use super::bucket::fault::Heard;
use super::bucket::{PAUSES, payload as payload_of, random_share};
use super::{Answer, BucketFault, BucketOptions, Patience};

pub use self::answers::{
    AnswerError, Retention, Version, VersionPage, lock_configuration, retention, version_page, versioning,
};

/// Requests at the same time: enough to hide the way there and back, few enough for a small gateway.
const REQUESTS_AT_ONCE: usize = 16;

/// What one version of an object is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VersionFacts {
    /// Length in bytes.
    pub length: u64,
    /// How long it is kept, if it is locked and the service tells.
    pub retention: Option<Retention>,
}

/// A bucket, and what signs requests to it.
pub struct Signed {
    courier: Courier,
    patience: Patience,
    session_token: Option<Zeroizing<String>>,
    /// Scheme and authority, without a slash at the end.
    endpoint: String,
    host: String,
    bucket: String,
    credentials: Credentials,
    requests: Semaphore,
}

impl std::fmt::Debug for Signed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signed")
            .field("endpoint", &self.endpoint)
            .field("bucket", &self.bucket)
            .field("access_key", &self.credentials.access_key)
            .finish_non_exhaustive()
    }
}

/// A request before it is signed.
struct Request<'a> {
    method: Method,
    /// Key of the object; `None` for the bucket itself.
    key: Option<&'a str>,
    query: Vec<(&'a str, &'a str)>,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
    /// The longest answer.
    limit: usize,
}

impl<'a> Request<'a> {
    fn new(method: Method, key: Option<&'a str>, query: Vec<(&'a str, &'a str)>) -> Self {
        Self { method, key, query, headers: Vec::new(), body: Bytes::new(), limit: MAX_ANSWER_BYTES }
    }
}

struct Reply {
    headers: header::HeaderMap,
    body: Bytes,
}

impl Signed {
    /// Nothing is asked of the service yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the options can not be used.
    pub fn new(options: &BucketOptions) -> io::Result<Self> {
        let endpoint = match &options.endpoint {
            Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
            None => format!("https://s3.{}.amazonaws.com", options.region),
        };
        let wrong = || {
            let text = format!("{endpoint} is no address of a service such as https://s3.example.com:7480");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        };
        let (scheme, host) = endpoint.split_once("://").ok_or_else(wrong)?;
        if !matches!(scheme, "http" | "https") || host.is_empty() || host.contains('/') {
            return Err(wrong());
        }
        // As a client writes it: the usual port is left out.
        let usual = if scheme == "https" { ":443" } else { ":80" };
        let host = host.strip_suffix(usual).unwrap_or(host).to_owned();
        Ok(Self {
            courier: options.courier()?,
            patience: options.patience,
            session_token: options.session_token.clone(),
            host,
            bucket: options.bucket.clone(),
            credentials: Credentials {
                access_key: options.access_key.clone(),
                secret_key: options.secret_key.clone(),
                region: options.region.clone(),
            },
            requests: Semaphore::new(REQUESTS_AT_ONCE),
            endpoint,
        })
    }

    /// Writes a version in one request, under a lock if one is given. Returns its id, where the service keeps versions.
    ///
    /// # Errors
    /// What the service says.
    pub async fn put(&self, key: &str, body: Bytes, lock: Option<Retention>) -> Result<Option<String>, BucketFault> {
        let mut request = Request::new(Method::PUT, Some(key), Vec::new());
        request.headers.push(("content-md5", BASE64.encode(Md5::digest(&body))));
        if let Some(lock) = lock {
            request.headers.push(("x-amz-object-lock-mode", lock.mode.as_str().to_owned()));
            request.headers.push(("x-amz-object-lock-retain-until-date", in_seconds(lock.until)));
        }
        request.body = body;
        let answer = self.send(request).await?;
        Ok(text_of(&answer.headers, "x-amz-version-id").filter(|id| id != "null"))
    }

    /// The `length` bytes at `offset` of a version; `length` is above 0.
    ///
    /// # Errors
    /// What the service says; 416 if the version is shorter.
    pub async fn get(&self, key: &str, version: &str, offset: u64, length: usize) -> Result<Bytes, BucketFault> {
        let mut request = Request::new(Method::GET, Some(key), vec![("versionId", version)]);
        let last = offset.saturating_add(length as u64).saturating_sub(1);
        request.headers.push(("range", format!("bytes={offset}-{last}")));
        request.limit = length;
        Ok(self.send(request).await?.body)
    }

    /// What a version is like. The lock is told only to whoever may read it.
    ///
    /// # Errors
    /// What the service says.
    pub async fn head(&self, key: &str, version: &str) -> Result<VersionFacts, BucketFault> {
        let request = Request::new(Method::HEAD, Some(key), vec![("versionId", version)]);
        let headers = self.send(request).await?.headers;
        let length = text_of(&headers, "content-length").and_then(|text| text.parse().ok());
        let mode = text_of(&headers, "x-amz-object-lock-mode");
        let until = text_of(&headers, "x-amz-object-lock-retain-until-date");
        let retention = match mode.zip(until) {
            Some((mode, until)) => Some(Retention {
                mode: answers::lock_mode(&mode).map_err(strange)?,
                until: answers::moment(&until, "RetainUntilDate").map_err(strange)?,
            }),
            None => None,
        };
        let length = length.ok_or_else(|| strange(AnswerError::Field { field: "length" }))?;
        Ok(VersionFacts { length, retention })
    }

    /// One page of the versions of all objects whose keys begin with `prefix`, behind the version `after`.
    ///
    /// # Errors
    /// What the service says.
    pub async fn versions(&self, prefix: &str, after: Option<&Version>) -> Result<VersionPage, BucketFault> {
        let mut query = vec![("versions", ""), ("prefix", prefix), ("encoding-type", "url")];
        if let Some(after) = after {
            query.extend([("key-marker", after.key.as_str()), ("version-id-marker", after.id.as_str())]);
        }
        let request = Request::new(Method::GET, None, query);
        let answer = self.send(request).await?;
        version_page(&answer.body).map_err(strange)
    }

    /// Removes a version, or the marker of a deletion, for good. One that is gone already is no error.
    ///
    /// # Errors
    /// What the service says; 403 if the version is locked.
    pub async fn delete_version(&self, key: &str, version: &str) -> Result<(), BucketFault> {
        match self.send(Request::new(Method::DELETE, Some(key), vec![("versionId", version)])).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map(drop),
        }
    }

    /// Until when a version is kept; `None` if it is not locked.
    ///
    /// # Errors
    /// What the service says; 404 if there is no such version.
    pub async fn retention(&self, key: &str, version: &str) -> Result<Option<Retention>, BucketFault> {
        let request = Request::new(Method::GET, Some(key), vec![("retention", ""), ("versionId", version)]);
        match self.send(request).await {
            Err(error) if error.code() == "NoSuchObjectLockConfiguration" => Ok(None),
            // A bucket that knows no locks.
            Err(error) if matches!(error.code(), "InvalidRequest" | "ObjectLockConfigurationNotFoundError") => Ok(None),
            answer => retention(&answer?.body).map(Some).map_err(strange),
        }
    }

    /// Keeps a version longer. Services refuse to keep it for a shorter time.
    ///
    /// # Errors
    /// What the service says.
    pub async fn extend(&self, key: &str, version: &str, lock: Retention) -> Result<(), BucketFault> {
        let mut request = Request::new(Method::PUT, Some(key), vec![("retention", ""), ("versionId", version)]);
        let body = format!(
            "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{}</Mode>\
             <RetainUntilDate>{}</RetainUntilDate></Retention>",
            lock.mode.as_str(),
            in_seconds(lock.until)
        );
        request.body = Bytes::from(body);
        request.headers.push(("content-md5", BASE64.encode(Md5::digest(&request.body))));
        self.send(request).await.map(drop)
    }

    /// Whether the bucket keeps versions.
    ///
    /// # Errors
    /// What the service says.
    pub async fn versioning(&self) -> Result<bool, BucketFault> {
        let request = Request::new(Method::GET, None, vec![("versioning", "")]);
        let answer = self.send(request).await?;
        versioning(&answer.body).map_err(strange)
    }

    /// Whether the bucket can lock objects.
    ///
    /// # Errors
    /// What the service says.
    pub async fn can_lock(&self) -> Result<bool, BucketFault> {
        let request = Request::new(Method::GET, None, vec![("object-lock", "")]);
        match self.send(request).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            answer => lock_configuration(&answer?.body).map_err(strange),
        }
    }

    /// The service's clock, in whole seconds.
    ///
    /// # Errors
    /// What the service says.
    pub async fn now(&self) -> Result<SystemTime, BucketFault> {
        let request = Request::new(Method::GET, None, vec![("max-keys", "1"), ("versions", "")]);
        let answer = self.send(request).await?;
        let date = text_of(&answer.headers, "date");
        let moment = date.and_then(|date| jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date).ok());
        moment.map(SystemTime::from).ok_or_else(|| strange(AnswerError::Field { field: "Date" }))
    }

    /// Sends a request until it is answered for good.
    async fn send(&self, request: Request<'_>) -> Result<Reply, BucketFault> {
        let began = Instant::now();
        let mut pause = PAUSES.0;
        loop {
            let fault = {
                // Whoever waits for better times takes nobody's turn.
                let turn = self.requests.acquire().await;
                let _turn = turn.map_err(|error| BucketFault::Strange { said: error.to_string() })?;
                match self.try_once(&request).await {
                    Ok(reply) => return Ok(reply),
                    Err(fault) => fault,
                }
            };
            if !fault.may_pass() || began.elapsed() + pause >= self.patience.total {
                return Err(fault);
            }
            tracing::debug!(fault = %fault, pause_ms = pause.as_millis(), "a request to the object store is repeated");
            tokio::time::sleep(pause).await;
            // Never in step with others that failed at the same moment.
            pause = (PAUSES.0 + (pause * 3).saturating_sub(PAUSES.0).mul_f64(random_share())).min(PAUSES.1);
        }
    }

    async fn try_once(&self, request: &Request<'_>) -> Result<Reply, BucketFault> {
        let path = match request.key {
            Some(key) => encoded_path(&format!("/{}/{key}", self.bucket)),
            None => encoded_path(&format!("/{}", self.bucket)),
        };
        let query = encoded_query(&request.query);
        // Anew for each attempt: a signature is good for some minutes.
        let moment = Timestamp::now();
        let payload = sha256_hex(&request.body);
        let mut headers: Vec<(String, String)> = vec![
            ("host".to_owned(), self.host.clone()),
            ("x-amz-content-sha256".to_owned(), payload.clone()),
            ("x-amz-date".to_owned(), amz_date(moment)),
        ];
        headers.extend(request.headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        if let Some(token) = &self.session_token {
            headers.push(("x-amz-security-token".to_owned(), token.as_str().to_owned()));
        }
        headers.sort();
        let to_sign = ToSign {
            method: request.method.as_str(),
            path: &path,
            query: &query,
            headers: &headers,
            payload: &payload,
        };
        let signed = authorization(&self.credentials, &to_sign, moment);
        let mark = if query.is_empty() { "" } else { "?" };
        let mut call = http::Request::builder()
            .method(request.method.clone())
            .uri(format!("{}{path}{mark}{query}", self.endpoint))
            .header(header::AUTHORIZATION, signed);
        for (name, value) in headers.iter().filter(|(name, _)| name != "host") {
            call = call.header(name, value);
        }
        if request.method == Method::PUT && request.body.is_empty() {
            call = call.header(header::CONTENT_LENGTH, 0);
        }
        let body = HttpRequestBody::from(payload_of(vec![request.body.clone()]));
        let call = call.body(body).map_err(|error| BucketFault::Strange { said: error.to_string() })?;
        let heard = Heard::default();
        let faulty = |error: HttpError| {
            let error = object_store::Error::Generic { store: "S3", source: Box::new(error) };
            BucketFault::of(error, &heard)
        };
        let reply = HEARD.scope(heard.clone(), self.courier.call(call)).await.map_err(faulty)?;
        let (parts, body) = reply.into_parts();
        let body = body.bytes().await.map_err(faulty)?;
        if !parts.status.is_success() {
            return Err(BucketFault::of_answer(Answer::read(parts.status.as_u16(), &body)));
        }
        if body.len() > request.limit {
            return Err(BucketFault::Strange { said: format!("more than {} bytes", request.limit) });
        }
        Ok(Reply { headers: parts.headers, body })
    }
}

fn strange(error: AnswerError) -> BucketFault {
    let mut said = error.to_string();
    if let Some(cause) = std::error::Error::source(&error) {
        said.push_str(&format!(": {cause}"));
    }
    BucketFault::Strange { said }
}

fn text_of(headers: &header::HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// A moment as services take it for the end of a lock: whole seconds, never earlier than asked for.
fn in_seconds(moment: SystemTime) -> String {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs() + u64::from(since.subsec_nanos() > 0);
    let moment = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    moment.unwrap_or(Timestamp::MAX).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn options(endpoint: Option<&str>, clear_text: bool) -> BucketOptions {
        BucketOptions {
            bucket: "b".to_owned(),
            folder: String::new(),
            endpoint: endpoint.map(str::to_owned),
            region: "eu-central-1".to_owned(),
            access_key: "a".to_owned(),
            secret_key: "very secret".to_owned().into(),
            session_token: None,
            authority: None,
            clear_text,
            patience: Patience::default(),
        }
    }

    #[test]
    fn the_host_is_signed_as_a_client_writes_it() {
        let host = |endpoint| Signed::new(&options(endpoint, true)).unwrap().host;
        assert_eq!(host(None), "s3.eu-central-1.amazonaws.com");
        assert_eq!(host(Some("https://s3.example.com:443/")), "s3.example.com");
        assert_eq!(host(Some("http://127.0.0.1:7480")), "127.0.0.1:7480");
        for wrong in ["s3.example.com", "ftp://x", "https://", "https://x/y"] {
            let error = Signed::new(&options(Some(wrong), true)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{wrong}");
        }
    }

    #[test]
    fn no_secret_is_shown() {
        let shown = format!("{:?}", Signed::new(&options(None, false)).unwrap());
        assert!(!shown.contains("very secret"), "{shown}");
    }

    #[test]
    fn a_lock_never_ends_earlier_than_asked_for() {
        let moment = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_001);
        assert_eq!(in_seconds(moment), "2023-11-14T22:13:21Z");
        assert_eq!(in_seconds(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00Z");
    }
}
