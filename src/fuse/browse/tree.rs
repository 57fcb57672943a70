//! The files of one volume of one checkpoint, and all that are active.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use fsnap_backend::{Backend, Dir, FileMeta, Snapshot};

use super::dir_cache::DirCache;
use super::layout::Records;
use super::node::{Node, What};
use crate::Result;
use crate::checkpoint::{CheckpointId, Member};
use crate::coordinator::{mount_snapshot, open_snapshot};
use crate::mount::Prepared;
use crate::name::Name;

/// So many snapshots are active at the most, besides those that files are open of: each takes descriptors, or a mount.
const MOST_ACTIVE: usize = 64;

/// An open directory of a snapshot.
#[derive(Debug)]
pub(super) struct OpenDir {
    pub(super) dir: Arc<dyn Dir>,
    /// Tells the numbers of different file systems apart: the number of the directory at which this one begins.
    pub(super) realm: u64,
    file_system: u64,
}

impl OpenDir {
    fn new(dir: Arc<dyn Dir>, number: u64, above: Option<&Self>) -> Result<Self> {
        let file_system = dir.file_system()?;
        let realm = above.filter(|above| above.file_system == file_system).map_or(number, |above| above.realm);
        Ok(Self { dir, realm, file_system })
    }
}

/// The files of one volume of one checkpoint.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) checkpoint: CheckpointId,
    /// Tells it from all other trees.
    pub(super) number: u64,
    member: Member,
    records: Records,
    root_meta: OnceLock<FileMeta>,
    open_files: AtomicUsize,
    /// How many trees are active.
    active: Arc<AtomicUsize>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Set while the snapshot is active.
    store: Option<Arc<dyn Backend>>,
    root: Option<Arc<OpenDir>>,
    below: DirCache,
    used: Instant,
}

