//! Asynchronous NBD client for the old dialect that XenServer's hosts speak.
//!
//! Floor 2. Fixed newstyle, optional STARTTLS, `EXPORT_NAME`, READ and DISC: nothing else is ever sent, so it works
//! against every NBD server. [`Connection`] is one socket with many requests in flight; [`Export`] is a pool of them over
//! one export, which reconnects elsewhere, goes on where it stopped and finds the exact place of a media error.
//! Hosts are mute about errors: what happened is told from the moment of a silent close, see [`NbdError`].

mod budget;
mod connection;
mod endpoint;
mod error;
mod export;
mod handshake;
mod protocol;

pub use budget::HostBudget;
pub use connection::{Connection, Timeouts};
pub use endpoint::{BoxError, Endpoint, EndpointSource, ExportName, FixedEndpoints, Tls};
pub use error::{NbdError, Phase, Retry, SizeProblem, Violation};
pub use export::{Export, ExportCounters, ExportOptions, ExtentStream, Patience, ReadOptions};
