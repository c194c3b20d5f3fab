//! Scripted hosts: HTTPS servers that answer JSON-RPC as told, for what the simulator does not do on order.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test double: what is unexpected ends the test"
)]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use xenvault_xenapi::{ConnectOptions, Floor, Sha256Fingerprint, Timeouts, Trust};

pub const PASSWORD: &str = "correct horse";
pub const POOL: &str = "11111111-2222-3333-4444-555555555555";

/// One request, as a host saw it.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which host, from 0.
    pub host: usize,
    /// Path and query.
    pub target: String,
    /// Of the call, or the HTTP method for other requests.
    pub method: String,
    /// Parameters, the session's reference among them.
    pub params: Vec<Value>,
    /// The head as it came.
    pub head: String,
    /// The id of a JSON-RPC call.
    pub id: Value,
}

/// What a host does about a request.
pub enum Reply {
    Result(Value),
    Failure(Vec<&'static str>),
    Http(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Not an answer: steps on the connection, which is closed after the last one.
    Steps(Vec<Step>),
}

pub enum Step {
    Send(Vec<u8>),
    /// Sends bytes without a copy of them.
    Share(Arc<Vec<u8>>),
    /// Reads this many bytes into the pool's uploads.
    Read(usize),
    /// Reads up to the end marker of the chunk protocol.
    ReadChunks,
    /// Sends these bytes so many times, with a pause before each.
    Repeat(Vec<u8>, usize, Duration),
    /// Reads one byte, then pauses, for ever.
    Sip(Duration),
    /// Does nothing, but keeps the connection open.
    Hang,
}

type Script = dyn Fn(&Call) -> Option<Reply> + Send + Sync;

/// A certificate with its key.
pub struct Identity {
    pub der: Vec<u8>,
    pub key: Vec<u8>,
}

impl Identity {
    /// As XenServer's own: self-signed, CA:TRUE, no subject alternative name.
    pub fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self { der: certificate.der().to_vec(), key: key.serialize_der() }
    }

    /// Certificates of hosts at these addresses, signed by an authority of its own, and that authority in PEM form.
    pub fn signed(hosts: usize) -> (Vec<Self>, String) {
        let authority_key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "an authority of a test");
        let authority = params.self_signed(&authority_key).unwrap();
        let issuer = rcgen::Issuer::new(params, authority_key);
        let sign = |host| {
            let key = rcgen::KeyPair::generate().unwrap();
            let params = rcgen::CertificateParams::new(vec![address(host)]).unwrap();
            let certificate = params.signed_by(&key, &issuer).unwrap();
            Self { der: certificate.der().to_vec(), key: key.serialize_der() }
        };
        let own = Self { der: authority.der().to_vec(), key: Vec::new() };
        ((0..hosts).map(sign).collect(), own.pem())
    }

    pub fn fingerprint(&self) -> Sha256Fingerprint {
        Sha256Fingerprint::of(&self.der)
    }

    pub fn pem(&self) -> String {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(&self.der);
        let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
    }
}

/// Hosts on 127.0.0.1, 127.0.0.2, ... with one port.
pub struct Pool {
    pub identities: Vec<Arc<Identity>>,
    pub port: u16,
    state: Arc<State>,
    hosts: Mutex<Vec<tokio::task::JoinHandle<()>>>,
    acceptors: Vec<TlsAcceptor>,
}

pub struct State {
    connections: AtomicU64,
    script: Box<Script>,
    calls: Mutex<Vec<Call>>,
    uploads: Mutex<Vec<u8>>,
    sessions: AtomicU64,
    pems: Vec<String>,
}

/// How the hosts show their certificates.
pub struct Look {
    pub hosts: usize,
    /// Signs with a key that is not the certificate's.
    pub wrong_key: bool,
    pub versions: &'static [&'static rustls::SupportedProtocolVersion],
}

impl Default for Look {
    fn default() -> Self {
        Self { hosts: 1, wrong_key: false, versions: rustls::ALL_VERSIONS }
    }
}

#[derive(Debug)]
struct Always(Arc<rustls::sign::CertifiedKey>);

impl rustls::server::ResolvesServerCert for Always {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

fn acceptor(identity: &Identity, look: &Look) -> TlsAcceptor {
    let key = if look.wrong_key { Identity::new().key } else { identity.key.clone() };
    let key = rustls_pki_types::PrivateKeyDer::try_from(key).unwrap();
    let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
    let certified = rustls::sign::CertifiedKey::new(vec![identity.der.clone().into()], key);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(look.versions)
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Always(Arc::new(certified))));
    TlsAcceptor::from(Arc::new(config))
}

async fn listeners(count: usize) -> (u16, Vec<TcpListener>) {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = first.local_addr().unwrap().port();
        let mut all = vec![first];
        for host in 2..=count {
            match TcpListener::bind(format!("127.0.0.{host}:{port}")).await {
                Ok(listener) => all.push(listener),
                Err(_) => break,
            }
        }
        if all.len() == count {
            return (port, all);
        }
    }
}

