//! A bounded number of open directories.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// Open directories by number, of which the least used are closed.
///
/// Two generations: what was not asked for while the younger one filled up goes with the older one. A tree that is deeper
/// than the cache is large still works, for whoever walks holds on to the descriptor that it needs next.
///
/// There may be a hundred trees over each other, each with a cache. All caches of the process together hold no more than a share of
/// the descriptors that it may have; when that is full, each goes on with two.
#[derive(Debug)]
pub(super) struct FdCache<T: Open> {
    young: HashMap<u64, Held<T>>,
    old: HashMap<u64, Held<T>>,
    generation: usize,
}

/// Something open.
pub(super) trait Open: Clone {
    /// Whether it is a descriptor.
    fn is_descriptor(&self) -> bool;
}

impl Open for Arc<OwnedFd> {
    fn is_descriptor(&self) -> bool {
        true
    }
}

/// How many descriptors all caches hold.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// How many they may hold: a quarter of what the process may have open.
fn share() -> usize {
    static SHARE: OnceLock<usize> = OnceLock::new();
    *SHARE.get_or_init(|| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        limit.and_then(|limit| usize::try_from(limit / 4).ok()).unwrap_or(usize::MAX)
    })
}

/// One that is in a cache, and is counted.
#[derive(Debug)]
struct Held<T: Open>(T);

impl<T: Open> Held<T> {
    fn new(open: T) -> Self {
        HELD.fetch_add(usize::from(open.is_descriptor()), Ordering::Relaxed);
        Self(open)
    }
}

impl<T: Open> Drop for Held<T> {
    fn drop(&mut self) {
        HELD.fetch_sub(usize::from(self.0.is_descriptor()), Ordering::Relaxed);
    }
}

impl<T: Open> Default for FdCache<T> {
    fn default() -> Self {
        Self::of(GENERATION)
    }
}

/// How many descriptors one generation holds.
const GENERATION: usize = 1024;

impl<T: Open> FdCache<T> {
    /// For a tree of which there are many: a sealed state.
    pub(super) fn small() -> Self {
        Self::of(GENERATION / 32)
    }

    fn of(generation: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), generation }
    }

    pub(super) fn get(&mut self, number: u64) -> Option<T> {
        if let Some(found) = self.young.get(&number) {
            return Some(found.0.clone());
        }
        let found = self.old.remove(&number)?.0.clone();
        self.put(number, found.clone());
        Some(found)
    }

    pub(super) fn put(&mut self, number: u64, open: T) {
        self.put_within(number, open, share());
    }

    fn put_within(&mut self, number: u64, open: T, share: usize) {
        let full = open.is_descriptor() && HELD.load(Ordering::Relaxed) >= share;
        if full || self.young.len() >= self.generation {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(number, Held::new(open));
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

    #[test]
    fn when_the_share_is_full_each_cache_holds_two() {
        let root = Arc::new(OwnedFd::from(std::fs::File::open("/").unwrap()));
        let mut caches: Vec<FdCache<_>> = (0..10).map(|_| FdCache::default()).collect();
        for number in 0..100 {
            for cache in &mut caches {
                cache.put_within(number, root.clone(), 0);
                assert!(cache.get(number).is_some());
            }
        }
        assert!(Arc::strong_count(&root) <= 2 * caches.len() + 1);
    }
}
