//! Keys of packs that were used last. A pack's salt stands in its header, and in the copy of it at the end, so the first chunk of a pack costs one small
//! read more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use xenvault_store_format::{Keys, PACK_END_BYTES, PACK_HEADER_BYTES, PackId, PackKey};

use crate::backend::Backend;
use crate::index::header_of;
use crate::{StoreError, names};

/// Keys in each of the two generations; a key takes some hundred bytes.
const GENERATION: usize = 2_048;

/// Two generations: what is used moves to the young one; when that is full, the old one goes.
#[derive(Debug, Default)]
pub(crate) struct PackKeys {
    generations: Mutex<Generations>,
}

#[derive(Debug, Default)]
struct Generations {
    young: HashMap<PackId, Arc<PackKey>>,
    old: HashMap<PackId, Arc<PackKey>>,
}

impl PackKeys {
    fn get(&self, id: &PackId) -> Option<Arc<PackKey>> {
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = generations.young.get(id) {
            return Some(Arc::clone(key));
        }
        let key = generations.old.remove(id)?;
        generations.put(*id, Arc::clone(&key));
        Some(key)
    }

    /// The key of a pack, whose header must belong under its name.
    pub(crate) async fn of(&self, backend: &dyn Backend, keys: &Keys, id: &PackId) -> Result<Arc<PackKey>, StoreError> {
        if let Some(key) = self.get(id) {
            return Ok(key);
        }
        let name = names::pack(id);
        let failed = |error| StoreError::io("read", &name, error);
        let first = backend.read(&name, 0, PACK_HEADER_BYTES).await.map_err(failed);
        let header = match first.and_then(|bytes| header_of(keys, *id, &name, &bytes)) {
            Err(error) if error.is_loss() && !error.is_gone() => {
                // The copy at the end is what it is there for.
                let length = backend.length(&name).await.map_err(failed)?;
                let at = length.saturating_sub(PACK_END_BYTES as u64);
                let copy = backend.read(&name, at, PACK_HEADER_BYTES).await.map_err(failed)?;
                header_of(keys, *id, &name, &copy).map_err(|_| error)?
            }
            header => header?,
        };
        let key = PackKey::derive(keys, &header.salt).map_err(|error| StoreError::format(&name, error))?;
        let key = Arc::new(key);
        self.put(*id, Arc::clone(&key));
        Ok(key)
    }

    fn put(&self, id: PackId, key: Arc<PackKey>) {
        self.generations.lock().unwrap_or_else(PoisonError::into_inner).put(id, key);
    }
}

impl Generations {
    fn put(&mut self, id: PackId, key: Arc<PackKey>) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(id, key);
    }
}

#[cfg(test)]
mod tests {
    use xenvault_store_format::{MasterKey, PackSalt, RepositoryId};

    use super::*;

    #[test]
    fn what_is_used_stays_and_the_number_is_bounded() {
        let keys = Keys::derive(MasterKey::from_bytes([1; 32]), RepositoryId::from_bytes([2; 16])).unwrap();
        let key = Arc::new(PackKey::derive(&keys, &PackSalt::from_bytes([3; 32])).unwrap());
        let id = |n: u32| {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&n.to_le_bytes());
            PackId::from_bytes(bytes)
        };
        let cache = PackKeys::default();
        for n in 0..20_000 {
            cache.put(id(n), Arc::clone(&key));
            assert!(cache.get(&id(0)).is_some(), "after {n}");
        }
        let generations = cache.generations.lock().unwrap();
        assert!(generations.young.len() + generations.old.len() <= 2 * GENERATION);
    }
}
