//! A small cache of what was read last. Bounded in weight; meant for dozens of entries, so it simply looks at all.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    state: Mutex<State<K, V>>,
    limit: usize,
}

#[derive(Debug)]
struct State<K, V> {
    entries: HashMap<K, Entry<V>>,
    weight: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    weight: usize,
    used: u64,
}

impl<K: Clone + Eq + Hash, V: Clone> Cache<K, V> {
    /// A cache that holds entries of `limit` together.
    pub(crate) fn new(limit: usize) -> Self {
        Self { state: Mutex::new(State { entries: HashMap::new(), weight: 0, clock: 0 }), limit }
    }

    pub(crate) fn get(&self, id: &K) -> Option<V> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let now = state.clock;
        let entry = state.entries.get_mut(id)?;
        entry.used = now;
        Some(entry.value.clone())
    }

    /// What is there, or what `make` makes and puts there.
    pub(crate) fn get_or_put(&self, id: K, weight: usize, make: impl FnOnce() -> V) -> V {
        // Two at once may both make one; the later one stays.
        self.get(&id).unwrap_or_else(|| {
            let value = make();
            self.put(id, value.clone(), weight);
            value
        })
    }

    pub(crate) fn put(&self, id: K, value: V, weight: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let used = state.clock;
        if let Some(old) = state.entries.insert(id, Entry { value, weight, used }) {
            state.weight -= old.weight;
        }
        state.weight += weight;
        while state.weight > self.limit {
            let Some(oldest) = state.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone())
            else {
                break;
            };
            if let Some(gone) = state.entries.remove(&oldest) {
                state.weight -= gone.weight;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use xenvault_store_format::ChunkId;

    use super::*;

    #[test]
    fn the_least_recently_used_goes_first_and_the_limit_holds() {
        let cache = Cache::new(10);
        let id = |n| ChunkId::from_bytes([n; 32]);
        cache.put(id(1), 'a', 4);
        cache.put(id(2), 'b', 4);
        assert_eq!(cache.get(&id(1)), Some('a'));
        cache.put(id(3), 'c', 4);
        assert_eq!((cache.get(&id(1)), cache.get(&id(2)), cache.get(&id(3))), (Some('a'), None, Some('c')));
        cache.put(id(4), 'd', 11);
        assert_eq!(cache.get(&id(4)), None);
    }
}
