//! Two threads that go through a tree together.
//!
//! Every directory is a [`Task`]: it is visited, which yields its subdirectories, and left when all of them were left.
//! The tasks wait on one stack, deepest first, so that few are waiting at any time. Nothing recurses, however deep
//! the tree is, and no path is put together but for a message.
//!
//! A bounded number of descriptors is held: the directories that were opened last. What is needed next lies beside them,
//! or below. A directory that was closed meanwhile is opened again, name by name, from the nearest ancestor that is
//! open, and so are those on the way: on the way back up through a tree that is much deeper than the bound, one such
//! descent serves as many directories as are held.

use std::cell::OnceCell;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use fsnap_backend::{Result, beneath};

/// How many threads work. The walk is bound by system calls: more would fight for the same locks of the kernel.
const THREADS: usize = 2;

/// How many directories are kept open; the usual limit of a process is 1,024 descriptors.
const DESCRIPTORS: usize = 256;

/// What is done with each directory.
pub(crate) trait Work: Sync {
    /// What is known of a directory.
    type Node: Send + Sync;
    /// What one thread needs for itself.
    type Hand: Send;

    /// Handles the directory itself and returns its subdirectories by name.
    fn visit(&self, hand: &mut Self::Hand, task: &Task<Self::Node>) -> Result<Vec<(OsString, Self::Node)>>;

    /// Handles the directory after everything below it was handled.
    fn leave(&self, hand: &mut Self::Hand, task: &Task<Self::Node>) -> Result<()>;
}

/// One directory on its way through the crew.
pub(crate) struct Task<N> {
    name: OsString,
    parent: Option<Arc<Task<N>>>,
    pending: AtomicUsize,
    slot: Arc<Slot>,
    pub(crate) node: N,
}

/// Holds a directory's descriptor while it is open.
type Slot = Mutex<Option<Arc<OwnedFd>>>;

/// An open directory.
#[derive(Clone)]
pub(crate) enum Descriptor<'a> {
    Root(BorrowedFd<'a>),
    Held(Arc<OwnedFd>),
}

impl AsFd for Descriptor<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Root(descriptor) => descriptor.as_fd(),
            Self::Held(held) => held.as_fd(),
        }
    }
}

/// Where the tree begins, and which of its directories were opened last.
pub(crate) struct Root<'a> {
    descriptor: BorrowedFd<'a>,
    opened: Mutex<Ring>,
}

/// The slots that were filled last; the oldest is emptied for a new one.
#[derive(Default)]
struct Ring {
    slots: Vec<Arc<Slot>>,
    oldest: usize,
}

impl<'a> Root<'a> {
    pub(crate) fn new(descriptor: BorrowedFd<'a>) -> Self {
        Self { descriptor, opened: Mutex::default() }
    }

    fn hold(&self, slot: &Arc<Slot>, descriptor: OwnedFd) -> Arc<OwnedFd> {
        let descriptor = Arc::new(descriptor);
        *lock(slot) = Some(descriptor.clone());
        let emptied = lock(&self.opened).add(slot.clone());
        // A slot that stands in the ring twice goes with its older place, and is filled again when it is needed.
        drop(emptied.and_then(|slot| lock(&slot).take()));
        descriptor
    }
}

impl Ring {
    /// Adds a slot; returns the one that gives way.
    fn add(&mut self, slot: Arc<Slot>) -> Option<Arc<Slot>> {
        if self.slots.len() < DESCRIPTORS {
            self.slots.push(slot);
            return None;
        }
        let oldest = std::mem::replace(&mut self.slots[self.oldest], slot);
        self.oldest = (self.oldest + 1) % DESCRIPTORS;
        Some(oldest)
    }
}

/// The path of something in a tree, put together only if a message needs it.
pub(crate) struct Shown<'a, N> {
    root: &'a Path,
    task: &'a Task<N>,
    name: Option<&'a OsStr>,
    path: OnceCell<PathBuf>,
}

