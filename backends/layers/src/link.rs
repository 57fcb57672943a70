//! Further names of a file, and how many there are.

use std::ffi::OsStr;

use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::attr::Attr;
use super::create::check_length;
use super::look::is_whiteout;
use super::node::Ino;
use super::object::Object;
use super::{Overlay, Result, Tree};

impl Overlay {
    /// Gives the file a further name.
    pub fn link(&self, ino: Ino, parent: Ino, name: &OsStr) -> Result<Attr> {
        let mut tree = self.tree();
        check_length(name)?;
        if tree.node(ino)?.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        if tree.look(parent, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        if tree.node(ino)?.names.is_empty() && tree.node(ino)?.index.is_none() {
            let object = tree.object(ino)?;
            if !tree.node(ino)?.upper || object.stat()?.st_nlink == 0 {
                return Err(Errno::NOENT);
            }
        }
        tree.copy_up(ino, true)?;
        tree.copy_up(parent, true)?;
        let (dir, object) = (tree.upper_dir(parent)?, tree.object(ino)?);
        if tree.upper_at(parent, name)?.is_some_and(|stat| is_whiteout(&stat)) {
            let (work, temporary) = (tree.store.work()?, tree.store.fresh());
            object.link(&work, &temporary)?;
            rustix::fs::renameat(&work, &temporary, &dir, name)?;
        } else {
            object.link(&dir, name)?;
        }
        let seen = tree.look(parent, name)?.ok_or(Errno::IO)?;
        Ok(tree.remember(parent, name, seen))
    }
}

impl Tree {
    /// The indexed file has lost a name that it had in the lower alone.
    ///
    /// Called after the name is gone: should the server be killed in between, the file outlives its last name, which costs
    /// space; the other way round, a name that is still there would show the lower's content again.
    pub(super) fn lose_lower_name(&mut self, ino: Ino) -> Result<()> {
        let object = self.object(ino)?;
        let links = self.lower_links(&object)? - 1;
        self.mark(&object, self.store.keys().links(), links.to_string().as_bytes())
    }

    /// Takes the file out of the index if no name leads to it any more.
    pub(super) fn tidy_index(&mut self, ino: Ino) -> Result<()> {
        let Some(index) = self.node(ino)?.index.clone() else { return Ok(()) };
        let object = Object::at(self.store.index(), index.clone());
        if self.indexed_links(&object, &object.stat()?)? > 0 {
            return Ok(());
        }
        let pin = object.pin()?;
        rustix::fs::unlinkat(&*self.store.index(), &index, AtFlags::empty())?;
        let node = self.node_mut(ino)?;
        node.pin = Some(pin);
        node.index = None;
        node.names.clear();
        Ok(())
    }
}
