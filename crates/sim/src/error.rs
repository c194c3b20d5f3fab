//! What can go wrong when a pool is started or driven from Rust.

/// Errors of [`crate::SimPool`]'s own methods; failures of XenAPI calls are answers, not errors, but
/// [`crate::SimPool::call`] hands them on as [`SimError::Api`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// A listener or a file of the pool could not be made.
    #[error("the simulated pool cannot {what}")]
    Io {
        /// The act that failed.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A certificate or key could not be made.
    #[error("the simulated pool cannot make a certificate: {0}")]
    Certificate(String),
    /// No such VM, disk, host, network or SR in this pool.
    #[error("the simulated pool has no {kind} {name:?}")]
    Unknown {
        /// What was looked for.
        kind: &'static str,
        /// Its name or uuid as given.
        name: String,
    },
    /// The options contradict each other.
    #[error("bad options for the simulated pool: {0}")]
    Options(String),
    /// A XenAPI failure: code first, then its parameters.
    #[error("{code} {params:?}")]
    Api {
        /// The error code.
        code: String,
        /// Its parameters.
        params: Vec<String>,
    },
}

impl SimError {
    /// Wraps an I/O error.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
