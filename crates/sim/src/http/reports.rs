//! What a pool tells about itself over HTTP: the dump of its database, the audit log, and statistics.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use super::connection::{Link, send};
use super::request::Request;
use super::response;
use crate::FaultEffect;
use crate::core::Core;

/// One of these handlers.
#[derive(Clone, Copy)]
pub(super) enum Report {
    Database,
    AuditLog,
    HostStatistics,
    StatisticUpdates,
}

impl Report {
    /// The handler of a path.
    pub(super) fn of(path: &str) -> Option<Self> {
        Some(match path {
            "/pool/xmldbdump" => Self::Database,
            "/audit_log" => Self::AuditLog,
            "/host_rrd" => Self::HostStatistics,
            "/rrd_updates" => Self::StatisticUpdates,
            _ => return None,
        })
    }

    /// Name of the call, and of its action in the realm of a 401.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Database => ("http/pool/xmldbdump", "get_pool_xml_db_sync"),
            Self::AuditLog => ("http/audit_log", "get_audit_log"),
            Self::HostStatistics => ("http/host_rrd", "get_host_rrd"),
            Self::StatisticUpdates => ("http/rrd_updates", "get_rrd_updates"),
        }
    }
}

pub(super) async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
    report: Report,
) {
    let (call, realm) = report.names();
    core.counters.call(call);
    let mut most = usize::MAX;
    match core.faults.strike(call) {
        Some(FaultEffect::Drop) => return,
        Some(FaultEffect::Hang) => return core.end.cancelled().await,
        Some(FaultEffect::Delay(time)) => tokio::time::sleep(time).await,
        Some(FaultEffect::Truncate(bytes)) => most = usize::try_from(bytes).unwrap_or(usize::MAX),
        _ => {}
    }
    let _access = match super::auth::check(core, host, request, realm) {
        Ok(access) => access,
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let answer = match report {
        Report::Database => {
            let dump = core.db().dump();
            let cut = dump.as_bytes().get(..most.min(dump.len())).unwrap_or_default();
            [&response::transfer("HTTP/1.1 200 OK", &[]), cut].concat()
        }
        // Entries are written for accounts with roles only, which this pool does not have.
        Report::AuditLog => b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nCache-Control: no-cache, no-store\r\n\
              content-type: text/plain\r\n\r\n"
            .to_vec(),
        // As on a host whose statistics daemon has nothing yet, which is what was recorded.
        Report::HostStatistics => response::internal_error(&response::escape("Failure(\"No host RRD available!\")")),
        Report::StatisticUpdates => response::internal_error("Rrd.No_RRA_Available"),
    };
    send(link, &answer).await;
}
