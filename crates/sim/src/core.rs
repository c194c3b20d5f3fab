//! The living pool: database, storage, hosts, faults and counters, shared by every server and every call.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::SimOptions;
use crate::control::{CounterBook, FaultBook};
use crate::model::{Database, Value};
use crate::nbd::{NbdCounters, NbdFaults};
use crate::rpc::{Failure, Outcome};
use crate::storage::{CbtMessage, Storage};

static THREADS: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
}

/// A host: what does not change while the pool lives.
#[derive(Debug)]
pub(crate) struct HostNode {
    pub(crate) reference: String,
    pub(crate) uuid: uuid::Uuid,
    pub(crate) address: Ipv4Addr,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) certificate_pem: String,
    pub(crate) key: PrivateKeyDer<'static>,
    /// What a verifier has to look for in the certificate, or the host's name.
    pub(crate) subject: String,
    pub(crate) control_domain: String,
    pub(crate) nbd_port: AtomicU16,
    /// Cancelled and replaced when the host's toolstack ends: its connections break. NBD has a life of its own.
    life: Mutex<CancellationToken>,
    /// The machine runs.
    powered: AtomicBool,
    /// Its toolstack runs.
    toolstack: AtomicBool,
    /// Its toolstack answers every call with `HOST_STILL_BOOTING`.
    booting: AtomicBool,
    /// A high-availability message has told of the host's last failure.
    pub(crate) failure_told: AtomicBool,
}

/// What a host is made of.
pub(crate) struct HostParts {
    pub(crate) reference: String,
    pub(crate) uuid: uuid::Uuid,
    pub(crate) address: Ipv4Addr,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) certificate_pem: String,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) subject: String,
    pub(crate) control_domain: String,
}

impl HostNode {
    /// A host that runs.
    pub(crate) fn new(parts: HostParts) -> Self {
        Self {
            reference: parts.reference,
            uuid: parts.uuid,
            address: parts.address,
            certificate: parts.certificate,
            certificate_pem: parts.certificate_pem,
            key: parts.key,
            subject: parts.subject,
            control_domain: parts.control_domain,
            nbd_port: AtomicU16::new(0),
            life: Mutex::new(CancellationToken::new()),
            powered: AtomicBool::new(true),
            toolstack: AtomicBool::new(true),
            booting: AtomicBool::new(false),
            failure_told: AtomicBool::new(true),
        }
    }

    pub(crate) fn nbd_port(&self) -> u16 {
        self.nbd_port.load(Ordering::Relaxed)
    }

    /// Whether the machine runs.
    pub(crate) fn is_powered(&self) -> bool {
        self.powered.load(Ordering::SeqCst)
    }

    /// Whether it answers: the machine and its toolstack run.
    pub(crate) fn is_up(&self) -> bool {
        self.is_powered() && self.toolstack.load(Ordering::SeqCst)
    }

    /// Whether its toolstack answers, but does not serve yet.
    pub(crate) fn is_booting(&self) -> bool {
        self.booting.load(Ordering::SeqCst)
    }

    /// Ends the toolstack's connections and calls.
    pub(crate) fn end_life(&self) {
        let mut life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        life.cancel();
        *life = CancellationToken::new();
    }

    pub(crate) fn life(&self) -> CancellationToken {
        self.life.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The living pool.
pub(crate) struct Core {
    db: Mutex<Database>,
    /// Number of the thread that holds the lock, 0 for none.
    holder: AtomicU64,
    generation: watch::Sender<u64>,
    pub(crate) storage: Storage,
    pub(crate) options: SimOptions,
    pub(crate) hosts: Vec<HostNode>,
    /// Index of the coordinator.
    coordinator: AtomicUsize,
    /// Counts changes of who answers and who is the coordinator.
    standing: watch::Sender<u64>,
    /// VMs that a crash halted, with the index of their host, until high availability starts them again.
    pub(crate) crashed: Mutex<HashMap<String, usize>>,
    /// XenAPI port, the same on all hosts.
    pub(crate) port: AtomicU16,
    pub(crate) faults: FaultBook,
    pub(crate) counters: CounterBook,
    pub(crate) nbd_counters: NbdCounters,
    pub(crate) nbd_faults: NbdFaults,
    /// Session by session: classes registered for `event.next`, with the generation seen.
    pub(crate) registrations: Mutex<HashMap<String, (Vec<String>, u64)>>,
    /// Background tasks that can be cancelled.
    pub(crate) cancels: Mutex<HashMap<String, CancellationToken>>,
    /// Where restored databases wait, with the host that boots with them.
    pub(crate) restores: OnceLock<tokio::sync::mpsc::Sender<(usize, Database)>>,
    /// Garbage collection of every SR.
    pub(crate) collectors: crate::methods::Collectors,
    /// What VTPMs hold, by their references. Never part of a record.
    vtpms: Mutex<HashMap<String, String>>,
    /// What stood in the pool when it had started.
    pub(crate) baseline: OnceLock<HashSet<(String, String)>>,
    /// Whose task each is: the session that made it.
    pub(crate) task_owners: Mutex<HashMap<String, String>>,
    /// When sessions were last used.
    pub(crate) session_uses: Mutex<HashMap<String, crate::methods::session::Use>>,
    /// Storage migrations in progress by host.
    pub(crate) storage_migrations: Mutex<HashMap<String, usize>>,
    /// Storage migrations wait before they switch a VM over.
    pub(crate) migrations_held: watch::Sender<bool>,
    /// Ends everything.
    pub(crate) end: CancellationToken,
}

/// The database, locked. Waiters for changes are woken when it is given back.
pub(crate) struct DbGuard<'a> {
    db: MutexGuard<'a, Database>,
    generation: &'a watch::Sender<u64>,
    holder: &'a AtomicU64,
    before: u64,
}

impl Deref for DbGuard<'_> {
    type Target = Database;
    fn deref(&self) -> &Database {
        &self.db
    }
}

