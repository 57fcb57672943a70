//! A bounded number of open directories.

use std::collections::HashMap;

/// Open directories by number, of which the least used are closed.
///
/// Two generations: what was not asked for while the younger one filled up goes with the older one. A tree that is deeper
/// than the cache is large still works, for whoever walks holds on to the descriptor that it needs next.
#[derive(Debug)]
pub(super) struct FdCache<T> {
    young: HashMap<u64, T>,
    old: HashMap<u64, T>,
    generation: usize,
}

impl<T> Default for FdCache<T> {
    fn default() -> Self {
        Self::of(GENERATION)
    }
}

/// How many descriptors one generation holds.
const GENERATION: usize = 1024;

impl<T> FdCache<T> {
    /// For a tree of which there are many: a sealed state.
    pub(super) fn small() -> Self {
        Self::of(GENERATION / 32)
    }

    fn of(generation: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), generation }
    }
}

impl<T: Clone> FdCache<T> {
    pub(super) fn get(&mut self, number: u64) -> Option<T> {
        if let Some(found) = self.young.get(&number) {
            return Some(found.clone());
        }
        let found = self.old.remove(&number)?;
        self.put(number, found.clone());
        Some(found)
    }

    pub(super) fn put(&mut self, number: u64, open: T) {
        if self.young.len() >= self.generation {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(number, open);
    }

    pub(super) fn remove(&mut self, number: u64) {
        self.young.remove(&number);
        self.old.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_is_used_stays_and_the_number_is_bounded() {
        let mut cache = FdCache::default();
        let root = Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
        for number in 0..10 * GENERATION as u64 {
            cache.put(number, root.clone());
            assert!(cache.get(0).is_some(), "lost after {number}");
        }
        assert!(Arc::strong_count(&root) <= 2 * GENERATION + 1);
        cache.remove(0);
        assert!(cache.get(0).is_none());
    }
}
