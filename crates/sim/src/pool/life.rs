//! The life of the pool's hosts, to be ordered by a test.

use std::sync::PoisonError;
use std::time::Duration;

use super::{SimPool, start};
use crate::{SimError, methods};

impl SimPool {
    /// A host crashes and is back at once with a later boot time: its VMs are halted without a clean shutdown, its
    /// disks' CBT logs stay marked as inconsistent, its connections break and its control domain's VBDs go.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub async fn crash_host(&self, host: usize) -> Result<(), SimError> {
        self.host_ref(host)?;
        // The NBD server dies with its host: connections break, and it is back on the same port.
        self.kill_nbd(host);
        methods::crash_host(&self.inner.core, host)?;
        self.start_nbd(host)
    }

    /// A host crashes and stays down: API, HTTP and NBD break and answer nothing, `host_metrics.live` is false. As in
    /// a pool without high availability its VMs stay "Running" by their records, and the VBDs of its control domain
    /// stay, until it starts again (or [`SimPool::ha_restart_vm`], or `VM.power_state_reset`, for VMs). If it was the
    /// coordinator its members answer nothing but logins until [`SimPool::move_coordinator`] or
    /// [`SimPool::start_host`], and all sessions have ended. Without effect on a host that is down.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub async fn stop_host(&self, host: usize) -> Result<(), SimError> {
        self.host_ref(host)?;
        self.kill_nbd(host);
        Ok(methods::stop_host(&self.inner.core, host)?)
    }

    /// A host that was stopped boots, with a later boot time: VMs that were running there are halted, the VBDs of its
    /// control domain and its pending tasks go. Without effect on a host that runs.
    ///
    /// # Errors
    /// [`SimError::Unknown`], [`SimError::Io`] if its ports can not be bound again.
    pub async fn start_host(&self, host: usize) -> Result<(), SimError> {
        self.host_ref(host)?;
        if self.inner.core.host_at(host)?.is_powered() {
            return Ok(());
        }
        self.start_nbd(host)?;
        Ok(methods::boot_host(&self.inner.core, host)?)
    }

    /// Restarts a host's toolstack; it is down for `down`, and this returns when it is up again (the restart goes on if
    /// the future is dropped). Connections to its API break and new ones are closed without an answer; calls and tasks
    /// in progress are not continued, and pending tasks are gone afterwards. On the coordinator all sessions end and
    /// the events of deletions are forgotten. NBD exports and guests go on.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub async fn restart_toolstack(&self, host: usize, down: Duration) -> Result<(), SimError> {
        self.host_ref(host)?;
        let core = &self.inner.core;
        let node = core.host_at(host)?;
        core.set_running(node, node.is_powered(), false);
        methods::end_toolstack_work(core, host);
        let later = std::sync::Arc::clone(core);
        let up = tokio::spawn(async move {
            tokio::time::sleep(down).await;
            methods::end_toolstack_work(&later, host);
            methods::toolstack_started(&later, host)
        });
        up.await.map_err(|_| SimError::Options("the toolstack did not start".to_owned()))?.map_err(SimError::from)
    }

    /// Makes another host the coordinator: as `pool.designate_new_master` while the old one runs, as a fail-over while
    /// it is down. All API connections and sessions end, pending tasks go, and event tokens from before count in
    /// another database (after a fail-over they can be ahead of it). NBD goes on. Without effect on the coordinator.
    ///
    /// # Errors
    /// [`SimError::Unknown`]; [`SimError::Api`] with `HOST_OFFLINE` if that host does not answer.
    pub async fn move_coordinator(&self, host: usize) -> Result<(), SimError> {
        self.host_ref(host)?;
        Ok(methods::move_coordinator(&self.inner.core, host)?)
    }

    /// As [`SimPool::move_coordinator`], but it takes a while, as it does in a pool: for `down` the new coordinator and the
    /// members answer every call (logins too) with `HOST_STILL_BOOTING`. The old coordinator, if it runs, is a member
    /// by then: it sends logins to the new one and is mute otherwise. Transfers are mute on every host. Returns when
    /// the pool serves again (the fail-over goes on if the future is dropped).
    ///
    /// # Errors
    /// [`SimError::Unknown`]; [`SimError::Api`] with `HOST_OFFLINE` if that host does not answer, `HOST_STILL_BOOTING`
    /// during another fail-over.
    pub async fn fail_over(&self, host: usize, down: Duration) -> Result<(), SimError> {
        self.host_ref(host)?;
        let core = std::sync::Arc::clone(&self.inner.core);
        let starting = methods::begin_fail_over(&core, host)?;
        if starting.is_empty() {
            return Ok(());
        }
        let up = tokio::spawn(async move {
            tokio::time::sleep(down).await;
            methods::end_fail_over(&core, &starting)
        });
        up.await.map_err(|_| SimError::Options("the fail-over did not end".to_owned()))?.map_err(SimError::from)
    }

    /// High availability starts the VM of a host that crashed or stopped on another one: the message `HA_HOST_FAILED`
    /// (once for a failure), every VM of a stopped host halted, then a start as any other.
    ///
    /// # Errors
    /// [`SimError::Unknown`] or [`SimError::Api`], `VM_BAD_POWER_STATE` for a VM that runs on a living host.
    pub async fn ha_restart_vm(&self, vm: &str, host: usize) -> Result<(), SimError> {
        let reference = self.vm_ref(vm)?;
        self.host_ref(host)?;
        methods::host_failed(&self.inner.core, &reference)?;
        self.start_vm(vm, host).await
    }

    /// Ends all sessions, as their age does: the next call of each gets `SESSION_INVALID`, a wait for events at once.
    pub fn expire_sessions(&self) {
        methods::end_sessions(&self.inner.core);
    }

    /// Holds storage migrations (`VDI.pool_migrate`, `VM.migrate_send`) when their copies are made and before the VM
    /// is switched over, or lets them go on. Copies keep up with the guest meanwhile.
    pub fn hold_storage_migrations(&self, on: bool) {
        self.inner.core.migrations_held.send_replace(on);
    }

    fn kill_nbd(&self, host: usize) {
        let mut servers = self.inner.nbd.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get_mut(host) {
            drop(server.take());
        }
    }

    fn start_nbd(&self, host: usize) -> Result<(), SimError> {
        let server = start::nbd_server(&self.inner.core, host)?;
        let mut servers = self.inner.nbd.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = servers.get_mut(host) {
            *place = Some(server);
        }
        Ok(())
    }
}
