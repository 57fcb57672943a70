//! Past states as plain paths: the tree that `fsnap mount` shows, without FUSE.
//!
//! ```text
//! README                             what this is
//! latest                             → ids/<the newest>
//! ids/<id>/<volume>/…                the files of a checkpoint
//! ids/<id>/.fsnap/                   not listed: meta.json, changed, parent → the one before, images → the process image
//! snapshots/<RFC 3339>, …/latest     → ids/<id>
//! tags/<tag>                         → ids/<id>
//! branches/<name>/<volume>/…         the files of a branch; → where they are, if `fsnap branch` made it
//! ```
//!
//! The upper part is read from the catalog whenever somebody looks and its files have changed, so that it is never out of date; the
//! catalog is open only while it is read. The files of checkpoints are read through [`Dir`](fsnap_backend::Dir), whatever backend keeps them. A snapshot is activated
//! when its files are first looked at, and let go when nobody did for a while; its nodes stay, for it is opened again by the same names.
//!
//! Architecture Invariant: nothing is computed ahead. What a call costs depends on what it asks for, and not on how many checkpoints
//! there are; only listing them does.

mod dir_cache;
mod errno;
mod layout;
mod native;
mod node;
mod opened;
mod pending;
mod processes;
mod tree;
mod unchanged;

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::Duration;

use fsnap_backend::{FileKind, FileMeta};
use rustix::io::Errno;

use layout::{Found, Layout, Place};
use node::{Node, Nodes, What};
use pending::Pending;
use tree::{Tree, Trees};

use super::branches::Branches;
use super::session;
use crate::name::Name;

pub(super) use errno::of as errno_of;
pub use layout::{Describe, Records};
pub use native::Natives;
pub use opened::Opened;
pub(super) use unchanged::States;

/// A directory that is there no more.
#[derive(Debug)]
pub struct Gone {
    /// The number of the directory that it was in.
    pub parent: u64,
    /// Its own.
    pub number: u64,
    /// Its name.
    pub name: OsString,
    /// There will be no other one of that name.
    pub for_good: bool,
}

/// The answer to a request.
pub type Result<T, E = Errno> = std::result::Result<T, E>;

/// The number of the uppermost directory.
pub const ROOT: u64 = 1;

/// How long what was answered stays true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// It never changes.
    Forever,
    /// It changes when a checkpoint or a branch is removed; a moment later is soon enough.
    Briefly,
    /// Somebody must look again.
    Not,
}

/// What is told of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Its number in the mount, and all else.
    pub meta: FileMeta,
    /// How long the name leads to it.
    pub name: Keep,
    /// How long the attributes are these.
    pub attributes: Keep,
}

/// One name in a directory.
#[derive(Debug)]
pub struct Listed {
    /// The name.
    pub name: OsString,
    /// What kind of file it is.
    pub kind: FileKind,
    /// Its number.
    pub number: u64,
    found: Found,
}

/// Told of every failure that is more than a wrong name; the kernel takes only a number of it.
pub type Report = Box<dyn Fn(&crate::Error) + Send + Sync>;

/// The tree.
pub struct Browse {
    branches: Arc<Branches>,
    layout: Layout,
    nodes: Nodes,
    trees: Trees,
    pending: Pending,
    report: Arc<Report>,
}

impl std::fmt::Debug for Browse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Browse").field("layout", &self.layout).finish_non_exhaustive()
    }
}

impl Browse {
    /// Shows what the catalog records. Opens nothing yet.
    pub fn new(records: Records, branches: Arc<Branches>, report: Report) -> Self {
        let root = Node { number: ROOT, parent: None, name: OsString::new(), what: What::Place(Place::Root) };
        let layout = Layout::new(records, branches.clone());
        let (nodes, trees, pending) = (Nodes::new(root), Trees::default(), Pending::default());
        Self { branches, layout, nodes, trees, pending, report: Arc::new(report) }
    }

    /// How many snapshots are active.
    pub fn active(&self) -> usize {
        self.trees.active()
    }

    /// Lets go of snapshots that nobody has looked at for so long and that no file is open of.
    pub fn let_go(&self, idle: Duration) {
        self.trees.let_go(idle);
    }