impl Pool {
    pub async fn start(look: Look, script: impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static) -> Self {
        let identities = (0..look.hosts).map(|_| Identity::new()).collect();
        Self::start_as(identities, look, script).await
    }

    /// As [`Pool::start`], with these certificates.
    pub async fn start_as(
        identities: Vec<Identity>,
        look: Look,
        script: impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let identities: Vec<Arc<Identity>> = identities.into_iter().map(Arc::new).collect();
        let (port, listeners) = listeners(look.hosts).await;
        let state = Arc::new(State {
            script: Box::new(script),
            connections: AtomicU64::new(0),
            calls: Mutex::default(),
            uploads: Mutex::default(),
            sessions: AtomicU64::new(0),
            pems: identities.iter().map(|identity| identity.pem()).collect(),
        });
        let acceptors: Vec<TlsAcceptor> = identities.iter().map(|identity| acceptor(identity, &look)).collect();
        let running = listeners.into_iter().enumerate();
        let hosts = running.map(|(host, listener)| run(host, listener, acceptors[host].clone(), &state)).collect();
        Self { identities, port, state, hosts: Mutex::new(hosts), acceptors }
    }

    /// One well-behaved host with these exceptions.
    pub async fn one(script: impl Fn(&Call) -> Option<Reply> + Send + Sync + 'static) -> Self {
        Self::start(Look::default(), script).await
    }

    pub fn url(&self, host: usize) -> String {
        format!("https://{}:{}", address(host), self.port)
    }

    /// Options for host 0, pinned by its fingerprint.
    pub fn options(&self) -> ConnectOptions {
        self.options_with(0, Trust::Fingerprint(self.identities[0].fingerprint()))
    }

    pub fn options_with(&self, host: usize, trust: Trust) -> ConnectOptions {
        let mut options = ConnectOptions::new(&self.url(host), "root", PASSWORD, trust);
        options.timeouts = Timeouts {
            connect: Duration::from_secs(20),
            tls: Duration::from_secs(20),
            read_call: Duration::from_secs(60),
            work_call: Duration::from_secs(60),
            send: Duration::from_secs(30),
            floor: Floor { bytes: 1, window: Duration::from_secs(30) },
            outage: Duration::ZERO,
        };
        options
    }

    /// Closes a host's port and all its connections.
    pub fn kill(&self, host: usize) {
        self.hosts.lock().unwrap()[host].abort();
    }

