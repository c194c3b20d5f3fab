//! Requests of the library on their way: one attempt each, given up when it moves no byte for too long, and listened to.
//!
//! A limit on the whole time of a request would fail every large one over a slow line; so what counts is silence, in
//! either direction. What the service says of a failure is noted for whoever asked (`Heard`).

use std::error::Error as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};

use super::MAX_OBJECT_BYTES;
use super::fault::{Answer, Event, Heard};

tokio::task_local! {
    /// Where what is heard in this attempt is noted.
    pub(in crate::backend) static HEARD: Heard;
}

/// Answers that are longer than any object, or than a page of a listing, are not taken in.
const MAX_ANSWER_BYTES: usize = MAX_OBJECT_BYTES + 1024 * 1024;

/// Sends requests.
#[derive(Clone, Debug)]
pub(in crate::backend) struct Courier {
    client: reqwest::Client,
    /// A request that moves no byte for this long is given up.
    silence: Duration,
}

impl Courier {
    pub(super) fn new(authority: Option<&[u8]>, clear_text: bool, silence: Duration) -> reqwest::Result<Self> {
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("xenvault/", env!("CARGO_PKG_VERSION")))
            .https_only(!clear_text)
            .connect_timeout(silence.min(Duration::from_secs(10)))
            .redirect(reqwest::redirect::Policy::none())
            .pool_idle_timeout(Duration::from_secs(30));
        if let Some(authority) = authority {
            builder = builder.tls_certs_merge(reqwest::Certificate::from_pem_bundle(authority)?);
        }
        Ok(Self { client: builder.build()?, silence })
    }

    async fn deliver(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let moved = Moved::now();
        let (parts, body) = request.into_parts();
        let url = reqwest::Url::parse(&parts.uri.to_string())
            .map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let mut sent = reqwest::Request::new(parts.method, url);
        *sent.headers_mut() = parts.headers;
        let length = body.content_length();
        if length > 0 {
            let moves = moved.clone();
            // The listened-to body does not tell its length.
            sent.headers_mut().entry(http::header::CONTENT_LENGTH).or_insert(length.into());
            let body = body.map_frame(move |frame| {
                moves.touch();
                frame
            });
            *sent.body_mut() = Some(reqwest::Body::wrap(body));
        }
        let answer = self.unless_silent(&moved, self.client.execute(sent)).await?.map_err(|error| failed(&error))?;
        let answer: http::Response<reqwest::Body> = answer.into();
        let (parts, mut body) = answer.into_parts();
        let mut taken = BytesMut::new();
        while let Some(frame) = self.unless_silent(&moved, body.frame()).await? {
            let frame = frame.map_err(|error| failed(&error))?;
            moved.touch();
            if let Ok(data) = frame.into_data() {
                if taken.len() + data.len() > MAX_ANSWER_BYTES {
                    return Err(broken("the answer is longer than any object".to_owned()));
                }
                taken.extend_from_slice(&data);
            }
        }
        let taken: Bytes = taken.freeze();
        if !parts.status.is_success() {
            note(Event::Answered(Answer::read(parts.status.as_u16(), &taken)));
        }
        Ok(HttpResponse::from_parts(parts, taken.into()))
    }

    /// What the work gives, unless nothing moves for too long.
    async fn unless_silent<T>(&self, moved: &Moved, work: impl Future<Output = T>) -> Result<T, HttpError> {
        tokio::pin!(work);
        loop {
            let left = self.silence.saturating_sub(moved.ago());
            if left.is_zero() {
                return Err(broken(format!("nothing moved for {} s", self.silence.as_secs_f32())));
            }
            tokio::select! {
                done = &mut work => return Ok(done),
                () = tokio::time::sleep(left) => {}
            }
        }
    }
}

impl HttpService for Courier {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(self.deliver(request))
    }
}

impl HttpConnector for Courier {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

/// When a byte of a request or its answer has moved last.
#[derive(Clone, Debug)]
struct Moved(Arc<Mutex<Instant>>);

impl Moved {
    fn now() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn ago(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

fn note(event: Event) {
    // Requests that nobody listens to (a token of a cloud) are none of ours.
    let _ = HEARD.try_with(|heard| heard.note(event));
}

fn broken(said: String) -> HttpError {
    note(Event::Broken(said.clone()));
    HttpError::new(HttpErrorKind::Timeout, std::io::Error::new(std::io::ErrorKind::TimedOut, said))
}

/// Whether TLS says so, in an error of input and output or in one within another.
fn is_tls(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<rustls::Error>() {
            return true;
        }
        // Its source is that of what it holds, which is passed over so.
        let held = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = held.map(|held| held as &(dyn std::error::Error + 'static));
    }
    false
}

/// Notes what the network says, and gives it to the library. The address is left out: it may hold a signature.
fn failed(error: &reqwest::Error) -> HttpError {
    let (mut said, mut tls, mut next) = (String::new(), false, error.source());
    while let Some(cause) = next {
        tls |= is_tls(cause);
        // The innermost one tells most; those around it repeat it or say "client error".
        said = cause.to_string();
        next = cause.source();
    }
    if said.is_empty() {
        said = "no answer".to_owned();
    }
    let event = if tls {
        Event::Tls(said.clone())
    } else if error.is_connect() || error.is_builder() {
        Event::Unreachable(said.clone())
    } else {
        Event::Broken(said.clone())
    };
    note(event);
    HttpError::new(HttpErrorKind::Unknown, std::io::Error::other(said))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_body_goes_out_as_it_is() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let heard = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            let mut taken = Vec::new();
            let mut buffer = [0; 4096];
            while !taken.ends_with(b"half and half") {
                let Ok(count) = stream.read(&mut buffer) else { break };
                taken.extend_from_slice(&buffer[..count]);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            String::from_utf8(taken).unwrap()
        });
        let _ = rustls::crypto::ring::default_provider().install_default();
        let courier = Courier::new(None, true, Duration::from_secs(20)).unwrap();
        let body = object_store::PutPayload::from_iter([Bytes::from_static(b"half"), Bytes::from_static(b" and half")]);
        let request = http::Request::put(format!("http://{address}/a")).body(body.into()).unwrap();
        let answer = courier.call(request).await.unwrap();
        assert!(answer.status().is_success());
        let heard = heard.join().unwrap();
        assert!(heard.contains("content-length: 13\r\n") && heard.ends_with("half and half"), "{heard}");
    }
}
