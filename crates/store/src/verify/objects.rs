//! The small objects: config, keys, records, sweeps, index segments.

use xenvault_store_format::{
    DamageMark, IndexLayout, KeySlot, MAX_SEGMENT_BYTES, Receipt, Record, StoredConfig, SweepEnd, SweepIntent,
    Tombstone, Undo, VerifyResult,
};

use super::{DamageKind, Verify};
use crate::backend::get;
use crate::{StoreError, names, records};

const MAX_SMALL_BYTES: usize = 128 * 1024;

impl Verify {
    /// What was read when the repository was opened is read once more: it may have been fine then.
    pub(super) async fn check_config_and_keys(&mut self) -> Result<(), StoreError> {
        let repository = self.repository.clone();
        let name = names::CONFIG;
        match get(&*repository.backend, name, MAX_SMALL_BYTES).await {
            Err(error) => self.take(name, StoreError::io("read", name, error))?,
            Ok(bytes) => match StoredConfig::decode(&bytes).and_then(|stored| stored.verify(&repository.keys)) {
                Err(error) => self.take(name, StoreError::format(name, error))?,
                Ok(config) if config != repository.config => {
                    self.damaged(name, DamageKind::Misplaced, "it is not the one that the repository was opened with");
                }
                Ok(_) => {}
            },
        }
        let slots = records::list(&repository, names::KEYS).await?;
        if slots.is_empty() {
            self.damaged(names::KEYS, DamageKind::Missing, "there is no key slot: nobody can open the repository");
        }
        for name in slots {
            match get(&*repository.backend, &name, MAX_SMALL_BYTES).await {
                Err(error) => self.take(&name, StoreError::io("read", &name, error))?,
                Ok(bytes) => match KeySlot::decode(&bytes) {
                    Err(error) => self.take(&name, StoreError::format(&name, error))?,
                    Ok(slot) if slot.repository() != repository.keys.repository() => {
                        self.damaged(&name, DamageKind::Misplaced, "it belongs to another repository");
                    }
                    Ok(_) => {}
                },
            }
        }
        Ok(())
    }

    pub(super) async fn check_sweeps_and_records(&mut self) -> Result<(), StoreError> {
        let repository = self.repository.clone();
        let state = match repository.look_at_sweeps().await {
            Ok(state) => Some(state),
            // Its object is told below.
            Err(error) if error.is_loss() => None,
            Err(error) => return Err(error),
        };
        let mut newest = state.as_ref().map_or(0, |state| state.number);
        for name in records::list(&repository, names::SWEEPS).await? {
            match names::sweep_parts(&name) {
                Some((number, _)) => newest = newest.max(number),
                None => self.damaged(&name, DamageKind::Misplaced, "no sweep has such an object"),
            }
        }
        let last_ended = state.is_none_or(|state| state.open.is_none());
        for number in 1..=newest {
            self.check::<SweepIntent>(&names::intent(number), |intent| intent.number == number).await?;
            let name = names::end(number);
            if number < newest || last_ended || records::exists(&repository, &name).await? {
                self.check::<SweepEnd>(&name, |end| end.number == number).await?;
            }
        }
        if let Ok(state) = repository.look_at_sweeps().await {
            repository.bar_copies(&state).await?;
        }
        self.check_all::<Tombstone>(names::TOMBSTONES, |one| names::tombstone(&one.point, &one.id)).await?;
        self.check_all::<Undo>(names::UNDONE, |one| names::undo(&one.tombstone)).await?;
        self.check_all::<Receipt>(names::RECEIPTS, |one| names::receipt(&one.point)).await?;
        self.check_all::<DamageMark>(names::DAMAGE, |one| names::damage(&one.id)).await?;
        self.check_all::<VerifyResult>(names::VERIFICATIONS, |one| names::verification(&one.id)).await
    }

    async fn check<R: Record>(&mut self, name: &str, fits: impl Fn(&R) -> bool) -> Result<(), StoreError> {
        match records::read::<R>(&self.repository, name).await {
            Ok(record) if fits(&record) => Ok(()),
            Ok(_) => {
                self.damaged(name, DamageKind::Misplaced, "it is another one than its name says");
                Ok(())
            }
            Err(error) => self.take(name, error),
        }
    }

    async fn check_all<R: Record + Send>(
        &mut self,
        folder: &str,
        name_of: impl Fn(&R) -> String,
    ) -> Result<(), StoreError> {
        for (name, record) in records::read_all::<R>(&self.repository, folder).await? {
            match record {
                Ok(record) if name_of(&record) == name => {}
                Ok(_) => self.damaged(&name, DamageKind::Misplaced, "it is another one than its name says"),
                // A sweep was faster.
                Err(error) if error.is_gone() => {}
                Err(error) => self.take(&name, error)?,
            }
        }
        Ok(())
    }

    /// Every segment by itself; then the index is loaded anew, so that later steps find what can be found.
    pub(super) async fn check_index(&mut self) -> Result<(), StoreError> {
        let repository = self.repository.clone();
        for name in records::list(&repository, names::INDEX).await? {
            let read = get(&*repository.backend, &name, MAX_SEGMENT_BYTES).await;
            let bytes = match read.map_err(|error| StoreError::io("read", &name, error)) {
                Ok(bytes) => bytes,
                Err(error) if error.is_gone() => continue,
                Err(error) => {
                    self.take(&name, error)?;
                    continue;
                }
            };
            self.report.read_bytes += bytes.len() as u64;
            if let Err(error) = IndexLayout::check(&bytes, &repository.keys) {
                self.take(&name, StoreError::format(&name, error))?;
            }
        }
        repository.index.refresh(&*repository.backend, &repository.keys).await?;
        repository.index.read_all(&*repository.backend, &repository.keys).await
    }
}
