//! A host of a test: speaks the old dialect with the manners of a real one, and with any misbehaviour that is ordered.
//!
//! Serves one request of a connection after the other, says "no error" before it reads, sends 512 KiB at a time, hangs up
//! where others send an error, and writes down what it saw.

#![allow(dead_code, reason = "each test uses another part of it")]

use std::collections::HashSet;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use xenvault_nbd::{Endpoint, ExportName};

const SLICE: u64 = 512 * 1024;

/// How a host behaves; may be changed while it runs.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    pub size: u64,
    /// Connections that are closed before a byte, counted down.
    pub refusals: usize,
    /// Places for connections; 0 is no limit.
    pub places: usize,
    /// Export names that open; `None` is any.
    pub names: Option<HashSet<String>>,
    /// How long opening takes.
    pub opening: Duration,
    /// How long it takes from DISC or an error to the close.
    pub closing: Duration,
    /// Reading a slice that touches one of these ends the connection.
    pub bad: Vec<Range<u64>>,
    /// Bytes of payload after which a connection is cut, whatever is going on; used up by one connection.
    pub cut_after: Vec<u64>,
    /// After this many requests of a connection it goes silent for ever.
    pub mute_after: Option<usize>,
    /// Answers nothing and hangs up on the first request, without a header.
    pub dead_disk: bool,
    /// The end of file after DISC never comes.
    pub never_closes: bool,
}

/// What a host saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub accepted: usize,
    pub refused: usize,
    pub opened: usize,
    pub wrong_names: usize,
    pub opening_now: usize,
    pub most_opening: usize,
    pub open_now: usize,
    pub most_open: usize,
    pub disconnects: usize,
    /// Offset and length.
    pub requests: Vec<(u64, u64)>,
    /// What a real host would have hung up on.
    pub foul: Vec<String>,
}

pub struct Host {
    pub address: SocketAddr,
    pub manners: Arc<Mutex<Manners>>,
    seen: Arc<Mutex<Seen>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Each 8 bytes of the disk are their own offset.
pub fn pattern(range: Range<u64>) -> Vec<u8> {
    let words = range.start / 8..range.end.div_ceil(8);
    let bytes: Vec<u8> = words.flat_map(|word| (word * 8).to_be_bytes()).collect();
    let skip = (range.start % 8) as usize;
    bytes[skip..skip + (range.end - range.start) as usize].to_vec()
}

impl Host {
    pub async fn start(manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let manners = Arc::new(Mutex::new(manners));
        let seen = Arc::new(Mutex::new(Seen::default()));
        let task = tokio::spawn(accept(listener, manners.clone(), seen.clone()));
        Self { address, manners, seen, task }
    }

    pub fn endpoint(&self, name: &str) -> Endpoint {
        Endpoint { address: self.address, tls: None, export_name: ExportName::new(name) }
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until something was seen.
    pub async fn until(&self, condition: impl Fn(&Seen) -> bool) {
        while !condition(&self.seen.lock().unwrap()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

async fn accept(listener: TcpListener, manners: Arc<Mutex<Manners>>, seen: Arc<Mutex<Seen>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let refused = {
            let (mut manners, mut seen) = (manners.lock().unwrap(), seen.lock().unwrap());
            seen.accepted += 1;
            let full = manners.places > 0 && seen.open_now + seen.opening_now >= manners.places;
            let refused = full || manners.refusals > 0;
            manners.refusals = manners.refusals.saturating_sub(1);
            seen.refused += usize::from(refused);
            refused
        };
        if !refused {
            tokio::spawn(serve(stream, manners.clone(), seen.clone()));
        }
    }
}

/// Ends with the connection, however it ends.
async fn serve(mut stream: TcpStream, manners: Arc<Mutex<Manners>>, seen: Arc<Mutex<Seen>>) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x01").await.ok()?;
    let mut head = [0; 20];
    stream.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes(head[16..20].try_into().unwrap());
    if head[..16] != *b"\0\0\0\x01IHAVEOPT\0\0\0\x01" || length > 4096 {
        seen.lock().unwrap().foul.push(format!("options {head:02x?}"));
        return None;
    }
    let mut name = vec![0; length as usize];
    stream.read_exact(&mut name).await.ok()?;
    let name = String::from_utf8(name).unwrap();

    let now = manners.lock().unwrap().clone();
    if now.names.is_some_and(|names| !names.contains(&name)) {
        seen.lock().unwrap().wrong_names += 1;
        return None;
    }
    {
        let mut seen = seen.lock().unwrap();
        seen.opening_now += 1;
        seen.most_opening = seen.most_opening.max(seen.opening_now);
    }
    tokio::time::sleep(now.opening).await;
    {
        let mut seen = seen.lock().unwrap();
        seen.opening_now -= 1;
        seen.open_now += 1;
        seen.opened += 1;
        seen.most_open = seen.most_open.max(seen.open_now);
    }
    let size = now.size;
    let mut answer = size.to_be_bytes().to_vec();
    answer.extend([0, 3]);
    answer.resize(134, 0);
    if stream.write_all(&answer).await.is_ok() {
        transmission(&mut stream, size, &manners, &seen).await;
    }
    let now = manners.lock().unwrap().clone();
    tokio::time::sleep(now.closing).await;
    seen.lock().unwrap().open_now -= 1;
    if now.never_closes {
        std::future::pending::<()>().await;
    }
    None
}

async fn transmission(stream: &mut TcpStream, size: u64, manners: &Mutex<Manners>, seen: &Mutex<Seen>) -> Option<()> {
    let mut cut = manners.lock().unwrap().cut_after.pop();
    for number in 0.. {
        let mut request = [0; 28];
        stream.read_exact(&mut request).await.ok()?;
        let handle = &request[8..16];
        let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
        let length = u64::from(u32::from_be_bytes(request[24..28].try_into().unwrap()));
        let kind = &request[..8];
        if kind == b"\x25\x60\x95\x13\0\0\0\x02" {
            seen.lock().unwrap().disconnects += 1;
            return None;
        }
        let end = offset + length;
        let aligned = offset % 4096 == 0 && (length % 4096 == 0 || end == size) && length % 512 == 0;
        if kind != b"\x25\x60\x95\x13\0\0\0\0" || !aligned || length == 0 || end > size {
            seen.lock().unwrap().foul.push(format!("{request:02x?}"));
            return None;
        }
        seen.lock().unwrap().requests.push((offset, length));
        let now = manners.lock().unwrap().clone();
        if now.dead_disk {
            return None;
        }
        if now.mute_after.is_some_and(|count| number >= count) {
            std::future::pending::<()>().await;
        }
        let mut header = b"\x67\x44\x66\x98\0\0\0\0".to_vec();
        header.extend_from_slice(handle);
        stream.write_all(&header).await.ok()?;
        let mut at = offset;
        while at < end {
            let slice = at..(at + SLICE).min(end);
            if now.bad.iter().any(|bad| bad.start < slice.end && slice.start < bad.end) {
                return None;
            }
            let data = pattern(slice.clone());
            match &mut cut {
                Some(left) if *left < data.len() as u64 => {
                    stream.write_all(&data[..*left as usize]).await.ok()?;
                    return None;
                }
                Some(left) => *left -= data.len() as u64,
                None => {}
            }
            stream.write_all(&data).await.ok()?;
            at = slice.end;
        }
    }
    None
}
