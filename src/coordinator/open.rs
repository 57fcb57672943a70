//! Opens the files of a checkpoint for reading.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fsnap_backend::{Backend, Dir, DirTree, Locator, MountSpec, Snapshot};

use super::Coordinator;
use crate::Result;
use crate::checkpoint::Member;
use crate::mount;
#[cfg(feature = "fuse")]
use crate::mount::{Prepared, Restrictions};

/// How often an image is activated anew that others deactivate meanwhile.
const ATTEMPTS: usize = 8;

impl Coordinator {
    /// The store that holds the member's snapshot.
    pub fn store_of(&self, member: &Member) -> Result<Arc<dyn Backend>> {
        self.store(&member.store)
    }

    /// The store of that identity.
    pub fn store_at(&self, identity: &fsnap_backend::Identity) -> Result<Arc<dyn Backend>> {
        self.store(identity)
    }

    /// The root of a snapshot's files, for reading; what was activated and mounted for it goes with the value.
    pub(super) fn read(&self, store: &Arc<dyn Backend>, snapshot: &Snapshot) -> Result<Reading> {
        let active = Active { store: store.clone(), at: snapshot.at.clone() };
        Ok(Reading { root: open_snapshot(store.as_ref(), snapshot)?, _active: Some(active) })
    }
}

/// The root of files that are read.
pub(super) struct Reading {
    pub(super) root: Arc<dyn Dir>,
    // After the root, which keeps it in use.
    _active: Option<Active>,
}

impl Reading {
    /// Files that nothing has to be activated for.
    pub(super) fn live(dir: &Path) -> Result<Self> {
        Ok(Self { root: Arc::new(DirTree::open(dir)?), _active: None })
    }
}

/// An image that is active as long as this lives.
struct Active {
    store: Arc<dyn Backend>,
    at: Locator,
}

impl Drop for Active {
    fn drop(&mut self) {
        // In use by others: then they let go of it.
        let _ = self.store.deactivate(&self.at);
    }
}

/// Activates the snapshot and opens the root of its files, for reading.
///
/// What the kernel has to mount for it is attached nowhere, and goes with the last value that was opened from it.
pub fn open_snapshot(store: &dyn Backend, snapshot: &Snapshot) -> Result<Arc<dyn Dir>> {
    match activate(store, &snapshot.at)? {
        (MountSpec::Tree(tree), _) => Ok(tree),
        (MountSpec::Bind { dir, .. }, _) => Ok(Arc::new(DirTree::open(&dir)?)),
        (spec @ MountSpec::Mount { .. }, _held) => {
            Ok(Arc::new(DirTree::from_descriptor(mount::open(&spec)?, snapshot.at.as_str())))
        }
    }
}

/// Activates the snapshot and makes it a mount of its own, attached nowhere; `None` if the kernel cannot mount it.
#[cfg(feature = "fuse")]
pub(crate) fn mount_snapshot(store: &dyn Backend, snapshot: &Snapshot) -> Result<Option<Prepared>> {
    match activate(store, &snapshot.at)? {
        (MountSpec::Tree(_), _) => Ok(None),
        (spec, _held) => Ok(Some(Prepared::new(&spec, Restrictions::default())?)),
    }
}

/// Activates an image that others may deactivate, and holds its device, if it has one, until it is mounted.
///
/// Nobody can deactivate it while the device is open. Before that somebody may have, and the device's number may be another image's
/// by now: so it is asked for again, until the answer is the device that is open.
pub(crate) fn activate(store: &dyn Backend, at: &Locator) -> Result<(MountSpec, Option<File>)> {
    let mut held: Option<(PathBuf, File)> = None;
    for _ in 0..ATTEMPTS {
        let spec = store.activate(at)?;
        let MountSpec::Mount { source, .. } = &spec else { return Ok((spec, None)) };
        match held.take() {
            Some((open, device)) if open == *source => return Ok((spec, Some(device))),
            _ => held = File::open(source).ok().map(|device| (source.clone(), device)),
        }
    }
    let by = "it is deactivated again and again".to_owned();
    Err(fsnap_backend::Error::Busy { what: format!("the image {at}"), by }.into())
}
