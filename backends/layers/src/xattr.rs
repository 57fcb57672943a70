//! Extended attributes: users see theirs, and none of fsnap's.

use std::ffi::{OsStr, OsString};

use fsnap_backend::Xattrs;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::node::Ino;
use super::store::Keys;
use super::{Overlay, Result, Tree};

/// The attribute of programs that have rights of their own.
pub(super) const CAPABILITY: &str = "security.capability";

/// The attributes of access control lists, without which the file's mode says all.
const ACLS: [&str; 2] = ["system.posix_acl_access", "system.posix_acl_default"];
/// What the names of all other attributes begin with that a file can have anywhere.
const NAMESPACES: [&str; 3] = ["user.", "trusted.", "security."];

/// What a file system says that has no attribute of this name: programs tell one that is not set from one that cannot be.
pub fn no_such_xattr(name: &OsStr) -> Errno {
    let known = ACLS.iter().any(|acl| name == *acl)
        || NAMESPACES.iter().any(|space| name.as_encoded_bytes().starts_with(space.as_bytes()));
    if known { Errno::NODATA } else { Errno::OPNOTSUPP }
}

/// Under which name users see what is kept in the upper or stands below; `None` if they do not.
fn shown(keys: Keys, upper: bool, name: OsString) -> Option<OsString> {
    // Below, everything is the user's but what is never anybody's.
    if upper { keys.shown(&name) } else { keys.kept(&name).map(|_| name) }
}

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
        object.xattr(kept)?.ok_or_else(|| no_such_xattr(name))
    }

    /// The names of a file's attributes.
    pub fn xattr_names(&self, ino: Ino) -> Result<Vec<OsString>> {
        let mut tree = self.tree();
        let (object, keys, upper) = (tree.object(ino)?, tree.store.keys(), tree.node(ino)?.upper);
        let names = object.xattr_names()?.into_iter();
        Ok(names.filter_map(|name| shown(keys, upper, name)).collect())
    }

    /// All attributes of a file, in the order of their names.
    ///
    /// They are read once: what lies below may be a sealed state that reads them all in its turn. If each asked the one below for the names and then for each
    /// value, a chain of `n` would take at least `2ⁿ` questions.
    pub(super) fn xattrs(&self, ino: Ino) -> Result<Xattrs> {
        let mut tree = self.tree();
        let (object, keys, upper) = (tree.object(ino)?, tree.store.keys(), tree.node(ino)?.upper);
        let found = object.xattrs()?.into_iter();
        let mut found: Xattrs = found.filter_map(|(name, value)| Some((shown(keys, upper, name)?, value))).collect();
        found.sort();
        Ok(found)
    }

    /// Sets an attribute.
    pub fn set_xattr(&self, ino: Ino, name: &OsStr, value: &[u8], flags: u32) -> Result<()> {
        let mut tree = self.tree();
        let kept = tree.store.keys().kept(name).ok_or(Errno::PERM)?;
        tree.copy_up(ino, true)?;
        tree.attributes_change(ino)?;
        tree.object(ino)?.set_xattr(kept, value, XattrFlags::from_bits_retain(flags))
    }

    /// Removes an attribute. An access control list need not be there.
    pub fn remove_xattr(&self, ino: Ino, name: &OsStr) -> Result<()> {
        let mut tree = self.tree();
        let kept = tree.store.keys().kept(name).ok_or(Errno::NODATA)?;
        if tree.object(ino)?.xattr(if tree.node(ino)?.upper { &kept } else { name })?.is_none() {
            return if ACLS.iter().any(|acl| name == *acl) { Ok(()) } else { Err(no_such_xattr(name)) };
        }
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