impl DerefMut for DbGuard<'_> {
    fn deref_mut(&mut self) -> &mut Database {
        &mut self.db
    }
}

impl Drop for DbGuard<'_> {
    fn drop(&mut self) {
        self.holder.store(0, Ordering::Relaxed);
        let now = self.db.generation();
        if now != self.before {
            self.generation.send_replace(now);
        }
    }
}

impl Core {
    pub(crate) fn new(options: SimOptions, storage: Storage, hosts: Vec<HostNode>, db: Database) -> Arc<Self> {
        let generation = watch::Sender::new(db.generation());
        Arc::new(Self {
            db: Mutex::new(db),
            holder: AtomicU64::new(0),
            generation,
            storage,
            options,
            hosts,
            coordinator: AtomicUsize::new(0),
            standing: watch::Sender::new(0),
            crashed: Mutex::default(),
            port: AtomicU16::new(0),
            faults: FaultBook::default(),
            counters: CounterBook::default(),
            nbd_counters: NbdCounters::default(),
            nbd_faults: NbdFaults::default(),
            registrations: Mutex::default(),
            cancels: Mutex::default(),
            restores: OnceLock::new(),
            collectors: crate::methods::Collectors::default(),
            vtpms: Mutex::default(),
            baseline: OnceLock::new(),
            task_owners: Mutex::default(),
            session_uses: Mutex::default(),
            storage_migrations: Mutex::default(),
            migrations_held: watch::Sender::new(false),
            end: CancellationToken::new(),
        })
    }