    /// Lets go of all that nobody has in use, snapshots and branches, and does it once more, if there was no descriptor left for it.
    pub(super) fn with_room<T>(&self, act: impl Fn() -> Result<T>) -> Result<T> {
        match act() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.trees.let_go(Duration::ZERO);
                self.branches.let_go(Duration::ZERO);
                act().inspect_err(|&error| {
                    if matches!(error, Errno::MFILE | Errno::NFILE) {
                        (self.report)(&session::Error::NoDescriptor { source: error.into() }.into());
                    }
                })
            }
            done => done,
        }
    }

    /// Lets go of all snapshots, when nobody can ask any more.
    pub fn let_go_of_all(&self) {
        self.trees.let_go_of_all();
    }

    /// Lets go of snapshots that are in the catalog no more.
    pub fn let_go_of_removed(&self) {
        self.trees.let_go_unless(|checkpoint| self.layout.is_recorded(checkpoint).unwrap_or(true));
    }

    /// Finds a name, and counts that the kernel knows it.
    pub fn look_up(&self, parent: u64, name: &OsStr) -> Result<Attr> {
        let parent = self.node(parent)?;
        let found = match &parent.what {
            What::Place(place) => {
                self.pending.seal(self.layout.records(), &self.report);
                self.with_room(|| self.layout.child(place, name, &self.trees).map_err(|error| self.failed(&error)))?
            }
            What::Volume(tree) | What::Entry(tree, _) => {
                let dir = self.dir(&parent)?;
                let entry = dir.dir.entry(name).map_err(|error| self.failed_in(tree, error))?;
                entry.map(|entry| Found::Entry { tree: tree.clone(), meta: entry.meta, realm: dir.realm })
            }
        };
        let Some(found) = found else {
            self.still_there(&parent)?;
            return Err(Errno::NOENT);
        };
        Ok(self.known(&parent, name, &found))
    }

    /// Tells the kernel to look again where the directory that it asks about is gone: there may be another one of that name.
    fn still_there(&self, node: &Node) -> Result<()> {
        match &node.what {
            What::Place(place) if place.keep() != Keep::Forever => {
                let meta = self.with_room(|| self.layout.meta(place).map_err(|error| self.failed(&error)))?;
                meta.map(drop).ok_or(Errno::STALE)
            }
            _ => Ok(()),
        }
    }

    /// Checks that a directory is there, when it is opened: later on, the kernel looks for no other one.
    pub fn open_dir(&self, number: u64) -> Result<()> {
        self.still_there(&*self.node(number)?)
    }

    /// The directories of checkpoints and branches that the kernel knows and that are recorded no more.
    pub fn gone(&self) -> Vec<Gone> {
        let known = self.nodes.recorded();
        if known.is_empty() {
            return Vec::new();
        }
        let Ok(there) = self.layout.there() else { return Vec::new() };
        let is_gone = |node: &Arc<Node>| matches!(&node.what, What::Place(place) if !there(place));
        let told = |node: Arc<Node>| {
            let for_good = matches!(&node.what, What::Place(Place::Checkpoint(_)));
            Some(Gone { parent: node.parent.as_ref()?.number, number: node.number, name: node.name.clone(), for_good })
        };
        known.into_iter().filter(is_gone).filter_map(told).collect()
    }

    fn known(&self, parent: &Arc<Node>, name: &OsStr, found: &Found) -> Attr {
        match found {
            // Its own attributes take its opening, which waits until somebody wants to know them.
            Found::Written(number) => {
                let meta = FileMeta { ino: *number, ..self.layout.dir_meta() };
                Attr { meta, name: Keep::Briefly, attributes: Keep::Not }
            }
            found => self.attr_of(&self.nodes.know(parent, name, found)),
        }
    }

    /// Makes a branch, and counts that the kernel knows it under the name that was asked for.
    pub fn make_dir(&self, parent: u64, name: &OsStr) -> Result<Attr> {
        let parent = self.node(parent)?;
        let What::Place(Place::Branches) = parent.what else { return Err(Errno::ROFS) };
        let branch = self.layout.make_branch(name).map_err(|error| self.failed(&error))?;
        let is_replaced = |place: &Place| match place {
            Place::Branch(name, made) => *name == branch.name && *made != branch.time,
            _ => false,
        };
        let is_replaced = |node: &&Arc<Node>| matches!(&node.what, What::Place(place) if is_replaced(place));
        let volumes: Vec<_> = branch.members.iter().map(|member| OsStr::new(member.volume.as_str())).collect();
        for replaced in self.nodes.recorded().iter().filter(is_replaced) {
            self.branches.forget(replaced.number, &volumes);
        }
        let found = Found::Place(Place::of_branch(&branch));
        let attr = self.known(&parent, OsStr::new(branch.name.as_str()), &found);
        Ok(Attr { name: Keep::Not, ..attr })
    }

    /// Removes a branch to which nothing was written.
    pub fn remove_dir(&self, parent: u64, name: &OsStr) -> Result<()> {
        let parent = self.node(parent)?;
        let What::Place(Place::Branches) = parent.what else { return Err(Errno::ROFS) };
        let name: Name = name.to_str().and_then(|name| name.parse().ok()).ok_or(Errno::NOENT)?;
        let removed = self.branches.remove_unchanged(&name, || self.layout.remove_branch(&name));
        if removed.map_err(|error| self.failed(&error))? { Ok(()) } else { Err(Errno::NOTEMPTY) }
    }

    /// Finds a name that was listed, and counts that the kernel knows it.
    pub fn look_up_listed(&self, parent: u64, listed: &Listed) -> Result<Attr> {
        Ok(self.known(&self.node(parent)?, &listed.name, &listed.found))
    }

    /// Counts that the kernel has forgotten so many of the names that it had found.
    pub fn forget(&self, number: u64, names: u64) {
        self.nodes.forget(number, names);
    }

    /// The directory that a directory is in.
    pub fn parent(&self, number: u64) -> u64 {
        self.nodes.get(number).and_then(|node| node.parent.as_ref().map(|parent| parent.number)).unwrap_or(ROOT)
    }

    /// Whether the listing of a directory is always the same.
    pub fn never_changes(&self, number: u64) -> bool {
        self.nodes.get(number).is_some_and(|node| !matches!(node.what, What::Place(_)))
    }

    /// The attributes of a file.
    pub fn attr(&self, number: u64) -> Result<Attr> {
        let node = self.node(number)?;
        match &node.what {
            What::Volume(tree) => {
                let meta = self.with_room(|| tree.root_meta().map_err(|error| self.failed_in(tree, error)))?;
                let meta = FileMeta { ino: number, ..meta };
                Ok(Attr { meta, name: Keep::Forever, attributes: Keep::Forever })
            }
            What::Place(place) => {
                let meta = self.with_room(|| self.layout.meta(place).map_err(|error| self.failed(&error)))?;
                let meta = meta.ok_or(Errno::STALE)?;
                Ok(Attr { meta: FileMeta { ino: number, ..meta }, name: place.keep(), attributes: place.keep() })
            }
            What::Entry(..) => Ok(self.attr_of(&node)),
        }
    }

    /// All names in a directory, sorted, without `.` and `..`.
    pub fn list(&self, number: u64) -> Result<Vec<Listed>> {
        let node = self.node(number)?;
        let found: Vec<(OsString, Found)> = match &node.what {
            What::Place(place) => {
                self.pending.seal(self.layout.records(), &self.report);
                self.with_room(|| self.layout.children(place, &self.trees).map_err(|error| self.failed(&error)))?
            }
            What::Volume(tree) | What::Entry(tree, _) => {
                let dir = self.dir(&node)?;
                let entries = dir.dir.entries().map_err(|error| self.failed_in(tree, error))?;
                let realm = dir.realm;
                let found = |meta| Found::Entry { tree: tree.clone(), meta, realm };
                entries.into_iter().map(|entry| (entry.name, found(entry.meta))).collect()
            }
        };
        let listed = |(name, found): (OsString, Found)| {
            let number = self.nodes.number_of(&node, &name, &found);
            Listed { kind: found.kind(), name, number, found }
        };
        Ok(found.into_iter().map(listed).collect())
    }

    /// The target of a symbolic link, as it was written. Nothing here ever follows one.
    pub fn read_link(&self, number: u64) -> Result<OsString> {
        let node = self.node(number)?;
        match &node.what {
            What::Place(Place::Link(target)) => Ok(target.clone().into_os_string()),
            What::Entry(tree, meta) if meta.kind == FileKind::Symlink => {
                let read = self.dir_of(&node)?.dir.read_link(&node.name);
                read.map_err(|error| self.failed_in(tree, error))
            }
            _ => Err(Errno::INVAL),
        }
    }

    /// Opens a regular file for reading. Its snapshot stays active while it is open.
    pub fn open(&self, number: u64) -> Result<Opened> {
        let node = self.node(number)?;
        match &node.what {
            What::Place(place @ Place::Kept(..)) => {
                let kept = self.layout.kept(place).map_err(|error| self.failed(&error))?.ok_or(Errno::STALE)?;
                Opened::file(kept).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
            }
            What::Place(place) => {
                let text = self.layout.text(place).map_err(|error| self.failed(&error))?;
                Ok(Opened::text(text.ok_or(Errno::INVAL)?))
            }
            What::Entry(tree, meta) if meta.kind == FileKind::File => {
                let used = tree::Used::new(tree);
                let content = self.dir_of(&node)?.dir.open_file(&node.name);
                Ok(Opened::content(content.map_err(|error| self.failed_in(tree, error))?, used))
            }
            _ => Err(Errno::INVAL),
        }
    }

    /// The extended attributes of a file.
    pub fn xattrs(&self, number: u64) -> Result<fsnap_backend::Xattrs> {
        let node = self.node(number)?;
        match &node.what {
            What::Place(_) => Ok(Vec::new()),
            What::Volume(tree) => self.dir(&node)?.dir.own_xattrs().map_err(|error| self.failed_in(tree, error)),
            What::Entry(tree, _) => {
                let read = self.dir_of(&node)?.dir.xattrs(&node.name);
                read.map_err(|error| self.failed_in(tree, error))
            }
        }
    }

    fn node(&self, number: u64) -> Result<Arc<Node>> {
        self.nodes.get(number).ok_or(Errno::STALE)
    }

    /// The open directory that a node of a volume is.
    fn dir(&self, node: &Arc<Node>) -> Result<Arc<tree::OpenDir>> {
        let tree = match &node.what {
            What::Volume(tree) => tree,
            What::Entry(tree, meta) if meta.kind == FileKind::Dir => tree,
            _ => return Err(Errno::NOTDIR),
        };
        let opened = self.with_room(|| tree.dir(node).map_err(|error| self.failed_in(tree, error)))?;
        self.trees.bound(tree);
        Ok(opened)
    }

    /// The open directory that a node of a volume was found in.
    fn dir_of(&self, node: &Arc<Node>) -> Result<Arc<tree::OpenDir>> {
        self.dir(node.parent.as_ref().ok_or(Errno::STALE)?)
    }

    fn attr_of(&self, node: &Node) -> Attr {
        match &node.what {
            What::Entry(_, meta) => {
                let meta = FileMeta { ino: node.number, ..*meta };
                Attr { meta, name: Keep::Forever, attributes: Keep::Forever }
            }
            // Its own attributes take its activation, which waits until somebody wants to know them.
            What::Volume(_) => {
                let meta = FileMeta { ino: node.number, ..self.layout.dir_meta() };
                Attr { meta, name: Keep::Forever, attributes: Keep::Not }
            }
            What::Place(place) => {
                let (meta, all) = self.layout.meta_at_once(place);
                let attributes = if all { place.keep() } else { Keep::Not };
                Attr { meta: FileMeta { ino: node.number, ..meta }, name: place.keep(), attributes }
            }
        }
    }

    fn failed(&self, error: &crate::Error) -> Errno {
        (self.report)(error);
        errno::of(error)
    }

    /// What failed in a snapshot that was removed failed because it was. Of one that is recorded nothing may be missing.
    fn failed_in(&self, tree: &Tree, error: impl Into<crate::Error>) -> Errno {
        let errno = self.failed(&error.into());
        match self.layout.is_recorded(&tree.checkpoint) {
            Ok(false) => Errno::STALE,
            Ok(true) if errno == Errno::NOENT => Errno::IO,
            _ => errno,
        }
    }
}
