//! XenAPI client: sessions, records, events, tasks and the HTTP transfers of disks, following the coordinator.
//!
//! ```no_run
//! # async fn example() -> Result<(), xenvault_xenapi::XenApiError> {
//! use xenvault_xenapi::{ConnectOptions, Session, Trust, vm};
//!
//! let fingerprint = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855".parse()?;
//! let options = ConnectOptions::new("https://pool.example", "root", "secret", Trust::Fingerprint(fingerprint));
//! let session = Session::login(options).await?;
//! for (vm, record) in vm::get_all_records(&session).await? {
//!     println!("{vm:?} {}", record.name_label);
//! }
//! session.logout().await
//! # }
//! ```
//!
//! The crate owns the wire (XML-RPC, JSON-RPC, HTTP), trust in hosts' certificates, and what belongs to one session.
//! It knows nothing of backups: no workflow, no marks of ours, no NBD. Classes, enumerations and wrappers of messages
//! are generated (`cargo xtask codegen`) from the data model. Secrets (passwords, session references) have redacting
//! `Debug` and are never logged.

mod date;
mod error;
pub mod event;
mod failure_class;
mod generated;
mod http_client;
pub mod inventory;
mod model;
mod reference;
mod rpc;
mod secret;
mod session_handle;
pub mod tasks;
pub mod transfer;
mod trust;
mod unsupported;
pub mod value;

pub use date::DateTime;
pub use error::{ApiFailure, Phase, Retry, XenApiError};
pub use failure_class::{Classified, FailureClass};
pub use generated::ErrorCode;
pub use generated::{
    certificate, host, host_metrics, message, network, pbd, pif, pool, session, sm, sr, task, vbd, vdi,
    vdi_nbd_server_info, vif, vm, vm_guest_metrics, vm_metrics, vtpm,
};
pub use model::Repeat;
pub use reference::{AnyClass, AnyRef, Ref};
pub use rpc::Protocol;
#[doc(hidden)]
pub use rpc::{decode_for_fuzzing, decode_json_for_fuzzing, decode_xml_for_fuzzing};
pub use secret::Secret;
pub use session_handle::{ConnectOptions, Floor, KnownPool, Limits, Member, Session, Timeouts};
pub use tokio_util::sync::CancellationToken;
pub use trust::{
    HostCertificate, PinnedHosts, PresentedCertificates, Sha256Fingerprint, Trust, fetch_certificates,
    pinned_client_config,
};
pub use unsupported::{Missing, ServerVersion, Unsupported};
pub use value::Value;
