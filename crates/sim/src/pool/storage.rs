//! The storage manager's own life, to be ordered by a test: garbage collection and change logs that fail.

use super::SimPool;
use crate::core::parse_uuid;
use crate::rpc::Failure;
use crate::storage::{CbtFault, CoalesceStart};
use crate::{SimError, methods};

impl SimPool {
    /// Reference and identity of an SR by uuid or, where unique, by name.
    fn sr_of(&self, name_or_uuid: &str) -> Result<(String, uuid::Uuid), SimError> {
        let db = self.inner.core.db();
        let named = || match db.refs_where("SR", "name_label", name_or_uuid).as_slice() {
            [sr] => Ok(sr.clone()),
            _ => Err(SimError::Unknown { kind: "SR", name: name_or_uuid.to_owned() }),
        };
        let sr = db.by_uuid("SR", name_or_uuid).or_else(|_| named())?;
        let uuid = parse_uuid(&db.text("SR", &sr, "uuid"))?;
        Ok((sr, uuid))
    }

    /// Takes the garbage collector of an SR one step on: begins a merge, or ends the one that is in progress, whose
    /// data was there twice until then. Gives what was begun; nothing in `work` if one was ended, or if there was
    /// nothing to do or no space for it. Meant for [`crate::GarbageCollection::OnOrder`], and for a collector that
    /// was stopped.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub async fn step_coalesce(&self, sr: &str) -> Result<CoalesceStart, SimError> {
        let (reference, uuid) = self.sr_of(sr)?;
        let core = &self.inner.core;
        if core.storage.is_coalescing(uuid).map_err(Failure::from)? {
            methods::end_coalesce(core, &reference, uuid).await;
            return Ok(CoalesceStart::default());
        }
        Ok(methods::begin_coalesce(core, &reference, uuid)?)
    }

    /// Lets the garbage collector of an SR do all that there is to do now, whatever space it takes in between.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn coalesce_all(&self, sr: &str) -> Result<(), SimError> {
        let (reference, uuid) = self.sr_of(sr)?;
        self.inner.core.storage.coalesce_all(uuid).map_err(Failure::from)?;
        self.inner.core.db().touch("SR", &reference);
        Ok(())
    }

    /// Stops the garbage collector of an SR: a merge in progress is given up, its space is free again, and chains
    /// grow with every snapshot that follows a write.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn stop_coalesce(&self, sr: &str) -> Result<(), SimError> {
        let (_, uuid) = self.sr_of(sr)?;
        self.inner.core.storage.set_garbage_collection(uuid, false).map_err(Failure::from)?;
        self.inner.core.storage.abort_coalesce(uuid).map_err(Failure::from)?;
        self.inner.core.collectors.stop(uuid, true);
        Ok(())
    }

    /// Lets the garbage collector of an SR work again, in the way of [`crate::SimOptions::garbage_collection`].
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn start_coalesce(&self, sr: &str) -> Result<(), SimError> {
        let (_, uuid) = self.sr_of(sr)?;
        let at_once = self.inner.core.options.garbage_collection == crate::GarbageCollection::AtOnce;
        self.inner.core.storage.set_garbage_collection(uuid, at_once).map_err(Failure::from)?;
        self.inner.core.collectors.stop(uuid, false);
        Ok(())
    }

    /// Orders that the change log of a disk (by the uuid of its VDI) fails once, with the message that the storage
    /// manager posts then.
    ///
    /// # Errors
    /// [`SimError::Api`] if there is no such disk.
    pub fn fail_cbt(&self, vdi: &str, fault: CbtFault) -> Result<(), SimError> {
        Ok(self.inner.core.storage.fail_cbt(parse_uuid(vdi)?, fault).map_err(Failure::from)?)
    }

    /// Fills an SR with something that is no disk of ours, so many bytes of it. Sets, not adds.
    ///
    /// # Errors
    /// [`SimError::Unknown`].
    pub fn set_foreign_use(&self, sr: &str, bytes: u64) -> Result<(), SimError> {
        let (_, uuid) = self.sr_of(sr)?;
        Ok(self.inner.core.storage.set_foreign_use(uuid, bytes).map_err(Failure::from)?)
    }
}
