//! A bounded number of open directories.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Descriptors of directories by number, of which the least used are closed.
///
/// Two generations: what was not asked for while the younger one filled up goes with the older one. A tree that is deeper
/// than the cache is large still works, for whoever walks holds on to the descriptor that it needs next.
#[derive(Debug, Default)]
pub(super) struct FdCache {
    young: HashMap<u64, Arc<OwnedFd>>,
    old: HashMap<u64, Arc<OwnedFd>>,
}

/// How many descriptors one generation holds.
const GENERATION: usize = 1024;

impl FdCache {
    pub(super) fn get(&mut self, number: u64) -> Option<Arc<OwnedFd>> {
        if let Some(found) = self.young.get(&number) {
            return Some(found.clone());
        }
        let found = self.old.remove(&number)?;
        self.put(number, found.clone());
        Some(found)
    }

    pub(super) fn put(&mut self, number: u64, descriptor: Arc<OwnedFd>) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(number, descriptor);
    }

    pub(super) fn remove(&mut self, number: u64) {
        self.young.remove(&number);
        self.old.remove(&number);
    }
}

#[cfg(test)]
mod tests {
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
