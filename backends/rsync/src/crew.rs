//! Two threads that go through a tree together.
//!
//! Every directory is a [`Task`]: it is visited, which yields its subdirectories, and left when all of them were left.
//! The tasks wait on one stack, deepest first, so that few are waiting at any time. Nothing recurses, however deep
//! the tree is, and a bounded number of descriptors is held: a task keeps its directory open from visit to leave while
//! the budget lasts; beyond that it is opened again, name by name, from the nearest ancestor that is open.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
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
    held: Mutex<Option<Held>>,
    pub(crate) node: N,
}

/// An open directory that counts against the budget.
type Held = Arc<(OwnedFd, Arc<AtomicUsize>)>;

/// An open directory.
#[derive(Clone)]
pub(crate) enum Descriptor<'a> {
    Root(BorrowedFd<'a>),
    Held(Held),
    Own(Arc<OwnedFd>),
}

impl AsFd for Descriptor<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Root(descriptor) => descriptor.as_fd(),
            Self::Held(held) => held.0.as_fd(),
            Self::Own(descriptor) => descriptor.as_fd(),
        }
    }
}

/// Where the tree begins, and how many of its directories are open.
#[derive(Clone)]
pub(crate) struct Root<'a> {
    descriptor: BorrowedFd<'a>,
    open: Arc<AtomicUsize>,
}

impl<'a> Root<'a> {
    pub(crate) fn new(descriptor: BorrowedFd<'a>) -> Self {
        Self { descriptor, open: Arc::default() }
    }
}

impl<N> Task<N> {
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
            if let Some(held) = &*lock(&at.held) {
                break Descriptor::Held(held.clone());
            }
            let Some(parent) = &at.parent else { break Descriptor::Root(root.descriptor) };
            below.push(at);
            at = parent;
        };
        for task in below.into_iter().rev() {
            let opened = beneath::open_dir(&descriptor, &task.name)?;
            descriptor = if root.open.fetch_add(1, Ordering::Relaxed) < DESCRIPTORS {
                let held = Arc::new((opened, root.open.clone()));
                *lock(&task.held) = Some(held.clone());
                Descriptor::Held(held)
            } else {
                root.open.fetch_sub(1, Ordering::Relaxed);
                Descriptor::Own(Arc::new(opened))
            };
        }
        Ok(descriptor)
    }

    fn close(&self) {
        if let Some(held) = lock(&self.held).take() {
            held.1.fetch_sub(1, Ordering::Relaxed);
        }
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

/// Goes through the whole tree; `hand` makes what each thread needs, and gets it back at the end.
pub(crate) fn run<W: Work>(work: &W, root: W::Node, hands: Vec<W::Hand>) -> Result<Vec<W::Hand>> {
    let root =
        Task { name: OsString::new(), parent: None, pending: AtomicUsize::new(0), held: Mutex::default(), node: root };
    let shared = Mutex::new(Shared { waiting: vec![Arc::new(root)], busy: 0, failure: None });
    let wake = Condvar::new();
    let hands = std::thread::scope(|scope| {
        let threads: Vec<_> = hands
            .into_iter()
            .map(|mut hand| {
                let (shared, wake) = (&shared, &wake);
                scope.spawn(move || {
                    while let Some(task) = next(shared, wake) {
                        let visited = step(work, &mut hand, task);
                        let mut state = lock(shared);
                        state.busy -= 1;
                        match visited {
                            Ok(children) => state.waiting.extend(children),
                            Err(failure) => {
                                state.failure.get_or_insert(failure);
                            }
                        }
                        drop(state);
                        wake.notify_all();
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

fn next<N>(shared: &Mutex<Shared<N>>, wake: &Condvar) -> Option<Arc<Task<N>>> {
    let mut state = lock(shared);
    loop {
        if state.failure.is_some() {
            return None;
        }
        if let Some(task) = state.waiting.pop() {
            state.busy += 1;
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
        let child = |(name, node)| {
            let parent = Some(task.clone());
            Arc::new(Task { name, parent, pending: AtomicUsize::new(0), held: Mutex::default(), node })
        };
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