impl<N> AsRef<Path> for Shown<'_, N> {
    fn as_ref(&self) -> &Path {
        self.path.get_or_init(|| {
            let below = self.name.map_or_else(|| self.task.path(), |name| self.task.path_of(name));
            // Joined, an empty path would leave a slash at the end.
            if below.as_os_str().is_empty() { self.root.to_owned() } else { self.root.join(below) }
        })
    }
}

impl<N> Task<N> {
    fn new(name: OsString, parent: Option<Arc<Self>>, node: N) -> Arc<Self> {
        Arc::new(Self { name, parent, pending: AtomicUsize::new(0), slot: Arc::default(), node })
    }

    /// The path of the directory, or of `name` in it, from `root`, for the case that a call fails.
    pub(crate) fn shown<'a>(&'a self, root: &'a Path, name: Option<&'a OsStr>) -> Shown<'a, N> {
        Shown { root, task: self, name, path: OnceCell::new() }
    }

    /// What is known of the directory that it lies in; `None` for the root.
    pub(crate) fn parent(&self) -> Option<&Task<N>> {
        self.parent.as_deref()
    }

    /// The path of `name` in this directory, from the root; for messages.
    pub(crate) fn path_of(&self, name: &OsStr) -> PathBuf {
        let mut names = vec![name];
        let mut at = self;
        while let Some(parent) = &at.parent {
            names.push(&at.name);
            at = parent;
        }
        names.into_iter().rev().collect()
    }

    /// The path of this directory, from the root; for messages.
    pub(crate) fn path(&self) -> PathBuf {
        self.parent.as_ref().map_or_else(PathBuf::new, |parent| parent.path_of(&self.name))
    }

    /// Opens the directory, or returns it if it is open.
    pub(crate) fn open<'a>(&self, root: &Root<'a>) -> io::Result<Descriptor<'a>> {
        let mut below = Vec::new();
        let mut at = self;
        let mut descriptor = loop {
            if let Some(held) = &*lock(&at.slot) {
                break Descriptor::Held(held.clone());
            }
            let Some(parent) = &at.parent else { break Descriptor::Root(root.descriptor) };
            below.push(at);
            at = parent;
        };
        for task in below.into_iter().rev() {
            let opened = beneath::open_dir(&descriptor, &task.name)?;
            descriptor = Descriptor::Held(root.hold(&task.slot, opened));
        }
        Ok(descriptor)
    }

    fn close(&self) {
        drop(lock(&self.slot).take());
    }
}

impl<N> Drop for Task<N> {
    /// Drops a chain of parents one by one: as deep as the tree, it would not fit the stack.
    fn drop(&mut self) {
        let mut parent = self.parent.take();
        while let Some(mut last) = parent.and_then(Arc::into_inner) {
            parent = last.parent.take();
        }
    }
}

struct Shared<N> {
    waiting: Vec<Arc<Task<N>>>,
    /// Threads that may still add to `waiting`.
    busy: usize,
    failure: Option<fsnap_backend::Error>,
}

impl<N> Shared<N> {
    /// The next task for a thread, which may then add to `waiting`.
    fn take(&mut self) -> Option<Arc<Task<N>>> {
        let task = self.waiting.pop()?;
        self.busy += 1;
        Some(task)
    }
}

