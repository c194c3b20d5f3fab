//! The pool as the NBD servers see it.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use crate::core::Core;
use crate::methods::{plug_in_control_domain, unplug_and_destroy};
use crate::nbd::{ExportRequest, NbdBackend, OpenDisk, Purposes, Refusal};
use xenvault_block::ReadAt;

/// Answers the NBD servers from the pool's database and storage.
pub(super) struct Backend {
    pub(super) core: Arc<Core>,
}

impl NbdBackend for Backend {
    fn purposes(&self) -> BoxFuture<'_, Purposes> {
        let db = self.core.db();
        let has = |purpose: &str| {
            db.refs("network")
                .iter()
                .any(|network| db.set_of("network", network, "purpose").iter().any(|known| known == purpose))
        };
        let purposes = Purposes { nbd: has("nbd"), insecure_nbd: has("insecure_nbd") };
        std::future::ready(purposes).boxed()
    }

    fn open(&self, host: uuid::Uuid, request: ExportRequest) -> BoxFuture<'_, Result<OpenDisk, Refusal>> {
        let core = Arc::clone(&self.core);
        async move {
            if !core.has_coordinator() {
                return Err(Refusal("the coordinator does not answer".to_owned()));
            }
            crate::methods::session::check(&core, &request.session).map_err(|failure| Refusal(failure.code))?;
            let index =
                core.hosts.iter().position(|node| node.uuid == host).ok_or_else(|| Refusal("host".to_owned()))?;
            let vdi = core.db().by_uuid("VDI", &request.vdi_uuid).map_err(|failure| Refusal(failure.text()))?;
            let refusal = |failure: crate::rpc::Failure| Refusal(failure.text());
            let vbd = plug_in_control_domain(&core, index, &vdi, false).await.map_err(refusal)?;
            let opened = core.disk_id(&vdi).and_then(|id| Ok((id, core.storage.disk(id)?)));
            match opened {
                Ok((id, disk)) => {
                    Ok(OpenDisk { vdi: id, size: disk.size(), device: Arc::new(disk), ticket: Box::new(vbd) })
                }
                Err(failure) => {
                    unplug_and_destroy(&core, &vbd).await;
                    Err(refusal(failure))
                }
            }
        }
        .boxed()
    }

    fn close(&self, _host: uuid::Uuid, disk: OpenDisk) -> BoxFuture<'_, ()> {
        async move {
            if let Ok(vbd) = disk.ticket.downcast::<String>() {
                unplug_and_destroy(&self.core, &vbd).await;
            }
        }
        .boxed()
    }
}