    /// Locks the database. Never held over an `await`, and never taken twice by one thread: that would hang, so it
    /// fails instead.
    pub(crate) fn db(&self) -> DbGuard<'_> {
        let me = THREAD.with(|number| *number);
        assert!(self.holder.load(Ordering::Relaxed) != me, "the database is locked twice by one thread");
        let db = self.db.lock().unwrap_or_else(PoisonError::into_inner);
        self.holder.store(me, Ordering::Relaxed);
        let before = db.generation();
        let mut guard = DbGuard { db, generation: &self.generation, holder: &self.holder, before };
        // Nobody sees records of chains as they were.
        let moved = self.storage.take_chain_changes();
        if !moved.is_empty() {
            for change in &moved {
                self.collectors.kick(change.sr);
            }
            crate::methods::apply_chain_changes(&mut guard, moved);
        }
        guard
    }

    /// Puts a restored database into the place of the present one. Tasks, sessions and what hung on them are gone.
    pub(crate) fn replace_db(&self, mut database: Database) {
        let mut db = self.db();
        database.keep_messages(&db);
        *db = database;
        drop(db);
        self.crashed.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.registrations.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.cancels.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A receiver that sees every later change of the database.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// Tries again whenever the database changes, as long as another operation is in the way (xapi waits up to two
    /// hours), or until `limit`.
    pub(crate) async fn retry<T>(
        &self,
        limit: Duration,
        mut attempt: impl FnMut(&mut Database) -> Outcome<T>,
    ) -> Outcome<T> {
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            let mut changes = self.changes();
            let outcome = attempt(&mut self.db());
            match outcome {
                Err(failure) if failure.code == "OTHER_OPERATION_IN_PROGRESS" => {
                    let now = tokio::time::Instant::now();
                    if now >= deadline {
                        return Err(failure);
                    }
                    let wait = deadline.min(now + Duration::from_secs(1));
                    // Either a change or a second: both mean to look again.
                    let _ = tokio::time::timeout_at(wait, changes.changed()).await;
                }
                outcome => return outcome,
            }
        }
    }

    pub(crate) fn host_of(&self, reference: &str) -> Outcome<&HostNode> {
        let found = self.hosts.iter().find(|host| host.reference == reference);
        found.ok_or_else(|| Failure::handle_invalid("host", reference))
    }

    pub(crate) fn host_at(&self, index: usize) -> Outcome<&HostNode> {
        self.hosts.get(index).ok_or_else(|| Failure::internal("no such host"))
    }

    /// Index of the coordinator, which may be down.
    pub(crate) fn coordinator(&self) -> usize {
        self.coordinator.load(Ordering::SeqCst)
    }

    pub(crate) fn set_coordinator(&self, host: usize) {
        self.coordinator.store(host, Ordering::SeqCst);
        self.standing.send_modify(|count| *count += 1);
    }

    /// Whether the coordinator serves.
    pub(crate) fn has_coordinator(&self) -> bool {
        self.hosts.get(self.coordinator()).is_some_and(|node| node.is_up() && !node.is_booting())
    }

    /// Returns as soon as a coordinator serves: members have no answers of their own.
    pub(crate) async fn await_coordinator(&self) {
        let mut changes = self.standing.subscribe();
        while !self.has_coordinator() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Switches a machine or its toolstack on or off; connections end with either.
    pub(crate) fn set_running(&self, node: &HostNode, powered: bool, toolstack: bool) {
        node.powered.store(powered, Ordering::SeqCst);
        node.toolstack.store(toolstack, Ordering::SeqCst);
        if !(powered && toolstack) {
            node.end_life();
        }
        self.standing.send_modify(|count| *count += 1);
    }

    /// Says of a toolstack that runs whether it serves yet.
    pub(crate) fn set_booting(&self, node: &HostNode, booting: bool) {
        node.booting.store(booting, Ordering::SeqCst);
        self.standing.send_modify(|count| *count += 1);
    }

    pub(crate) fn port(&self) -> u16 {
        self.port.load(Ordering::Relaxed)
    }

    /// URL of a host's XenAPI.
    pub(crate) fn url_of(&self, host: &HostNode) -> String {
        let scheme = if self.options.plain_http { "http" } else { "https" };
        format!("{scheme}://{}:{}", host.address, self.port())
    }

    /// The storage's identity of a disk.
    pub(crate) fn disk_id(&self, vdi: &str) -> Outcome<uuid::Uuid> {
        let db = self.db();
        db.check("VDI", vdi)?;
        parse_uuid(&db.text("VDI", vdi, "uuid"))
    }

    /// What a VTPM holds; empty for a new one.
    pub(crate) fn vtpm(&self, reference: &str) -> String {
        self.vtpms.lock().unwrap_or_else(PoisonError::into_inner).get(reference).cloned().unwrap_or_default()
    }

    pub(crate) fn set_vtpm(&self, reference: &str, content: String) {
        self.vtpms.lock().unwrap_or_else(PoisonError::into_inner).insert(reference.to_owned(), content);
    }

    pub(crate) fn forget_vtpm(&self, reference: &str) {
        self.vtpms.lock().unwrap_or_else(PoisonError::into_inner).remove(reference);
    }

    /// What the storage did to a disk by itself: CBT is off, and a pool message says so.
    pub(crate) fn tell(&self, message: Option<CbtMessage>) {
        let Some(message) = message else { return };
        let uuid = message.vdi.to_string();
        let mut db = self.db();
        if let Ok(vdi) = db.by_uuid("VDI", &uuid) {
            db.set("VDI", &vdi, "cbt_enabled", false);
        }
        post_message(&mut db, message.name, 3, "VDI", &uuid, &message.body);
    }
}

/// Adds a message to the pool.
pub(crate) fn post_message(
    db: &mut Database,
    name: &str,
    priority: i64,
    class: &str,
    uuid: &str,
    body: &str,
) -> String {
    db.create(
        "message",
        vec![
            ("name", name.into()),
            ("priority", priority.into()),
            ("cls", class.into()),
            ("obj_uuid", uuid.into()),
            ("timestamp", Value::Date(crate::model::now())),
            ("body", body.into()),
        ],
    )
}

pub(crate) fn parse_uuid(text: &str) -> Outcome<uuid::Uuid> {
    text.parse().map_err(|_| Failure::internal("uuid"))
}
