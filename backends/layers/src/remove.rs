//! Removing names.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, RenameFlags};
use rustix::io::Errno;

use super::look::{Seen, is_whiteout};
use super::node::Ino;
use super::object::{self, Object};
use super::{Overlay, Result, Tree};

/// The number and the kind of a file that had a name.
pub type Had = (Ino, FileType);

impl Overlay {
    /// Removes a name of a file that is no directory, and tells what had it.
    pub fn unlink(&self, parent: Ino, name: &OsStr) -> Result<Had> {
        let mut tree = self.tree();
        let seen = tree.look(parent, name)?.ok_or(Errno::NOENT)?;
        if seen.attr.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let had = (seen.ino, seen.attr.kind);
        tree.copy_up(parent, true)?;
        let (ino, upper_name) = tree.prepare_removal(parent, name, seen)?;
        let covers = tree.lower_at(parent, name)?.is_some();
        let dir = tree.upper_dir(parent)?;
        if covers {
            tree.white_out(&dir, name, upper_name)?;
        } else {
            rustix::fs::unlinkat(&dir, name, AtFlags::empty())?;
        }
        tree.name_is_gone(ino, parent, name, upper_name)?;
        Ok(had)
    }

    /// Removes an empty directory, and tells which it was.
    pub fn rmdir(&self, parent: Ino, name: &OsStr) -> Result<Had> {
        let mut tree = self.tree();
        let seen = tree.look(parent, name)?.ok_or(Errno::NOENT)?;
        if seen.attr.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let (ino, upper_name) = (seen.ino, seen.upper_name);
        tree.know(parent, name, seen);
        if !tree.is_empty(ino)? {
            tree.nodes.drop_unused(ino);
            return Err(Errno::NOTEMPTY);
        }
        tree.copy_up(parent, true)?;
        let pin = tree.object(ino)?.pin()?;
        let covers = tree.lower_at(parent, name)?.is_some();
        let dir = tree.upper_dir(parent)?;
        match (upper_name, covers) {
            (false, _) => tree.white_out(&dir, name, false)?,
            (true, covers) => tree.remove_upper_dir(&dir, name, covers)?,
        }
        tree.dirs.remove(ino);
        tree.node_mut(ino)?.pin = Some(pin);
        tree.nodes.remove_name(ino, parent, name);
        tree.nodes.drop_unused(ino);
        Ok((ino, FileType::Directory))
    }
}

impl Tree {
    /// Enters the file among the known ones, and sees to it that other names of it and open handles will still lead to it.
    pub(super) fn prepare_removal(&mut self, parent: Ino, name: &OsStr, seen: Seen) -> Result<(Ino, bool)> {
        let upper_name = seen.upper_name;
        let several = !seen.attr.upper && seen.attr.stat.st_nlink > 1;
        let (ino, _) = self.know(parent, name, seen);
        if several {
            self.copy_up(ino, true)?;
        }
        let node = self.node(ino)?;
        // Only those that somebody holds are worth a descriptor; the others go from the table at once.
        if node.index.is_none() && node.pin.is_none() && node.names.len() == 1 {
            let pin = self.object(ino)?.pin()?;
            self.node_mut(ino)?.pin = Some(pin);
        }
        Ok((ino, upper_name))
    }

    /// Accounts for a name that was removed after [`prepare_removal`](Self::prepare_removal).
    pub(super) fn name_is_gone(&mut self, ino: Ino, parent: Ino, name: &OsStr, upper_name: bool) -> Result<()> {
        if !upper_name && self.node(ino)?.index.is_some() {
            self.lose_lower_name(ino)?;
        }
        self.tidy_index(ino)?;
        self.nodes.remove_name(ino, parent, name);
        self.nodes.drop_unused(ino);
        Ok(())
    }

    /// Whether users see nothing in the directory.
    pub(super) fn is_empty(&mut self, ino: Ino) -> Result<bool> {
        Ok(self.list(ino)?.is_empty())
    }

    /// Removes a directory of the upper that has nothing but whiteouts in it.
    fn remove_upper_dir(&mut self, dir: &Arc<OwnedFd>, name: &OsStr, covers: bool) -> Result<()> {
        if !covers {
            match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                done => return done,
            }
        }
        let (work, temporary) = (self.store.work()?, self.store.fresh());
        if covers {
            rustix::fs::mknodat(&work, &temporary, FileType::CharacterDevice, rustix::fs::Mode::empty(), 0)?;
            rustix::fs::renameat_with(&work, &temporary, dir, name, RenameFlags::EXCHANGE)?;
        } else {
            rustix::fs::renameat(dir, name, &work, &temporary)?;
        }
        // It is out of sight; what cannot be removed now is removed when the store is opened next.
        let _ = fsnap_backend::beneath::remove_tree(&work, &temporary);
        Ok(())
    }

    /// Makes an empty directory of the upper truly empty, so that another one can take its place.
    pub(super) fn clear_whiteouts(&mut self, dir: &Arc<OwnedFd>, name: &OsStr) -> Result<()> {
        use std::os::fd::AsFd;
        let object = Object::at(dir.clone(), name);
        let open = object::open_dir(dir, name)?;
        let names = object::names(open.as_fd())?;
        if names.is_empty() {
            return Ok(());
        }
        // What the whiteouts hide must not come back.
        self.mark(&object, self.store.keys().opaque(), b"y")?;
        let _ = object.remove_xattr(self.store.keys().redirect());
        for (name, _) in names {
            if is_whiteout(&object::stat_at(&open, &name)?) {
                rustix::fs::unlinkat(&open, &name, AtFlags::empty())?;
            }
        }
        Ok(())
    }
}
