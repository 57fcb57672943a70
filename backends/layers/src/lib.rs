//! The copy-on-write tree: lower, upper, and the names and files that they make together.
//!
//! The words are overlayfs's. The *lower* is a directory that never changes. The *upper*, in the store, mirrors the tree as
//! far as it was changed: what stands there hides what the lower has under the same name. A *whiteout* hides a name without
//! putting anything in its place; an *opaque* directory hides the whole directory below it. *Copy-up* makes an upper object
//! out of a lower one before its first change. The page `overlay-format` of fsnap's design says how all this is kept.
//!
//! A file is named by its [`Ino`], which is what users see as `st_ino`: it stays the same across copy-up, rename and
//! remount. All names and attributes are behind one lock, and every change of them is one atomic system call on the upper,
//! prepared in the store's `work`: a process that is killed leaves the tree as it was before or as it is after. Contents are
//! read and written outside of that lock, through [`OpenFile`].
//!
//! # Code map
//!
//! * What is below: `lower`, a directory that never changes; `below`, that or a snapshot which cannot be mounted; `origin`, the note of which
//!   it was. What is above: `store`, the directory of a branch; `object`, one file of either.
//! * Who is meant: `node`, files by their numbers; `look`, which layer answers to a name; `list`, both as one; `fd_cache`, directories that
//!   stay open; `open_dirs`, directories one after the other, however deep.
//! * One kind of call each: `attr`, `xattr`, `open`, `create`, `link`, `rename`, `remove`; `copy_up`, what a change begins with; `data`, the
//!   contents of open files.
//! * States that do not change any more: `seal` ends the layer that is written; `sealed` reads what was, which `shared` opens once for all;
//!   `deeper` goes down a long chain of them; `backend` offers it as images; `verify` reads a whole one. `still` keeps a tree from changing for a moment.
//! * Layers that nobody needs by themselves: `plan` finds out what makes one of two, `steps` writes that down and does it, `merge` decides when.

mod attr;
mod backend;
mod below;
#[cfg(test)]
mod chain_tests;
mod copy_up;
mod create;
mod data;
mod deeper;
mod fd_cache;
mod link;
mod list;
mod look;
mod lower;
mod merge;
#[cfg(test)]
mod merge_tests;
mod node;
mod object;
mod open;
mod open_dirs;
mod origin;
mod plan;
mod remove;
mod rename;
mod seal;
mod sealed;
mod shared;
mod steps;
mod still;
mod store;
mod verify;
mod xattr;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use attr::{Attr, Change, SetTime, privileges};
pub use backend::{KIND, MERGE, SEAL, STORE, Store, abandon, prepare};
pub use data::OpenFile;
pub use list::Listed;
pub use lower::Below;
pub use node::{Ino, ROOT};
pub use origin::{Origin, Origins, note};
pub use remove::Had;
use rustix::io::Errno;
pub use seal::MOST_LAYERS;
pub use still::Still;
pub use store::Error;
pub use xattr::no_such_xattr;

use self::data::Source;
use self::deeper::deeper;
use self::fd_cache::FdCache;
use self::look::Lately;
use self::lower::Lower;
use self::node::Nodes;
use self::store::{PATIENCE, Purpose};

/// The result of one operation on the tree: what the caller of the system call is told.
pub type Result<T, E = Errno> = std::result::Result<T, E>;

/// On whose behalf something is made.
#[derive(Debug, Clone, Copy)]
pub struct Caller {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// The copy-on-write tree over one lower directory.
#[derive(Debug)]
pub struct Overlay {
    tree: Mutex<Tree>,
    /// Held by who merges layers.
    merging: Mutex<()>,
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let tree = self.tree.get_mut().unwrap_or_else(PoisonError::into_inner);
        let below = [tree.lower.close(), tree.origin.close()];
        // Where no thread can be had, it goes on here.
        let _ = deeper(move || drop(below));
    }
}

impl Overlay {
    /// Opens the branch that `store` keeps over `lower`; makes a new one where there is none.
    ///
    /// Waits a moment for a server that has just begun to end.
    pub fn open(lower: Below, store: &Path) -> Result<Self, Error> {
        Self::open_for(lower, store, Purpose::Serve, PATIENCE)
    }

    /// The same, and does not wait for a server.
    pub fn open_at_once(lower: Below, store: &Path) -> Result<Self, Error> {
        Self::open_for(lower, store, Purpose::Serve, Duration::ZERO)
    }

    fn open_for(lower: Below, store: &Path, purpose: Purpose, patience: Duration) -> Result<Self, Error> {
        let (lower, opened) = store::open(lower, store, purpose, patience)?;
        let mut tree = Tree::new(lower, opened);
        tree.climb().map_err(|error| Error::Io {
            action: "open the layers of",
            object: store.to_owned(),
            source: error.into(),
        })?;
        Ok(Self::of(tree))
    }

    fn of(tree: Tree) -> Self {
        Self { tree: Mutex::new(tree), merging: Mutex::default() }
    }

    /// Opens a content where it is now.
    fn source(&self, ino: Ino) -> Result<Source> {
        self.tree().source(ino)
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        // A panic in one request leaves a tree that is still what the disk says: nothing of it is kept only in memory.
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether files may be written past this tree: a layer that is sealed meanwhile takes a copy of each. Where copies share no
    /// blocks, no more than those that were open at the first seal are to be copied.
    pub fn may_be_passed(&self) -> bool {
        let tree = self.tree();
        tree.store.shares || tree.epoch == 0
    }

    /// The space of the file system that holds the store.
    pub fn space(&self) -> Result<rustix::fs::StatVfs> {
        let upper = self.tree().store.upper_root();
        rustix::fs::fstatvfs(&*upper)
    }
}

/// Everything that is known of names and files.
#[derive(Debug)]
struct Tree {
    lower: Lower,
    /// What is below all layers.
    origin: Lower,
    store: store::TreeStore,
    nodes: Nodes,
    /// Upper directories, by their inode number.
    dirs: FdCache<Arc<OwnedFd>>,
    /// Empty where something is written.
    lately: Lately,
    /// How often a layer was sealed since the tree was opened.
    epoch: u64,
}
