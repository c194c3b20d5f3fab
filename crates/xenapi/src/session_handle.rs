//! The session: one login that many handles share, renewed when it ends, logged out on every path.

mod calls;
mod directory;
mod login;
mod options;
mod outage;
mod search;

pub(crate) use calls::jittered;
pub use options::{ConnectOptions, Floor, KnownPool, Limits, Member, Timeouts};

use crate::error::XenApiError;
use crate::host;
use crate::http_client::HttpClient;
use crate::model::Repeat;
use crate::rpc::{Document, Encoding};
use crate::secret::Secret;
use crate::tasks::TaskGuard;
use crate::trust::PinnedHosts;
use crate::unsupported::ServerVersion;
use crate::value::{FromValue, ToValue, Value};
use directory::Directory;
use search::Search;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

/// How long [`Session::logout`] waits for what was cancelled to be cleaned up: longer than the end of a task is waited
/// for, so that a task that does not end is destroyed all the same.
const CLEANUP_LIMIT: Duration = Duration::from_secs(90);

/// How often an otherwise idle session is used, so that the pool does not end it.
const KEEP_ALIVE: Duration = Duration::from_secs(300);

/// A session at a pool; cloning gives another handle of the same session.
///
/// It ends with [`Session::logout`], or in the background when the last handle is dropped.
#[derive(Clone)]
pub struct Session {
    inner: Arc<Inner>,
    task_note: Arc<str>,
}

struct Inner {
    options: Arc<ConnectOptions>,
    directory: Arc<Directory>,
    state: Mutex<State>,
    /// Held during a login, so that many calls that find the session ended log in once. The last failure, as a text.
    renewing: tokio::sync::Mutex<String>,
    /// Counts passes over the hosts that found no coordinator, so that calls that waited for one do not make the same.
    failed_passes: AtomicU64,
    permits: Semaphore,
    outage: outage::Outage,
    background: TaskTracker,
    runtime: tokio::runtime::Handle,
    keep_alive: Mutex<Option<tokio::task::AbortHandle>>,
}

/// What changes with a login.
#[derive(Clone)]
struct State {
    client: Arc<HttpClient>,
    encoding: Encoding,
    reference: crate::session::Ref,
    generation: u64,
    ended: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("coordinator", &self.coordinator()).finish_non_exhaustive()
    }
}

impl Session {
    /// Opens a session. The future may be dropped at any time: a session that was opened is closed again.
    ///
    /// # Errors
    /// [`XenApiError::LoginRefused`], [`XenApiError::Certificate`], [`XenApiError::HostIsSlave`],
    /// [`XenApiError::WrongPool`], [`XenApiError::Connection`], [`XenApiError::Timeout`].
    pub async fn login(options: ConnectOptions) -> Result<Self, XenApiError> {
        // In a task of its own: a login whose answer nobody waits for any more still ends with a logout.
        let opening = tokio::spawn(async move {
            let directory = Arc::new(Directory::new(&options)?);
            let (options, background) = (Arc::new(options), TaskTracker::new());
            let opened = search::run(Search::first(&options, &directory), &background).await?;
            let session = Self::assemble(options, directory, background, opened);
            session.keep_alive();
            Ok(session)
        });
        opening.await.unwrap_or_else(|_| Err(XenApiError::Cancelled { operation: "login".to_owned() }))
    }

    fn assemble(
        options: Arc<ConnectOptions>,
        directory: Arc<Directory>,
        background: TaskTracker,
        opened: login::Opened,
    ) -> Self {
        let permits = Semaphore::new(options.limits.calls.max(1));
        let state = State {
            client: opened.client,
            encoding: opened.encoding,
            reference: opened.reference,
            generation: 1,
            ended: false,
        };
        let inner = Inner {
            options,
            directory,
            state: Mutex::new(state),
            renewing: tokio::sync::Mutex::default(),
            failed_passes: AtomicU64::new(0),
            permits,
            outage: outage::Outage::default(),
            background,
            runtime: tokio::runtime::Handle::current(),
            keep_alive: Mutex::new(None),
        };
        Self { inner: Arc::new(inner), task_note: Arc::from("") }
    }

