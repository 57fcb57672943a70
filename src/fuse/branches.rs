//! The branches that are written through a mount: which of them are open, and what numbers their files have.
//!
//! Each volume of such a branch is a copy-on-write tree of its own, over a snapshot of whatever backend. It is opened when
//! somebody first asks for more than its name; then this server has its store, and no other server gets it. It is let go of when
//! nothing of it is known to the kernel any more, and when the catalog has the branch no longer.
//!
//! All trees of a mount share one space of numbers. A tree's own numbers take 53 bits; those above tell the trees apart, and are 0
//! for the rest of the mount. A tree gets its bits from its directory's name. Where two trees want the same ones, the one that was made
//! first has them, in every mount: that of the other change only if the first is removed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use fsnap_backend::{Backend, Locator};
use fuser::{INodeNo, Notifier};
use rustix::io::Errno;

use super::adapter::Adapter;
use super::browse::{Records, Report, errno_of};
use super::overlay::{self, Origin, Overlay, Still};
use super::{lower, session};
use crate::branch::BranchMember;
use crate::catalog::Catalog;
use crate::checkpoint::PathText;
use crate::error::IoContext;
use crate::failpoint;
use crate::name::Name;
use crate::{Error, Result};

/// How many bits a tree's own numbers take.
pub(super) const OWN_BITS: u32 = 53;
/// How many trees one mount can have.
const SLOTS: u64 = (1 << (64 - OWN_BITS)) - 1;

/// The part of a number that says which tree it belongs to; 0 for none.
pub(super) fn slot_of(number: u64) -> u64 {
    number >> OWN_BITS
}

/// Branches that are written through one mount.
pub struct Branches {
    records: Records,
    report: Report,
    notifier: Arc<OnceLock<Notifier>>,
    passthrough: AtomicBool,
    slots: Mutex<HashMap<u64, Slot>>,
    open: RwLock<HashMap<u64, Arc<Adapter>>>,
}

/// A tree that has a number.
#[derive(Debug, Clone)]
struct Slot {
    branch: Name,
    dir: PathBuf,
    /// What is active for it.
    below: Option<Below>,
    used: Instant,
}

/// The snapshot below an open tree.
#[derive(Debug, Clone)]
struct Below {
    store: Arc<dyn Backend>,
    at: Locator,
}

impl std::fmt::Debug for Branches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Branches").field("records", &self.records).finish_non_exhaustive()
    }
}

impl Branches {
    /// Opens nothing yet. The notifier is set once the session has one.
    pub fn new(records: Records, report: Report, notifier: Arc<OnceLock<Notifier>>) -> Self {
        let (slots, open) = (Mutex::default(), RwLock::default());
        Self { records, report, notifier, passthrough: AtomicBool::new(false), slots, open }
    }

