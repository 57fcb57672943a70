//! Moving names.

use std::ffi::OsStr;

use rustix::fs::{AtFlags, FileType, RenameFlags};
use rustix::io::Errno;

use super::create::check_length;
use super::look::is_whiteout;
use super::node::Ino;
use super::object::{self, Object};
use super::remove::Had;
use super::{Overlay, Result, Tree};

impl Overlay {
    /// `renameat2(2)`; with `exchange` both names must exist, with `no_replace` the second must not. Tells what had the first.
    pub fn rename(&self, from: (Ino, &OsStr), to: (Ino, &OsStr), no_replace: bool, exchange: bool) -> Result<Had> {
        check_length(to.1)?;
        let mut tree = self.tree();
        if exchange { tree.exchange(from, to) } else { tree.rename(from, to, no_replace) }
    }
}

impl Tree {
    fn rename(&mut self, (from, old): (Ino, &OsStr), (to, new): (Ino, &OsStr), no_replace: bool) -> Result<Had> {
        let source = self.look(from, old)?.ok_or(Errno::NOENT)?;
        let target = self.look(to, new)?;
        let had = (source.ino, source.attr.kind);
        let is_dir = source.attr.kind == FileType::Directory;
        if let Some(target) = &target {
            if no_replace {
                return Err(Errno::EXIST);
            }
            if target.ino == source.ino {
                return Ok(had);
            }
            match (is_dir, target.attr.kind == FileType::Directory) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                _ => {}
            }
        }
        self.copy_up(to, true)?;
        self.copy_up(from, true)?;
        // The target's other names and handles are prepared for its end.
        let replaced = match target {
            Some(target) if is_dir => {
                let (ino, upper_name) = (target.ino, target.upper_name);
                self.know(to, new, target);
                if !self.is_empty(ino)? {
                    self.nodes.drop_unused(ino);
                    return Err(Errno::NOTEMPTY);
                }
                let pin = self.object(ino)?.pin()?;
                self.node_mut(ino)?.pin = Some(pin);
                if upper_name {
                    let dir = self.upper_dir(to)?;
                    self.clear_whiteouts(&dir, new)?;
                }
                self.dirs.remove(ino);
                Some((ino, upper_name))
            }
            Some(target) => Some(self.prepare_removal(to, new, target)?),
            None => None,
        };
        let upper_name = source.upper_name;
        let (ino, _) = self.know(from, old, source);
        self.copy_up(ino, true)?;
        let (old_dir, new_dir) = (self.upper_dir(from)?, self.upper_dir(to)?);
        let indexed_below = !upper_name && self.node(ino)?.index.is_some();
        if is_dir {
            self.prepare_move(ino, (from, old), (to, new))?;
        }
        let covers = self.lower_at(from, old)?.is_some();
        if indexed_below {
            // The name is the lower's alone; the file gets its new one before the old one goes.
            let (work, temporary) = (self.store.work()?, self.store.fresh());
            self.object(ino)?.link(&work, &temporary)?;
            rustix::fs::renameat(&work, &temporary, &new_dir, new)?;
            self.white_out(&old_dir, old, false)?;
        } else if is_dir && self.upper_at(to, new)?.is_some_and(|stat| is_whiteout(&stat)) {
            rustix::fs::renameat_with(&old_dir, old, &new_dir, new, RenameFlags::EXCHANGE)?;
            if !covers {
                rustix::fs::unlinkat(&old_dir, old, AtFlags::empty())?;
            }
        } else if covers {
            rustix::fs::renameat_with(&old_dir, old, &new_dir, new, RenameFlags::WHITEOUT)?;
        } else {
            rustix::fs::renameat(&old_dir, old, &new_dir, new)?;
        }
        if let Some((replaced, upper_name)) = replaced {
            if is_dir {
                self.nodes.remove_name(replaced, to, new);
                self.nodes.drop_unused(replaced);
            } else {
                self.name_is_gone(replaced, to, new, upper_name)?;
            }
        }
        self.nodes.add_name(ino, to, new);
        if !is_dir {
            self.nodes.remove_name(ino, from, old);
        }
        if indexed_below {
            self.lose_lower_name(ino)?;
        }
        self.nodes.drop_unused(ino);
        Ok(had)
    }

    fn exchange(&mut self, (from, old): (Ino, &OsStr), (to, new): (Ino, &OsStr)) -> Result<Had> {
        let first = self.look(from, old)?.ok_or(Errno::NOENT)?;
        let second = self.look(to, new)?.ok_or(Errno::NOENT)?;
        let had = (first.ino, first.attr.kind);
        if first.ino == second.ino {
            return Ok(had);
        }
        self.copy_up(to, true)?;
        self.copy_up(from, true)?;
        let mut moved = Vec::new();
        for (seen, here, there) in [(first, (from, old), (to, new)), (second, (to, new), (from, old))] {
            let upper_name = seen.upper_name;
            let (ino, _) = self.know(here.0, here.1, seen);
            self.copy_up(ino, true)?;
            if !upper_name && self.node(ino)?.index.is_some() {
                // Its name becomes one of the upper's first.
                let dir = self.upper_dir(here.0)?;
                let parent = Object::of(dir.clone());
                let times = object::times_of(&parent.stat()?);
                self.object(ino)?.link(&dir, here.1)?;
                self.lose_lower_name(ino)?;
                parent.set_times(&times)?;
            }
            if self.node(ino)?.kind == FileType::Directory {
                self.prepare_move(ino, here, there)?;
            }
            moved.push((ino, here, there));
        }
        let (old_dir, new_dir) = (self.upper_dir(from)?, self.upper_dir(to)?);
        rustix::fs::renameat_with(&old_dir, old, &new_dir, new, RenameFlags::EXCHANGE)?;
        for (ino, here, there) in moved {
            self.nodes.add_name(ino, there.0, there.1);
            if self.node(ino)?.kind != FileType::Directory {
                self.nodes.remove_name(ino, here.0, here.1);
            }
            self.nodes.drop_unused(ino);
        }
        Ok(had)
    }

    /// Marks a directory so that in its new place the same lower directory shows through, or none.
    fn prepare_move(&mut self, ino: Ino, _here: (Ino, &OsStr), (to, new): (Ino, &OsStr)) -> Result<()> {
        let object = self.object(ino)?;
        let keys = self.store.keys();
        if let Some(dir) = self.node(ino)?.lower_dir.clone() {
            if object.xattr(keys.redirect())?.is_none() {
                let path = self.store.shorten(dir.path())?;
                self.mark(&object, keys.redirect(), &path)?;
            }
            return Ok(());
        }
        let hides = self.lower_at(to, new)?.is_some_and(|(_, stat)| object::kind_of(&stat) == FileType::Directory);
        if hides { self.mark(&object, keys.opaque(), b"y") } else { Ok(()) }
    }
}
