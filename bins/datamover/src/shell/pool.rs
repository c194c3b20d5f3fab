//! The pool of a command line: address, trust, account; and one piece of work against it, from login to logout.

use super::exit::Exit;
use super::pins;
use super::progress::Monitor;
use super::secrets::{PASSWORD, SecretError};
use super::signals::{Ended, Signals};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xenvault_engine::{ClearText, Engine, EngineError, EngineOptions};
use xenvault_store::Repository;
use xenvault_xenapi::{ConnectOptions, Session, Sha256Fingerprint, Trust, XenApiError};
use zeroize::Zeroizing;

/// Options that name a pool and say why it is trusted.
#[derive(Clone, Debug, clap::Args)]
pub struct PoolArguments {
    /// Address of the pool's coordinator, such as https://192.0.2.1
    #[arg(long, value_name = "URL")]
    pub pool: String,
    /// SHA-256 of the coordinator's certificate, as `xenvault-datamover pin` shows it and a person confirmed it
    #[arg(long, value_name = "SHA256", conflicts_with_all = ["ca_file", "system_roots"])]
    pub fingerprint: Option<String>,
    /// Certificates (PEM) of an authority that signed the hosts' certificates
    #[arg(long, value_name = "FILE", conflicts_with = "system_roots")]
    pub ca_file: Option<PathBuf>,
    /// Trust the certificate authorities of this machine (its store, or SSL_CERT_FILE and SSL_CERT_DIR)
    #[arg(long)]
    pub system_roots: bool,
    /// Accept that everybody on the network can read password and disks: allows http:// and NBD without TLS
    #[arg(long)]
    pub accept_clear_text: bool,
    /// Account of the pool
    #[arg(long, value_name = "NAME", default_value = "root")]
    pub user: String,
    /// File whose first line is the password; `-` is standard input. Otherwise XENVAULT_PASSWORD is used
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

/// Where this installation keeps its identity and its journal.
#[derive(Clone, Debug, clap::Args)]
pub struct StateArguments {
    /// Folder for this installation's identity, journal and leases [default: $XDG_STATE_HOME/xenvault or
    /// ~/.local/state/xenvault]
    #[arg(long, value_name = "DIR", env = "XENVAULT_STATE")]
    pub state: Option<PathBuf>,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolFailure {
    /// HTTPS without a reason to trust.
    #[error(
        "nothing says which certificate of {at} is the right one: run `xenvault-datamover pin {at}`, compare the fingerprint with the host's own console, then give it with --fingerprint; where an authority signed the hosts' certificates, use --ca-file or --system-roots", at = without_account(url)
    )]
    NoTrust {
        /// The pool.
        url: String,
    },
    /// HTTP without consent.
    #[error(
        "{} is not encrypted: use https://, or accept with --accept-clear-text that everybody on the network can read password and disks",
        without_account(url)
    )]
    ClearText {
        /// The pool.
        url: String,
    },
    /// Not 64 hexadecimal digits.
    #[error("{text:?} is no SHA-256 fingerprint: it has 64 hexadecimal digits, with or without colons")]
    Fingerprint {
        /// As given.
        text: String,
    },
    /// No folder for the state.
    #[error("there is no home folder to keep the state of this installation in: name one with --state")]
    NoStateFolder,
    /// The login failed.
    #[error("cannot log in to the pool at {}", without_account(url))]
    Login {
        /// The pool.
        url: String,
        /// Why.
        source: XenApiError,
    },
}

/// An address without the account that somebody may have written into it: a password never stands in an error.
fn without_account(url: &str) -> String {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let (scheme, rest) = url.split_at_checked(begin).unwrap_or(("", url));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest.get(..end).and_then(|authority| authority.rfind('@')) {
        Some(at) => format!("{scheme}<account hidden>@{}", rest.get(at + 1..).unwrap_or_default()),
        None => url.to_owned(),
    }
}

impl PoolFailure {
    /// The exit code, if the cause does not tell more.
    pub fn exit(&self) -> Option<Exit> {
        match self {
            Self::Login { .. } => None,
            _ => Some(Exit::Usage),
        }
    }
}

impl StateArguments {
    /// The folder.
    ///
    /// # Errors
    /// [`PoolFailure::NoStateFolder`].
    pub fn folder(&self) -> Result<PathBuf, PoolFailure> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        self.state
            .clone()
            .or_else(|| variable("XDG_STATE_HOME").map(|folder| folder.join("xenvault")))
            .or_else(|| variable("HOME").map(|folder| folder.join(".local/state/xenvault")))
            .ok_or(PoolFailure::NoStateFolder)
    }
}