    /// Ends the session for all its handles, after what was cancelled has been cleaned up.
    ///
    /// # Errors
    /// Those of the call; the session is not used any more in any case.
    pub async fn logout(&self) -> Result<(), XenApiError> {
        self.inner.background.close();
        let _ = tokio::time::timeout(CLEANUP_LIMIT, self.inner.background.wait()).await;
        let state = {
            let mut state = self.inner.lock();
            if state.ended {
                return Ok(());
            }
            state.ended = true;
            state.clone()
        };
        self.inner.stop_keep_alive();
        // In a task of its own, so that dropping this future does not leave the session open.
        let limits = self.inner.options.limits.clone();
        let leaving = self.inner.runtime.spawn(async move { login::leave(&state, &limits).await });
        leaving.await.unwrap_or_else(|_| Err(XenApiError::Cancelled { operation: "session.logout".to_owned() }))
    }

    /// Counts logins: changes when the session had ended and was renewed, so that references can be looked up again.
    pub fn generation(&self) -> u64 {
        self.inner.lock().generation
    }

    /// The pool's uuid.
    pub fn pool_uuid(&self) -> String {
        self.inner.directory.pool_uuid().unwrap_or_default()
    }

    /// The host that calls go to: the coordinator, with its port where that is not the usual one.
    pub fn coordinator(&self) -> String {
        self.inner.lock().client.endpoint.display_host()
    }

    /// Product and version of the coordinator, as they were learned at the last login.
    pub fn server(&self) -> ServerVersion {
        self.inner.directory.server()
    }

    /// The pool's hosts, as they were learned at the last login.
    pub fn members(&self) -> Vec<Member> {
        self.inner.directory.members()
    }

    /// Every certificate that is confirmed or was learned, to be kept for the next login
    /// ([`crate::Trust::Pins`]).
    pub fn pinned_hosts(&self) -> PinnedHosts {
        self.inner.directory.pins()
    }

    /// Where the pool's hosts are, to be kept for the next login ([`ConnectOptions::known`]).
    pub fn known_pool(&self) -> KnownPool {
        let addresses = self.members().into_iter().map(|member| member.address).collect();
        KnownPool { pool_uuid: self.inner.directory.pool_uuid(), addresses }
    }

    /// Another handle of the same session: the tasks of transfers that are started through it bear `note` as their
    /// description, so that a caller that died can be recognised by what it left.
    #[must_use]
    pub fn with_task_note(&self, note: &str) -> Self {
        Self { inner: Arc::clone(&self.inner), task_note: Arc::from(note) }
    }

    pub(crate) fn task_note(&self) -> &str {
        &self.task_note
    }

    /// The session's own reference, a secret.
    pub fn reference(&self) -> crate::session::Ref {
        self.inner.lock().reference.clone()
    }

    /// The options that it was opened with.
    pub fn options(&self) -> &ConnectOptions {
        &self.inner.options
    }

    pub(crate) async fn invoke<T: FromValue>(
        &self,
        method: &str,
        repeat: Repeat,
        arguments: Vec<Value>,
    ) -> Result<T, XenApiError> {
        let value = self.call(method, repeat, arguments).await?;
        T::from_value(value).map_err(|source| XenApiError::decode(method, source))
    }

    /// Calls an `Async.` form. If nobody waits for the task's reference any more, the task is cancelled and destroyed.
    pub(crate) async fn start(&self, method: &str, arguments: Vec<Value>) -> Result<crate::task::Ref, XenApiError> {
        let (found, waiting) = tokio::sync::oneshot::channel();
        let (session, name) = (self.clone(), method.to_owned());
        self.background(async move {
            let result = session.invoke(&name, Repeat::Never, arguments).await;
            // The guard goes along: the answer may be given up before it is sent, or after it was.
            let _ = found.send(result.map(|task| TaskGuard::new(&session, task)));
        });
        let started = waiting.await.unwrap_or_else(|_| Err(XenApiError::Cancelled { operation: method.to_owned() }));
        started.map(TaskGuard::release)
    }