    /// As [`Pool::kill`], and returns when connections are refused.
    pub async fn kill_and_wait(&self, host: usize) {
        self.kill(host);
        while tokio::net::TcpStream::connect((address(host), self.port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Opens the port of a killed host again.
    pub async fn revive(&self, host: usize) {
        self.revive_as(host, self.acceptors[host].clone()).await;
    }

    /// As [`Pool::revive`], with a new certificate, which is given.
    pub async fn revive_with_another_certificate(&self, host: usize) -> Identity {
        let identity = Identity::new();
        self.revive_as(host, acceptor(&identity, &Look::default())).await;
        identity
    }

    async fn revive_as(&self, host: usize, acceptor: TlsAcceptor) {
        let place = (address(host), self.port);
        // The connections of before may need a moment to be gone.
        let listener = loop {
            match TcpListener::bind((place.0.as_str(), place.1)).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        self.hosts.lock().unwrap()[host] = run(host, listener, acceptor, &self.state);
    }

    /// Connections that were opened so far, with TLS.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state.calls.lock().unwrap().clone()
    }

    pub fn count(&self, method: &str) -> usize {
        self.calls().iter().filter(|call| call.method == method).count()
    }

    pub fn uploads(&self) -> Vec<u8> {
        self.state.uploads.lock().unwrap().clone()
    }

    /// Waits until a call was seen so often.
    pub async fn saw(&self, method: &str, times: usize) {
        let waiting = async {
            while self.count(method) < times {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let limit = Duration::from_secs(60);
        assert!(tokio::time::timeout(limit, waiting).await.is_ok(), "{method} was not called: {:?}", self.methods());
    }

    pub fn methods(&self) -> Vec<String> {
        self.calls().into_iter().map(|call| call.method).collect()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.hosts.lock().unwrap().iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn run(host: usize, listener: TcpListener, acceptor: TlsAcceptor, state: &Arc<State>) -> tokio::task::JoinHandle<()> {
    let state = Arc::clone(state);
    tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, state) = (acceptor.clone(), Arc::clone(&state));
            connections.spawn(async move {
                if let Ok(stream) = acceptor.accept(tcp).await {
                    state.connections.fetch_add(1, Ordering::SeqCst);
                    let _ = serve(host, stream, state).await;
                }
            });
        }
    })
}

pub fn address(host: usize) -> String {
    format!("127.0.0.{}", host + 1)
}

pub fn host_ref(host: usize) -> String {
    format!("OpaqueRef:host-{host}")
}

/// What a host does that nobody scripted otherwise.
fn usual(call: &Call, state: &State) -> Reply {
    match call.method.as_str() {
        "session.login_with_password" => {
            assert_eq!(call.params[1], json!(PASSWORD));
            let number = state.sessions.fetch_add(1, Ordering::SeqCst) + 1;
            Reply::Result(json!(format!("OpaqueRef:session-{number}")))
        }
        "session.logout" | "task.cancel" | "task.destroy" | "task.set_status" => Reply::Result(json!("")),
        "pool.get_all_records" => Reply::Result(json!({"OpaqueRef:pool": {"uuid": POOL, "master": host_ref(0)}})),
        "host.get_all_records" => {
            let hosts: BTreeMap<String, Value> = (0..state.pems.len())
                .map(|host| (host_ref(host), json!({"uuid": format!("host-{host}"), "address": address(host)})))
                .collect();
            Reply::Result(json!(hosts))
        }
        "host.get_server_certificate" => {
            let host = (0..state.pems.len()).find(|host| call.params[1] == json!(host_ref(*host))).unwrap();
            Reply::Result(json!(state.pems[host]))
        }
        "task.create" => Reply::Result(json!("OpaqueRef:own-task")),
        _ => Reply::Failure(vec!["MESSAGE_METHOD_UNKNOWN"]),
    }
}

/// A record of a task, as `task.get_record` gives it.
pub fn task(status: &str, result: &str, error_info: &[&str]) -> Reply {
    Reply::Result(json!({"status": status, "result": result, "error_info": error_info, "progress": 0.5}))
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    host: usize,
    mut stream: S,
    state: Arc<State>,
) -> std::io::Result<()> {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap();
        let mut words = head.split(' ');
        let (verb, target) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
        let mut call = Call { host, target, method: verb, params: Vec::new(), head: head.clone(), id: Value::Null };
        if call.method == "POST" {
            let length = head.lines().filter_map(|line| line.split_once(": ")).find_map(|(name, value)| {
                name.eq_ignore_ascii_case("content-length").then(|| value.parse::<usize>().unwrap())
            });
            let mut body = vec![0; length.unwrap()];
            stream.read_exact(&mut body).await?;
            if call.target == "/jsonrpc" {
                let body: Value = serde_json::from_slice(&body).unwrap();
                call.method = body["method"].as_str().unwrap().to_owned();
                call.params = body["params"].as_array().unwrap().clone();
                call.id = body["id"].clone();
            } else {
                let body = String::from_utf8(body).unwrap();
                let method = body.split("<methodName>").nth(1).unwrap().split('<').next().unwrap();
                call.method = method.to_owned();
                call.params = vec![json!(body); 8];
            }
        }
        let id = call.id.clone();
        state.calls.lock().unwrap().push(call.clone());
        let reply = (state.script)(&call).unwrap_or_else(|| usual(&call, &state));
        let (status, headers, body) = match reply {
            Reply::Result(result) => (200, vec![], json!({"jsonrpc": "2.0", "result": result, "id": id}).to_string()),
            Reply::Failure(parts) => {
                let error = json!({"code": 1, "message": parts[0], "data": parts[1..]});
                (200, vec![], json!({"jsonrpc": "2.0", "error": error, "id": id}).to_string())
            }
            Reply::Http(status, headers, body) => (status, headers, String::from_utf8(body).unwrap()),
            Reply::Steps(steps) => return take_steps(&mut stream, steps, &state).await,
        };
        let mut answer = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            answer.push_str(&format!("{name}: {value}\r\n"));
        }
        answer.push_str("\r\n");
        answer.push_str(&body);
        stream.write_all(answer.as_bytes()).await?;
        stream.flush().await?;
    }
}

async fn take_steps<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    steps: Vec<Step>,
    state: &State,
) -> std::io::Result<()> {
    for step in steps {
        match step {
            Step::Send(bytes) => {
                stream.write_all(&bytes).await?;
                stream.flush().await?;
            }
            Step::Share(bytes) => {
                stream.write_all(&bytes).await?;
                stream.flush().await?;
            }
            Step::Read(count) => {
                let mut bytes = vec![0; count];
                stream.read_exact(&mut bytes).await?;
                state.uploads.lock().unwrap().extend_from_slice(&bytes);
            }
            Step::ReadChunks => loop {
                let mut header = [0; 12];
                stream.read_exact(&mut header).await?;
                let length = usize::try_from(u32::from_le_bytes(header[8..].try_into().unwrap())).unwrap();
                let mut bytes = vec![0; length];
                stream.read_exact(&mut bytes).await?;
                let mut uploads = state.uploads.lock().unwrap();
                uploads.extend_from_slice(&header);
                uploads.extend_from_slice(&bytes);
                if header == [0; 12] {
                    break;
                }
            },
            Step::Repeat(bytes, times, pause) => {
                for _ in 0..times {
                    tokio::time::sleep(pause).await;
                    stream.write_all(&bytes).await?;
                    stream.flush().await?;
                }
            }
            Step::Sip(pause) => loop {
                stream.read_u8().await?;
                tokio::time::sleep(pause).await;
            },
            Step::Hang => std::future::pending().await,
        }
    }
    // As hosts do: without a close_notify.
    Ok(())
}
