//! Extended attributes: users see theirs, and none of fsnap's.

use std::ffi::{OsStr, OsString};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::node::Ino;
use super::{Overlay, Result, Tree};

/// The attribute of programs that have rights of their own.
pub(super) const CAPABILITY: &str = "security.capability";

impl Overlay {
    /// One attribute of a file.
    pub fn xattr(&self, ino: Ino, name: &OsStr) -> Result<Vec<u8>> {
        let mut tree = self.tree();
        // Asked for before the first write to each file.
        if name == CAPABILITY && tree.node(ino)?.incapable {
            return Err(Errno::NODATA);
        }
        let object = tree.object(ino)?;
        let kept = if tree.node(ino)?.upper { tree.store.keys().kept(name) } else { Some(name.to_owned()) };
        let hidden = tree.store.keys().kept(name).is_none();
        let kept = kept.filter(|_| !hidden).ok_or(Errno::NODATA)?;
        object.xattr(kept)?.ok_or(Errno::NODATA)
    }

    /// The names of a file's attributes.
    pub fn xattr_names(&self, ino: Ino) -> Result<Vec<OsString>> {
        let mut tree = self.tree();
        let (object, keys, upper) = (tree.object(ino)?, tree.store.keys(), tree.node(ino)?.upper);
        let names = object.xattr_names()?.into_iter();
        // Below, everything is the user's but what is never anybody's.
        let shown = |name: OsString| if upper { keys.shown(&name) } else { keys.kept(&name).map(|_| name) };
        Ok(names.filter_map(shown).collect())
    }

    /// Sets an attribute.
    pub fn set_xattr(&self, ino: Ino, name: &OsStr, value: &[u8], flags: u32) -> Result<()> {
        let mut tree = self.tree();
        let kept = tree.store.keys().kept(name).ok_or(Errno::PERM)?;
        tree.copy_up(ino, true)?;
        tree.attributes_change(ino)?;
        tree.object(ino)?.set_xattr(kept, value, XattrFlags::from_bits_retain(flags))
    }

    /// Removes an attribute.
    pub fn remove_xattr(&self, ino: Ino, name: &OsStr) -> Result<()> {
        let mut tree = self.tree();
        let kept = tree.store.keys().kept(name).ok_or(Errno::NODATA)?;
        tree.object(ino)?.xattr(if tree.node(ino)?.upper { &kept } else { name })?.ok_or(Errno::NODATA)?;
        tree.copy_up(ino, true)?;
        tree.attributes_change(ino)?;
        tree.object(ino)?.remove_xattr(kept)
    }
}

impl Tree {
    /// What is remembered of a file's attributes has to be looked at again.
    fn attributes_change(&mut self, ino: Ino) -> Result<()> {
        let node = self.node_mut(ino)?;
        (node.hands_on, node.incapable) = (None, false);
        Ok(())
    }
}
