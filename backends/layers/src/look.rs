//! Looking up a name: which of the layers answers.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;

use super::attr::Attr;
use super::lower::{LowerAt, LowerDir};
use super::node::{Ino, Node, ROOT};
use super::object::{self, Object};
use super::{Overlay, Result, Tree};

/// What stands under a name.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) ino: Ino,
    pub(super) attr: Attr,
    pub(super) node: Node,
    /// The upper has this very name; else the name is the lower's.
    pub(super) upper_name: bool,
}

/// What was looked at last in a sealed state.
///
/// Whoever opens a file of a chain of states has looked at it before, and each state asks the one below for the same file again: once to tell what it
/// is, and once to open it, or to read its attributes. If each of these looks went down to the end, a chain of `n` would cost `n²/2` of them.
#[derive(Debug, Default)]
pub(super) struct Lately(VecDeque<(Ino, OsString, Seen)>);

impl Lately {
    /// A chain has many states. All that is in the way to one file is needed, and no more.
    const MOST: usize = 16;

    fn get(&self, parent: Ino, name: &OsStr) -> Option<Seen> {
        let found = self.0.iter().rev().find(|(own, known, _)| *own == parent && known == name);
        found.map(|(.., seen)| seen.clone())
    }

    fn put(&mut self, parent: Ino, name: &OsStr, seen: &Seen) {
        if self.0.len() >= Self::MOST {
            self.0.pop_front();
        }
        self.0.push_back((parent, name.to_owned(), seen.clone()));
    }
}

impl Overlay {
    /// Looks up a name and holds the file, until it is forgotten as often as it was looked up.
    pub fn look_up(&self, parent: Ino, name: &OsStr) -> Result<Attr> {
        let mut tree = self.tree();
        let seen = tree.look(parent, name)?.ok_or(Errno::NOENT)?;
        Ok(tree.remember(parent, name, seen))
    }

    /// The number was forgotten so many times.
    pub fn forget(&self, ino: Ino, times: u64) {
        self.tree().nodes.forget(ino, times);
    }

    /// How many files are known: for tests that nothing is held for ever.
    pub fn known(&self) -> usize {
        self.tree().nodes.len()
    }
}

