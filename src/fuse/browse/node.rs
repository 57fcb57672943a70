//! What the kernel knows, by number.
//!
//! A number is made of what the file is, and is no counter: a file that the kernel has forgotten comes back under the number that it
//! had, so that programs which look for hard links by number see the same at every look. Where two files would have one number, the second
//! takes the next that is free.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fsnap_backend::{FileKind, FileMeta};

use super::ROOT;
use super::layout::{Found, Place};
use super::tree::Tree;
use crate::fuse::branches::OWN_BITS;

/// A file or directory that somebody has looked up.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) number: u64,
    /// The directory that it was found in; the node of a directory lives as long as those of what is in it.
    pub(super) parent: Option<Arc<Node>>,
    pub(super) name: OsString,
    pub(super) what: What,
}

impl Drop for Node {
    /// Takes its parents along one by one: a tree may be deeper than the stack is.
    fn drop(&mut self) {
        let mut parent = self.parent.take();
        while let Some(mut node) = parent.and_then(Arc::into_inner) {
            parent = node.parent.take();
        }
    }
}

#[derive(Debug, Clone)]
pub(super) enum What {
    /// Something of the upper part.
    Place(Place),
    /// The root of a volume's files.
    Volume(Arc<Tree>),
    /// Something in a volume.
    Entry(Arc<Tree>, FileMeta),
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    names: u64,
}

/// All nodes that the kernel knows.
#[derive(Debug)]
pub(super) struct Nodes {
    known: Mutex<HashMap<u64, Known>>,
}

impl Nodes {
    pub(super) fn new(root: Node) -> Self {
        let root = Known { node: Arc::new(root), names: 1 };
        Self { known: Mutex::new(HashMap::from([(ROOT, root)])) }
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<Node>> {
        self.locked().get(&number).map(|known| known.node.clone())
    }

    /// The node for what was found under a name, with one more name that the kernel knows.
    pub(super) fn know(&self, parent: &Arc<Node>, name: &OsStr, found: &Found) -> Arc<Node> {
        let mut known = self.locked();
        let number = free_or_same(&known, parent, name, found);
        let entry = known.entry(number).or_insert_with(|| {
            let what = match found {
                Found::Place(place) => What::Place(place.clone()),
                Found::Volume(tree) => What::Volume(tree.clone()),
                Found::Entry { tree, meta, .. } => What::Entry(tree.clone(), *meta),
                // It has its number already, and is nobody's to know here.
                Found::Written(_) => What::Place(Place::Branches),
            };
            let node = Node { number, parent: Some(parent.clone()), name: name.to_owned(), what };
            Known { node: Arc::new(node), names: 0 }
        });
        entry.names += 1;
        entry.node.clone()
    }

    /// The number that it has, or would get.
    pub(super) fn number_of(&self, parent: &Node, name: &OsStr, found: &Found) -> u64 {
        free_or_same(&self.locked(), parent, name, found)
    }

    /// The directories of checkpoints and branches among them.
    pub(super) fn recorded(&self) -> Vec<Arc<Node>> {
        let is_recorded = |node: &Node| matches!(node.what, What::Place(Place::Checkpoint(_) | Place::Branch(..)));
        self.locked().values().map(|known| &known.node).filter(|node| is_recorded(node)).cloned().collect()
    }

    pub(super) fn forget(&self, number: u64, names: u64) {
        let mut known = self.locked();
        if let Some(entry) = known.get_mut(&number).filter(|_| number != ROOT) {
            entry.names = entry.names.saturating_sub(names);
            if entry.names == 0 {
                known.remove(&number);
            }
        }
    }
}

fn free_or_same(known: &HashMap<u64, Known>, parent: &Node, name: &OsStr, found: &Found) -> u64 {
    if let Found::Written(number) = found {
        return *number;
    }
    let mut number = wanted(parent, name, found);
    while known.get(&number).is_some_and(|known| !same(&known.node, parent, name, found)) {
        number = within(number + 1);
    }
    number
}

fn wanted(parent: &Node, name: &OsStr, found: &Found) -> u64 {
    let mut hasher = DefaultHasher::new();
    match found {
        Found::Entry { tree, meta, realm } if meta.kind != FileKind::Dir => {
            (tree.number, realm, meta.ino).hash(&mut hasher)
        }
        Found::Place(Place::Link(target)) => (parent.number, name, target).hash(&mut hasher),
        _ => (parent.number, name).hash(&mut hasher),
    }
    within(hasher.finish())
}

/// The numbers above are of the files of branches.
fn within(number: u64) -> u64 {
    (number & ((1 << OWN_BITS) - 1)).max(ROOT + 1)
}

/// Whether the node stands for what was found.
fn same(node: &Node, parent: &Node, name: &OsStr, found: &Found) -> bool {
    let in_place = || node.name == name && node.parent.as_ref().is_some_and(|known| known.number == parent.number);
    match (&node.what, found) {
        (What::Place(known), Found::Place(place)) => known == place && in_place(),
        (What::Volume(known), Found::Volume(tree)) => known.number == tree.number && in_place(),
        // Two names of one file have all of this in common, but when it was last read; two files never have, for no two share number
        // and file system.
        (What::Entry(known, meta), Found::Entry { tree, meta: found, .. }) => {
            let meta = FileMeta { atime: found.atime, ..*meta };
            known.number == tree.number && meta == *found && (found.kind != FileKind::Dir || in_place())
        }
        _ => false,
    }
}
