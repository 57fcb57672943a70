//! The files that somebody holds on to, by their numbers.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use rustix::fs::FileType;

use super::data::OpenFile;
use super::lower::{LowerAt, LowerDir};
use super::object::Object;

/// The number of a file: what users see as `st_ino`.
pub type Ino = u64;

/// The root of the tree.
pub const ROOT: Ino = 1;

/// What is known of one file.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) kind: FileType,
    /// The names by which it was found, as far as they still exist.
    pub(super) names: Vec<(Ino, OsString)>,
    /// It has an object in the upper.
    pub(super) upper: bool,
    /// The upper object is in the index, under this name.
    pub(super) index: Option<OsString>,
    /// A directory's counterpart in the lower.
    pub(super) lower_dir: Option<Arc<LowerDir>>,
    /// A file's counterpart in the lower; meaningless once it is in the upper.
    pub(super) lower: Option<LowerAt>,
    /// The file itself, held since its last known name went.
    pub(super) pin: Option<Object>,
    /// No name leads to it any more, though a sealed state may have one that its file system counts.
    pub(super) nameless: bool,
    /// Whether a directory hands on an ACL to what is made in it, if that is known.
    pub(super) hands_on: Option<bool>,
    /// It was made here and was given no attribute since, so that it has no capabilities.
    pub(super) incapable: bool,
    /// Its content, while it is open.
    pub(super) file: Option<Arc<OpenFile>>,
    /// At which of the tree's seals this was true: afterwards, what it was in the upper it is in the lower.
    pub(super) epoch: u64,
    /// How many handles are open on it.
    pub(super) opens: u64,
    /// How often the kernel was told its number.
    lookups: u64,
    /// How many names of other nodes are in it.
    children: u64,
}

impl Node {
    pub(super) fn new(kind: FileType) -> Self {
        Self {
            kind,
            names: Vec::new(),
            upper: false,
            index: None,
            lower_dir: None,
            lower: None,
            pin: None,
            nameless: false,
            hands_on: None,
            incapable: false,
            file: None,
            epoch: 0,
            opens: 0,
            lookups: 0,
            children: 0,
        }
    }
}

/// The known files. A file is forgotten when nobody has its number, no handle on it, and no known file is in it.
#[derive(Debug)]
pub(super) struct Nodes {
    table: HashMap<Ino, Node>,
}

impl Nodes {
    pub(super) fn new(lower: Arc<LowerDir>) -> Self {
        let mut root = Node::new(FileType::Directory);
        root.upper = true;
        root.lower_dir = Some(lower);
        root.lookups = 1;
        Self { table: HashMap::from([(ROOT, root)]) }
    }

    pub(super) fn get(&self, ino: Ino) -> Option<&Node> {
        self.table.get(&ino)
    }

    pub(super) fn get_mut(&mut self, ino: Ino) -> Option<&mut Node> {
        self.table.get_mut(&ino)
    }

    /// Adds a file that was found, or what was found to the file.
    pub(super) fn put(&mut self, ino: Ino, node: Node, epoch: u64) -> &mut Node {
        let known = self.table.entry(ino).or_insert_with(|| Node { epoch, ..Node::new(node.kind) });
        known.kind = node.kind;
        known.upper |= node.upper;
        known.index = known.index.take().or(node.index);
        known.lower_dir = known.lower_dir.take().or(node.lower_dir);
        known.lower = known.lower.take().or(node.lower);
        known
    }

    pub(super) fn add_name(&mut self, ino: Ino, parent: Ino, name: &OsStr) {
        let Some(node) = self.table.get_mut(&ino) else { return };
        if node.names.iter().any(|(known, own)| *known == parent && own == name) {
            return;
        }
        // A directory has one name only; an earlier one was moved.
        let gone = if node.kind == FileType::Directory { std::mem::take(&mut node.names) } else { Vec::new() };
        node.names.push((parent, name.to_owned()));
        if let Some(parent) = self.table.get_mut(&parent) {
            parent.children += 1;
        }
        gone.into_iter().for_each(|(parent, _)| self.let_go(parent));
    }

    pub(super) fn remove_name(&mut self, ino: Ino, parent: Ino, name: &OsStr) {
        let Some(node) = self.table.get_mut(&ino) else { return };
        let before = node.names.len();
        node.names.retain(|(known, own)| !(*known == parent && own == name));
        if node.names.len() != before {
            self.let_go(parent);
        }
    }

    fn let_go(&mut self, parent: Ino) {
        if let Some(node) = self.table.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
        }
        self.drop_unused(parent);
    }

    pub(super) fn looked_up(&mut self, ino: Ino) {
        if let Some(node) = self.table.get_mut(&ino) {
            node.lookups += 1;
        }
    }

    /// The kernel has forgotten the number so many times.
    pub(super) fn forget(&mut self, ino: Ino, times: u64) {
        if let Some(node) = self.table.get_mut(&ino) {
            node.lookups = node.lookups.saturating_sub(times);
        }
        self.drop_unused(ino);
    }

    /// Removes the file and then its parents, as far as nobody needs them.
    pub(super) fn drop_unused(&mut self, ino: Ino) {
        let mut candidates = vec![ino];
        while let Some(ino) = candidates.pop() {
            let unused = |node: &Node| node.lookups == 0 && node.opens == 0 && node.children == 0;
            if ino == ROOT || !self.table.get(&ino).is_some_and(unused) {
                continue;
            }
            let Some(node) = self.table.remove(&ino) else { continue };
            for (parent, _) in node.names {
                if let Some(parent) = self.table.get_mut(&parent) {
                    parent.children = parent.children.saturating_sub(1);
                }
                candidates.push(parent);
            }
        }
    }

    /// Forgets all, the root as well.
    pub(super) fn clear(&mut self) {
        self.table.clear();
    }

    /// The numbers of all files that are open.
    pub(super) fn open(&self) -> Vec<Ino> {
        self.table.iter().filter(|(_, node)| node.file.is_some()).map(|(ino, _)| *ino).collect()
    }

    /// Whether one is like that.
    pub(super) fn any(&self, wanted: impl Fn(&Node) -> bool) -> bool {
        self.table.values().any(wanted)
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }
}
