//! Listing a directory: both layers as one.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::attr::Attr;
use super::look::is_whiteout;
use super::node::{Ino, ROOT};
use super::object;
use super::{Overlay, Result, Tree};

/// One name of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name.
    pub name: OsString,
}

/// The names of a directory, while one layer after the other says which it has: the uppermost first.
///
/// All layers of a chain fill the same one: if each made a list of those below it, a name would be copied as often as it has layers above.
#[derive(Debug, Default)]
pub(super) struct Union {
    found: Vec<Listed>,
    hidden: HashSet<OsString>,
}

impl Union {
    /// A name that is there, or a whiteout, unless something above has it; `hides` if there is something below.
    pub(super) fn add(&mut self, name: OsString, whiteout: bool, hides: bool) {
        #[cfg(test)]
        super::chain_tests::NAMES.with(|names| names.set(names.get() + 1));
        if self.hidden.contains(&name) {
            return;
        }
        if hides {
            self.hidden.insert(name.clone());
        }
        if !whiteout {
            self.found.push(Listed { name });
        }
    }

    pub(super) fn names(self) -> impl Iterator<Item = OsString> {
        self.found.into_iter().map(|listed| listed.name)
    }
}

impl Overlay {
    /// All names of a directory at this moment, in the order of the file systems.
    pub fn list(&self, ino: Ino) -> Result<Vec<Listed>> {
        self.tree().list(ino)
    }

    /// Adds the names of a directory to those that the layers above have.
    pub(super) fn list_into(&self, ino: Ino, union: &mut Union) -> Result<()> {
        self.tree().list_into(ino, union)
    }

    /// Looks up a name without holding the file.
    pub fn peek(&self, parent: Ino, name: &OsStr) -> Result<Option<Attr>> {
        Ok(self.tree().look(parent, name)?.map(|seen| seen.attr))
    }

    /// The directory that this one is in.
    pub fn parent(&self, ino: Ino) -> Ino {
        self.tree().nodes.get(ino).and_then(|node| node.names.first()).map_or(ROOT, |(parent, _)| *parent)
    }

    /// Makes a directory's names durable.
    pub fn sync_dir(&self, ino: Ino) -> Result<()> {
        use rustix::fs::{Mode, OFlags};
        let dir = {
            let mut tree = self.tree();
            if !tree.node(ino)?.upper {
                return Ok(());
            }
            tree.upper_dir(ino)?
        };
        let gate = self.tree().store.gate.clone();
        if gate.settle()? {
            return Ok(());
        }
        rustix::fs::fsync(rustix::fs::openat(&dir, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }
}

impl Tree {
    pub(super) fn list(&mut self, ino: Ino) -> Result<Vec<Listed>> {
        let mut union = Union::default();
        self.list_into(ino, &mut union)?;
        Ok(union.found)
    }

    fn list_into(&mut self, ino: Ino, union: &mut Union) -> Result<()> {
        let node = self.node(ino)?;
        if node.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        if node.pin.is_some() {
            // It was removed, so that it is empty.
            return Ok(());
        }
        let (upper, lower) = (node.upper, node.lower_dir.clone());
        if upper {
            let dir = self.upper_dir(ino)?;
            let names = if self.store.read_only { object::names } else { object::names_for_somebody };
            for (name, kind) in names(dir.as_fd())? {
                let device = matches!(kind, FileType::CharacterDevice | FileType::Unknown);
                let whiteout = device && object::find_at(&dir, &name)?.is_some_and(|stat| is_whiteout(&stat));
                union.add(name, whiteout, lower.is_some());
            }
        }
        match lower {
            Some(lower) => self.lower.names(&lower, union),
            None => Ok(()),
        }
    }
}
