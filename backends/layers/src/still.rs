//! A tree that is kept from changing, for somebody who decides by what was written to it.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::sync::MutexGuard;

use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;

use super::copy_up::copy_attributes;
use super::object::{self, Object};
use super::{Overlay, Result, Tree, seal};

/// Keeps a tree as it is until it is dropped: names, attributes, and contents that were never written.
///
/// Whoever changes the tree for the first time does that before, and can be seen, or waits.
#[derive(Debug)]
pub struct Still<'a>(MutexGuard<'a, Tree>);

impl Overlay {
    /// Waits for those who are at it, and keeps all others waiting.
    pub fn still(&self) -> Still<'_> {
        Still(self.tree())
    }
}

impl Still<'_> {
    /// Ends the tree: whatever is asked of it from now on is `ESTALE`.
    pub fn end(mut self) {
        self.0.nodes.clear();
    }

    /// Whether nothing was ever written to the tree, nor any layer sealed. What was made and removed again was not written.
    pub fn is_unchanged(&mut self) -> Result<bool> {
        let tree = &mut *self.0;
        let index = tree.store.index();
        if seal::live(&tree.store.dir)? != 0 || !object::names(index.as_fd())?.is_empty() {
            return Ok(false);
        }
        let upper = tree.store.upper_root();
        Ok(object::names(upper.as_fd())?.is_empty() && tree.is_root_as_made()?)
    }
}

impl Tree {
    /// Whether the upper's root has the attributes that a new one would get, times aside: these move with every name.
    fn is_root_as_made(&mut self) -> Result<bool> {
        let (work, temporary, keys) = (self.store.work()?, self.store.fresh(), self.store.keys());
        let (below, upper) = (self.lower.dir(&self.lower.root())?, Object::of(self.store.upper_root()));
        rustix::fs::mkdirat(&work, &temporary, Mode::RWXU)?;
        let new = Object::at(work.clone(), temporary.clone());
        let said = copy_attributes(&below, &new, keys).and_then(|()| Ok((said_of(&new)?, said_of(&upper)?)));
        rustix::fs::unlinkat(&work, &temporary, AtFlags::REMOVEDIR)?;
        said.map(|(new, upper)| new == upper)
    }
}

/// Mode, owner, group and extended attributes.
type Said = (u32, u32, u32, Vec<(std::ffi::OsString, Vec<u8>)>);

fn said_of(object: &Object) -> Result<Said> {
    let stat = object.stat()?;
    let mut xattrs = Vec::new();
    for name in object.xattr_names()? {
        let value = object.xattr(OsStr::new(&name))?.ok_or(Errno::IO)?;
        xattrs.push((name, value));
    }
    xattrs.sort();
    Ok((stat.st_mode, stat.st_uid, stat.st_gid, xattrs))
}
