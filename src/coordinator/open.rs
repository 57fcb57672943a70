//! Opens the files of a checkpoint for reading.

use std::sync::Arc;

use fsnap_backend::{Backend, Dir, DirTree, MountSpec, Snapshot};

use super::Coordinator;
use crate::checkpoint::Member;
use crate::{Result, mount};

impl Coordinator {
    /// The store that holds the member's snapshot.
    pub fn store_of(&self, member: &Member) -> Result<Arc<dyn Backend>> {
        self.store(&member.store)
    }

    /// The store of that identity.
    pub fn store_at(&self, identity: &fsnap_backend::Identity) -> Result<Arc<dyn Backend>> {
        self.store(identity)
    }

    /// The root of a snapshot's files, for reading; whatever had to be mounted for it goes with the value.
    pub(super) fn read(&self, store: &dyn Backend, snapshot: &Snapshot) -> Result<Arc<dyn Dir>> {
        open_snapshot(store, snapshot)
    }
}

/// Activates the snapshot and opens the root of its files, for reading.
///
/// What the kernel has to mount for it is attached nowhere, and goes with the last value that was opened from it.
pub fn open_snapshot(store: &dyn Backend, snapshot: &Snapshot) -> Result<Arc<dyn Dir>> {
    match store.activate(&snapshot.at)? {
        MountSpec::Tree(tree) => Ok(tree),
        MountSpec::Bind { dir, .. } => Ok(Arc::new(DirTree::open(&dir)?)),
        spec @ MountSpec::Mount { .. } => {
            Ok(Arc::new(DirTree::from_descriptor(mount::open(&spec)?, snapshot.at.as_str())))
        }
    }
}
