//! Copy-up: an upper object in the place of a lower one.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, XattrFlags};
use rustix::io::Errno;

use super::data;
use super::look::index_name;
use super::node::Ino;
use super::object::{self, Object, SAFE};
use super::store::Keys;
use super::{Result, Tree};

/// Gives `to` the owner, permissions and extended attributes that `from` has in the lower.
pub(super) fn copy_attributes(from: &Object, to: &Object, keys: Keys) -> Result<()> {
    let stat = from.stat()?;
    let own = to.stat()?;
    let unprivileged = !rustix::process::geteuid().is_root();
    let mut mode = object::mode_of(&stat);
    if (own.st_uid, own.st_gid) != (stat.st_uid, stat.st_gid) {
        match to.chown(Some(stat.st_uid), Some(stat.st_gid)) {
            // What is copied up becomes the user's own, who must not get somebody else's set-id bits with it.
            Err(Errno::PERM) if unprivileged => mode -= Mode::SUID | Mode::SGID,
            done => done?,
        }
    }
    // Capabilities would be lost by a later change of owner; an access ACL sets permissions, so that it comes first.
    for name in from.xattr_names()? {
        let Some(kept) = keys.kept(&name) else { continue };
        let Some(value) = from.xattr(&name)? else { continue };
        match to.set_xattr(kept, &value, XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) if !is_needed(&name, unprivileged) => {}
            Err(Errno::PERM) if unprivileged => {}
            done => done?,
        }
    }
    if object::kind_of(&stat) != FileType::Symlink {
        to.chmod(mode)?;
    }
    Ok(())
}

/// Whether a file must not be without this attribute: its users' own, and what says who may do what. Others are a file system's own
/// business, which another one has no notion of.
fn is_needed(name: &std::ffi::OsStr, unprivileged: bool) -> bool {
    let name = name.as_encoded_bytes();
    let begins = |with: &str| name.starts_with(with.as_bytes());
    begins("user.") || begins("system.posix_acl_") || (begins("security.") && !unprivileged)
}

impl Tree {
    /// Makes sure that the file is in the upper. Without `content`, a regular file's becomes empty.
    pub(super) fn copy_up(&mut self, ino: Ino, content: bool) -> Result<()> {
        let node = self.node(ino)?;
        if node.upper {
            return Ok(());
        }
        if node.kind == FileType::Directory { self.copy_up_dir(ino) } else { self.copy_up_file(ino, content) }
    }

    fn copy_up_dir(&mut self, ino: Ino) -> Result<()> {
        let mut missing = vec![ino];
        loop {
            let node = self.node(missing[missing.len() - 1])?;
            let parent = node.names.first().ok_or(Errno::NOENT)?.0;
            if self.node(parent)?.upper {
                break;
            }
            missing.push(parent);
        }
        for ino in missing.into_iter().rev() {
            let (parent, name) = self.node(ino)?.names[0].clone();
            let from = self.object(ino)?;
            let stat = from.stat()?;
            let (work, temporary) = (self.store.work()?, self.store.fresh());
            rustix::fs::mkdirat(&work, &temporary, Mode::RWXU)?;
            let to = Object::at(work.clone(), temporary.clone());
            let done = copy_attributes(&from, &to, self.store.keys())
                .and_then(|()| self.mark(&to, self.store.keys().origin(), format!("{ino:x}").as_bytes()))
                .and_then(|()| to.set_times(&object::times_of(&stat)))
                .and_then(|()| put_in_place(&work, &temporary, &self.upper_dir(parent)?, &name));
            done.inspect_err(|_| {
                let _ = rustix::fs::unlinkat(&work, &temporary, AtFlags::REMOVEDIR);
            })?;
            self.node_mut(ino)?.upper = true;
        }
        Ok(())
    }