pub(super) fn is_whiteout(stat: &Stat) -> bool {
    object::kind_of(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// The name of a file in the index.
pub(super) fn index_name(ino: Ino) -> OsString {
    format!("{ino:x}").into()
}

impl Tree {
    pub(super) fn node(&mut self, ino: Ino) -> Result<&Node> {
        self.refresh(ino);
        self.nodes.get(ino).ok_or(Errno::STALE)
    }

    pub(super) fn node_mut(&mut self, ino: Ino) -> Result<&mut Node> {
        self.refresh(ino);
        self.nodes.get_mut(ino).ok_or(Errno::STALE)
    }

    /// Opens the upper's part of a directory that has one.
    pub(super) fn upper_dir(&mut self, ino: Ino) -> Result<Arc<OwnedFd>> {
        let mut missing = Vec::new();
        let mut at = ino;
        let mut open = loop {
            if at == ROOT {
                break self.store.upper_root();
            }
            if let Some(found) = self.dirs.get(at) {
                break found;
            }
            let node = self.node(at)?;
            if let Some(pin) = &node.pin {
                break pin.as_handle()?;
            }
            let (parent, name) = node.names.first().ok_or(Errno::STALE)?.clone();
            missing.push((at, name));
            at = parent;
        };
        for (ino, name) in missing.into_iter().rev() {
            open = Arc::new(object::open_dir(&open, &name)?);
            self.dirs.put(ino, open.clone());
        }
        Ok(open)
    }

    /// Where the file is now.
    pub(super) fn object(&mut self, ino: Ino) -> Result<Object> {
        if ino == ROOT {
            return Ok(Object::of(self.store.upper_root()));
        }
        let node = self.node(ino)?;
        if let Some(pin) = &node.pin {
            return Ok(pin.clone());
        }
        if let Some(index) = node.index.clone() {
            return Ok(Object::at(self.store.index(), index));
        }
        if node.upper {
            let (parent, name) = node.names.first().ok_or(Errno::STALE)?.clone();
            return Ok(Object::at(self.upper_dir(parent)?, name));
        }
        if let Some(dir) = node.lower_dir.clone() {
            return self.lower.dir(&dir);
        }
        let lower = node.lower.clone().ok_or(Errno::STALE)?;
        self.lower.object(&lower)
    }

    /// What the upper has under the name, a whiteout included.
    pub(super) fn upper_at(&mut self, parent: Ino, name: &OsStr) -> Result<Option<Stat>> {
        if !self.node(parent)?.upper {
            return Ok(None);
        }
        let dir = self.upper_dir(parent)?;
        object::find_at(&dir, name)
    }

    /// What the lower has under the name, hidden or not.
    pub(super) fn lower_at(&mut self, parent: Ino, name: &OsStr) -> Result<Option<(Arc<LowerDir>, Stat)>> {
        let Some(dir) = self.node(parent)?.lower_dir.clone() else { return Ok(None) };
        Ok(self.lower.find(&dir, name)?.map(|stat| (dir, stat)))
    }

    pub(super) fn look(&mut self, parent: Ino, name: &OsStr) -> Result<Option<Seen>> {
        if !self.store.read_only {
            return self.look_anew(parent, name);
        }
        if let Some(seen) = self.lately.get(parent, name) {
            return Ok(Some(seen));
        }
        let seen = self.look_anew(parent, name)?;
        if let Some(seen) = &seen {
            self.lately.put(parent, name, seen);
        }
        Ok(seen)
    }

    fn look_anew(&mut self, parent: Ino, name: &OsStr) -> Result<Option<Seen>> {
        #[cfg(test)]
        super::chain_tests::LOOKS.with(|looks| looks.set(looks.get() + 1));
        match self.upper_at(parent, name)? {
            Some(stat) if is_whiteout(&stat) => Ok(None),
            Some(stat) => self.look_in_upper(parent, name, stat).map(Some),
            None => self.look_in_lower(parent, name),
        }
    }

    fn look_in_upper(&mut self, parent: Ino, name: &OsStr, stat: Stat) -> Result<Seen> {
        let (mut object, mut stat) = (Object::at(self.upper_dir(parent)?, name), stat);
        let mut node = Node::new(object::kind_of(&stat));
        node.upper = true;
        let ino = self.number_of(&object, &stat)?;
        if node.kind == FileType::Directory {
            node.lower_dir = self.lower_of(&object, parent, name)?;
        } else if (stat.st_nlink > 1 || self.store.read_only) && object.xattr(self.store.keys().links())?.is_some() {
            // In a sealed layer this may be another file: a copy of the one that the name leads to, which is still written.
            if let Some(indexed) = object::find_at(&self.store.index(), &index_name(ino))? {
                (object, stat) = (Object::at(self.store.index(), index_name(ino)), indexed);
                node.index = Some(index_name(ino));
            }
        }
        let attr = self.attr_of(ino, &object, stat, true, node.index.is_some())?;
        node.kind = attr.kind;
        Ok(Seen { ino, attr, node, upper_name: true })
    }

    /// The lower directory that shows through one of the upper.
    fn lower_of(&mut self, object: &Object, parent: Ino, name: &OsStr) -> Result<Option<Arc<LowerDir>>> {
        let keys = self.store.keys();
        let found = match object.xattr(keys.redirect())? {
            Some(path) => {
                let path = self.store.lengthen(path)?;
                if path.is_empty() || path == b"/" {
                    return Ok(Some(self.lower.root()));
                }
                self.lower.resolve(&path)?
            }
            None => match self.lower_at(parent, name)? {
                Some((dir, stat)) if object::kind_of(&stat) == FileType::Directory => {
                    let opaque = object.xattr(keys.opaque())?.is_some();
                    (!opaque).then(|| (LowerAt { dir, name: name.to_owned() }, stat))
                }
                _ => None,
            },
        };
        let found = found.filter(|(_, stat)| object::kind_of(stat) == FileType::Directory);
        Ok(found.map(|(at, stat)| self.lower.enter(&at.dir, &at.name, &stat)))
    }

    fn look_in_lower(&mut self, parent: Ino, name: &OsStr) -> Result<Option<Seen>> {
        let Some((dir, stat)) = self.lower_at(parent, name)? else { return Ok(None) };
        let mut node = Node::new(object::kind_of(&stat));
        if node.kind == FileType::Directory {
            let entered = self.lower.enter(&dir, name, &stat);
            let ino = self.number_below(&entered, &stat);
            // The one that is known already is kept: its descriptor is open.
            node.lower_dir = match self.node(ino).ok().and_then(|known| known.lower_dir.clone()) {
                Some(known) => Some(known),
                None => Some(entered),
            };
            let object = self.lower.object(&LowerAt { dir, name: name.to_owned() })?;
            let attr = self.attr_of(ino, &object, stat, false, false)?;
            return Ok(Some(Seen { ino, attr, node, upper_name: false }));
        }
        let ino = self.number_below(&dir, &stat);
        // A file that was open when its layer was sealed is in the index whatever it is called.
        if stat.st_nlink > 1 || self.lower.is_tree() {
            let object = Object::at(self.store.index(), index_name(ino));
            if let Some(stat) = object::find_at(&self.store.index(), &index_name(ino))? {
                node.upper = true;
                node.index = Some(index_name(ino));
                node.kind = object::kind_of(&stat);
                let attr = self.attr_of(ino, &object, stat, true, true)?;
                return Ok(Some(Seen { ino, attr, node, upper_name: false }));
            }
        }
        let at = LowerAt { dir, name: name.to_owned() };
        let object = self.lower.object(&at)?;
        node.lower = Some(at);
        let attr = self.attr_of(ino, &object, stat, false, false)?;
        Ok(Some(Seen { ino, attr, node, upper_name: false }))
    }

    /// Enters what was seen among the known files.
    pub(super) fn know(&mut self, parent: Ino, name: &OsStr, seen: Seen) -> (Ino, Attr) {
        self.refresh(seen.ino);
        self.nodes.put(seen.ino, seen.node, self.epoch);
        self.nodes.add_name(seen.ino, parent, name);
        (seen.ino, seen.attr)
    }

    /// Enters what was seen among the known files, and counts one more lookup.
    pub(super) fn remember(&mut self, parent: Ino, name: &OsStr, seen: Seen) -> Attr {
        let (ino, attr) = self.know(parent, name, seen);
        self.nodes.looked_up(ino);
        attr
    }
}
