//! A bounded number of open directories of one snapshot.

use std::collections::HashMap;
use std::sync::Arc;

use super::tree::OpenDir;

/// How many one generation holds.
const GENERATION: usize = 32;

/// Open directories by number, of which the least used are closed: what was not asked for while the younger generation filled up goes
/// with the older one.
#[derive(Debug, Default)]
pub(super) struct DirCache {
    young: HashMap<u64, Arc<OpenDir>>,
    old: HashMap<u64, Arc<OpenDir>>,
}

impl DirCache {
    pub(super) fn get(&mut self, number: u64) -> Option<Arc<OpenDir>> {
        if let Some(found) = self.young.get(&number) {
            return Some(found.clone());
        }
        let found = self.old.remove(&number)?;
        self.put(number, found.clone());
        Some(found)
    }

    pub(super) fn put(&mut self, number: u64, dir: Arc<OpenDir>) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(number, dir);
    }

    pub(super) fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}