/// Goes through the whole tree; `hand` makes what each thread needs, and gets it back at the end.
pub(crate) fn run<W: Work>(work: &W, root: W::Node, hands: Vec<W::Hand>) -> Result<Vec<W::Hand>> {
    let root = Task::new(OsString::new(), None, root);
    let shared = Mutex::new(Shared { waiting: vec![root], busy: 0, failure: None });
    let wake = Condvar::new();
    let hands = std::thread::scope(|scope| {
        let threads: Vec<_> = hands
            .into_iter()
            .map(|mut hand| {
                let (shared, wake) = (&shared, &wake);
                scope.spawn(move || {
                    let mut task = None;
                    while let Some(now) = next(shared, wake, task.take()) {
                        let visited = step(work, &mut hand, now);
                        let mut state = lock(shared);
                        state.busy -= 1;
                        match visited {
                            Ok(children) => {
                                state.waiting.extend(children);
                                // Woken for nothing, the other thread would only take this one's place.
                                task = state.take();
                            }
                            Err(failure) => {
                                state.failure.get_or_insert(failure);
                            }
                        }
                        let news = !state.waiting.is_empty() || state.busy == 0 || state.failure.is_some();
                        drop(state);
                        if news {
                            wake.notify_all();
                        }
                    }
                    hand
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    match shared.into_inner().unwrap_or_else(PoisonError::into_inner).failure {
        None => Ok(hands),
        Some(failure) => Err(failure),
    }
}

/// One value for each thread.
pub(crate) fn hands<H>(make: impl FnMut(usize) -> H) -> Vec<H> {
    (0..THREADS).map(make).collect()
}

/// Waits for a task, unless the thread has one already; `None` at the end, or when something failed.
fn next<N>(shared: &Mutex<Shared<N>>, wake: &Condvar, taken: Option<Arc<Task<N>>>) -> Option<Arc<Task<N>>> {
    let mut state = lock(shared);
    loop {
        if state.failure.is_some() {
            return None;
        }
        if let Some(task) = taken {
            return Some(task);
        }
        if let Some(task) = state.take() {
            return Some(task);
        }
        if state.busy == 0 {
            return None;
        }
        state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Visits one directory; leaves it, and every ancestor of which it was the last, if nothing is below it.
fn step<W: Work>(work: &W, hand: &mut W::Hand, task: Arc<Task<W::Node>>) -> Result<Vec<Arc<Task<W::Node>>>> {
    let children = work.visit(hand, &task)?;
    if !children.is_empty() {
        task.pending.store(children.len(), Ordering::Release);
        let child = |(name, node)| Task::new(name, Some(task.clone()), node);
        // The stack gives the last first: names in order keep neighbours together.
        return Ok(children.into_iter().rev().map(child).collect());
    }
    let mut done = task;
    loop {
        work.leave(hand, &done)?;
        done.close();
        let Some(parent) = done.parent.clone() else { break };
        if parent.pending.fetch_sub(1, Ordering::AcqRel) > 1 {
            break;
        }
        done = parent;
    }
    Ok(Vec::new())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that a thread panicked; the panic itself is passed on by `run`.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a tree of `depth` levels with `width` directories each, the first of which goes on.
    struct Tree {
        depth: usize,
        width: usize,
        visited: AtomicUsize,
        left: AtomicUsize,
    }

    impl Work for Tree {
        type Node = (usize, AtomicUsize);
        type Hand = ();

        fn visit(&self, (): &mut (), task: &Task<Self::Node>) -> Result<Vec<(OsString, Self::Node)>> {
            self.visited.fetch_add(1, Ordering::Relaxed);
            let (depth, below) = &task.node;
            if *depth == self.depth || task.name != "0" && *depth > 0 {
                return Ok(Vec::new());
            }
            below.store(self.width, Ordering::Relaxed);
            Ok((0..self.width).map(|n| (n.to_string().into(), (depth + 1, AtomicUsize::new(0)))).collect())
        }

        fn leave(&self, (): &mut (), task: &Task<Self::Node>) -> Result<()> {
            assert_eq!(task.node.1.load(Ordering::Relaxed), 0, "left before what is below it");
            self.left.fetch_add(1, Ordering::Relaxed);
            if let Some(parent) = task.parent() {
                parent.node.1.fetch_sub(1, Ordering::Relaxed);
            }
            Ok(())
        }
    }

    #[test]
    fn every_directory_is_left_once_and_after_its_children() {
        let tree = Tree { depth: 100_000, width: 3, visited: AtomicUsize::new(0), left: AtomicUsize::new(0) };
        run(&tree, (0, AtomicUsize::new(0)), hands(|_| ())).unwrap();
        assert_eq!(tree.visited.into_inner(), 300_001);
        assert_eq!(tree.left.into_inner(), 300_001);
    }
}
