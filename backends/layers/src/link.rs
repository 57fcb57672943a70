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
            if !tree.node(ino)?.upper || tree.node(ino)?.nameless || object.stat()?.st_nlink == 0 {
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
        node.nameless = true;
        for (parent, name) in node.names.clone() {
            self.nodes.remove_name(ino, parent, &name);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;

    use fsnap_backend::beneath;
    use rustix::io::Errno;

    use super::super::node::ROOT;
    use super::super::{Below, Caller, Overlay};

    /// A file that is written past the tree while it is sealed keeps its name in the sealed layer, which leads to a copy of it. The file system
    /// counts that name, and users must not.
    #[test]
    fn a_name_in_a_sealed_state_is_not_counted() {
        let base = tempfile::tempdir().unwrap();
        let (lower, store) = (base.path().join("lower"), base.path().join("store"));
        fs::create_dir(&lower).unwrap();
        let tree = Overlay::open_at_once(Below::Dir(beneath::open_root(&lower).unwrap()), &store).unwrap();
        let name = OsStr::new("file");
        let ino = tree.create(ROOT, name, 0o644, 0, Caller { uid: 0, gid: 0 }).unwrap().0.ino;
        tree.seal("image", || ((), vec![ino])).unwrap();
        assert_eq!(tree.attr(ino).unwrap().nlink, 1);
        tree.link(ino, ROOT, OsStr::new("other")).unwrap();
        tree.unlink(ROOT, name).unwrap();
        assert_eq!(tree.attr(ino).unwrap().nlink, 1);
        tree.unlink(ROOT, OsStr::new("other")).unwrap();
        assert_eq!(tree.attr(ino).unwrap().nlink, 0);
        assert_eq!(tree.link(ino, ROOT, name).unwrap_err(), Errno::NOENT);
        assert!(tree.list(ROOT).unwrap().is_empty());
    }

    /// The directory was taken to have the file in it for ever, and stayed open when it was removed.
    #[test]
    fn a_file_with_several_names_lets_go_of_its_directories() {
        let base = tempfile::tempdir().unwrap();
        let lower = base.path().join("lower");
        for dir in ["one", "two"] {
            fs::create_dir_all(lower.join(dir)).unwrap();
        }
        fs::write(lower.join("one/file"), "").unwrap();
        fs::hard_link(lower.join("one/file"), lower.join("two/file")).unwrap();
        let root = beneath::open_root(&lower).unwrap();
        let tree = Overlay::open_at_once(Below::Dir(root), &base.path().join("store")).unwrap();
        let file = OsStr::new("file");
        let dirs = ["one", "two"].map(OsStr::new);
        let known = dirs.map(|dir| {
            let dir = tree.look_up(ROOT, dir).unwrap().ino;
            (dir, tree.look_up(dir, file).unwrap().ino)
        });
        for (dir, _) in known {
            tree.unlink(dir, file).unwrap();
        }
        for dir in dirs {
            tree.rmdir(ROOT, dir).unwrap();
        }
        for (dir, ino) in known {
            tree.forget(ino, 1);
            tree.forget(dir, 1);
        }
        assert_eq!(tree.known(), 1);
    }
}
