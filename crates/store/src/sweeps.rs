//! Which sweeps there are, and what they forbid. Every writer and reader looks here; only `sweep` writes.
//!
//! The newest number is asked for by name, since a listing may be late; the listing only says where to begin.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use xenvault_store_format::{ChunkId, DamageMark, PackId, PointId, SweepEnd, SweepIntent};

use crate::index::Barred;
use crate::repository::Inner;
use crate::{StoreError, names, records};

/// The sweeps at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct SweepState {
    /// Number of the newest sweep whose intent is there; 0 if there is none.
    pub(crate) number: u64,
    /// Its intent, while it has no end.
    pub(crate) open: Option<Arc<SweepIntent>>,
    /// Packs that are condemned and may be there.
    condemned: HashSet<PackId>,
}

impl SweepState {
    /// Number of the newest sweep that has ended.
    pub(crate) fn ended(&self) -> u64 {
        if self.open.is_some() { self.number.saturating_sub(1) } else { self.number }
    }

    /// Whether a pack is condemned and may be there.
    pub(crate) fn is_condemned(&self, pack: &PackId) -> bool {
        self.condemned.contains(pack)
    }

    /// Packs that are condemned and may be there.
    pub(crate) fn condemned(&self) -> impl Iterator<Item = &PackId> {
        self.condemned.iter()
    }

    /// Whether the open sweep is going to remove this point.
    pub(crate) fn takes(&self, point: &PointId) -> bool {
        self.open.as_ref().is_some_and(|intent| intent.forgotten.iter().any(|going| going.point == *point))
    }
}

/// What was seen last.
#[derive(Debug, Default)]
pub(crate) struct Sweeps {
    last: Mutex<Arc<SweepState>>,
}

impl Sweeps {
    fn last(&self) -> Arc<SweepState> {
        Arc::clone(&self.last.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Inner {
    /// The sweeps as they are now. Costs two requests if there is none, or no new one.
    pub(crate) async fn look_at_sweeps(&self) -> Result<Arc<SweepState>, StoreError> {
        if self.ignore_deletions {
            return Ok(Arc::default());
        }
        let last = self.sweeps.last();
        let number = self.newest_sweep(last.number).await?;
        if number == last.number && last.open.is_none() {
            return Ok(last);
        }
        let state = Arc::new(self.load_sweep(number).await?);
        let mut slot = self.sweeps.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Of two who look at once, the one who saw more counts.
        if state.number > slot.number || (state.number == slot.number && state.open.is_none()) {
            *slot = Arc::clone(&state);
        }
        Ok(state)
    }

    async fn newest_sweep(&self, known: u64) -> Result<u64, StoreError> {
        let mut newest = known;
        if known == 0 {
            let listed = records::list(self, names::SWEEPS).await?;
            let mut numbers: Vec<u64> =
                listed.iter().filter_map(|name| names::sweep_parts(name)).map(|(number, _)| number).collect();
            numbers.sort_unstable();
            while let Some(number) = numbers.pop() {
                if self.has_intent(number).await? {
                    newest = number;
                    break;
                }
            }
        }
        let mut step = 1;
        while self.has_intent(newest.saturating_add(step)).await? {
            newest = newest.saturating_add(step);
            step *= 2;
        }
        // Between `newest`, which is there, and the first one that was not.
        while step > 1 {
            step /= 2;
            if self.has_intent(newest.saturating_add(step)).await? {
                newest = newest.saturating_add(step);
            }
        }
        Ok(newest)
    }

    /// Whether a sweep was announced. Where versions are kept nothing gets damaged, and what does not open is what somebody
    /// without the key has put there.
    async fn has_intent(&self, number: u64) -> Result<bool, StoreError> {
        if !self.backend.oldest_counts() {
            return records::exists(self, &names::intent(number)).await;
        }
        match self.read_intent(number).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_gone() => Ok(false),
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::warn!(number, error = %error, "an intent of a sweep that is none of ours is left out");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn load_sweep(&self, number: u64) -> Result<SweepState, StoreError> {
        if number == 0 {
            return Ok(SweepState::default());
        }
        let name = names::end(number);
        match records::read::<SweepEnd>(self, &name).await {
            Ok(end) if end.number == number => {
                return Ok(SweepState { number, open: None, condemned: end.kept.into_iter().collect() });
            }
            Ok(end) => return Err(misplaced(name, end.number)),
            Err(error) if error.is_gone() => {}
            // Somebody without the key has put it there.
            Err(StoreError::Damaged { .. }) if self.backend.oldest_counts() => {}
            // It has ended; without its word, all that it condemned may be there.
            Err(error) if error.is_loss() => {
                let intent = self.read_intent(number).await?;
                return Ok(SweepState { number, open: None, condemned: intent.condemned.into_iter().collect() });
            }
            Err(error) => return Err(error),
        }
        let intent = self.read_intent(number).await?;
        let condemned = intent.condemned.iter().copied().collect();
        Ok(SweepState { number, open: Some(Arc::new(intent)), condemned })
    }

    /// Whether a sweep has removed this point. Its tombstone may be gone since, or was undone when it was too late;
    /// intents stay. Reads them from the newest on, so it is for points that nothing else explains.
    pub(crate) async fn was_swept(&self, point: &PointId) -> Result<bool, StoreError> {
        let newest = self.look_at_sweeps().await?.number;
        for number in (1..=newest).rev() {
            match self.read_intent(number).await {
                Ok(intent) if intent.forgotten.iter().any(|going| going.point == *point) => return Ok(true),
                Ok(_) => {}
                Err(error) if error.is_loss() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    async fn read_intent(&self, number: u64) -> Result<SweepIntent, StoreError> {
        let name = names::intent(number);
        let intent: SweepIntent = records::read(self, &name).await?;
        if intent.number == number { Ok(intent) } else { Err(misplaced(name, intent.number)) }
    }

    /// Tells the index what must not be referred to any more: what sweeps condemn and what damage marks name.
    pub(crate) async fn bar_copies(&self, state: &SweepState) -> Result<(), StoreError> {
        let mut barred = Barred { condemned: state.condemned.clone(), ..Barred::default() };
        for (name, mark) in records::read_all::<DamageMark>(self, names::DAMAGE).await? {
            match mark {
                Ok(mark) => {
                    barred.damaged_packs.extend(mark.packs);
                    let copies = mark.copies.iter().map(|copy| (copy.chunk, copy.pack));
                    barred.damaged_copies.extend::<Vec<(ChunkId, PackId)>>(copies.collect());
                }
                Err(error) if error.is_loss() => {
                    tracing::warn!(object = name, error = %error, "damage mark left out");
                }
                Err(error) => return Err(error),
            }
        }
        self.index.bar(Arc::new(barred));
        Ok(())
    }
}

fn misplaced(object: String, number: u64) -> StoreError {
    StoreError::Damaged { object, source: format!("it is of sweep {number}").into() }
}