    /// Requests may be passed through to files below.
    pub(super) fn pass_through(&self) {
        self.passthrough.store(true, Ordering::Relaxed);
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<u64, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the root of the branch's volume, if it is written through the mount. Opens nothing.
    pub(super) fn number_of(&self, catalog: &Catalog, branch: &Name, member: &BranchMember) -> Result<Option<u64>> {
        let Some(dir) = written_in(member) else { return Ok(None) };
        if let Some(known) = known(&self.slots(), dir) {
            return Ok(Some(root_of(known)));
        }
        // Whoever is asked for first must not take what an older one has in other mounts.
        let all = catalog.branches()?;
        let mut slots = self.slots();
        for older in &all {
            for dir in older.members.iter().filter_map(written_in) {
                find_or_take(&mut slots, &older.name, dir);
            }
        }
        Ok(find_or_take(&mut slots, branch, dir).map(root_of))
    }

    /// The tree that a number belongs to; opens it where it is not open. `None` for numbers of no tree.
    pub(super) fn tree(&self, number: u64) -> Result<Option<Arc<Adapter>>, Errno> {
        let slot = slot_of(number);
        if slot == 0 {
            return Ok(None);
        }
        if let Some(open) = self.open.read().unwrap_or_else(PoisonError::into_inner).get(&slot) {
            return Ok(Some(open.clone()));
        }
        self.open(slot).map(Some).map_err(|error| {
            (self.report)(&error);
            errno_of(&error)
        })
    }

    /// The tree, if it is open.
    pub(super) fn open_tree(&self, number: u64) -> Option<Arc<Adapter>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&slot_of(number)).cloned()
    }

    fn open(&self, number: u64) -> Result<Arc<Adapter>> {
        // Whoever comes meanwhile waits, and so does whoever asks for another one: it takes a millisecond, and a mount at most.
        let mut slots = self.slots();
        if let Some(open) = self.open_tree(root_of(number)) {
            return Ok(open);
        }
        let slot = slots.get_mut(&number).ok_or_else(gone)?;
        let coordinator = self.records.open()?;
        let branch = coordinator.catalog().branch(&slot.branch)?.ok_or_else(gone)?;
        let is_it =
            |member: &&BranchMember| member.form.layers().is_some_and(|layers| layers.dir.as_path() == slot.dir);
        let member = branch.members.iter().find(is_it).ok_or_else(gone)?;
        let store = coordinator.store_at(&member.store)?;
        let below = lower::of_image(store.as_ref(), &member.at)?;
        let at = member.at.clone();
        if let Some(home) = slot.dir.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(home).context("make the directory", home)?;
        }
        overlay::prepare(&slot.dir, &member.identity)?;
        let tree = Overlay::open_at_once(below, &slot.dir).map_err(session::Error::from)?;
        // Another server may have removed it before this one had it for itself.
        if !coordinator.catalog().branch(&slot.branch)?.is_some_and(|branch| branch.members.iter().any(|m| is_it(&m))) {
            drop(tree);
            coordinator.discard(&slot.dir)?;
            return Err(gone());
        }
        let (notifier, base) = (self.notifier.clone(), number << OWN_BITS);
        if let Some(record) = coordinator.catalog().store(&member.store)? {
            let (backend, place, at) = (member.backend.clone(), record.place.0, member.at.clone());
            let origin = Origin::Image { backend, place, store: member.store.clone(), at };
            overlay::note(&slot.dir, &origin)?;
        }
        let passthrough = self.passthrough.load(Ordering::Relaxed);
        let adapter = Arc::new(Adapter::within(tree, &slot.dir, notifier, base, passthrough));
        slot.below = Some(Below { store, at });
        slot.used = Instant::now();
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(number, adapter.clone());
        Ok(adapter)
    }

    /// Makes the kernel ask again for these names in the directory of a branch that is gone. Not for the directory itself: who makes another one
    /// in its place has the one above locked.
    pub(super) fn forget(&self, dir: u64, names: &[&OsStr]) {
        self.let_go_of_removed();
        if let Some(notifier) = self.notifier.get() {
            // What it does not know needs nothing.
            names.iter().for_each(|name| drop(notifier.inval_entry(INodeNo(dir), name)));
        }
    }

    /// Removes a branch by `remove`, if nothing was ever written to it; `false` if something was.
    ///
    /// Nobody can write to it meanwhile: this server takes its trees, so that no other one has them, and keeps them still.
    /// Whoever comes first is seen, and whoever comes later finds nothing to write to.
    pub(super) fn remove_unchanged(&self, name: &Name, remove: impl FnOnce() -> Result<()>) -> Result<bool> {
        let coordinator = self.records.open()?;
        let Some(branch) = coordinator.catalog().branch(name)? else {
            return remove().map(|()| true);
        };
        let mut trees = Vec::with_capacity(branch.members.len());
        for member in &branch.members {
            let Some(number) = self.number_of(coordinator.catalog(), name, member)? else { return Ok(false) };
            trees.push(self.open(slot_of(number))?);
        }
        drop(coordinator);
        let mut still: Vec<_> = trees.iter().map(|tree| tree.overlay.still()).collect();
        for (tree, member) in still.iter_mut().zip(&branch.members) {
            let examined = tree.is_unchanged();
            if !examined.map_err(|error| failed("examine", &member.path, error))? {
                return Ok(false);
            }
        }
        failpoint::hit("rmdir:unchanged");
        let removed = remove();
        if removed.is_ok() || self.records.open()?.catalog().branch(name)?.is_none() {
            // Somebody may be waiting with the first write.
            still.into_iter().for_each(Still::end);
            self.let_go_of_removed();
        }
        removed.map(|()| true)
    }

    /// Lets go of trees of which the kernel has known nothing for so long, and that no call is under way in.
    pub(super) fn let_go(&self, idle: Duration) {
        self.close_those(|slot, adapter| {
            if Arc::strong_count(adapter) == 1 && adapter.is_idle() {
                return slot.used.elapsed() >= idle;
            }
            slot.used = Instant::now();
            false
        });
    }

    /// Lets go of trees that are in the catalog no more.
    pub(super) fn let_go_of_removed(&self) {
        let Ok(coordinator) = self.records.open() else { return };
        let Ok(branches) = coordinator.catalog().branches() else { return };
        let dirs: Vec<PathBuf> = branches.iter().flat_map(|branch| branch.homes()).map(|dir| dir.0).collect();
        self.close_those(|slot, _| !dirs.contains(&slot.dir));
        self.slots().retain(|_, slot| slot.below.is_some() || dirs.contains(&slot.dir));
    }

    /// Gives back the room of layers that nobody needs any more.
    pub(super) fn merge(&self) {
        let open: Vec<_> = self.open.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for adapter in open {
            // What cannot be merged now is tried again.
            let _ = adapter.merger()();
        }
    }

    /// Lets go of all.
    pub(super) fn close(&self) {
        self.close_those(|_, _| true);
    }

    fn close_those(&self, mut goes: impl FnMut(&mut Slot, &Arc<Adapter>) -> bool) {
        let mut slots = self.slots();
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let mut below = Vec::new();
        open.retain(|number, adapter| {
            let Some(slot) = slots.get_mut(number) else { return false };
            let goes = goes(slot, adapter);
            if goes {
                below.extend(slot.below.take());
            }
            !goes
        });
        drop(open);
        for below in below {
            // In use by others: then they let go of it.
            let _ = below.store.deactivate(&below.at);
        }
    }
}

