//! A pool for the NBD tests: disks by name, sessions, and VBDs that take time to go.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use rcgen::{CertificateParams, IsCa, KeyPair};
use rsa::pkcs8::EncodePrivateKey as _;
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use uuid::Uuid;
use xenvault_sim::nbd::{
    BlockDevice, ExportRequest, NbdBackend, NbdCounters, NbdFaults, NbdOptions, NbdServer, OpenDisk, Purposes, Refusal,
};

pub const HOST_NAME: &str = "host.example.invalid";
pub const LIMIT: Duration = Duration::from_secs(60);

/// A certificate and its key, made once.
pub static IDENTITY: LazyLock<(CertificateDer<'static>, Vec<u8>)> = LazyLock::new(|| {
    let key = new_key();
    let pair = KeyPair::try_from(key.as_slice()).unwrap();
    let mut params = CertificateParams::new(vec![HOST_NAME.to_owned(), "127.0.0.1".to_owned()]).unwrap();
    // The real ones are CA:TRUE, which rustls alone refuses as a leaf; what a client makes of that is not at stake here.
    params.is_ca = IsCa::NoCa;
    (params.self_signed(&pair).unwrap().der().clone(), key)
});

/// A private key in PKCS #8.
pub fn new_key() -> Vec<u8> {
    let key = rsa::RsaPrivateKey::new(&mut rsa::rand_core::OsRng, 2048).unwrap();
    key.to_pkcs8_der().unwrap().as_bytes().to_vec()
}

/// A disk in memory.
#[derive(Debug)]
pub struct Memory(pub Vec<u8>);

impl BlockDevice for Memory {
    fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let start = usize::try_from(offset).unwrap();
        Ok(Bytes::copy_from_slice(&self.0[start..start + length]))
    }
}

/// A device and its size.
pub type Device = (Arc<dyn BlockDevice>, u64);

/// The pool behind the servers.
#[derive(Debug, Default)]
pub struct Pool {
    pub purposes: Mutex<Purposes>,
    pub sessions: Mutex<BTreeSet<String>>,
    pub disks: Mutex<BTreeMap<String, Device>>,
    pub vbds: AtomicUsize,
    pub close_delay: Mutex<Duration>,
}

impl NbdBackend for Pool {
    fn purposes(&self) -> BoxFuture<'_, Purposes> {
        let purposes = *self.purposes.lock().unwrap();
        async move { purposes }.boxed()
    }

    fn open(&self, _host: Uuid, request: ExportRequest) -> BoxFuture<'_, Result<OpenDisk, Refusal>> {
        async move {
            if !self.sessions.lock().unwrap().contains(&request.session) {
                return Err(Refusal("SESSION_INVALID".to_owned()));
            }
            let Some((device, size)) = self.disks.lock().unwrap().get(&request.vdi_uuid).cloned() else {
                return Err(Refusal("UUID_INVALID".to_owned()));
            };
            self.vbds.fetch_add(1, Ordering::SeqCst);
            let vdi = request.vdi_uuid.parse().unwrap();
            Ok(OpenDisk { vdi, size, device, ticket: Box::new(()) })
        }
        .boxed()
    }

    fn close(&self, _host: Uuid, _disk: OpenDisk) -> BoxFuture<'_, ()> {
        async move {
            let delay = *self.close_delay.lock().unwrap();
            tokio::time::sleep(delay).await;
            self.vbds.fetch_sub(1, Ordering::SeqCst);
        }
        .boxed()
    }
}

/// A host with its server.
pub struct Host {
    pub pool: Arc<Pool>,
    pub counters: NbdCounters,
    pub faults: NbdFaults,
    pub id: Uuid,
    pub server: NbdServer,
}

impl Host {
    /// With one disk, one session, and TLS forced or refused.
    pub fn start(tls: bool) -> Self {
        let pool = Pool::default();
        *pool.purposes.lock().unwrap() = Purposes { nbd: tls, insecure_nbd: !tls };
        *pool.close_delay.lock().unwrap() = Duration::from_millis(30);
        pool.sessions.lock().unwrap().insert("OpaqueRef:good".to_owned());
        Self::with(Arc::new(pool))
    }

    pub fn with(pool: Arc<Pool>) -> Self {
        Self::with_key(pool, IDENTITY.1.clone())
    }