    fn copy_up_file(&mut self, ino: Ino, content: bool) -> Result<()> {
        let node = self.node(ino)?;
        let at = node.lower.clone().ok_or(Errno::STALE)?;
        let (place, orphan) = (node.names.first().cloned(), node.names.is_empty());
        let from = if orphan { self.object(ino)? } else { self.lower.object(&at)? };
        let stat = from.stat()?;
        let indexed = !orphan && stat.st_nlink > 1;
        if let (Some((parent, _)), false) = (&place, indexed) {
            self.copy_up(*parent, true)?;
        }
        let (work, temporary) = (self.store.work()?, self.store.fresh());
        let to = Object::at(work.clone(), temporary.clone());
        let path = (!orphan).then(|| at.path());
        let made = self.make_like(&from, &stat, &to, path.as_deref(), content).and_then(|()| {
            let keys = self.store.keys();
            self.mark(&to, keys.origin(), format!("{ino:x}").as_bytes())?;
            if indexed {
                self.mark(&to, keys.links(), stat.st_nlink.to_string().as_bytes())?;
            }
            to.set_times(&object::times_of(&stat))
        });
        // Where there is no space, what was prepared must not take any.
        made.inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&work, &temporary, AtFlags::empty());
        })?;
        let mut pin = None;
        let mut index = None;
        match place {
            _ if indexed => {
                rustix::fs::renameat(&work, &temporary, &*self.store.index(), index_name(ino))?;
                index = Some(index_name(ino));
            }
            Some((parent, name)) => {
                let dir = self.upper_dir(parent)?;
                put_in_place(&work, &temporary, &dir, &name)?;
            }
            None => {
                pin = Some(to.pin()?);
                rustix::fs::unlinkat(&work, &temporary, AtFlags::empty())?;
            }
        }
        let node = self.node_mut(ino)?;
        node.upper = true;
        node.index = index;
        node.pin = pin.or(node.pin.take());
        let file = node.file.clone();
        if let Some(file) = file {
            let source = self.source(ino)?;
            file.replace(source);
        }
        Ok(())
    }

    fn make_like(&mut self, from: &Object, stat: &Stat, to: &Object, path: Option<&[u8]>, content: bool) -> Result<()> {
        let (dir, name) = to.place()?;
        match object::kind_of(stat) {
            kind if !self.store.keys().can_mark(kind) => {
                // It stands for a file that could not bear our attributes.
                let mut value = match kind {
                    FileType::Symlink => b"l ".to_vec(),
                    FileType::Fifo => b"p".to_vec(),
                    FileType::Socket => b"s".to_vec(),
                    _ => return Err(Errno::PERM),
                };
                if kind == FileType::Symlink {
                    // With a slash before it, so that no target is taken for the name of a long one.
                    let target = from.read_link()?;
                    let kept = [b"/", target.as_encoded_bytes()].concat();
                    value.extend(self.store.shorten(kept)?);
                }
                rustix::fs::mknodat(dir, name, FileType::RegularFile, Mode::RUSR | Mode::WUSR, 0)?;
                self.mark(to, self.store.keys().node(), &value)?;
            }
            FileType::Symlink => rustix::fs::symlinkat(from.read_link()?, dir, name)?,
            FileType::RegularFile => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | SAFE;
                let file = rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?;
                if content && stat.st_size > 0 {
                    self.copy_content(from, stat, to, &file, path)?;
                }
            }
            FileType::CharacterDevice if stat.st_rdev == 0 => self.make_mock_device(dir, name)?,
            kind => rustix::fs::mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev)?,
        }
        copy_attributes(from, to, self.store.keys())
    }

    /// An empty file that stands for the device node 0:0.
    pub(super) fn make_mock_device(&mut self, dir: &std::sync::Arc<OwnedFd>, name: &std::ffi::OsStr) -> Result<()> {
        rustix::fs::mknodat(dir, name, FileType::RegularFile, Mode::RUSR | Mode::WUSR, 0)?;
        self.mark(&Object::at(dir.clone(), name), self.store.keys().node(), b"c 0 0")
    }

    /// Shares the blocks where the file system can; else leaves the content below, until it is written.
    fn copy_content(
        &mut self,
        from: &Object,
        stat: &Stat,
        to: &Object,
        file: &OwnedFd,
        path: Option<&[u8]>,
    ) -> Result<()> {
        let source = from.content()?;
        match source.as_file().map(|whole| rustix::fs::ioctl_ficlone(file, whole)) {
            Some(Ok(())) => return Ok(()),
            Some(Err(Errno::NOSPC | Errno::DQUOT | Errno::IO)) => return Err(Errno::NOSPC),
            _ => {}
        }
        // A file without a name is copied whole: nothing that would have to be remembered of it.
        let Some(path) = path.filter(|_| self.store.sparse) else {
            data::copy_all(&source, file)?;
            // Else a power cut could leave the new name with nothing in it.
            return rustix::fs::fdatasync(file);
        };
        rustix::fs::ftruncate(file, stat.st_size as u64)?;
        let mut value = format!("{:x} ", stat.st_size).into_bytes();
        value.extend(self.store.shorten(path.to_vec())?);
        self.mark(to, self.store.keys().partial(), &value)
    }
}

/// Moves what was prepared to its place, where nothing is, and leaves the directory's times as they were.
fn put_in_place(
    work: &std::sync::Arc<OwnedFd>,
    temporary: &std::ffi::OsStr,
    dir: &std::sync::Arc<OwnedFd>,
    name: &std::ffi::OsStr,
) -> Result<()> {
    let parent = Object::of(dir.clone());
    let times = object::times_of(&parent.stat()?);
    let place = || rustix::fs::renameat(work, temporary, dir, name);
    let mut placed = place();
    if placed == Err(Errno::ACCESS) {
        // Whoever has no privileges needs the right to write to the directory, and to one that is moved, which tells where it lies.
        let moved = Object::at(work.clone(), temporary).pin()?;
        let is_dir = object::kind_of(&moved.stat()?) == FileType::Directory;
        placed = parent.as_if_writable(|_| if is_dir { moved.as_if_writable(|_| place()) } else { place() });
    }
    placed?;
    parent.set_times(&times)
}