/// Where the volume of a branch keeps what differs, if it is written through a mount.
fn written_in(member: &BranchMember) -> Option<&Path> {
    member.form.layers().map(|layers| layers.dir.as_path())
}

fn known(slots: &HashMap<u64, Slot>, dir: &Path) -> Option<u64> {
    let wanted = wanted(dir);
    if slots.get(&wanted).is_some_and(|slot| slot.dir == dir) {
        return Some(wanted);
    }
    slots.iter().find(|(_, slot)| slot.dir == dir).map(|(number, _)| *number)
}

/// The one that the tree has, or the first free one from the one that it wants; `None` if all are taken.
fn find_or_take(slots: &mut HashMap<u64, Slot>, branch: &Name, dir: &Path) -> Option<u64> {
    if let Some(known) = known(slots, dir) {
        return Some(known);
    }
    let from = wanted(dir);
    let free = (from..=SLOTS).chain(1..from).find(|number| !slots.contains_key(number))?;
    slots.insert(free, Slot { branch: branch.clone(), dir: dir.to_owned(), below: None, used: Instant::now() });
    Some(free)
}

fn wanted(dir: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    dir.hash(&mut hasher);
    hasher.finish() % SLOTS + 1
}

fn root_of(slot: u64) -> u64 {
    (slot << OWN_BITS) | overlay::ROOT
}

fn gone() -> Error {
    Error::Io { action: "open", object: "a branch that is gone".into(), source: Errno::STALE.into() }
}

fn failed(action: &'static str, path: &PathText, source: Errno) -> Error {
    Error::Io { action, object: path.to_string(), source: source.into() }
}