    /// With a key that need not be the certificate's.
    pub fn with_key(pool: Arc<Pool>, key: Vec<u8>) -> Self {
        let (counters, faults, id) = (NbdCounters::default(), NbdFaults::default(), Uuid::new_v4());
        let backend: Arc<dyn NbdBackend> = Arc::<Pool>::clone(&pool);
        let server = NbdServer::start(NbdOptions {
            host: id,
            listen: "127.0.0.1:0".parse().unwrap(),
            certificates: vec![IDENTITY.0.clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)),
            backend,
            counters: counters.clone(),
            faults: faults.clone(),
        });
        Self { pool, counters, faults, id, server: server.unwrap() }
    }

    /// Adds a disk; gives its uuid and its export name.
    pub fn add(&self, device: Arc<dyn BlockDevice>, size: u64) -> (Uuid, String) {
        let vdi = Uuid::new_v4();
        self.pool.disks.lock().unwrap().insert(vdi.to_string(), (device, size));
        (vdi, format!("/{vdi}?session_id=OpaqueRef:good"))
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    pub fn vbds(&self) -> usize {
        self.pool.vbds.load(Ordering::SeqCst)
    }

    pub async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Waits until something holds.
    pub async fn until(&self, mut holds: impl FnMut(&Self) -> bool) {
        let wait = async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LIMIT, wait).await.unwrap();
    }
}

/// TLS as a client that trusts the host's certificate.
pub fn client_config(versions: &[&'static SupportedProtocolVersion], groups: Option<&[&str]>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(IDENTITY.0.clone()).unwrap();
    let mut provider = rustls::crypto::ring::default_provider();
    if let Some(groups) = groups {
        provider.kx_groups.retain(|group| groups.iter().any(|name| format!("{:?}", group.name()) == *name));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(versions).unwrap();
    Arc::new(config.with_root_certificates(roots).with_no_client_auth())
}

pub async fn handshake(config: Arc<ClientConfig>, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    TlsConnector::from(config).connect(ServerName::try_from(HOST_NAME).unwrap(), stream).await
}

/// Greeting, flags and STARTTLS where it is forced, up to the options inside.
pub async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x01");
    stream.write_all(&[0, 0, 0, 1]).await.unwrap();
}

pub async fn option<S: AsyncWrite + Unpin>(stream: &mut S, number: u32, payload: &[u8]) {
    let mut message = b"IHAVEOPT".to_vec();
    message.extend(number.to_be_bytes());
    message.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    message.extend(payload);
    stream.write_all(&message).await.unwrap();
    stream.flush().await.unwrap();
}

/// Names an export and reads the 134 bytes; gives the size.
pub async fn open<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, name: &str) -> io::Result<u64> {
    option(stream, 1, name.as_bytes()).await;
    let mut answer = [0; 134];
    stream.read_exact(&mut answer).await?;
    assert_eq!(answer[8..10], [0, 3]);
    assert!(answer[10..].iter().all(|&byte| byte == 0));
    Ok(u64::from_be_bytes(answer[..8].try_into().unwrap()))
}

pub async fn request<S: AsyncWrite + Unpin>(stream: &mut S, command: u32, handle: u64, offset: u64, length: u32) {
    let mut message = 0x2560_9513_u32.to_be_bytes().to_vec();
    message.extend(command.to_be_bytes());
    message.extend(handle.to_be_bytes());
    message.extend(offset.to_be_bytes());
    message.extend(length.to_be_bytes());
    stream.write_all(&message).await.unwrap();
    stream.flush().await.unwrap();
}

/// Reads a reply's header; gives its error number.
pub async fn reply<S: AsyncRead + Unpin>(stream: &mut S, handle: u64) -> io::Result<u32> {
    let mut header = [0; 16];
    stream.read_exact(&mut header).await?;
    assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
    assert_eq!(header[8..], handle.to_be_bytes());
    Ok(u32::from_be_bytes(header[4..8].try_into().unwrap()))
}

/// Asks for a range and reads all of it.
pub async fn read<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, offset: u64, length: u32) -> io::Result<Vec<u8>> {
    request(stream, 0, offset, offset, length).await;
    assert_eq!(reply(stream, offset).await?, 0);
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await?;
    Ok(data)
}

/// All that still comes before the end of the connection.
pub async fn rest<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Vec<u8>> {
    let mut rest = Vec::new();
    tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await.expect("the server closes in time")?;
    Ok(rest)
}

/// Bytes that differ from place to place.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let words = std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 16).to_le_bytes()
    });
    words.flatten().take(length).collect()
}
