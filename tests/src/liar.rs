//! A service that speaks as much of S3 as a repository needs, keeps everything in memory, believes every signature, and
//! does not keep the promises that it is told to break.

use crate::proxy::{read_head, read_up_to};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// What it does not keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lie {
    /// It keeps everything.
    #[default]
    None,
    /// Conditions of writes are accepted and ignored, as Garage does.
    Conditions,
    /// Conditions are checked, and not when two writes are under way at once.
    Races,
    /// The object that was written last is not listed yet.
    Listings,
    /// What was overwritten is still read for a while.
    Stale,
    /// What is removed stays.
    Removals,
}

/// A running liar; it ends with the value.
#[derive(Debug)]
pub struct Liar {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    lie: Lie,
    objects: Mutex<BTreeMap<String, Vec<Vec<u8>>>>,
    newest: Mutex<String>,
    ends: AtomicBool,
}

struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Liar {
    /// Begins to listen.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn start(lie: Lie) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (objects, newest, ends) = Default::default();
        let shared = Arc::new(Shared { lie, objects, newest, ends });
        let work = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if work.ends.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(client), work) = (client, Arc::clone(&work)) else { continue };
                thread::spawn(move || work.serve(client));
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Names of what it holds, with the bucket.
    pub fn names(&self) -> Vec<String> {
        lock(&self.shared.objects).keys().cloned().collect()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        let (head, mut body) = read_head(&mut client)?;
        let header = |wanted: &str| {
            head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case(wanted).then(|| value.trim().to_owned())
            })
        };
        let length = header("content-length").and_then(|length| length.parse().ok()).unwrap_or_default();
        read_up_to(&mut client, &mut body, length)?;
        let mut words = head.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let name = path.trim_start_matches('/').to_owned();
        let answer = match method {
            "PUT" => self.put(name, body, header("if-none-match").is_some()),
            "DELETE" => self.remove(&name),
            _ if query.contains("list-type=") => self.list(&name, query),
            _ => self.get(&name, header("range").as_deref()),
        };
        let Answer { status, headers, body } = answer;
        write!(
            client,
            "HTTP/1.1 {status} Said\r\nconnection: close\r\nlast-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\
             etag: \"0\"\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        )?;
        if method == "HEAD" { Ok(()) } else { client.write_all(&body) }
    }

    fn put(&self, name: String, body: Vec<u8>, only_new: bool) -> Answer {
        let is_there = lock(&self.objects).contains_key(&name);
        if self.lie == Lie::Races {
            // Whoever asks in the meantime is told the same.
            thread::sleep(std::time::Duration::from_millis(200));
        }
        if only_new && is_there && self.lie != Lie::Conditions {
            return refuse(412, "PreconditionFailed");
        }
        lock(&self.newest).clone_from(&name);
        let mut objects = lock(&self.objects);
        if only_new && self.lie != Lie::Conditions && self.lie != Lie::Races && objects.contains_key(&name) {
            return refuse(412, "PreconditionFailed");
        }
        objects.entry(name).or_default().push(body);
        Answer { status: 200, headers: String::new(), body: Vec::new() }
    }

    fn remove(&self, name: &str) -> Answer {
        if self.lie != Lie::Removals {
            lock(&self.objects).remove(name);
        }
        Answer { status: 204, headers: String::new(), body: Vec::new() }
    }

    fn get(&self, name: &str, range: Option<&str>) -> Answer {
        let objects = lock(&self.objects);
        let Some(versions) = objects.get(name) else { return refuse(404, "NoSuchKey") };
        let newest = if self.lie == Lie::Stale { versions.first() } else { versions.last() };
        let whole = newest.cloned().unwrap_or_default();
        let Some((from, to)) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) else {
            return Answer { status: 200, headers: String::new(), body: whole };
        };
        let (from, to) =
            (from.parse().unwrap_or(0_usize), to.parse().map_or(whole.len(), |to: usize| to.saturating_add(1)));
        let to = to.min(whole.len());
        match whole.get(from..to).filter(|part| !part.is_empty()) {
            None => refuse(416, "InvalidRange"),
            Some(part) => Answer {
                status: 206,
                headers: format!("content-range: bytes {from}-{}/{}\r\n", to - 1, whole.len()),
                body: part.to_vec(),
            },
        }
    }

    fn list(&self, bucket: &str, query: &str) -> Answer {
        let value = |wanted: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(wanted)?.strip_prefix('='))
                .unwrap_or_default()
                .replace("%2F", "/")
        };
        let (bucket, newest) = (bucket.trim_end_matches('/'), lock(&self.newest).clone());
        let (prefix, after) = (format!("{bucket}/{}", value("prefix")), value("start-after"));
        let mut body = String::from("<ListBucketResult><IsTruncated>false</IsTruncated>");
        for (name, versions) in lock(&self.objects).iter().filter(|(name, _)| name.starts_with(&prefix)) {
            let key = name.get(bucket.len() + 1..).unwrap_or_default();
            if key > after.as_str() && (self.lie != Lie::Listings || *name != newest) {
                let size = versions.last().map_or(0, Vec::len);
                body.push_str(&format!(
                    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                     <ETag>\"0\"</ETag><Size>{size}</Size></Contents>"
                ));
            }
        }
        body.push_str("</ListBucketResult>");
        Answer { status: 200, headers: String::new(), body: body.into_bytes() }
    }
}

fn refuse(status: u16, code: &str) -> Answer {
    let body = format!("<Error><Code>{code}</Code></Error>").into_bytes();
    Answer { status, headers: String::new(), body }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