impl Tree {
    fn new(checkpoint: CheckpointId, member: Member, records: Records, active: Arc<AtomicUsize>) -> Self {
        let mut hasher = DefaultHasher::new();
        (checkpoint, &member.volume).hash(&mut hasher);
        let state = State { store: None, root: None, below: DirCache::default(), used: Instant::now() };
        Self {
            checkpoint,
            number: hasher.finish(),
            member,
            records,
            root_meta: OnceLock::new(),
            open_files: AtomicUsize::new(0),
            active,
            state: Mutex::new(state),
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root; activates the snapshot where it is not active. Whoever comes meanwhile waits.
    fn root(&self) -> Result<Arc<OpenDir>> {
        let mut state = self.locked();
        state.used = Instant::now();
        if let Some(root) = &state.root {
            return Ok(root.clone());
        }
        let open = |store: &dyn Backend, snapshot: &Snapshot| {
            Ok(Arc::new(OpenDir::new(open_snapshot(store, snapshot)?, self.number, None)?))
        };
        let opened = self.activated(&mut state, open)?;
        state.root = Some(opened.clone());
        Ok(opened)
    }

    /// The snapshot as a mount of its own, attached nowhere; `None` if the kernel cannot mount it. Activates it.
    pub(super) fn to_mount(&self) -> Result<Option<Prepared>> {
        let mut state = self.locked();
        state.used = Instant::now();
        self.activated(&mut state, mount_snapshot)
    }

    /// Makes something of the snapshot that activates it. It stays active, unless that fails.
    fn activated<T>(&self, state: &mut State, make: impl FnOnce(&dyn Backend, &Snapshot) -> Result<T>) -> Result<T> {
        let store = match &state.store {
            Some(store) => store.clone(),
            None => self.records.open()?.store_of(&self.member)?,
        };
        let snapshot = &self.member.snapshot;
        let made = make(store.as_ref(), snapshot);
        if made.is_ok() {
            self.set_store(state, Some(store));
        } else if state.root.is_none() {
            // It may have been activated for all that. If it cannot be undone, it stays so, which harms nothing.
            let _ = store.deactivate(&snapshot.at);
            self.set_store(state, None);
        }
        made
    }

    /// The name of the volume.
    pub(super) fn volume(&self) -> &Name {
        &self.member.volume
    }

    fn set_store(&self, state: &mut State, store: Option<Arc<dyn Backend>>) {
        match (state.store.is_some(), store.is_some()) {
            (false, true) => drop(self.active.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.active.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        state.store = store;
    }

    /// The attributes of the root.
    pub(super) fn root_meta(&self) -> Result<FileMeta> {
        if let Some(meta) = self.root_meta.get() {
            return Ok(*meta);
        }
        let meta = self.root()?.dir.meta()?;
        Ok(*self.root_meta.get_or_init(|| meta))
    }

    /// The open directory that this node of the tree is; opens those above it as far as they are not open.
    pub(super) fn dir(&self, node: &Arc<Node>) -> Result<Arc<OpenDir>> {
        let mut missing = Vec::new();
        let mut at = node;
        let mut dir = loop {
            if !matches!(at.what, What::Entry(..)) {
                break self.root()?;
            }
            if let Some(open) = self.cached(at.number) {
                break open;
            }
            missing.push(at);
            match &at.parent {
                Some(parent) => at = parent,
                None => break self.root()?,
            }
        };
        for node in missing.into_iter().rev() {
            let below = Arc::from(dir.dir.open_dir(&node.name)?);
            dir = Arc::new(OpenDir::new(below, node.number, Some(&dir))?);
            let mut state = self.locked();
            if state.root.is_some() {
                state.below.put(node.number, dir.clone());
            }
        }
        Ok(dir)
    }

    fn cached(&self, number: u64) -> Option<Arc<OpenDir>> {
        let mut state = self.locked();
        state.used = Instant::now();
        state.below.get(number)
    }

    /// For how long nobody has used it; `None` if it is not active, if files are open of it, or if it is being used now.
    fn idle(&self) -> Option<Duration> {
        let state = self.state.try_lock().ok()?;
        let free = state.store.is_some() && self.open_files.load(Ordering::Acquire) == 0;
        free.then(|| state.used.elapsed())
    }

    fn let_go(&self) {
        let mut state = self.locked();
        if self.open_files.load(Ordering::Acquire) > 0 {
            return;
        }
        state.root = None;
        state.below.clear();
        // In use by others, or by a call that is under way: the next time will do.
        if state.store.as_ref().is_some_and(|store| store.deactivate(&self.member.snapshot.at).is_ok()) {
            self.set_store(&mut state, None);
        }
    }
}

/// A file that is open in a tree, which keeps it active.
#[derive(Debug)]
pub(super) struct Used(Arc<Tree>);

impl Used {
    pub(super) fn new(tree: &Arc<Tree>) -> Self {
        tree.open_files.fetch_add(1, Ordering::AcqRel);
        Self(tree.clone())
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        self.0.locked().used = Instant::now();
        self.0.open_files.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The trees that are known: one for each volume of each checkpoint that was looked at.
#[derive(Debug, Default)]
pub(super) struct Trees {
    known: Mutex<HashMap<(CheckpointId, Name), Arc<Tree>>>,
    active: Arc<AtomicUsize>,
}

impl Trees {
    fn locked(&self) -> MutexGuard<'_, HashMap<(CheckpointId, Name), Arc<Tree>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tree of a checkpoint's volume. Activates nothing.
    pub(super) fn get(&self, checkpoint: CheckpointId, member: &Member, records: &Records) -> Arc<Tree> {
        let mut known = self.locked();
        let tree = known.entry((checkpoint, member.volume.clone()));
        let new = || Arc::new(Tree::new(checkpoint, member.clone(), records.clone(), self.active.clone()));
        tree.or_insert_with(new).clone()
    }

    fn all(&self) -> Vec<Arc<Tree>> {
        self.locked().values().cloned().collect()
    }

    pub(super) fn active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    /// Keeps the number of active snapshots bounded, after one was used.
    pub(super) fn bound(&self, used: &Arc<Tree>) {
        if self.active() <= MOST_ACTIVE {
            return;
        }
        let mut idle: Vec<_> = self.all().into_iter().filter_map(|tree| Some((tree.idle()?, tree))).collect();
        // Half of them at once, so that this is not done at every call.
        idle.sort_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        for (_, tree) in idle.iter().take(MOST_ACTIVE / 2).filter(|(_, tree)| !Arc::ptr_eq(tree, used)) {
            tree.let_go();
        }
    }

    pub(super) fn let_go(&self, idle: Duration) {
        for tree in self.all().iter().filter(|tree| tree.idle().is_some_and(|since| since >= idle)) {
            tree.let_go();
        }
        // What nobody knows and is not active is made anew when it is looked at.
        self.locked().retain(|_, tree| {
            let active = tree.state.try_lock().is_ok_and(|state| state.store.is_some());
            active || Arc::strong_count(tree) > 1
        });
    }

    /// Lets go of everything. One snapshot may be in use by another, as what a sealed state of a branch began with: that comes later.
    pub(super) fn let_go_of_all(&self) {
        loop {
            let before = self.active();
            self.let_go(Duration::ZERO);
            if self.active() == before {
                return;
            }
        }
    }

    pub(super) fn let_go_unless(&self, keep: impl Fn(&CheckpointId) -> bool) {
        for tree in self.all().iter().filter(|tree| tree.idle().is_some() && !keep(&tree.checkpoint)) {
            tree.let_go();
        }
    }
}