impl PoolArguments {
    /// Reads the password.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn password(&self) -> Result<Zeroizing<String>, SecretError> {
        PASSWORD.read(self.password_file.as_deref())
    }

    /// Settings of the engine that follow from these options.
    pub fn engine_options(&self, state: PathBuf, monitor: Arc<Monitor>) -> EngineOptions {
        let mut options = EngineOptions::new(state).with_monitor(monitor);
        options.clear_text = if self.accept_clear_text { ClearText::Accept } else { ClearText::Refuse };
        options
    }

    /// Why the pool is trusted. With `state`, members' certificates of an earlier login count too.
    fn trust(&self, state: &Path) -> Result<Trust, PoolFailure> {
        let url = self.pool.clone();
        if url.starts_with("http://") {
            return if self.accept_clear_text { Ok(Trust::PlainHttp) } else { Err(PoolFailure::ClearText { url }) };
        }
        match (self.confirmed()?, &self.ca_file) {
            (Some(confirmed), _) => {
                Ok(pins::load(state, &url, confirmed).map_or(Trust::Fingerprint(confirmed), Trust::Pins))
            }
            (None, Some(file)) => Ok(Trust::CaFile(file.clone())),
            (None, None) if self.system_roots => Ok(Trust::SystemRoots),
            (None, None) => Err(PoolFailure::NoTrust { url }),
        }
    }

    /// The fingerprint that the operator gave.
    fn confirmed(&self) -> Result<Option<Sha256Fingerprint>, PoolFailure> {
        let parse = |text: &String| text.parse().map_err(|_| PoolFailure::Fingerprint { text: text.clone() });
        self.fingerprint.as_ref().map(parse).transpose()
    }

    async fn login(&self, password: &str, state: &Path) -> Result<Session, PoolFailure> {
        let mut options = ConnectOptions::new(&self.pool, &self.user, password.to_owned(), self.trust(state)?);
        let confirmed = self.confirmed()?;
        if confirmed.is_none() {
            options.known = pins::load_known(state, &self.pool).unwrap_or_default();
        }
        let session =
            Session::login(options).await.map_err(|source| PoolFailure::Login { url: self.pool.clone(), source })?;
        match confirmed {
            Some(confirmed) => pins::save(state, &self.pool, confirmed, session.pinned_hosts()),
            None => pins::save_known(state, &self.pool, &session.known_pool()),
        }
        Ok(session)
    }
}

/// Everything that one piece of work against a pool needs.
pub struct Job<'a> {
    /// Which pool.
    pub pool: &'a PoolArguments,
    /// Its password.
    pub password: Zeroizing<String>,
    /// The repository, where the work needs one.
    pub repository: Option<Repository>,
    /// Settings of the engine.
    pub options: EngineOptions,
    /// What shows the progress.
    pub monitor: Arc<Monitor>,
}

impl Job<'_> {
    /// Logs in, does the work, logs out. A signal cancels the work; then what it made in the pool is removed first.
    ///
    /// # Errors
    /// What login or work failed with.
    pub async fn run<T, F>(
        self,
        mut signals: Signals,
        work: impl FnOnce(Engine) -> F,
    ) -> Result<Ended<T>, Box<dyn std::error::Error>>
    where
        F: Future<Output = Result<T, EngineError>>,
    {
        let session = match signals.run(self.pool.login(&self.password, &self.options.state_dir)).await {
            Ended::Done(session) => session?,
            Ended::Stopped(exit) => return Ok(Ended::Stopped(exit)),
        };
        let engine = Engine::open(session.clone(), self.repository, self.options);
        let ended = match engine {
            Ok(engine) => {
                let ended = signals.run(work(engine.clone())).await;
                // After a cancelled run the engine is still removing what it made; a second signal ends the wait.
                let _ = signals.run(engine.settled()).await;
                ended
            }
            Err(error) => Ended::Done(Err(error)),
        };
        self.monitor.finish();
        if let Err(error) = session.logout().await {
            tracing::warn!(%error, "the session could not be logged out; the pool ends it by itself");
        }
        match ended {
            Ended::Done(result) => Ok(Ended::Done(result?)),
            Ended::Stopped(exit) => Ok(Ended::Stopped(exit)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(url: &str) -> PoolArguments {
        PoolArguments {
            pool: url.to_owned(),
            fingerprint: None,
            ca_file: None,
            system_roots: false,
            accept_clear_text: false,
            user: "root".to_owned(),
            password_file: None,
        }
    }

    #[test]
    fn an_account_in_an_address_is_not_shown() {
        let hidden = "https://<account hidden>@192.0.2.1:8443/x";
        assert_eq!(without_account("https://root:se@cret@192.0.2.1:8443/x"), hidden);
        assert_eq!(without_account("https://192.0.2.1"), "https://192.0.2.1");
        for url in ["http://root:secret@a", "https://root:secret@a"] {
            let shown = arguments(url).trust(Path::new("/no/such/folder")).unwrap_err().to_string();
            assert!(!shown.contains("secret"), "{shown}");
        }
    }

    #[test]
    fn trust_is_never_silent() {
        let state = Path::new("/no/such/folder");
        assert!(matches!(arguments("https://a").trust(state), Err(PoolFailure::NoTrust { .. })));
        assert!(matches!(arguments("http://a").trust(state), Err(PoolFailure::ClearText { .. })));
        let accepted = PoolArguments { accept_clear_text: true, ..arguments("https://a") };
        assert!(matches!(accepted.trust(state), Err(PoolFailure::NoTrust { .. })));
        let system = PoolArguments { system_roots: true, ..arguments("https://a") };
        assert!(matches!(system.trust(state), Ok(Trust::SystemRoots)));
        let plain = PoolArguments { system_roots: true, ..arguments("http://a") };
        assert!(matches!(plain.trust(state), Err(PoolFailure::ClearText { .. })));
        let wrong = PoolArguments { fingerprint: Some("abc".to_owned()), ..arguments("https://a") };
        assert!(matches!(wrong.trust(state), Err(PoolFailure::Fingerprint { .. })));
    }
}
