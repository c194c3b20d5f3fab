//! A database dump that was restored: after a while the host reboots into it, as the coordinator of itself.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::SimPool;
use crate::SimError;
use crate::core::Core;
use crate::model::Database;

/// Waits for restored databases until the pool ends.
pub(super) fn serve(pool: &SimPool, core: &Arc<Core>) {
    // A second one that comes before the reboot takes the place of the first on a real host; here it waits.
    let (sender, mut restores) = mpsc::channel(1);
    if core.restores.set(sender).is_err() {
        return;
    }
    let weak = Arc::downgrade(&pool.inner);
    let (end, fuse) = (core.end.clone(), core.options.restore_fuse);
    tokio::spawn(async move {
        let work = async {
            while let Some((host, database)) = restores.recv().await {
                tokio::time::sleep(fuse).await;
                let Some(pool) = weak.upgrade().map(SimPool::from_inner) else { return };
                if let Err(error) = pool.reboot_into(host, database).await {
                    tracing::error!(%error, "a restored database could not be booted into");
                }
            }
        };
        tokio::select! {
            () = end.cancelled() => {}
            () = work => {}
        }
    });
}

impl SimPool {
    /// The host crashes, and boots with the other database as the only host of its pool.
    async fn reboot_into(&self, host: usize, database: Database) -> Result<(), SimError> {
        let core = &self.inner.core;
        for index in (0..core.hosts.len()).rev() {
            self.stop_host(index).await?;
        }
        core.replace_db(database);
        core.set_coordinator(host);
        self.start_host(host).await
    }
}