    /// Runs work that outlives the caller; [`Session::logout`] waits for it.
    pub(crate) fn background(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.inner.background.spawn_on(work, &self.inner.runtime);
    }

    /// Runs work that its owner ends; [`Session::logout`] does not wait for it.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> tokio::task::AbortHandle {
        self.inner.runtime.spawn(work).abort_handle()
    }

    /// The host that does transfers for `host`, known from the pool itself.
    pub(crate) async fn client_of(&self, host: &host::Ref) -> Result<HttpClient, XenApiError> {
        let address = match self.inner.directory.address_of(host) {
            Some(address) => address,
            None => {
                self.refresh_members().await?;
                let unknown = || XenApiError::UnknownHost { host: host.as_str().to_owned() };
                self.inner.directory.address_of(host).ok_or_else(unknown)?
            }
        };
        self.client_at(&address).await
    }

    /// As [`Session::client_of`] by address, which must be that of a member.
    pub(crate) async fn client_at(&self, address: &str) -> Result<HttpClient, XenApiError> {
        // A host that was away at the login, or that joined the pool since.
        if !self.inner.directory.is_ready(address) {
            self.refresh_members().await?;
        }
        if !self.inner.directory.is_member(address) {
            return Err(XenApiError::UnknownHost { host: address.to_owned() });
        }
        let endpoint = self.inner.lock().client.endpoint.at(address);
        let tls = self.inner.directory.tls_for(&endpoint)?;
        Ok(HttpClient::new(endpoint, tls, self.inner.options.timeouts.clone()))
    }

    async fn refresh_members(&self) -> Result<(), XenApiError> {
        let state = self.inner.lock().clone();
        login::learn(&state, &self.inner.options, &self.inner.directory, login::Certificates::Missing).await
    }

    /// Learns the certificates of hosts that were away or unknown at earlier logins. Nothing waits for it: whoever needs
    /// one that is still missing asks for it again.
    fn learn_certificates(&self) {
        let state = self.inner.lock().clone();
        let (options, directory) = (Arc::clone(&self.inner.options), Arc::clone(&self.inner.directory));
        self.spawn(async move {
            if let Err(error) = login::learn(&state, &options, &directory, login::Certificates::Missing).await {
                tracing::debug!(%error, "certificates could not be learned");
            }
        });
    }

    /// Uses the session now and then, for as long as a handle exists.
    fn keep_alive(&self) {
        let weak = Arc::downgrade(&self.inner);
        let task = self.inner.runtime.spawn(async move {
            loop {
                tokio::time::sleep(KEEP_ALIVE).await;
                let Some(inner) = weak.upgrade() else { return };
                let session = Self { inner, task_note: Arc::from("") };
                if let Err(error) = session.call("pool.get_all", Repeat::Harmless, Vec::new()).await {
                    tracing::debug!(%error, "keeping the session alive failed");
                }
            }
        });
        *self.inner.keep_alive.lock().unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop_keep_alive(&self) {
        if let Some(task) = self.keep_alive.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop_keep_alive();
        let state = self.lock().clone();
        if !state.ended {
            let limits = self.options.limits.clone();
            self.runtime.spawn(async move {
                if let Err(error) = login::leave(&state, &limits).await {
                    tracing::debug!(%error, "logging out in the background failed");
                }
            });
        }
    }
}

impl State {
    /// A call in this session, as a document.
    fn document(&self, method: &str, arguments: &[Value]) -> Result<Document, XenApiError> {
        let own = std::iter::once(self.reference.to_value());
        let secret = Secret::from(self.reference.as_str());
        Document::new(self.encoding, method, own.chain(arguments.iter().cloned()).collect(), secret)
    }
}
