//! Between a client and an S3 service: lets requests through, and spoils those that it is told to.
//!
//! Signatures hold, since nothing of a request is changed. Each request has a connection of its own.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// No request takes longer on any machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Longer heads are none.
const MAX_HEAD_BYTES: usize = 64 * 1024;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// An object is written.
    Put,
    /// A part of an object is read.
    Get,
    /// An object is looked at.
    Head,
    /// Objects are listed.
    List,
    /// An object is removed.
    Delete,
}

/// All of them.
pub const KINDS: [Kind; 5] = [Kind::Put, Kind::Get, Kind::Head, Kind::List, Kind::Delete];

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is answered with this status and the service's word for it, and goes no further.
    Answer(u16, &'static str),
    /// The connection breaks before anything was done.
    NoAnswer,
    /// Half of what is sent arrives, then the connection breaks.
    HalfOfRequest,
    /// It is done, and the connection breaks before the answer.
    LostAnswer,
    /// It is done, and the connection breaks in the middle of the answer.
    HalfOfAnswer,
    /// Nothing is done and nothing is answered.
    Silence,
    /// Nothing is answered; it is done after the sender has given up.
    Late,
}

/// A running proxy; it ends with the value.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    plan: Mutex<HashMap<Kind, Plan>>,
    seen: Mutex<HashMap<Kind, u64>>,
    ends: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    fault: Fault,
    /// Requests that are spoilt.
    times: u64,
}

impl Proxy {
    /// Begins to listen.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn start(upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (plan, seen, ends) = Default::default();
        let shared = Arc::new(Shared { upstream, plan, seen, ends });
        let work = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if work.ends.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(client), work) = (client, Arc::clone(&work)) else { continue };
                // A connection that breaks is what this is for.
                thread::spawn(move || work.serve(client));
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next `times` requests of this kind are spoilt.
    pub fn plan(&self, kind: Kind, fault: Fault, times: u64) {
        lock(&self.shared.plan).insert(kind, Plan { fault, times });
    }

    /// From now on nothing is spoilt. Gives how many requests were still to be.
    pub fn relent(&self) -> u64 {
        lock(&self.shared.plan).drain().map(|(_, plan)| plan.times).fold(0, u64::saturating_add)
    }

    /// How many requests of this kind have come.
    pub fn seen(&self, kind: Kind) -> u64 {
        lock(&self.shared.seen).get(&kind).copied().unwrap_or_default()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        // Wakes the one that listens.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn next(&self, kind: Kind) -> Option<Fault> {
        *lock(&self.seen).entry(kind).or_default() += 1;
        let mut plans = lock(&self.plan);
        let plan = plans.get_mut(&kind).filter(|plan| plan.times > 0)?;
        plan.times -= 1;
        Some(plan.fault)
    }

    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        client.set_read_timeout(Some(PATIENCE))?;
        let (head, mut body) = read_head(&mut client)?;
        let length = content_length(&head);
        let fault = self.next(kind(&head));
        match fault {
            Some(Fault::NoAnswer) => return client.shutdown(Shutdown::Both),
            Some(Fault::Silence) => return wait_for_end(&mut client),
            Some(Fault::HalfOfRequest) => {
                read_up_to(&mut client, &mut body, length / 2)?;
                let mut service = self.connect()?;
                service.write_all(head.as_bytes())?;
                service.write_all(&body)?;
                service.shutdown(Shutdown::Both)?;
                return client.shutdown(Shutdown::Both);
            }
            _ => {}
        }
        read_up_to(&mut client, &mut body, length)?;
        match fault {
            Some(Fault::Answer(status, code)) => {
                let text = format!("<Error><Code>{code}</Code><Message>told to</Message></Error>");
                let is_head = head.starts_with("HEAD ");
                let shown = if is_head { "" } else { &text };
                let answer = format!(
                    "HTTP/1.1 {status} Told\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{shown}",
                    text.len()
                );
                return client.write_all(answer.as_bytes());
            }
            Some(Fault::Late) => wait_for_end(&mut client)?,
            _ => {}
        }
        let answer = self.ask(&head, &body)?;
        let sent = match fault {
            Some(Fault::LostAnswer | Fault::Late) => &[][..],
            Some(Fault::HalfOfAnswer) => {
                let end = answer.windows(4).position(|window| window == b"\r\n\r\n").map_or(0, |at| at + 4);
                // Within the body, where there is one.
                let cut = if answer.len() > end + 1 { end + (answer.len() - end) / 2 } else { end / 2 };
                answer.get(..cut).unwrap_or_default()
            }
            _ => &answer,
        };
        client.write_all(sent)?;
        client.shutdown(Shutdown::Both)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let service = TcpStream::connect(self.upstream)?;
        service.set_read_timeout(Some(PATIENCE))?;
        Ok(service)
    }

    /// The whole answer of the service.
    fn ask(&self, head: &str, body: &[u8]) -> io::Result<Vec<u8>> {
        let mut service = self.connect()?;
        // Not among the headers that are signed.
        let (first, rest) = head.split_once("\r\n").unwrap_or((head, ""));
        service.write_all(format!("{first}\r\nconnection: close\r\n{rest}").as_bytes())?;
        service.write_all(body)?;
        let mut answer = Vec::new();
        service.read_to_end(&mut answer)?;
        Ok(answer)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kind(head: &str) -> Kind {
    let mut words = head.split(' ');
    match (words.next().unwrap_or_default(), words.next().unwrap_or_default()) {
        ("PUT", _) => Kind::Put,
        ("HEAD", _) => Kind::Head,
        ("DELETE", _) => Kind::Delete,
        (_, path) if path.contains("list-type=") => Kind::List,
        _ => Kind::Get,
    }
}

fn content_length(head: &str) -> usize {
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    value.unwrap_or_default()
}

/// The head with its empty line, and what came with it of the body.
pub(crate) fn read_head(stream: &mut impl Read) -> io::Result<(String, Vec<u8>)> {
    let mut taken = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        if let Some(at) = taken.windows(4).position(|window| window == b"\r\n\r\n") {
            let body = taken.split_off(at + 4);
            return String::from_utf8(taken).map(|head| (head, body)).map_err(io::Error::other);
        }
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count if taken.len() > MAX_HEAD_BYTES => return Err(io::Error::other(format!("{count} bytes too many"))),
            count => taken.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    }
}

/// Reads on until there are so many bytes.
pub(crate) fn read_up_to(stream: &mut impl Read, into: &mut Vec<u8>, length: usize) -> io::Result<()> {
    let left = length.saturating_sub(into.len());
    let read = stream.take(left as u64).read_to_end(into)?;
    if read < left { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Returns when the other side has given up.
fn wait_for_end(client: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match client.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
