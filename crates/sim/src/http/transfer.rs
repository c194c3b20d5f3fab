//! What exports and imports of disks have in common: the disk, the right host, the task, and late failures.

use std::sync::Arc;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::request::Request;
use super::response;
use crate::core::Core;
use crate::methods::{complete, fail, new_task};
use crate::model::Value;
use crate::rpc::Failure;

/// A failed read or write of the disk or of the client's connection.
pub(super) fn io_failure() -> Failure {
    Failure::new("VDI_IO_ERROR", ["Device I/O errors"])
}

/// The disk that a request names by reference or uuid: `Ok(None)` without one, an error page if it is unknown.
pub(super) fn disk_of(core: &Core, request: &Request, name: &str) -> Result<Option<String>, Vec<u8>> {
    let Some(given) = request.param(name) else { return Ok(None) };
    let db = core.db();
    if db.exists("VDI", given) {
        return Ok(Some(given.to_owned()));
    }
    if let Ok(vdi) = db.by_uuid("VDI", given) {
        return Ok(Some(vdi));
    }
    let text = format!("Db_exn.Read_missing_uuid(\"VDI\", \"\", \"{given}\")");
    Err(response::internal_error(&response::escape(&text)))
}

/// A redirection if this host does not have all of the SRs attached; `None` if it has. It leads to a live host that
/// has, or is an error page if there is none.
pub(super) fn redirection(
    core: &Core,
    host: usize,
    request: &Request,
    srs: &[String],
) -> Option<Result<Vec<u8>, Failure>> {
    let here = core.host_at(host).ok()?.reference.clone();
    let able = crate::methods::live_hosts_of_all(&core.db(), srs);
    if able.contains(&here) {
        return None;
    }
    let Some(node) = able.first().and_then(|host| core.host_of(host).ok()) else {
        return Some(Err(Failure::bare("NO_HOSTS_AVAILABLE")));
    };
    let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
    let query: Vec<String> =
        request.query.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
    let url = format!("{}{}?{}", core.url_of(node), request.path, query.join("&"));
    Some(Ok(response::transfer("HTTP/1.1 302 Found", &[format!("Location: {url}")])))
}

/// The task of a transfer: the client's, or one of its own that goes with it.
pub(super) struct TransferTask {
    core: Arc<Core>,
    pub(super) reference: String,
    own: bool,
    shown: u64,
}

impl TransferTask {
    pub(super) fn new(core: &Arc<Core>, host: usize, request: &Request, label: &str) -> Self {
        let given = request.param("task_id").map(str::to_owned);
        let own = given.is_none();
        let reference = given.unwrap_or_else(|| new_task(core, host, label, ""));
        Self { core: Arc::clone(core), reference, own, shown: 0 }
    }

    /// Tells how far it is, in steps of a percent.
    pub(super) fn progress(&mut self, done: u64, all: u64) {
        let percent = done.saturating_mul(100).checked_div(all).unwrap_or(0).min(99);
        if percent > self.shown {
            self.shown = percent;
            let value = f64::from(u32::try_from(percent).unwrap_or(0)) / 100.0;
            self.core.db().set("task", &self.reference, "progress", value);
        }
    }

    pub(super) fn succeed(&self, result: Option<&Value>) {
        complete(&self.core, &self.reference, result);
    }

    pub(super) fn fail(&self, failure: &Failure) {
        fail(&self.core, &self.reference, failure);
    }
}

impl Drop for TransferTask {
    fn drop(&mut self) {
        if self.own {
            self.core.db().destroy("task", &self.reference);
        }
    }
}

/// A device in the control domain for the time of a transfer. Its end takes the time that unplugging takes, also
/// when the transfer was broken off.
pub(super) struct Plugged {
    core: Arc<Core>,
    vbd: Option<String>,
}

impl Plugged {
    pub(super) async fn new(core: &Arc<Core>, host: usize, vdi: &str, write: bool) -> Result<Self, Failure> {
        let vbd = crate::methods::plug_in_control_domain(core, host, vdi, write).await?;
        Ok(Self { core: Arc::clone(core), vbd: Some(vbd) })
    }

    pub(super) async fn end(mut self) {
        if let Some(vbd) = self.vbd.take() {
            crate::methods::unplug_and_destroy(&self.core, &vbd).await;
        }
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        let Some(vbd) = self.vbd.take() else { return };
        let core = Arc::clone(&self.core);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { crate::methods::unplug_and_destroy(&core, &vbd).await });
        }
    }
}
