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

impl Overlay {
    /// All names of a directory at this moment, in the order of the file systems.
    pub fn list(&self, ino: Ino) -> Result<Vec<Listed>> {
        self.tree().list(ino)
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
        let node = self.node(ino)?;
        if node.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        if node.pin.is_some() {
            // It was removed, so that it is empty.
            return Ok(Vec::new());
        }
        let (upper, lower) = (node.upper, node.lower_dir.clone());
        let mut found = Vec::new();
        let mut hidden = HashSet::new();
        if upper {
            let dir = self.upper_dir(ino)?;
            let names = if self.store.read_only { object::names } else { object::names_for_somebody };
            for (name, kind) in names(dir.as_fd())? {
                let device = matches!(kind, FileType::CharacterDevice | FileType::Unknown);
                let whiteout = device && object::find_at(&dir, &name)?.is_some_and(|stat| is_whiteout(&stat));
                if lower.is_some() {
                    hidden.insert(name.clone());
                }
                if !whiteout {
                    found.push(Listed { name });
                }
            }
        }
        if let Some(lower) = lower {
            let names = self.lower.names(&lower)?.into_iter();
            found.extend(names.filter(|name| !hidden.contains(name)).map(|name| Listed { name }));
        }
        Ok(found)
    }
}
